"""Rows with defects that are known, because they were put there."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Planted:
    """Rows for one check: those numbered in `expected` (from 0) have the defect, in one grade of difficulty.

    `files` are further files that the check needs, by name: their rows.
    """

    check: str
    grade: str
    rows: list[dict[str, Any]]
    expected: set[int]
    files: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
