"""What a metric is.

A metric gives every test row a score, or a few counts from which a score of the whole set follows (corpus BLEU,
perplexity). Everything said about a set of rows is a function of the *sum* of its rows, so an interval or a p-value
resamples numbers and never reads a text twice:

    score of a set = of_sums(sum over rows of rows_BS, number of rows)

Shapes: B rows of the test set, S statistics of a row. Rows are [B] where the score of a set is the mean of its rows
and [B, S] otherwise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tunesmith.data.answers import Floats
from tunesmith.errors import DataError

References = Sequence[str] | Sequence[Sequence[str]]
"""One reference a row, or several of which the best counts."""


@dataclass(frozen=True, slots=True)
class Aggregate:
    """The score of a set of rows, as a function of the sum of its rows.

    of_sums: (sums [..., S], number of rows [...]) -> scores [...].
    of_row: the same for a single row; `of_sums` with one row where a set and a row are scored alike.
    bounds: least and greatest score, None where there is no such number.
    """

    of_sums: Callable[[Floats, Floats], Floats]
    of_row: Callable[[Floats, Floats], Floats] | None = None
    bounds: tuple[float, float] | None = None

    def __call__(self, rows: Floats) -> float:
        """The score of `rows` ([B] or [B, S]); raises DataError if there are none."""
        if len(rows) == 0:
            raise DataError("there are no rows to score", hint="give a test file with at least one row")
        return float(self.of_sums(as_statistics(rows).sum(axis=0), np.asarray(len(rows))))

    def row_values(self, rows: Floats) -> Floats:
        """The score of every row alone, [B]."""
        return (self.of_row or self.of_sums)(as_statistics(rows), np.ones(len(rows)))


def as_statistics(rows: Floats) -> Floats:
    """`rows` as [B, S], S = 1 for [B]."""
    return rows[:, None] if rows.ndim == 1 else rows


@dataclass(frozen=True, slots=True)
class Metric:
    """One way to score.

    score: (predictions, references) -> rows for `reads == "text"`; for `reads == "likelihood"` keyword arrays [B]:
        `negative_log_likelihood` (nats, summed over the row's target tokens) and `tokens` or `bytes`; for "samples" the
        keyword `samples` (the drawn answers of each row); for "classes", "numbers" and "tags" `predicted` (Classes,
        Numbers, Tags) and `truth` ([B, K] bool, [B], or tags of each row).
    right_or_wrong: rows are 0 or 1, so two systems are compared with McNemar's exact test.
    needs: what the score takes as keywords: settings of `evaluate`, as `chosen.py` reads them, and `examples`.
    """

    name: str
    description: str
    score: Callable[..., Floats]
    aggregate: Aggregate
    higher_is_better: bool = True
    right_or_wrong: bool = False
    reads: Literal["text", "likelihood", "classes", "numbers", "tags", "samples"] = "text"
    needs: tuple[str, ...] = ()

    def score_rows(self, predictions: Sequence[str] = (), references: References = (), **context: Any) -> Floats:
        """Scores of the rows, [B] or [B, S] float64.

        Text metrics read `predictions` and `references` (equally many; a reference may be a list of texts, of which
        the best match counts), and in `context` what they need. Likelihood metrics read `context`, see the class. Raises
        DataError where the numbers of rows differ or a reference cannot be read by this metric.
        """
        if self.reads != "text":
            return self.score(**context)
        if len(predictions) != len(references):
            raise DataError(f"{self.name}: {len(predictions)} predictions for {len(references)} references")
        several = [[texts] if isinstance(texts, str) else list(texts) for texts in references]
        for number, texts in enumerate(several, start=1):
            if not texts:
                raise DataError(f"{self.name}: row {number} has no reference", hint="give each test row an answer")
        return self.score(list(predictions), several, **context)

    def row_values(self, rows: Floats) -> Floats:
        """One number a row, [B], for tables and for counting rows that became better; on the metric's own scale."""
        return self.aggregate.row_values(rows)


def _mean_of_sums(sums: Floats, num_rows: Floats) -> Floats:
    return sums[..., 0] / num_rows


MEAN = Aggregate(_mean_of_sums)
FRACTION = Aggregate(_mean_of_sums, bounds=(0.0, 1.0))
