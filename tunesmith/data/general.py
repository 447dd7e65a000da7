"""Rows that have nothing to do with the task: trained on now and then, so that less is forgotten, or only watched.

Texts are cut into passages, so that a long one is no more than others; questions with their answers stay as they are.
"""

from collections.abc import Iterator

import numpy as np

from tunesmith.data.formats import examine, read_examples
from tunesmith.data.settings import DataSettings
from tunesmith.data.sources import read_rows
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


def drawn_keys(path: str, *, count: int) -> set[int]:
    """The keys of the `count` parts of a file that are drawn: those with the smallest keys, whatever their order."""

    def keys() -> Iterator[int]:
        settings = DataSettings(train=path)
        for row in read_rows(path, on_bad=lambda problem: None):
            example = examine(row, settings=settings)
            if isinstance(example, Example):
                yield from map(draw_key, parts(example))

    found = np.unique(np.fromiter(keys(), np.uint64))
    return set(found[:count].tolist())
