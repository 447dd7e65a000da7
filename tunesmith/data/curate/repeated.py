"""Rows that repeat or contradict earlier ones, in their file and in another: what duplicates.py finds, as problems."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from tunesmith.data.curate.duplicates import GRAM, MAX_PAIRS, MIN_JACCARD, Repeat, Repeats
from tunesmith.data.ledger import Problem
from tunesmith.data.types import Example, Origin

Again = Callable[[], Iterable[Example]]  # reads all rows a second time, in the same order


class Repeated:
    """Looks for exact, nearly equal and contradicting rows, and for rows that stand in another file too.

    again: reads the rows of both files once more, for those that may be alike. The rows of the other file come first,
    to `other`. min_jaccard, gram: as `Repeats` has them. `exact_rows` are the numbers of the checked rows that repeat an
    earlier one exactly.
    """

    name = "duplicates"

    def __init__(self, again: Again, *, min_jaccard: float = MIN_JACCARD, gram: int = GRAM):
        self.again = again
        self.exact_rows: list[int] = []
        self._repeats = Repeats(min_jaccard=min_jaccard, gram=gram)

    def other(self, examples: Iterable[Example]) -> None:
        """Take the rows of the file to compare with, before the first of those that are checked."""
        for example in examples:
            self._repeats.add(example)
        self._repeats.start()

    def look(self, example: Example) -> Iterator[Problem]:
        """Take the next row; nothing can be said before the last one."""
        self._repeats.add(example)
        yield from ()

    def finish(self) -> Iterator[Problem]:
        """All repeats, leaks and contradictions."""
        leaked = np.zeros(self._repeats.num_rows, bool)
        for leak in self._repeats.leaks():
            leaked[leak.row] = True
            words = "row" if leak.how == "exact" else "prompt (case and punctuation apart)"
            message = f"the same {words} stands in the other file"
            yield self._problem("leak", "error", leak, message, hint="remove it from one of the two files")
        for repeat in self._repeats.repeats():
            if repeat.how == "exact":
                self.exact_rows.append(repeat.row - self._repeats.first)
                message, hint = "repeats an earlier row", "to leave it out, set data.duplicates: drop"
                yield self._problem("exact_duplicate", "warning", repeat, message, hint=hint)
            else:
                message = "repeats an earlier row but for case, quotes, punctuation or white space"
                yield self._problem("near_duplicate", "warning", repeat, message)
        for contradiction in self._repeats.contradictions():
            message = "has the prompt of an earlier row and another answer"
            yield self._problem("contradiction", "warning", contradiction, message, hint="keep the right one")
        first = self._repeats.first
        pairs = [(row, other) for row, other in self._repeats.candidates() if other >= first or not leaked[row]]
        for repeat in self._near(pairs):
            if repeat.other < first:
                message = "nearly the same row stands in the other file"
                yield self._problem("leak", "warning", repeat, message, hint="remove it from one of the two files")
            else:
                yield self._problem("near_duplicate", "warning", repeat, "repeats an earlier row nearly word for word")
        if len(pairs) >= MAX_PAIRS:
            message = f"near repeats were looked for in the first {MAX_PAIRS:,} likely pairs only; there may be more"
            yield Problem("quality", "warning", self._repeats.origin(first).file, 1, message)

    def _problem(self, kind: str, severity: str, repeat: Repeat, message: str, *, hint: str = "") -> Problem:
        origin, other = self._repeats.origin(repeat.row), self._repeats.origin(repeat.other)
        return Problem(kind, severity, *origin, message=f"{message} ({other})", other=other, hint=hint)

    def _near(self, candidates: list[tuple[int, int]]) -> Iterator[Repeat]:
        """Of the candidates, those that are alike; each row is kept only while a pair still needs it."""
        partners: dict[int, list[int]] = {}
        last_use: dict[int, int] = {}
        for row, other in candidates:
            partners.setdefault(row, []).append(other)
            last_use[row] = max(row, last_use.get(row, 0))
            last_use[other] = max(row, last_use.get(other, 0))
        numbers = {self._repeats.origin(number): number for number in last_use}
        kept: dict[int, Example] = {}
        for number, example in self._read_again(numbers):
            kept[number] = example
            for other in partners.get(number, ()):
                if other in kept and self._repeats.is_near(example, kept[other]):
                    yield Repeat(number, other, "near")
            for old in (number, *partners.get(number, ())):
                if last_use[old] <= number:
                    kept.pop(old, None)

    def _read_again(self, numbers: dict[Origin, int]) -> Iterator[tuple[int, Example]]:
        """The wanted rows of both files, in the order of their numbers."""
        for example in self.again() if numbers else ():
            if example.origin in numbers:
                yield numbers[example.origin], example
