"""Texts that share passages: an index of word n-grams, and runs of n-grams that a text has in common with it.

    containment(a, b) = |G_n(a) n G_n(b)| / |G_n(a)|,    G_n the distinct word n-grams       (Broder 1997, section 2)

Words are runs of letters, digits and underscores without regard to case; where a script writes no spaces, each sign is
one. A word is hashed by Python's own keyed 64-bit hash, new in each process, since no index outlives one; a gram is a
polynomial of its words' hashes. Two texts with a passage of m >= n words in common share m - n + 1 grams in a row, so
no passage of n words is missed, and what is found is verbatim up to collisions of 64 bits.

Shapes: W words, G grams of the index, Q grams asked for, H hits, P pairs of a text asked for and one of the index.
"""

import re
import unicodedata
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from tunesmith.data.types import Example, Origin

UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # Thai to Chinese
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
FACTOR = np.uint64(0x9E3779B97F4A7C15)
TABLE_CELLS_A_GRAM = 8  # one in eight grams that are not there, or fewer, is looked for in vain
MAX_TABLE_BITS = 28
BATCH_PARTS, BATCH_CHARACTERS = 512, 500_000


def words_of(text: str) -> list[str]:
    """The words of a text in the form in which they are compared."""
    if text.isascii():
        return WORD.findall(text.lower())
    return [word.casefold() for word in WORD.findall(unicodedata.normalize("NFKC", text))]


def hashed(words: list[str]) -> np.ndarray:
    """uint64 [W]: a hash of each word."""
    return np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)


def grams_of(hashes_W: np.ndarray, *, size: int) -> np.ndarray:
    """uint64 [max(W - size + 1, 0)]: a hash of the `size` words from each word on."""
    num_grams = max(len(hashes_W) - size + 1, 0)
    grams_G = np.zeros(num_grams, np.uint64)
    for offset in range(size if num_grams else 0):
        grams_G *= FACTOR
        grams_G += hashes_W[offset : offset + num_grams]
    return grams_G


class Part(NamedTuple):
    """A text of a row, and what it is there: `the answer`."""

    name: str
    text: str


def parts_of(example: Example) -> list[Part]:
    """The texts of a row."""
    plain = example.plain_text
    if plain is not None:
        return [Part("the text", plain)]
    turns = [message for message in example.messages if message.role != "system"]
    names = {"system": "the system prompt"}
    if [turn.role for turn in turns] == ["user", "assistant"]:
        names |= {"user": "the prompt", "assistant": "the answer"}
    return [
        Part(names.get(message.role, f"message {number} ({message.role})"), message.content)
        for number, message in enumerate(example.messages, start=1)
    ]


def texts_in(value: Any) -> Iterator[str]:
    """All texts in a JSON value; a list of texts is one text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        yield "\n".join(value)
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_in(item)


def passage(text: str, *, first: int, last: int) -> str:
    """What stands from word `first` to word `last` (from 0)."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    places = [match.span() for match in WORD.finditer(text)]
    return text[places[first][0] : places[last][1]]


class Index:
    """The word n-grams of many texts, each a sorted 64-bit hash with the number of its text and its first word there.

    Texts are added in order; `close` sorts. `every_place`: a gram is kept once for each text that has it, and otherwise
    in the first text alone. Memory is 24 to 32 bytes a gram, and 64 while `close` sorts.
    """

    def __init__(self, *, size: int, every_place: bool = True):
        self.size, self.every_place = size, every_place
        self.num_texts = 0
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.grams_G = np.zeros(0, np.uint64)
        self.text_G = self.place_G = np.zeros(0, np.uint32)
        self._seen = np.zeros(1, bool)

    def add(self, hashes_W: np.ndarray) -> int:
        """Add a text by its words' hashes; returns its number."""
        grams, place = grams_of(hashes_W, size=self.size), np.arange(max(len(hashes_W) - self.size + 1, 0))
        if self.every_place:
            grams, place = np.unique(grams, return_index=True)
        self._waiting.append((grams, np.full(len(grams), self.num_texts, np.uint32), place.astype(np.uint32)))
        self.num_texts += 1
        return self.num_texts - 1

    def close(self) -> None:
        """Sort what was added; nothing may be added any more."""
        if not self._waiting:
            return
        grams, texts, places = (np.concatenate(column) for column in zip(*self._waiting, strict=True))
        self._waiting = []
        if self.every_place:
            order = np.argsort(grams, kind="stable")
            self.grams_G = grams[order]
        else:
            self.grams_G, order = np.unique(grams, return_index=True)
        self.text_G, self.place_G = texts[order], places[order]
        bits = min(max(int(TABLE_CELLS_A_GRAM * len(order)).bit_length(), 10), MAX_TABLE_BITS)
        self._seen = np.zeros(1 << bits, bool)
        self._seen[self._cells(self.grams_G)] = True

    def drop_common(self, owner_T: np.ndarray, *, most: int) -> None:
        """Forget the grams of the texts of more than `most` owners; `owner_T` says whose a text is, in order."""
        new = np.ones(len(self.grams_G), bool)  # stable sorting left the texts, and so the owners, of a gram in order
        owner_G = owner_T[self.text_G]
        new[1:] = (self.grams_G[1:] != self.grams_G[:-1]) | (owner_G[1:] != owner_G[:-1])
        _, inverse = np.unique(self.grams_G, return_inverse=True)
        kept = np.bincount(inverse, weights=new)[inverse] <= most
        self.grams_G, self.text_G, self.place_G = self.grams_G[kept], self.text_G[kept], self.place_G[kept]

    def num_grams(self) -> np.ndarray:
        """int64 [texts]: how many distinct grams are kept of each text."""
        return np.bincount(self.text_G, minlength=self.num_texts)

    def find(self, grams_Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(query_H, entry_H): which gram asked for equals which of the index, in the order of the queries."""
        likely = np.flatnonzero(self._seen[self._cells(grams_Q)])
        first = np.searchsorted(self.grams_G, grams_Q[likely], "left")
        count = np.searchsorted(self.grams_G, grams_Q[likely], "right") - first
        query_H = np.repeat(likely, count)
        within = np.arange(len(query_H)) - np.repeat(np.cumsum(count) - count, count)
        return query_H, np.repeat(first, count) + within

    def _cells(self, grams: np.ndarray) -> np.ndarray:
        return grams & np.uint64(len(self._seen) - 1)


class Batch(NamedTuple):
    """The parts of some rows, and their words' hashes one after the other. `start_P` is each part's first word."""

    origins: list[Origin]
    parts: list[Part]
    words: list[list[str]]
    hashes_W: np.ndarray
    start_P: np.ndarray

    def grams(self, *, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(grams_Q, part_Q, word_Q): all grams that lie in one part, their parts and their first words there."""
        grams_Q = grams_of(self.hashes_W, size=size)
        length_P = np.diff(self.start_P, append=len(self.hashes_W))
        part_Q = np.repeat(np.arange(len(length_P)), length_P)[: len(grams_Q)]
        word_Q = np.arange(len(grams_Q)) - self.start_P[part_Q]
        whole = word_Q + size <= length_P[part_Q]
        return grams_Q[whole], part_Q[whole], word_Q[whole]


class Batches:
    """Gathers rows until there are enough to be looked at together."""

    def __init__(self) -> None:
        self._found: list[tuple[Origin, Part]] = []
        self._num_characters = 0

    def add(self, example: Example) -> Batch | None:
        """Take a row; the batch, once it is full."""
        parts = parts_of(example)
        self._found += [(example.origin, part) for part in parts]
        self._num_characters += sum(len(part.text) for part in parts)
        full = len(self._found) >= BATCH_PARTS or self._num_characters >= BATCH_CHARACTERS
        return self.take() if full else None

    def take(self) -> Batch:
        """What is there."""
        found, self._found, self._num_characters = self._found, [], 0
        words = [words_of(part.text) for _, part in found]
        lengths = np.array([len(part) for part in words], np.int64)
        hashes_W = hashed([word for part in words for word in part])
        origins, parts = [origin for origin, _ in found], [part for _, part in found]
        return Batch(origins, parts, words, hashes_W, np.cumsum(lengths) - lengths)


def runs_of(group_H: np.ndarray, word_H: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first_R, last_R): the hits, sorted by group and word, in runs of one group and following words."""
    breaks = np.flatnonzero((group_H[1:] != group_H[:-1]) | (word_H[1:] > word_H[:-1] + 1)) + 1
    if not len(word_H):
        return breaks, breaks
    return np.concatenate([[0], breaks]), np.concatenate([breaks, [len(word_H)]]) - 1
