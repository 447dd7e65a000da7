"""Rows whose answer their question does not explain, or that a model finds far less likely than the others.

    s(A | Q), s(A)      nats a token of the answer behind its question, and without it (evaluate/difficulty.py)
    s(A | Q) >= s(A)    an instruction-following difficulty of 1: the question makes the answer no likelier, so it may be
                        another question's (Li et al. 2024, section 2.2, who leave such rows out)
    s far out           more than FAR robust standard deviations above the file's median: noise, or another language

What a small model does not see is told of too: these are scores to look at, worth what the model is. 16 bytes a row.
"""

import math
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.data.curate.base import Places
from tunesmith.data.ledger import Problem
from tunesmith.data.types import Example

FAR = 5.0
MAX_IDLE_SHARE = 0.5  # of the rows with a question: where more are idle, it is the base that understands none of them
SCORED_ROWS = 256


@dataclass(frozen=True)
class Scorer:
    """A model that scores rows: float64 [rows, 2] of s(A | Q) and s(A), NaN where there is none.

    `files` are those it is read from, each with its SHA-256.
    """

    score: Callable[[list[Example]], np.ndarray]
    files: tuple[str, ...] = ()


class Difficulty:
    """Scores every row with a model; needs a pass of it over all of them.

    Afterwards `nats_N2` holds the scores and `places` the rows they are of.
    """

    name = "difficulty"

    def __init__(self, scorer: Scorer):
        self.scorer, self.places = scorer, Places()
        self._scores = array("d")
        self._waiting: list[Example] = []

    @property
    def nats_N2(self) -> np.ndarray:
        """s(A | Q) and s(A) of each row, in nats a token."""
        return np.frombuffer(self._scores).reshape(-1, 2)

    def look(self, example: Example) -> Iterator[Problem]:
        """Score the row, together with others."""
        self.places.add(example.origin)
        self._waiting.append(example)
        if len(self._waiting) == SCORED_ROWS:
            self._score()
        yield from ()

    def finish(self) -> Iterator[Problem]:
        """The rows far out, and those whose question says nothing."""
        self._score()
        behind_N, alone_N = self.nats_N2.T
        known_N = np.isfinite(behind_N)
        median = float(np.median(behind_N[known_N])) if known_N.any() else 0.0
        deviation = 1.4826 * float(np.median(np.abs(behind_N[known_N] - median))) if known_N.any() else 0.0
        with np.errstate(invalid="ignore"):  # what is not known is neither
            far_N = behind_N > median + FAR * deviation if deviation else np.zeros(len(behind_N), bool)
            idle_N = behind_N >= alone_N
        num_idle, num_asked = int(idle_N.sum()), int(np.isfinite(alone_N).sum())
        if num_idle > MAX_IDLE_SHARE * num_asked and num_idle > 1:
            rows = f"{num_idle:,} of {num_asked:,} rows"
            message = f"the question makes the answer no likelier in {rows}, this the first of them"
            hint = "the base does not see what the questions tell; score with a larger one"
            first = self.places[int(np.flatnonzero(idle_N)[0])]
            yield Problem("difficulty", "warning", *first, message=message, hint=hint)
            idle_N = np.zeros(len(idle_N), bool)
        for row in np.flatnonzero(far_N | idle_N).tolist():
            if far_N[row]:
                message = f"unlikely: perplexity {np.exp(behind_N[row]):,.0f}, and {np.exp(median):,.0f} in the middle"
            else:
                ratio = behind_N[row] / alone_N[row]
                message = f"the question makes the answer no likelier (instruction-following difficulty {ratio:.2f})"
            yield Problem("difficulty", "warning", *self.places[row], message=message, hint="look at the row")

    def summary(self) -> dict[str, Any]:
        """For the report: how many rows have scores, and quantiles of them."""
        behind_N, alone_N = self.nats_N2.T
        document: dict[str, Any] = {"rows": int(np.isfinite(behind_N).sum())}
        for name, score_N in (("perplexity", np.exp(behind_N)), ("difficulty", behind_N / alone_N)):
            known = score_N[np.isfinite(score_N)]
            if len(known):
                document[name] = dict(
                    zip(("p5", "median", "p95"), np.percentile(known, [5, 50, 95]).tolist(), strict=True)
                )
        return document

    def rows(self) -> Iterator[dict[str, Any]]:
        """The scores of each row, in order; null where there is none."""
        for row, (behind, alone) in enumerate(self.nats_N2.tolist()):
            values = {"perplexity": math.exp(behind), "difficulty": behind / alone}
            known = {name: value if math.isfinite(value) else None for name, value in values.items()}
            yield {"file": self.places[row].file, "line": self.places[row].line} | known

    def _score(self) -> None:
        if self._waiting:
            self._scores.extend(self.scorer.score(self._waiting).ravel())
            self._waiting = []
