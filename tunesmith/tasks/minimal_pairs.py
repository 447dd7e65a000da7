"""Minimal pairs: of two sentences that differ in one point of grammar, does the model find the good one likelier?

    right  <=>  log p(good) > log p(bad),   log p(x) = sum_t log p(x_t | begin-of-text, x_<t)

BLiMP (Warstadt et al. 2020) scores whole sentences this way; nothing is generated. A pair is a row with
`sentence_good`, `sentence_bad` and `UID`, the paradigm.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tunesmith.data.formats import json_type
from tunesmith.data.ledger import Problem
from tunesmith.data.sources import read_rows
from tunesmith.data.types import Sequence
from tunesmith.errors import DataError
from tunesmith.models.load import Model

CHUNK_PAIRS = 512
PACK_TOKENS = 4096


@dataclass(frozen=True)
class Pair:
    """Two sentences and the paradigm they belong to."""

    good: str
    bad: str
    paradigm: str


@dataclass(frozen=True)
class Score:
    """`accuracy` is the mean over paradigms of the share of pairs told apart; `paradigms` are these shares."""

    accuracy: float
    paradigms: dict[str, float]
    pairs: int


def read_pairs(file: Path) -> list[Pair]:
    """The pairs of a file; raises DataError naming the row that is none."""
    problems: list[Problem] = []
    pairs = []
    for row in read_rows(file, on_bad=problems.append):
        value = row.value if isinstance(row.value, dict) else {}
        texts = [value.get(name) for name in ("sentence_good", "sentence_bad", "UID")]
        if not all(isinstance(text, str) and text for text in texts):
            found = ", ".join(json_type(text) for text in texts)
            raise DataError(
                f"a minimal pair needs the texts sentence_good, sentence_bad and UID (found {found})",
                file=row.origin.file,
                line=row.origin.line,
                hint="see docs/evaluation.md",
            )
        pairs.append(Pair(*map(str, texts)))
    if problems:
        raise problems[0].as_error()
    return pairs


def score(model: Model, *, pairs: list[Pair]) -> Score:
    """Accuracy of a model on minimal pairs. What the two sentences begin with alike is computed once."""
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(pairs), CHUNK_PAIRS):
        chunk = pairs[start : start + CHUNK_PAIRS]
        logprob_S = sentence_logprobs(model, texts=[text for pair in chunk for text in (pair.good, pair.bad)])
        for pair, good, bad in zip(chunk, logprob_S[::2], logprob_S[1::2], strict=True):
            right[pair.paradigm].append(bool(good > bad))
    paradigms = {name: float(np.mean(found)) for name, found in sorted(right.items())}
    return Score(float(np.mean(list(paradigms.values()))), paradigms, len(pairs))


def sentence_logprobs(model: Model, *, texts: list[str]) -> np.ndarray:
    """log p of each text after begin-of-text, in nats; the first token counts only where something stands before it."""
    tokenizer = model.tokenizer
    sequences = []
    for row, ids in enumerate(tokenizer.encode_text(texts)):
        tokens_T = np.array([*tokenizer.begin_ids, *ids], dtype=np.int32)
        weight_T = np.ones(len(tokens_T), dtype=np.float32)
        weight_T[0] = 0
        sequences.append(Sequence(tokens_T, weight_T, row))
    return model.row_logprobs(sequences, num_rows=len(texts), max_tokens=PACK_TOKENS, min_shared=4)
