"""Answers that are labels: one class only or nearly, classes with few rows, one label in two spellings.

Classes are called uneven where a classifier misses the small one more often than it finds it (benchmarks/thresholds.py): of
two, from 90 % of the rows on, always; of more, where one has 50 times the rows of another, always as well. Below, it depends
on the words, and on whether the small class has rows enough in itself, so nothing is said.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from tunesmith.data.curate.duplicates import normalise
from tunesmith.data.ledger import Problem
from tunesmith.data.types import Example, Origin

MAX_LABELS = 1_000
MAX_LABEL_CHARACTERS = 64
MAX_SPELLINGS = 1_000  # in all, besides the first of each label
MAX_PLACES = 100  # of each spelling
ROWS_A_LABEL = 3  # fewer rows a distinct answer on average, and the answers are not labels
MIN_ROWS_FOR_RARE = 10
MIN_ROWS_FOR_SHARES = 50
MAX_CLASS_SHARE = 0.9
MAX_CLASS_RATIO = 50


@dataclass
class _Spelling:
    """A way to write a label: how many rows have it, and where the first of them stand."""

    text: str
    num_rows: int = 0
    origins: list[Origin] = field(default_factory=list)


@dataclass
class _Label:
    """A label in all its spellings; the usual one is that of most rows, of equals the first."""

    spellings: dict[str, _Spelling] = field(default_factory=dict)
    num_rows: int = 0

    @property
    def usual(self) -> _Spelling:
        return max(self.spellings.values(), key=lambda spelling: spelling.num_rows)

    @property
    def spelling(self) -> str:
        return self.usual.text

    @property
    def origin(self) -> Origin:
        return self.usual.origins[0]


class Labels:
    """Counts the answers of a file as long as they may be labels: few, short, and not JSON.

    `certain` says that they are (the file has a label column), however few rows there are. max_class_share,
    max_class_ratio: beyond which share of the rows, and how many times another class, a class is told.
    """

    name = "labels"

    def __init__(self, *, max_class_share: float = MAX_CLASS_SHARE, max_class_ratio: float = MAX_CLASS_RATIO) -> None:
        self.max_class_share, self.max_class_ratio = max_class_share, max_class_ratio
        self.certain = False
        self.num_rows = 0
        self._labels: dict[str, _Label] = {}
        self._num_spellings = 0
        self._given_up = False

    def look(self, example: Example) -> Iterator[Problem]:
        """Count the row's answer or label; nothing can be said before the last one."""
        if example.messages:
            self.add(example.messages[-1].content, origin=example.origin)
        elif isinstance(example.label, str):
            self.certain = True
            self.add(example.label, origin=example.origin)
        yield from ()

    def add(self, answer: str, *, origin: Origin) -> None:
        """Count one answer."""
        self.num_rows += 1
        if self._given_up:
            return
        if len(answer) > MAX_LABEL_CHARACTERS or answer.lstrip()[:1] in ("{", "[") or len(self._labels) > MAX_LABELS:
            self._given_up = True
            self._labels.clear()
            return
        label = self._labels.setdefault(normalise(answer), _Label())
        label.num_rows += 1
        if answer not in label.spellings and label.spellings:
            self._num_spellings += 1
            if self._num_spellings > MAX_SPELLINGS:
                return
        spelling = label.spellings.setdefault(answer, _Spelling(answer))
        spelling.num_rows += 1
        if len(spelling.origins) < MAX_PLACES:
            spelling.origins.append(origin)

    @property
    def are_labels(self) -> bool:
        """Whether the answers so far are labels."""
        if self._given_up or self.num_rows < 2:
            return False
        return self.certain or len(self._labels) * ROWS_A_LABEL <= self.num_rows

    @property
    def may_be_labels(self) -> bool:
        """Whether no answer so far rules it out."""
        return not self._given_up

    def finish(self) -> Iterator[Problem]:
        """What is odd about the labels; nothing where the answers are no labels."""
        if not self.are_labels:
            return
        for label in self._labels.values():
            usual = label.usual
            for odd in label.spellings.values():
                message = f"the label {odd.text!r} is written {usual.text!r} at {usual.origins[0]}"
                for origin in odd.origins if odd is not usual else ():
                    yield Problem(
                        "label_error",
                        "warning",
                        *origin,
                        message=message,
                        other=usual.origins[0],
                        hint="use one spelling",
                    )
        if len(self._labels) == 1:
            only = next(iter(self._labels.values()))
            message = (
                f"all {self.num_rows:,} rows have the same answer, {only.spelling!r}: there is nothing to tell apart"
            )
            yield Problem("imbalance", "warning", *only.origin, message=message, hint="add rows of the other classes")
        elif self.num_rows >= MIN_ROWS_FOR_RARE:
            for label in self._labels.values():
                if label.num_rows == 1:
                    message = f"the class {label.spelling!r} has a single row: it cannot be both trained and tested"
                    yield Problem("imbalance", "warning", *label.origin, message=message, hint="add rows of this class")
            yield from self._uneven()

    def _uneven(self) -> Iterator[Problem]:
        """One class that nearly all rows have, or one that is many times as large as another."""
        most = max(self._labels.values(), key=lambda label: label.num_rows)
        least = min(self._labels.values(), key=lambda label: (label.num_rows == 1, label.num_rows))
        hint = "add rows of the small classes, and compare by macro_f1"
        if self.num_rows >= MIN_ROWS_FOR_SHARES and most.num_rows > self.max_class_share * self.num_rows:
            message = (
                f"{most.num_rows / self.num_rows:.1%} of the rows have the class {most.spelling!r}: always answering it"
                " is right as often"
            )
            yield Problem("imbalance", "warning", *most.origin, message=message, hint=hint)
        elif 1 < least.num_rows < most.num_rows / self.max_class_ratio:
            message = (
                f"the class {least.spelling!r} has {least.num_rows:,} rows, {most.spelling!r} has {most.num_rows:,}:"
                f" {most.num_rows / least.num_rows:,.0f} times as many"
            )
            yield Problem("imbalance", "warning", *least.origin, message=message, other=most.origin, hint=hint)
