"""What a head says of rows: classes, numbers or tags. Shapes: B rows, K classes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
OUTSIDE = "O"  # the tag of a word that is part of no entity
NO_ANSWER = "(do not know)"


@dataclass(frozen=True)
class Classes:
    """Probabilities [B, K] of the `labels`, and which of them are the answer, [B, K] bool; no answer where none is."""

    labels: tuple[str, ...]
    probability_BK: Floats
    decided_BK: NDArray[np.bool_]
    several: bool = False
    hierarchy: str | None = None

    def texts(self) -> list[str]:
        """The answers as text; several labels in the order of the alphabet with commas between."""
        none = "" if self.several else NO_ANSWER  # of several classes none is an answer too
        return [", ".join(sorted(np.array(self.labels)[row].tolist())) or none for row in self.decided_BK]

    def documents(self, *, most: int = 5) -> list[dict[str, Any]]:
        """What scripts read: the labels, and the probabilities of the most likely."""
        documents = []
        for probability_K, decided_K in zip(self.probability_BK, self.decided_BK, strict=True):
            likely = np.argsort(-probability_K, kind="stable")[:most]
            documents.append(
                {
                    "labels": [self.labels[k] for k in np.flatnonzero(decided_K)],
                    "probabilities": {self.labels[k]: round(float(probability_K[k]), 6) for k in likely},
                }
            )
        return documents


@dataclass(frozen=True)
class Numbers:
    """Estimates [B], and the bounds of an interval that holds a share `coverage` of them; NaN where none is known."""

    estimate_B: Floats
    low_B: Floats
    high_B: Floats
    coverage: float

    def texts(self) -> list[str]:
        """The estimates as text."""
        return [f"{value:.6g}" for value in self.estimate_B]

    def documents(self) -> list[dict[str, Any]]:
        """What scripts read: the estimate and its interval."""
        rows = zip(self.estimate_B.tolist(), self.low_B.tolist(), self.high_B.tolist(), strict=True)
        known = bool(np.isfinite(self.low_B).all())
        return [{"estimate": e} | ({"low": low, "high": high} if known else {}) for e, low, high in rows]


@dataclass(frozen=True)
class Tags:
    """A tag for each word of each row."""

    rows: tuple[tuple[str, ...], ...]

    def texts(self) -> list[str]:
        """The tags with spaces between them."""
        return [" ".join(tags) for tags in self.rows]

    def documents(self) -> list[dict[str, Any]]:
        """What scripts read: the tags, and the entities as [kind, first word, one past the last]."""
        found = [sorted(entities(tags), key=_place) for tags in self.rows]
        return [{"tags": list(t), "entities": list(map(list, e))} for t, e in zip(self.rows, found, strict=True)]

    def filled(self, lengths: list[int]) -> "Tags":
        """With O for words at the end that were not read."""
        return Tags(tuple(t + (OUTSIDE,) * (n - len(t)) for t, n in zip(self.rows, lengths, strict=True)))


def _place(entity: tuple[str, int, int]) -> tuple[int, int, str]:
    return entity[1], entity[2], entity[0]


def entities(tags: tuple[str, ...]) -> set[tuple[str, int, int]]:
    """(kind, first, one past the last) of each entity, read as conlleval does: B and S begin, E and S end, O is none.

    A tag without such a mark is an entity's kind (IO notation); I and E after another kind begin an entity of their own.
    """
    found, start, kind = set(), 0, ""
    for place, tag in enumerate((*tags, OUTSIDE)):
        mark, dash, name = tag.partition("-")
        if not dash or mark not in ("B", "I", "E", "S", "L", "U"):
            mark, name = ("O", "") if tag == OUTSIDE else ("I", tag)
        if kind and (mark in ("O", "B", "S", "U") or name != kind):
            found.add((kind, start, place))
            kind = ""
        if name and not kind:
            kind, start = name, place
        if kind and mark in ("E", "S", "L", "U"):
            found.add((kind, start, place + 1))
            kind = ""
    return found


Answer = Classes | Numbers | Tags
