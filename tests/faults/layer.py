"""The fault layer: every call that changes something under a folder is a *boundary*, and at the N-th something happens.

    TUNESMITH_FAULT='{"folder": F, "at": N, "kind": KIND, "log": L}'     `install()` before the program starts

    kill        SIGKILL before the call is made
    half        half of the bytes are written, then SIGKILL; at a boundary that writes none, as `kill`
    short       the call writes half of the bytes and says so, once
    EIO         the call fails, once
    ENOSPC      from this call on nothing that needs room succeeds; half of the first one's bytes are written
    signal      the signals of "signals" are raised before the call is made
    (none)      only counted: L has a line a boundary

With "phase" and "call" in place of "at", `signal` comes at the call-th entry to a function of the program (PHASES).
Boundaries are calls of `os`, writes of Python's files, safetensors' save, and commits of SQLite.
"""

import builtins
import errno
import importlib
import io
import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from typing import Any

VARIABLE = "TUNESMITH_FAULT"
NEEDS_ROOM = ("open", "mkdir", "write", "serialize", "link", "posix_fallocate", "commit")
WRITES = ("write", "serialize")
PHASES = {  # where a signal may come, as module:name of a function that is entered there
    "loading the base": "tunesmith.models.load:_check_complete",
    "preparing data": "tunesmith.data.prepare:_Preparation._rendered",
    "inserting the method": "tunesmith.tuning:_apply",
    "entering the run": "tunesmith.registry.index:Index.start_run",
    "micro-batch": "tunesmith.train.loop:forward",
    "update": "tunesmith.train.optimiser:Optimiser.step",
    "validation": "tunesmith.train.loop:evaluate_loss",
    "saving": "tunesmith.train.checkpoint:save_tensors",
    "reading back": "tunesmith.train.checkpoint:verify",
    "the best step": "tunesmith.train.loop:Fit.restore_best",
    "finishing the head": "tunesmith.objectives.classification:Classification.calibrated",
    "writing the model": "tunesmith.models.load:Model.save_tokenizer",
    "writing the summary": "tunesmith.tuning:summary_of",
    "evaluating": "tunesmith.evaluate.run:_likelihood",
}


class Layer:
    """Counts boundaries under a folder and lets something happen at one of them."""

    def __init__(self, settings: dict[str, Any]):
        self.folder = os.path.realpath(settings["folder"])
        self.kind, self.at = settings.get("kind"), settings.get("at")
        self.numbers: list[int] = settings.get("signals", [])
        self.count = 0
        self._log = os.open(settings["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND) if "log" in settings else None

    def say(self, line: str) -> None:
        """A line of the log."""
        if self._log is not None:
            _write(self._log, (line + "\n").encode())

    def inside(self, path: Any, folder: int | None = None) -> bool:
        """Whether a path, or an open file, is under the folder."""
        if isinstance(path, int):
            name = os.readlink(f"/proc/self/fd/{path}")
        else:
            start = os.getcwd() if folder is None else os.readlink(f"/proc/self/fd/{folder}")
            name = os.path.join(start, os.fsdecode(path))
        return os.path.normpath(name).startswith(self.folder + os.sep)

    def boundary(self, name: str) -> bool:
        """Whether half of the bytes are to be written and the rest lost; most things happen here and it does not return."""
        self.count += 1
        self.say(name)
        full = self.kind == "ENOSPC" and self.at is not None and self.count > self.at and name in NEEDS_ROOM
        if self.count != self.at and not full:
            return False
        if self.kind in ("half", "short", "ENOSPC") and name in WRITES:
            return True
        if self.kind in ("kill", "half"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "signal":
            self.raise_signals()
        if self.kind == "EIO" or (self.kind == "ENOSPC" and name in NEEDS_ROOM):
            number = getattr(errno, self.kind)
            if name == "commit":
                raise sqlite3.OperationalError("disk I/O error" if self.kind == "EIO" else "database or disk is full")
            raise OSError(number, os.strerror(number))
        return False

    def raise_signals(self) -> None:
        """All of them, with the moment of the first in the log."""
        self.say(f"signal {time.monotonic()}")
        for number in self.numbers:
            signal.raise_signal(number)

    def after_half(self) -> None:
        """What follows upon half of the bytes, where they are not simply fewer."""
        if self.kind == "half":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "ENOSPC":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


_write = os.write


def _wrap_os(layer: Layer, name: str) -> None:
    original = getattr(os, name)

    def call(*arguments: Any, **given: Any) -> Any:
        folder = given.get("dir_fd", given.get("src_dir_fd"))
        counted = any(layer.inside(a, folder) for a in arguments[: 2 if name in ("replace", "rename", "link") else 1])
        if name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            counted = False
        if counted:
            layer.boundary(name)
        return original(*arguments, **given)

    setattr(os, name, call)


def _wrap_files(layer: Layer) -> None:
    original = io.open

    class Raw(io.FileIO):
        def write(self, data: Any) -> int:
            view = memoryview(data).cast("B")
            if not layer.boundary("write"):
                return super().write(view)
            written = super().write(view[: max(1, len(view) // 2)])
            layer.after_half()
            return written

        def truncate(self, size: int | None = None) -> int:
            layer.boundary("truncate")
            return super().truncate(size)

    def open_file(
        file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None, newline: Any = None,
        closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        if not set(mode) & set("wax+") or not layer.inside(file):
            return original(file, mode, buffering, encoding, errors, newline, closefd, opener)
        if not isinstance(file, int):
            layer.boundary("open")
        raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding, errors, newline)

    io.open = builtins.open = open_file  # type: ignore[assignment]


def _wrap_safetensors(layer: Layer) -> None:
    import safetensors.torch
    from safetensors import SafetensorError

    original = safetensors.torch.serialize_file

    def serialize_file(tensors: Any, filename: Any, **given: Any) -> None:
        if not layer.inside(filename):
            return original(tensors, filename, **given)
        try:
            half = layer.boundary("serialize")
        except OSError as error:
            raise SafetensorError(_as_safetensors_says(error)) from error
        original(tensors, filename, **given)
        if not half or layer.kind == "short":  # the library itself goes on after a short write
            return None
        os.truncate(filename, os.stat(filename).st_size // 2)
        try:
            layer.after_half()
        except OSError as error:
            raise SafetensorError(_as_safetensors_says(error)) from error
        return None

    safetensors.torch.serialize_file = serialize_file


def _as_safetensors_says(error: OSError) -> str:
    return f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"


def _wrap_sqlite(layer: Layer) -> None:
    original = sqlite3.dbapi2.connect

    class Connection(sqlite3.Connection):
        def commit(self) -> None:
            layer.boundary("commit")
            super().commit()

    def connect(database: Any, *arguments: Any, **given: Any) -> Any:
        if layer.inside(database):
            given["factory"] = Connection
        return original(database, *arguments, **given)

    sqlite3.connect = sqlite3.dbapi2.connect = connect


def _wrap_phase(layer: Layer, phase: str, *, at_call: int) -> None:
    module_name, _, path = PHASES[phase].partition(":")
    owner: Any = importlib.import_module(module_name)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original: Callable[..., Any] = getattr(owner, name)
    calls = [0]

    def entered(*arguments: Any, **given: Any) -> Any:
        calls[0] += 1
        if calls[0] == at_call:
            layer.raise_signals()
        return original(*arguments, **given)

    setattr(owner, name, entered)


def install() -> None:
    """Wrap everything, as the variable says; nothing without it."""
    if VARIABLE not in os.environ:
        return
    settings = json.loads(os.environ[VARIABLE])
    layer = Layer(settings)
    for name in ("open", "fsync", "replace", "rename", "unlink", "remove", "rmdir", "mkdir", "chmod", "link",
        "posix_fallocate"):  # fmt: skip
        _wrap_os(layer, name)
    _wrap_files(layer)
    _wrap_safetensors(layer)
    _wrap_sqlite(layer)
    if "phase" in settings:
        _wrap_phase(layer, settings["phase"], at_call=settings.get("call", 1))
