"""Rows that have nothing to do with the task: trained on now and then, so that less is forgotten, or only watched.

Texts are cut into passages, so that a long one is no more than others; questions with their answers stay as they are.
"""

from collections.abc import Iterable

import numpy as np

from tunesmith.data.formats import read_examples
from tunesmith.data.settings import DataSettings
from tunesmith.data.types import Example
from tunesmith.errors import DataError

PASSAGE_CHARACTERS = 1200


def read_general(path: str) -> list[Example]:
    """The rows of a file: conversations as they are, texts in passages, which keep the place of their text.

    Raises DataError where a row cannot be read, or texts and questions stand in one file.
    """
    rows = read_examples(path, settings=DataSettings(train=path))
    if len({row.text is None for row in rows}) > 1:
        raise DataError(
            "texts and questions stand in one file", file=path, hint="give evaluate.general one kind of row"
        )
    return [part for row in rows for part in parts(row)]


def parts(row: Example) -> list[Example]:
    """A conversation itself; a text in pieces that end with a line, where it has lines."""
    if row.text is None:
        return [row]
    pieces, held = [], ""
    for line in row.text.splitlines(keepends=True):
        while len(line) > PASSAGE_CHARACTERS:
            pieces.append(held + line[: PASSAGE_CHARACTERS - len(held)])
            line, held = line[PASSAGE_CHARACTERS - len(held) :], ""
        if len(held) + len(line) > PASSAGE_CHARACTERS:
            pieces.append(held)
            held = ""
        held += line
    return [Example(row.origin, "text", text=piece) for piece in [*pieces, held] if piece.strip()]


def draw_key(part: Example) -> int:
    """What decides whether it is drawn: 64 bits of its content."""
    return int(part.key[:16], 16)


def drawn_keys(rows: Iterable[Example], *, count: int) -> set[int]:
    """The keys of the `count` parts of rows that are drawn: those with the smallest keys, whatever their order."""
    keys = (draw_key(part) for row in rows for part in parts(row))
    return set(np.unique(np.fromiter(keys, np.uint64))[:count].tolist())
