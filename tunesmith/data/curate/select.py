"""`data.select`: a small set of training rows that stands for all of them.

Diversity is facility location: the chosen rows S are those to which all rows are near,

    F(S) = sum_i max_{j in S} q_j s(i, j),    s: cosine of TF-IDF (words.py) of prompt and answer,   q in [0, 1]: quality

F is monotone and submodular, so the greedy choice reaches (1 - 1/e) of the best (Nemhauser, Wolsey, Fisher 1978). It is
found lazily (Minoux 1978): a row's gain only falls, so an old gain is a bound, and only rows whose bound is the largest are
looked at again. The gains before the first choice cost one product, s being no less than 0.

Cost is bounded by two samples rather than by looking at random candidates (Mirzasoleiman et al. 2015), which with sparse
vectors is slower than lazy evaluation: beyond REPRESENTED_ROWS rows, i runs over so many of them, drawn by their keys, and
words that more than COMMON_SHARE of the rows have, and at least COMMON_ROWS, say nothing. All rows may be chosen.

Difficulty is the instruction-following difficulty of difficulty.py: the hardest rows below 1, beyond which the question does
not help to tell the answer (Li et al. 2024, section 2.2).

Classes keep their shares: each has its part of `keep`, rounded, and one row at least, chosen by its own F. The shares are
what a classifier learns as its prior, so a choice that evened them out would be wrong about rows as they come. The choice
depends on the rows' content alone: they are taken in the order of their keys, which is as good as random and breaks ties.

Shapes: N rows, F columns, M rows to be represented, B rows looked at together.
"""

import heapq
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.batched import batched
from tunesmith.data.curate.difficulty import SCORED_ROWS, Scorer
from tunesmith.data.curate.duplicates import normalise, said
from tunesmith.data.curate.quality import REFUSAL
from tunesmith.data.curate.words import check_installed, tfidf, word_counts, words_of
from tunesmith.data.settings import SelectSettings
from tunesmith.data.types import Example, Label, Origin
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

REPRESENTED_ROWS = 20_000
COMMON_SHARE, COMMON_ROWS = 0.02, 200
BLOCK_ROWS = 128

REFUSAL_QUALITY, COPY_QUALITY, CUT_QUALITY, SCRIPT_QUALITY = 0.1, 0.3, 0.5, 0.5
USUAL_DEVIATIONS = 2.0  # of the logarithm of the length from the file's median: no farther is usual
GRAM, MIN_GRAMS = 3, 10
CUT_WORDS = 20
SENTENCE = re.compile(r"[.!?…]['\"”’)\]]*\s")
SENTENCE_END = re.compile(r"[.!?…:。！？]['\"”’)\]}*_`]*\s*$")


@dataclass(frozen=True, slots=True)
class _Judged:
    """What is known of a row's quality by itself: a factor, and what is compared with the other rows."""

    factor: float
    num_characters: int
    script: str


@dataclass(frozen=True, slots=True)
class _Candidate:
    """What is kept of a row besides its vector."""

    key: str
    origin: Origin
    label: Label | None
    judged: _Judged


def select(examples: Iterable[Example], *, settings: SelectSettings, scorer: Scorer | None = None) -> set[Origin]:
    """Where the chosen rows stand. Rows are read one at a time; memory is about a kilobyte a row of 50 words.

    `scorer` is needed by `difficulty`. Raises DataError where there is nothing to choose (as many rows are to be kept as
    there are, or fewer than there are classes) or to score, MissingExtraError where scikit-learn is needed and missing.
    """
    candidates: list[_Candidate] = []
    vectors_NF = None
    hardness: list[float] = []
    if settings.by == "difficulty":
        assert scorer is not None, "runs.py gives one"
        examples = _scored(examples, scorer=scorer, noted=hardness)
    if "diversity" in settings.by:
        check_installed(f"data.select.by: {settings.by}")
        vectors_NF = word_counts(_texts(examples, noted=candidates))
    else:
        for _ in _texts(examples, noted=candidates):
            pass
    num_kept = settings.num_kept(len(candidates))
    if num_kept >= len(candidates):
        raise DataError(
            f"data.select.keep is {settings.keep:g} and there are {len(candidates):,} rows to choose from, so nothing"
            " would be left out",
            hint="keep fewer, or leave data.select out",
        )
    if hardness and not any(map(math.isfinite, hardness)):
        raise DataError(
            "data.select.by: difficulty needs a question and an answer, and no row has both",
            hint="choose by quality or diversity",
        )
    order = sorted(range(len(candidates)), key=lambda row: (candidates[row].key, candidates[row].origin))
    candidates = [candidates[row] for row in order]
    by_quality = "quality" in settings.by
    quality_N = _scores([c.judged for c in candidates]) if by_quality else np.ones(len(candidates))
    quality_N = np.array(hardness)[order] if hardness else quality_N
    if vectors_NF is not None:
        vectors_NF = tfidf(vectors_NF[order], most_rows=max(int(COMMON_SHARE * len(order)), COMMON_ROWS))
    chosen: set[Origin] = set()
    for rows, quota in _quotas(_classes([c.label for c in candidates], num_kept=num_kept), num_kept=num_kept):
        if vectors_NF is None:
            best = np.argsort(-quality_N[rows], kind="stable")[:quota].tolist()
        else:
            best = facility_location(vectors_NF[rows], quality_N=quality_N[rows], keep=quota)
        chosen.update(candidates[rows[place]].origin for place in best)
    return chosen


def _texts(examples: Iterable[Example], *, noted: list[_Candidate]) -> Iterator[str]:
    """The text of each row, and the rest of what is needed of it in `noted`."""
    for example in examples:
        noted.append(_Candidate(example.key, example.origin, example.label, _judged(example)))
        yield "\n".join(said(example)[1:])


def _scored(examples: Iterable[Example], *, scorer: Scorer, noted: list[float]) -> Iterator[Example]:
    """The same rows, and how hard each is in `noted`: the larger the better, what a question does not help with last."""
    for batch in batched(examples, SCORED_ROWS):
        behind_B, alone_B = scorer.score(batch).T
        difficulty_B = behind_B / alone_B
        noted += np.where(difficulty_B < 1, difficulty_B, -np.nan_to_num(difficulty_B, nan=np.inf)).tolist()
        yield from batch


# --------------------------------------------------------------------------------------------------- diversity


def facility_location(vectors_NF: "csr_matrix", *, quality_N: np.ndarray, keep: int) -> list[int]:
    """The rows chosen by lazy greedy maximisation of F, in the order of choice; of equal gains the first row's.

    vectors_NF: of length 1 and nowhere negative. With more than REPRESENTED_ROWS rows, F is that of the first so many.
    """
    represented_FM = vectors_NF[:REPRESENTED_ROWS].T.tocsr()
    nearness_M = np.zeros(represented_FM.shape[1])  # q_j s(i, j) of the best row chosen so far
    gain_N = quality_N * (vectors_NF @ np.asarray(represented_FM.sum(axis=1)).ravel())
    heap = [(-gain, row) for row, gain in enumerate(gain_N.tolist())]
    heapq.heapify(heap)
    known_at_N = np.zeros(len(heap), np.int64)  # how many rows were chosen when the row's gain was computed
    chosen: list[int] = []
    while len(chosen) < keep:
        block_rows = 1
        while known_at_N[heap[0][1]] < len(chosen):
            stale: list[int] = []
            while heap and len(stale) < block_rows and known_at_N[heap[0][1]] < len(chosen):
                stale.append(heapq.heappop(heap)[1])
            gains = _gains(vectors_NF[stale] @ represented_FM, quality_B=quality_N[stale], nearness_M=nearness_M)
            known_at_N[stale] = len(chosen)
            for row, gain in zip(stale, gains.tolist(), strict=True):
                heapq.heappush(heap, (-gain, row))
            block_rows = min(2 * block_rows, BLOCK_ROWS)
        row = heapq.heappop(heap)[1]
        chosen.append(row)
        near = vectors_NF[row] @ represented_FM
        nearness_M[near.indices] = np.maximum(nearness_M[near.indices], quality_N[row] * near.data)
    return chosen


def _gains(cosine_BM: "csr_matrix", *, quality_B: np.ndarray, nearness_M: np.ndarray) -> np.ndarray:
    """How much F rises by each of the rows alone, [B]."""
    row = np.repeat(np.arange(len(quality_B)), np.diff(cosine_BM.indptr))
    rise = quality_B[row] * cosine_BM.data - nearness_M[cosine_BM.indices]
    return np.bincount(row, weights=np.maximum(rise, 0), minlength=len(quality_B))


def _classes(labels: list[Label | None], *, num_kept: int) -> list[list[int]]:
    """The rows by class; a row of several counts for the rarest of them. Rows without a label are one class.

    Numbers that are too many to keep one row of each are no classes.
    """
    sets = [(label,) if isinstance(label, str) else tuple(sorted(set(label or ()))) for label in labels]
    counts = Counter(name for names in sets for name in names)
    by_class: dict[str, list[int]] = {}
    for row, names in enumerate(sets):
        by_class.setdefault(min(names, key=lambda name: (counts[name], name), default=""), []).append(row)
    if len(by_class) <= num_kept:
        return [by_class[name] for name in sorted(by_class)]
    if all(_is_number(name) for name in by_class):
        return [list(range(len(labels)))]
    raise DataError(
        f"data.select keeps {num_kept:,} rows and there are {len(by_class):,} classes, of which each keeps one at least",
        hint=f"keep {len(by_class):,} or more",
    )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _quotas(classes: list[list[int]], *, num_kept: int) -> list[tuple[list[int], int]]:
    """Each class with how many of its rows are kept: one, and its share of the others, by the largest remainders."""
    total, others = sum(map(len, classes)) - len(classes), num_kept - len(classes)
    exact = [(len(rows) - 1) * others / max(total, 1) for rows in classes]
    quotas = [int(share) for share in exact]
    by_remainder = sorted(range(len(classes)), key=lambda place: (quotas[place] - exact[place], place))
    for place in by_remainder[: others - sum(quotas)]:
        quotas[place] += 1
    return [(rows, 1 + quota) for rows, quota in zip(classes, quotas, strict=True)]


# ----------------------------------------------------------------------------------------------------- quality


def quality_scores(examples: Iterable[Example]) -> np.ndarray:
    """A score in [0, 1] for each row: 1 where nothing is amiss, else the product of

    0.1 where the answer is a refusal; 0.3 where it repeats the prompt; 0.5 where prose of 20 words breaks off inside a
    sentence; 0.5 where it is in another script than most; the share of its groups of three words that are no repetition
    (Rae et al. 2021, A1.1); and 2 / z where the logarithm of its length lies z > 2 standard deviations (1.48 median
    deviations) from the file's median.

    Of plain text and of words with a label the text itself is judged.
    """
    return _scores([_judged(example) for example in examples])


def _judged(example: Example) -> _Judged:
    _, prompt, answer = said(example)
    factor, text = 1.0, answer
    if example.plain_text is None:
        factor *= REFUSAL_QUALITY if REFUSAL.match(answer) else 1.0
        factor *= COPY_QUALITY if normalise(answer) == normalise(prompt) else 1.0
    else:
        text = prompt
    words = words_of(text)
    if len(words) >= CUT_WORDS and example.label is None and SENTENCE.search(text) and not SENTENCE_END.search(text):
        factor *= CUT_QUALITY
    grams = list(zip(*(words[start:] for start in range(GRAM)), strict=False))
    if len(grams) >= MIN_GRAMS:
        factor *= len(set(grams)) / len(grams)
    return _Judged(factor, len(text), _script(text))


def _scores(judged: list[_Judged]) -> np.ndarray:
    """The scores of rows that are judged each by itself, compared with each other."""
    if not judged:
        return np.zeros(0)
    usual_script = Counter(row.script for row in judged).most_common(1)[0][0]
    foreign_N = np.array([row.script not in (usual_script, "") for row in judged])
    length_N = np.log1p([row.num_characters for row in judged])
    away_N = np.abs(length_N - np.median(length_N))
    deviation = 1.4826 * float(np.median(away_N))  # a standard deviation, were they normal
    far_N = away_N / deviation if deviation else np.zeros(len(judged))
    score_N = np.array([row.factor for row in judged]) * np.where(foreign_N, SCRIPT_QUALITY, 1.0)
    return score_N * np.minimum(1.0, USUAL_DEVIATIONS / np.maximum(far_N, USUAL_DEVIATIONS))


def _script(text: str) -> str:
    """The script of most of the first letters (`LATIN`, `CYRILLIC`, `CJK`, ...); an empty string where there is none."""
    found = Counter(filter(None, map(_script_of, text[:200])))
    return found.most_common(1)[0][0] if found else ""


@lru_cache(maxsize=4096)
def _script_of(character: str) -> str:
    return unicodedata.name(character, "").partition(" ")[0] if character.isalpha() else ""
