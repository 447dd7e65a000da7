"""Rows that repeat: exactly, after normalising, or nearly; in one file, or across two.

Every row leaves one fixed-size record in an array: 64-bit keys of its content, its normalised content, its prompt and
its answer, and a one-permutation MinHash signature of its character 5-grams (Li, Owen, Zhang 2012; empty bins are
filled as in Shrivastava 2017). Equal keys are found by sorting; near repeats share a band of four signature bytes,
and are then compared by the true Jaccard similarity of their 5-grams

    J(a, b) = |A n B| / |A u B|  >=  0.8

on texts that are read a second time. From 0.7 on a tenth of the words may differ, but of the questions of CLINC150 and
TREC between 0.7 and 0.8 one pair in five, read by hand, asks two things (benchmarks/thresholds.py). 5-grams that every
third row of the first rows has (a template, a long prompt) say nothing about a row and are left out. Time is linear in
the input but for the sorts; memory is 150 bytes a row.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tunesmith.data.types import Example, Origin

GRAM = 5
BINS, BAND = 60, 4
NEIGHBOURS = 3  # rows of a bucket are compared with the three before them
MIN_JACCARD = 0.8
ESTIMATE_MARGIN = 0.2  # below which the signatures may put a pair: 60 bins err by 0.05 (one standard deviation)
MIN_GRAMS = 12
MAX_SHINGLED_CHARACTERS = 50_000
MAX_PAIRS = 50_000
SHORT_ANSWER_CHARACTERS = 64
FLUSH_ROWS, FLUSH_CHARACTERS, HASHED_ROWS = 512, 500_000, 64
COMMON_TABLE_BITS = 20
COMMON_SHARE, COMMON_MIN_ROWS = 1 / 3, 50

ROW = np.dtype(
    [("exact", "u8"), ("same", "u8"), ("prompt", "u8"), ("answer", "u8"), ("line", "u4"), ("file", "u4"),
     ("grams", "u4"), ("signature", "u1", (BINS,))]
)  # fmt: skip

# The bins that an empty bin takes its value from, in the order they are tried: a fixed random order for each bin.
DONORS = np.random.default_rng(0).permuted(np.tile(np.arange(BINS), (BINS, 1)), axis=1)

_DASHES = re.compile("[‐‑‒–—−]")
_APOSTROPHES = re.compile("['`‘’]")
_QUOTES = re.compile('[;?"“”„«»…¡¿]')
_STOPS = re.compile(r"[.,:!](?!(?<=\d.)\d|(?<=!)=)")  # not in 3.5 and 12:30, and not in !=


def normalise(text: str) -> str:
    """What stays the same when only case, width, quotes, sentence punctuation and white space change.

    Signs that carry meaning (`+ - * / = < > % #`, decimal points) stay.
    """
    if not text.isascii():
        text = _DASHES.sub("-", unicodedata.normalize("NFKC", text))
    text = _QUOTES.sub(" ", _APOSTROPHES.sub("", text.casefold()))
    return " ".join(_STOPS.sub(" ", text).split())


def key_of(text: str) -> int:
    """A 64-bit key of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def said(example: Example) -> tuple[str, str, str]:
    """An example as (system prompt, the rest of the prompt, answer); plain text is all prompt, a label the answer."""
    if example.plain_text is not None:
        label = example.label or ""
        return "", example.plain_text, label if isinstance(label, str) else " ".join(label)
    system = example.messages[0].content if example.messages[0].role == "system" else ""
    *prompt, answer = [
        _words(message.content, message.extra) for message in example.messages if message.role != "system"
    ]
    return system, "\n".join(prompt), answer


def _words(content: str, extra: dict[str, object]) -> str:
    return f"{content} {extra['tool_calls']}" if "tool_calls" in extra else content


@dataclass(frozen=True, slots=True)
class Repeat:
    """Row number `row` repeats row number `other`, an earlier one. how: `exact`, `same` (normalised), `near`."""

    row: int
    other: int
    how: str


class Repeats:
    """Collects the rows of one or two files and finds the repeats among them.

    With a second file, add its rows first: rows from `start()` on are the ones that are checked. min_jaccard: from which
    similarity of their character grams of `gram` bytes on two rows nearly repeat.
    """

    def __init__(self, *, min_jaccard: float = MIN_JACCARD, gram: int = GRAM) -> None:
        self.min_jaccard, self.gram = min_jaccard, gram
        self._min_alike = round((min_jaccard - ESTIMATE_MARGIN) * BINS)
        self.rows = np.zeros(1024, ROW)
        self.num_rows = 0
        self.first = 0
        self.files: list[str] = []
        self._texts: list[str] = []
        self._num_characters = 0
        self._common: np.ndarray | None = None  # by the low bits of a gram's hash: whether it is too common to count

    def start(self) -> None:
        """The rows added from here on are the ones to check; those before are compared with."""
        self._flush()
        self.first = self.num_rows

    def add(self, example: Example) -> int:
        """Add a row; returns its number."""
        if self.num_rows == len(self.rows):
            self.rows.resize(len(self.rows) * 5 // 4, refcheck=False)
        if not self.files or self.files[-1] != example.origin.file:
            self.files.append(example.origin.file)
        system, prompt, answer = map(normalise, said(example))
        asked = f"{system}\0{prompt}"
        row = self.rows[self.num_rows]
        row["exact"], row["same"] = int(example.key[:16], 16), key_of(f"{asked}\0{answer}")
        row["prompt"], row["answer"] = key_of(asked), key_of(answer)
        row["line"], row["file"] = example.origin.line, len(self.files) - 1
        self._texts.append(f"{prompt} {answer}"[:MAX_SHINGLED_CHARACTERS])
        self._num_characters += len(self._texts[-1])
        self.num_rows += 1
        if len(self._texts) >= FLUSH_ROWS or self._num_characters >= FLUSH_CHARACTERS:
            self._flush()
        return self.num_rows - 1

    def origin(self, row: int) -> Origin:
        """Where a row stands."""
        return Origin(self.files[self.rows["file"][row]], int(self.rows["line"][row]))

    def repeats(self) -> Iterator[Repeat]:
        """Rows that equal an earlier checked row exactly, or after normalising."""
        exact, same = self._first_with(self._checked("exact")), self._first_with(self._checked("same"))
        for row in np.flatnonzero(same != np.arange(len(same))).tolist():
            how = "exact" if exact[row] != row else "same"
            yield Repeat(self.first + row, self.first + int(exact[row] if how == "exact" else same[row]), how)

    def contradictions(self) -> Iterator[Repeat]:
        """Rows whose prompt an earlier checked row has with another answer, both normalised."""
        answers = self._checked("answer")
        earlier = self._first_with(self._checked("prompt"))
        for row in np.flatnonzero(answers != answers[earlier]).tolist():
            yield Repeat(self.first + row, self.first + int(earlier[row]), "same")

    def leaks(self) -> Iterator[Repeat]:
        """Checked rows whose prompt the other file has too, normalised."""
        other = self.rows["prompt"][: self.first]
        order = np.argsort(other, kind="stable")
        checked = self._checked("prompt")
        place = np.minimum(np.searchsorted(other[order], checked), max(len(order) - 1, 0))
        if len(order):
            for row in np.flatnonzero(other[order[place]] == checked).tolist():
                partner = int(order[place[row]])
                exact = self.rows["exact"][self.first + row] == self.rows["exact"][partner]
                yield Repeat(self.first + row, partner, "exact" if exact else "same")

    def candidates(self) -> list[tuple[int, int]]:
        """Pairs (row, other row) that may nearly repeat: for every row at most one of its file and one of the other.

        At most MAX_PAIRS, in the order of the rows.
        """
        self._flush()
        same = self.rows["same"][: self.num_rows]
        is_first = np.zeros(self.num_rows, bool)  # of the rows that are the same in one file, only the first takes part
        for start, part in ((0, same[: self.first]), (self.first, same[self.first :])):
            is_first[start + np.unique(part, return_index=True)[1]] = True
        usable = np.flatnonzero(is_first & (self.rows["grams"][: self.num_rows] >= MIN_GRAMS))
        best = np.zeros((2, self.num_rows), np.uint64)  # within the file, across; the estimate above the partner
        for band in range(0, BINS, BAND):
            # The following band is the minor key, so that in a crowded bucket the most alike stand together.
            columns = [(band + offset) % BINS for offset in range(2 * BAND)]
            bytes_N8 = self.rows["signature"][: self.num_rows, columns]
            keys_U = np.ascontiguousarray(bytes_N8).view(">u8")[usable, 0]
            order = np.argsort(keys_U, kind="stable")
            sorted_U = usable[order]
            buckets_U = keys_U[order] >> np.uint64(8 * BAND)
            for step in range(1, NEIGHBOURS + 1):
                together = np.flatnonzero(buckets_U[step:] == buckets_U[:-step])
                self._compare(sorted_U[together + step], sorted_U[together], best=best)
        pairs = [
            (row, int(best[side, row] & np.uint64(0xFFFFFFFF))) for side in (0, 1) for row in np.flatnonzero(best[side])
        ]
        return sorted((int(row), other) for row, other in pairs)[:MAX_PAIRS]

    def _compare(self, one_P: np.ndarray, two_P: np.ndarray, *, best: np.ndarray) -> None:
        """Note in `best` the partners whose signatures are alike, for rows that are checked and do not equal them."""
        for start in range(0, len(one_P), 65_536):  # in pieces: the signatures of all pairs are larger than the table
            one, two = one_P[start : start + 65_536], two_P[start : start + 65_536]
            row, other = np.maximum(one, two), np.minimum(one, two)
            keep = (row >= self.first) & (self.rows["same"][row] != self.rows["same"][other])
            row, other = row[keep], other[keep]
            alike = (self.rows["signature"][row] == self.rows["signature"][other]).sum(axis=1)
            keep = alike >= self._min_alike
            noted = (alike[keep].astype(np.uint64) << np.uint64(32)) | other[keep].astype(np.uint64)
            np.maximum.at(best, ((other[keep] < self.first).astype(np.int64), row[keep]), noted)

    def is_near(self, a: Example, b: Example) -> bool:
        """Whether two rows say the same in nearly the same words, by the true similarity."""
        (_, prompt_a, answer_a), (_, prompt_b, answer_b) = said(a), said(b)
        short = min(len(answer_a), len(answer_b)) <= SHORT_ANSWER_CHARACTERS
        if short and normalise(answer_a) != normalise(answer_b):
            return False
        text_a, text_b = f"{prompt_a} {answer_a}", f"{prompt_b} {answer_b}"
        grams_a, grams_b = self._grams(text_a), self._grams(text_b)
        shared = len(np.intersect1d(grams_a, grams_b, assume_unique=True))
        union = len(grams_a) + len(grams_b) - shared
        return union > 0 and shared / union >= self.min_jaccard and not another_fact(text_a, text_b)

    def _checked(self, column: str) -> np.ndarray:
        return self.rows[column][self.first : self.num_rows]

    @staticmethod
    def _first_with(keys_N: np.ndarray) -> np.ndarray:
        """For every row, the first row with the same key."""
        _, first, inverse = np.unique(keys_N, return_index=True, return_inverse=True)
        return first[inverse]

    def _grams(self, text: str) -> np.ndarray:
        """The distinct hashes of a text's 5-grams that are not too common."""
        hashes, _ = _hash_grams([normalise(text)[:MAX_SHINGLED_CHARACTERS]], size=self.gram)
        hashes = np.unique(hashes)
        return hashes if self._common is None else hashes[~self._common[_common_place(hashes)]]

    def _flush(self) -> None:
        """Turn the texts waiting into signatures."""
        if not self._texts:
            return
        if self._common is None:
            self._common = _common_grams(*_hash_grams(self._texts, size=self.gram), num_rows=len(self._texts))
        rows = self.rows[self.num_rows - len(self._texts) : self.num_rows]
        for start in range(0, len(rows), HASHED_ROWS):  # few rows at a time, so that the arrays stay in the cache
            piece = rows[start : start + HASHED_ROWS]
            hashes_G, row_G = _hash_grams(self._texts[start : start + HASHED_ROWS], size=self.gram)
            kept = ~self._common[_common_place(hashes_G)]
            hashes_G, row_G = hashes_G[kept], row_G[kept]
            piece["grams"] = np.bincount(row_G, minlength=len(piece))
            piece["signature"] = _signatures(hashes_G, row_G, num_rows=len(piece))
        self._texts, self._num_characters = [], 0


def another_fact(a: str, b: str) -> bool:
    """Whether two nearly equal texts differ in a number or in a name (a capital inside a sentence)."""
    words_a, words_b = (Counter(re.findall(r"\w+", text.casefold())) for text in (a, b))
    changed = set(words_a - words_b) | set(words_b - words_a)
    if any(character.isdigit() for word in changed for character in word):
        return True
    inside = re.compile(r"(?<=[^\s.!?:\"“(] )[^\W\d_]\w*")
    names = {match[0].casefold() for text in (a, b) for match in inside.finditer(text) if match[0][0].isupper()}
    return bool(changed & names)


# ------------------------------------------------------------------------------------------------- signatures


def _hash_grams(texts: list[str], *, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The 32-bit hashes of all grams of `size` UTF-8 bytes of the texts, and the text each belongs to."""
    data = [text.encode() for text in texts]
    bytes_C = np.frombuffer(b"".join(data), np.uint8).astype(np.uint32)
    if len(bytes_C) < size:
        return np.zeros(0, np.uint32), np.zeros(0, np.int64)
    hashes_G = bytes_C[: len(bytes_C) - size + 1].copy()
    for offset in range(1, size):
        hashes_G *= np.uint32(0x01000193)
        hashes_G += bytes_C[offset : len(hashes_G) + offset]
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hashes_G ^= hashes_G >> np.uint32(shift)
        hashes_G *= np.uint32(factor)
    hashes_G ^= hashes_G >> np.uint32(16)
    row_C = np.repeat(np.arange(len(texts)), [len(text) for text in data])
    inside = row_C[: len(hashes_G)] == row_C[size - 1 :]
    return hashes_G[inside], row_C[: len(hashes_G)][inside]


def _common_place(hashes_G: np.ndarray) -> np.ndarray:
    return hashes_G & np.uint32((1 << COMMON_TABLE_BITS) - 1)


def _common_grams(hashes_G: np.ndarray, row_G: np.ndarray, *, num_rows: int) -> np.ndarray:
    """Which places of the table hold grams that more than a third of the rows have."""
    table = np.zeros(1 << COMMON_TABLE_BITS, bool)
    if num_rows >= COMMON_MIN_ROWS:
        order = np.lexsort((row_G, hashes_G))
        hashes, rows = hashes_G[order], row_G[order]
        new = np.r_[True, (hashes[1:] != hashes[:-1]) | (rows[1:] != rows[:-1])][: len(hashes)]
        distinct, counts = np.unique(hashes[new], return_counts=True)
        table[_common_place(distinct[counts > COMMON_SHARE * num_rows])] = True
    return table


def _signatures(hashes_G: np.ndarray, row_G: np.ndarray, *, num_rows: int) -> np.ndarray:
    """uint8 [rows, BINS]: for each bin of the hash range one byte of its smallest hash."""
    empty = np.uint32(0xFFFFFFFF)
    smallest = np.full(num_rows * BINS, empty, np.uint32)
    bins = (hashes_G >> np.uint32(COMMON_TABLE_BITS)) % np.uint32(BINS)
    np.minimum.at(smallest, row_G * BINS + bins, hashes_G * np.uint32(0x9E3779B1))
    smallest_RB = smallest.reshape(num_rows, BINS)
    filled = smallest_RB.copy()
    for attempt in range(BINS):
        holes = filled == empty
        if not holes.any():
            break
        filled = np.where(holes, smallest_RB[:, DONORS[:, attempt]], filled)
    return ((filled * np.uint32(2654435761)) >> np.uint32(24)).astype(np.uint8)
