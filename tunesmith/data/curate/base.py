"""What every check of the rows has: a name, a look at each row in order, and a word on the whole at the end.

Also what the checks share: the places of the rows, the answers of a conversation, and short quotations.
"""

from array import array
from collections.abc import Iterator
from typing import Protocol

from tunesmith.data.curate.masking import Masker
from tunesmith.data.ledger import Problem
from tunesmith.data.types import Example, Origin

MAX_QUOTE_CHARACTERS = 60
MAX_MASKED_CHARACTERS = 400  # more than is quoted, so that no value is cut in two and missed


class Check(Protocol):
    """One check of `data check`; `name` is what `--only` calls it. Everything it finds is a warning."""

    name: str

    def look(self, example: Example) -> Iterator[Problem]:
        """Take the next row; what it alone says. Called once for every readable row, in order."""

    def finish(self) -> Iterator[Problem]:
        """What only the whole says. Called once, after the last row."""


class Places:
    """Where each row stands, in eight bytes a row."""

    def __init__(self) -> None:
        self._files: list[str] = []
        self._file, self._line = array("I"), array("I")

    def __len__(self) -> int:
        return len(self._line)

    def __getitem__(self, row: int) -> Origin:
        return Origin(self._files[self._file[row]], self._line[row])

    def add(self, origin: Origin) -> None:
        """Take the place of the next row."""
        if not self._files or self._files[-1] != origin.file:
            self._files.append(origin.file)
        self._file.append(len(self._files) - 1)
        self._line.append(origin.line)


def answers(example: Example) -> Iterator[tuple[str, str]]:
    """The trained turns of a conversation: (the user's turn before it, the answer)."""
    prompt = ""
    for message in example.messages:
        if message.role == "user":
            prompt = message.content
        elif message.role == "assistant" and message.weight and message.content:
            yield prompt, message.content


def quoted(text: str, *, end: bool = False) -> str:
    """At most 60 characters of a text's beginning, or `end`, on one line, without personal data: for a message."""
    part = text[-MAX_MASKED_CHARACTERS:] if end else text[:MAX_MASKED_CHARACTERS]
    line = " ".join(Masker().text(part).split())
    if len(line) > MAX_QUOTE_CHARACTERS:
        kept = MAX_QUOTE_CHARACTERS - 4
        line = f"... {line[-kept:]}" if end else f"{line[:kept]} ..."
    return repr(line)
