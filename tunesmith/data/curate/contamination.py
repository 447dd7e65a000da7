"""Training rows that hold what a benchmark asks: then its score says what was remembered, not what was learned.

    contaminated  <=>  |G(item) n G(row)| >= max(0.3 |G(item)|, min(|G(item)|, 5)),   or 40 words in a row in common

An item is one text of a benchmark's row (its question, its answer); G are its word 8-grams, the shortest of Brown et
al. 2020, appendix C. It is the item's share that counts, as in Lee et al. 2022, section 4, so the length of the row
does not matter. Longer grams make the finding no surer, since a share of many must be there, and lose items with a few
words changed; 5-grams tell of 210 training rows of CLINC150 for its test set, most of which ask something else, 8-grams
of 29, of which 26 hold an item (benchmarks/thresholds.py). Grams that more than ten rows of the benchmarks share
(instructions, templates) do not count. Items of three to seven words must make up a whole text of the row.

Shapes: H hits, P pairs of a part of a row and an item, R runs of hits (ngrams.py), T items.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tunesmith.data.curate.base import quoted
from tunesmith.data.curate.ngrams import Batch, Batches, Index, hashed, parts_of, passage, runs_of, texts_in, words_of
from tunesmith.data.formats import examine
from tunesmith.data.ledger import Problem
from tunesmith.data.settings import DataSettings
from tunesmith.data.sources import read_rows
from tunesmith.data.types import Example, Origin

GRAM_WORDS = 8
MIN_ITEM_WORDS = 3
MIN_CONTAINMENT, MIN_SHARED_GRAMS = 0.3, 5  # five grams are twelve words
MIN_PASSAGE_WORDS = 40
MAX_ROWS_A_GRAM = 10


class _Match(NamedTuple):
    """What a part of a row has in common with an item: the item's share, and words [first, last] of the part."""

    part: int
    origin: Origin
    share: float
    first: int
    last: int

    @property
    def size(self) -> tuple[float, int]:
        return self.share, self.last - self.first


class Contamination:
    """Looks for the items of benchmark files in training rows.

    files: whatever `data.train` may name; settings: how their rows are read; of a row that this fits not, all texts are
    taken. gram_words, min_containment, min_passage_words: 8, 0.3 and 40 above. Raises NotFoundError and DataError as
    `read_rows` does. Memory is 64 bytes a word of the benchmarks at most.
    """

    name = "contamination"

    def __init__(
        self,
        files: list[str],
        settings: DataSettings,
        *,
        gram_words: int = GRAM_WORDS,
        min_containment: float = MIN_CONTAINMENT,
        min_passage_words: int = MIN_PASSAGE_WORDS,
    ):
        self.gram_words, self.min_containment = gram_words, min_containment
        self.min_passage_words = min_passage_words
        self._batches = Batches()
        self._bad: list[Problem] = []
        self._index = Index(size=gram_words)
        self._items: list[Origin] = []
        self._short: dict[str, Origin] = {}
        short_rows: Counter[str] = Counter()
        for file in files:
            for row in read_rows(file, on_bad=self._bad.append):
                found = examine(row, settings=settings)
                texts = texts_in(row.value) if isinstance(found, Problem) else (part.text for part in parts_of(found))
                for words in map(words_of, dict.fromkeys(texts)):
                    if len(words) >= gram_words:
                        self._index.add(hashed(words))
                        self._items.append(row.origin)
                    elif len(words) >= MIN_ITEM_WORDS:
                        self._short.setdefault(" ".join(words), row.origin)
                        short_rows[" ".join(words)] += 1
        self._short = {text: row for text, row in self._short.items() if short_rows[text] <= MAX_ROWS_A_GRAM}
        numbers = {origin: number for number, origin in enumerate(dict.fromkeys(self._items))}
        self._index.close()
        self._index.drop_common(np.array([numbers[row] for row in self._items], np.int64), most=MAX_ROWS_A_GRAM)
        self._num_grams_T = self._index.num_grams()

    def look(self, example: Example) -> Iterator[Problem]:
        """Take a row; the findings of it and of rows before it, once there are enough to look at together."""
        if (batch := self._batches.add(example)) is not None:
            yield from self._findings(batch)

    def finish(self) -> Iterator[Problem]:
        """The findings of the last rows, and what of the benchmarks could not be read."""
        yield from self._findings(self._batches.take())
        for problem in self._bad:
            if problem.severity == "error":
                message = f"this row of a benchmark cannot be read and was not looked for: {problem.message}"
                yield Problem("quality", "warning", *problem.origin, message=message, hint="mend the file")

    def _findings(self, batch: Batch) -> Iterator[Problem]:
        """One problem for each row with items in it: the one it holds most of."""
        best: dict[Origin, _Match] = {}
        rows: dict[Origin, set[Origin]] = {}
        for match in sorted([*self._whole(batch), *self._matches(batch)], key=lambda match: match.part):
            row = batch.origins[match.part]
            best[row] = max(best.get(row, match), match, key=lambda match: match.size)
            rows.setdefault(row, set()).add(match.origin)
        for row, match in best.items():
            quote = quoted(passage(batch.parts[match.part].text, first=match.first, last=match.last))
            others = f"; and texts of {len(rows[row]) - 1} more of its rows" if len(rows[row]) > 1 else ""
            message = (
                f"holds {match.share:.0%} of a text of {match.origin} (words {match.first + 1} to {match.last + 1} of"
                f" {batch.parts[match.part].name}: {quote}){others}"
            )
            hint = "leave the row out, or do not trust the benchmark's score"
            yield Problem("contamination", "warning", *row, message=message, other=match.origin, hint=hint)

    def _whole(self, batch: Batch) -> Iterator[_Match]:
        """Short items that are a whole part of a row."""
        for part, words in enumerate(batch.words):
            if MIN_ITEM_WORDS <= len(words) < self.gram_words and (origin := self._short.get(" ".join(words))):
                yield _Match(part, origin, 1.0, 0, len(words) - 1)

    def _matches(self, batch: Batch) -> Iterator[_Match]:
        """The parts that hold enough of a longer item."""
        grams_Q, part_Q, word_Q = batch.grams(size=self.gram_words)
        query_H, entry_H = self._index.find(grams_Q)
        if not len(query_H):
            return
        order = np.lexsort((word_Q[query_H], self._index.text_G[entry_H], part_Q[query_H]))
        query_H, entry_H = query_H[order], entry_H[order]
        part_H, word_H, item_H = part_Q[query_H], word_Q[query_H], self._index.text_G[entry_H]
        starts_P = np.flatnonzero(np.r_[True, (part_H[1:] != part_H[:-1]) | (item_H[1:] != item_H[:-1])])
        ends_P = np.r_[starts_P[1:], len(part_H)] - 1
        pair_H = np.repeat(np.arange(len(starts_P)), ends_P - starts_P + 1)
        held_P = np.bincount(np.unique(np.stack([pair_H, entry_H]), axis=1)[0])  # a gram twice in the row counts once
        first_R, last_R = runs_of(pair_H, word_H)
        passage_P = np.zeros(len(starts_P), np.int64)
        np.maximum.at(passage_P, pair_H[first_R], word_H[last_R] - word_H[first_R] + self.gram_words)
        all_P = self._num_grams_T[item_H[starts_P]]
        enough_P = held_P >= np.maximum(self.min_containment * all_P, np.minimum(all_P, MIN_SHARED_GRAMS))
        for pair in np.flatnonzero(enough_P | (passage_P >= self.min_passage_words)).tolist():
            start, end = int(starts_P[pair]), int(ends_P[pair])
            yield _Match(
                part=int(part_H[start]),
                origin=self._items[item_H[start]],
                share=float(held_P[pair] / all_P[pair]),
                first=int(word_H[start]),
                last=int(word_H[end]) + self.gram_words - 1,
            )
