"""Every error a user can meet.

    TunesmithError                    what was found, where, what is allowed; `hint` says what to do
     ├── RecipeError (ValueError)         a recipe or an option is wrong
     ├── DataError (ValueError)           a file or a row is wrong; knows its file and line
     ├── TemplateError (ValueError)       a conversation cannot be rendered or masked exactly
     ├── ModelError (ValueError)          a model cannot or must not be loaded, or does not fit the request
     ├── NotFoundError (LookupError)      no such run, version, file or hub name
     ├── MissingExtraError (ImportError)  an optional dependency is not installed
     ├── NumericalError (ArithmeticError) the loss or a gradient is not finite
     ├── OutOfMemoryError (MemoryError)   not even one row at a time fits
     ├── ElsewhereError (RuntimeError)    another process of the same run stopped with an error
     ├── StorageError (OSError)           a write failed or a checkpoint is damaged
     └── Interrupted (KeyboardInterrupt)  stopped by a signal after saving

Each is also the standard-library type in parentheses, so scripts need not import this module. The command line
prints `error: ...` and `hint: ...` and exits with 2 for all of them but `Interrupted` (128 + the signal).
`assert` is for our own bugs and is never caught.
"""

from pathlib import Path


class TunesmithError(Exception):
    """Base of all errors that are not our own bugs.

    `file` and `line` (counted from 1) say where; `hint` says what to do.
    """

    def __init__(self, message: str, *, hint: str = "", file: str | Path | None = None, line: int | None = None):
        self.message, self.hint, self.file, self.line = message, hint, str(file) if file is not None else None, line
        super().__init__(str(self))

    def __str__(self) -> str:
        where = "" if self.file is None else self.file + (f":{self.line}" if self.line is not None else "") + ": "
        return where + self.message


class RecipeError(TunesmithError, ValueError):
    """A recipe or an option is wrong."""


class DataError(TunesmithError, ValueError):
    """A file or a row is wrong."""


class TemplateError(TunesmithError, ValueError):
    """A conversation cannot be rendered, or what is trained in it cannot be told exactly."""


class ModelError(TunesmithError, ValueError):
    """A model cannot or must not be loaded, or does not fit the request."""


class NotFoundError(TunesmithError, LookupError):
    """No such run, version, file or hub name."""


class MissingExtraError(TunesmithError, ImportError):
    """An optional dependency is not installed."""


class NumericalError(TunesmithError, ArithmeticError):
    """The loss or a gradient is not finite."""


class StorageError(TunesmithError, OSError):
    """A write failed, or what was written is damaged."""


class OutOfMemoryError(TunesmithError, MemoryError):
    """Not even one row at a time fits into memory."""


class ElsewhereError(TunesmithError, RuntimeError):
    """Another process of the same run stopped with an error."""


class Interrupted(TunesmithError, KeyboardInterrupt):
    """Stopped by a signal after saving. `signal_number` gives the exit status 128 + n."""

    def __init__(self, message: str, *, hint: str = "", signal_number: int = 2):
        super().__init__(message, hint=hint)
        self.signal_number = signal_number
