"""Rows with defects planted in them, at graded difficulty: one module a family of checks, each with a `planted`."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Planted:
    """A corpus: `rows` as a file would hold them, and in `expected` the numbers, from 1, of those with the defect.

    check: the name of the check that should find them. grade: `easy`, `medium` or `hard`, after the sort of the defect
    where the check knows several (`echo, hard`). Rows with a `label` are read as texts with labels. `files` are further
    files that the check needs, by name: their rows.
    """

    check: str
    grade: str
    rows: list[dict[str, Any]]
    expected: set[int]
    files: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
