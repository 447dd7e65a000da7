"""Names of persons in rows, as a model finds them (models/names.py).

A name that is found in one turn of a row is that row's in all of its turns: what a model sees once it may overlook twice.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from tunesmith.data.batched import batched
from tunesmith.data.types import Example

FindNames = Callable[[list[str]], list[list[tuple[int, int]]]]  # texts -> characters [start, end) of each name

BATCH_ROWS = 256


class Names:
    """The names in texts and rows; of a text that was looked at, its digest and its names are kept.

    `find` is the model. `files` are those it is read from, each with its SHA-256.
    """

    def __init__(self, find: FindNames, *, files: Sequence[str]):
        self.files = list(files)
        self._find = find
        self._known: dict[bytes, tuple[str, ...]] = {}

    def in_texts(self, texts: list[str]) -> list[tuple[str, ...]]:
        """The names in each text, each once."""
        keys = [hashlib.sha256(text.encode()).digest()[:16] for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._known}
        for (key, text), spans in zip(new.items(), self._find(list(new.values())), strict=True):
            self._known[key] = tuple(dict.fromkeys(text[start:end] for start, end in spans))
        return [self._known[key] for key in keys]

    def in_rows(self, examples: list[Example]) -> list[tuple[str, ...]]:
        """The names in each row, tool calls among it; of a row of words, the words of its names."""
        texts = [list(_texts(example)) for example in examples]
        found = iter(self.in_texts([text for some in texts for text in some]))
        rows = []
        for example, some in zip(examples, texts, strict=True):
            names = [name for _ in some for name in next(found)]
            rows.append(tuple(dict.fromkeys(" ".join(names).split() if example.words else names)))
        return rows


def with_names(examples: Iterable[Example], *, names: Names | None) -> Iterator[tuple[Example, tuple[str, ...]]]:
    """Each row with its names; none without a model."""
    if names is None:
        yield from ((example, ()) for example in examples)
        return
    for batch in batched(examples, BATCH_ROWS):
        yield from zip(batch, names.in_rows(batch), strict=True)


def _texts(example: Example) -> Iterator[str]:
    if example.plain_text is not None:
        yield example.plain_text
    for message in example.messages:
        yield message.content
        yield from _strings(message.extra)


def _strings(value: Any) -> Iterator[str]:
    """The texts in JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
