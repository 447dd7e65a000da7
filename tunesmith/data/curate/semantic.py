"""Rows that say the same in other words: the cosine of their embeddings, and no other fact in either.

    cos(e_i, e_j) >= threshold,   j the row before i that is most like it           (SemDeDup, Abbas et al. 2023, section 3)

A model puts texts close that differ in a name or a number alone: a pair in which each has a number, or each a name,
that the other has not is left out, as are rows that are equal but for case and punctuation. All pairs are compared,
exactly, in blocks of rows: memory is the embeddings and 2,000 characters a row, time grows with the square of the rows,
so they are at most 200,000. The threshold is for a small sentence encoder. At 0.75 it finds 14 of 20 paraphrases
instead of 4, but of TREC's questions between 0.75 and 0.85 four pairs in five, read by hand, ask two things
(benchmarks/thresholds.py).

Shapes: N rows, D embedding, B a block's rows, C the columns compared at once.
"""

import re
from collections.abc import Callable, Iterator

import numpy as np

from tunesmith.data.curate.base import Places
from tunesmith.data.curate.duplicates import key_of, normalise, said
from tunesmith.data.ledger import Problem
from tunesmith.data.types import Example

MIN_COSINE = 0.85
MAX_ROWS = 200_000
EMBEDDED_ROWS = 1024
MAX_CHARACTERS = 2_000  # about what an encoder of 512 tokens reads
BLOCK_ROWS, BLOCK_COLUMNS = 1024, 8192

NAME_INSIDE = re.compile(r"(?<=[^\s.!?:\"“(] )[^\W\d_]\w*")  # a word that no sentence begins with

Embed = Callable[[list[str]], np.ndarray]  # texts -> float32 [texts, D] of length 1


class SemanticRepeats:
    """Looks for rows that repeat an earlier one in other words.

    embed: embeddings of length 1 of a list of texts, such as `load_embedder` of models/embed.py gives.
    """

    name = "semantic"

    def __init__(self, embed: Embed, *, min_cosine: float = MIN_COSINE):
        self.embed, self.min_cosine = embed, min_cosine
        self.num_left_out = 0
        self._keys: set[int] = set()
        self._texts: list[str] = []
        self._places = Places()
        self._blocks: list[np.ndarray] = []
        self._num_embedded = 0

    def look(self, example: Example) -> Iterator[Problem]:
        """Embed the row, together with others; nothing can be found before the last one."""
        _, prompt, answer = said(example)
        text = f"{prompt}\n{answer}".strip()
        key = key_of(normalise(text))
        if text and key not in self._keys:
            if len(self._texts) < MAX_ROWS:
                self._keys.add(key)
                self._texts.append(text[:MAX_CHARACTERS])
                self._places.add(example.origin)
            else:
                self.num_left_out += 1
            if len(self._texts) - self._num_embedded == EMBEDDED_ROWS:
                self._embed()
        yield from ()

    def finish(self) -> Iterator[Problem]:
        """The later row of each pair."""
        self._embed()
        if self._blocks:
            for row, other, cosine in self._nearest(np.concatenate(self._blocks)):
                if not other_facts(self._texts[row], self._texts[other]):
                    place = self._places[other]
                    message = (
                        f"says nearly the same as an earlier row in other words (similarity {cosine:.2f}; {place})"
                    )
                    hint = "keep both only if the variety is wanted"
                    yield Problem("near_duplicate", "warning", *self._places[row], message, other=place, hint=hint)
        if self.num_left_out:
            message = f"rows that say the same were looked for in the first {MAX_ROWS:,} different rows only"
            yield Problem(
                "quality",
                "warning",
                *self._places[len(self._places) - 1],
                message=message,
                hint="check a part of the file",
            )

    def _embed(self) -> None:
        texts = self._texts[self._num_embedded :]
        if texts:
            self._blocks.append(np.asarray(self.embed(texts), np.float32))
            self._num_embedded = len(self._texts)

    def _nearest(self, embedding_ND: np.ndarray) -> Iterator[tuple[int, int, float]]:
        """(row, the earlier row most like it, their cosine) where that reaches the threshold."""
        for start in range(0, len(embedding_ND), BLOCK_ROWS):
            block_BD = embedding_ND[start : start + BLOCK_ROWS]
            best_B, other_B = np.full(len(block_BD), -1.0, np.float32), np.zeros(len(block_BD), np.int64)
            for column in range(0, start + len(block_BD), BLOCK_COLUMNS):
                stop = min(column + BLOCK_COLUMNS, start + len(block_BD))
                cosine_BC = block_BD @ embedding_ND[column:stop].T
                if stop > start:  # a row is compared with those before it alone
                    later = np.arange(column, stop)[None] >= np.arange(start, start + len(block_BD))[:, None]
                    cosine_BC[later] = -1.0
                nearest_B = cosine_BC.argmax(axis=1)
                cosine_B = cosine_BC[np.arange(len(block_BD)), nearest_B]
                better_B = cosine_B > best_B
                best_B[better_B], other_B[better_B] = cosine_B[better_B], column + nearest_B[better_B]
            for place in np.flatnonzero(best_B >= self.min_cosine).tolist():
                yield start + place, int(other_B[place]), float(best_B[place])


def other_facts(a: str, b: str) -> bool:
    """Whether each of two texts has a number that the other has not, or each a name (a capital inside a sentence)."""
    words_a, words_b = (set(re.findall(r"\w+", text.casefold())) for text in (a, b))
    return any(facts(a) - words_b and facts(b) - words_a for facts in (_numbers, _names))


def _numbers(text: str) -> set[str]:
    return {word for word in re.findall(r"\w+", text.casefold()) if any(map(str.isdigit, word))}


def _names(text: str) -> set[str]:
    return {match[0].casefold() for match in NAME_INSIDE.finditer(text) if match[0][0].isupper()}
