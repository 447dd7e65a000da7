"""Is one system better than another, by how much, and is that luck?

Both systems answered the same rows, so everything here is paired: rows are drawn together, never system by system.

Intervals are those of the Bayesian bootstrap (Rubin 1981): row i weighs w_i ~ Exponential(1), where Efron's bootstrap
weighs it by how often it is drawn. Every resample is then well defined, and the interval leans the right way for skewed
rows. Two corrections make 95 % mean 95 % on small test sets:

- the quantiles are Student's, Phi(-sqrt(n / (n - 1)) t_{n-1}), which undoes that a bootstrap of n rows is too narrow
  (Hesterberg 2015, "What teachers should know about the bootstrap");
- where a score has bounds, half a row is added at each. For rows of 0 and 1 this is Jeffreys' prior, Beta(1/2, 1/2);
  it is what keeps 120 right of 120 from being reported as "1.00 to 1.00".

On 30 rows the percentile interval covers the truth 79 % of the time for an event of probability 0.05 and 89 % for
exponential rows, BCa 79 % and 91 %; these intervals cover 98 % and 93 %. A mean over fewer than 100 rows with a very
heavy tail (log-normal, sigma 1) is beyond them: 89 %.

Shapes: B rows, C clusters (groups of rows that are drawn together; without groups every row is its own), S statistics
a row, R resamples. Rows are [B] or [B, S], see `metrics.py`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tunesmith.data.answers import Floats
from tunesmith.errors import DataError, NumericalError
from tunesmith.evaluate.metric import FRACTION, Aggregate, Metric, as_statistics
from tunesmith.evaluate.metrics import METRICS

RESAMPLES = 2000
PERMUTATIONS = 9999
CHUNK_NUMBERS = 4_000_000  # weights held at once: 32 MB whatever the number of rows
LEVEL = 0.95
Clusters = Sequence[Any] | NDArray[Any] | None
"""One label a row; rows with equal labels (turns of one conversation, questions on one passage) are drawn together."""


class Interval(NamedTuple):
    """A score, or a difference of two, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """`{"value", "low", "high"}`."""
        return self._asdict()


def interval(
    rows: Floats,
    *,
    aggregate: Aggregate = FRACTION,
    resamples: int = RESAMPLES,
    seed: int = 0,
    clusters: Clusters = None,
) -> Interval:
    """95 % interval of one system's score.

    rows: [B] or [B, S]. A single row (or cluster) gives the aggregate's bounds. Raises DataError for a single row of
    a score without bounds, for no rows, and NumericalError for NaN or infinity.
    """
    table = _Table.of([rows], clusters=clusters)
    return _interval(table, aggregate=aggregate, resamples=resamples, seed=seed)


def paired_bootstrap(
    rows_a: Floats,
    rows_b: Floats,
    *,
    aggregate: Aggregate = FRACTION,
    resamples: int = RESAMPLES,
    seed: int = 0,
    clusters: Clusters = None,
) -> Interval:
    """95 % interval of the difference a - b of two systems' scores on the same rows. Errors as in `interval`."""
    table = _Table.of([rows_a, rows_b], clusters=clusters)
    return _interval(table, aggregate=aggregate, resamples=resamples, seed=seed)


class _Table(NamedTuple):
    """The rows of one or two systems side by side, summed over clusters.

    sums_NCS: N = 1 or 2 systems. sizes_C: rows in each cluster. single: rows were [B], so bounds hold for each row too.
    """

    sums_NCS: Floats
    sizes_C: Floats
    single: bool

    @classmethod
    def of(cls, systems: list[Floats], *, clusters: Clusters) -> "_Table":
        systems = [np.asarray(rows, dtype=np.float64) for rows in systems]
        shapes = {rows.shape for rows in systems}
        if len(shapes) > 1:
            raise DataError(f"the systems have rows of different shapes: {sorted(shapes)}", hint="score the same rows")
        for rows in systems:
            if not np.isfinite(rows).all():
                row = int(np.argwhere(~np.isfinite(rows))[0, 0])
                raise NumericalError(
                    f"the score of row {row + 1} is not a finite number", hint="look at that row's output"
                )
        sums_NCS = np.stack([as_statistics(rows) for rows in systems])
        num_rows = sums_NCS.shape[1]
        if num_rows == 0:
            raise DataError("there are no rows to score", hint="give a test file with at least one row")
        if clusters is None:
            return cls(sums_NCS, np.ones(num_rows), systems[0].ndim == 1)
        if len(clusters) != num_rows:
            raise DataError(f"{len(clusters)} cluster labels for {num_rows} rows")
        _, cluster_B, counts_C = np.unique(np.asarray(clusters), return_inverse=True, return_counts=True)
        grouped_NCS = np.zeros((len(systems), len(counts_C), sums_NCS.shape[2]))
        for system, rows_BS in enumerate(sums_NCS):
            np.add.at(grouped_NCS[system], cluster_B, rows_BS)
        return cls(grouped_NCS, counts_C.astype(np.float64), systems[0].ndim == 1)

    @property
    def num_clusters(self) -> int:
        return len(self.sizes_C)

    def score(self, aggregate: Aggregate, *, sums_NRS: Floats, num_rows_R: Floats) -> Floats:
        """The score of one system, or the difference of two, for each of R sets of rows."""
        scores_NR = aggregate.of_sums(sums_NRS, num_rows_R)
        return scores_NR[0] - scores_NR[1] if len(scores_NR) == 2 else scores_NR[0]

    def observed(self, aggregate: Aggregate) -> float:
        """As `score`, of the rows as they are."""
        return float(
            self.score(aggregate, sums_NRS=self.sums_NCS.sum(1)[:, None], num_rows_R=self.sizes_C.sum(keepdims=True))[0]
        )

    def bounds(self, aggregate: Aggregate) -> tuple[float, float] | None:
        """Least and greatest value that `score` can take."""
        if aggregate.bounds is None:
            return None
        low, high = aggregate.bounds
        return (low - high, high - low) if len(self.sums_NCS) == 2 else (low, high)


def _chunks(total: int, *, width: int) -> Iterator[int]:
    """Sizes that add up to `total`, so small that size x width numbers fit in memory."""
    size = max(1, CHUNK_NUMBERS // max(1, width))
    for start in range(0, total, size):
        yield min(size, total - start)


def resampled(
    systems: list[Floats],
    *,
    aggregate: Aggregate = FRACTION,
    resamples: int = RESAMPLES,
    seed: int = 0,
    clusters: Clusters = None,
) -> Floats:
    """Scores [N, R] of N systems on the same rows, under the same random weights of the rows in each resample.

    For whatever is computed from several scores: its quantiles over R are its interval. Errors as in `interval`.
    """
    table = _Table.of(systems, clusters=clusters)
    bounds = None if aggregate.bounds is None else np.tile(aggregate.bounds, (len(systems), 1))
    return _bayesian_bootstrap(table, aggregate=aggregate, resamples=resamples, seed=seed, ends_N2=bounds)


def student_tail(num_clusters: int) -> float:
    """The share of resamples left out at each end, such that 95 % intervals of a bootstrap are as wide as Student's."""
    student = stats.t.ppf(0.5 + LEVEL / 2, num_clusters - 1) * math.sqrt(num_clusters / (num_clusters - 1))
    return float(stats.norm.cdf(-student))


def _interval(table: _Table, *, aggregate: Aggregate, resamples: int, seed: int) -> Interval:
    value, bounds, num_clusters = table.observed(aggregate), table.bounds(aggregate), table.num_clusters
    if num_clusters == 1:
        if bounds is None:
            raise DataError(
                "one row says nothing about luck", hint="give a test file with at least two rows, better 50"
            )
        return Interval(value, *bounds)
    two = len(table.sums_NCS) == 2
    ends = None
    if (
        aggregate.bounds is not None
    ):  # (low, high) of one system and (high, low) of the other, so that both ends are met
        ends = np.array([aggregate.bounds, aggregate.bounds[::-1]][: 1 + two])
    scores_NR = _bayesian_bootstrap(table, aggregate=aggregate, resamples=resamples, seed=seed, ends_N2=ends)
    tail = student_tail(num_clusters)
    low, high = np.quantile(scores_NR[0] - scores_NR[1] if two else scores_NR[0], [tail, 1 - tail])
    return Interval(value, min(value, float(low)), max(value, float(high)))


def _bayesian_bootstrap(
    table: _Table, *, aggregate: Aggregate, resamples: int, seed: int, ends_N2: Floats | None
) -> Floats:
    """[N, R] scores under random weights of the clusters, scaled to the number of clusters.

    Where a row has bounds, half a cluster is added at each of `ends_N2`, the least and greatest a row can be.
    """
    generator = np.random.default_rng(seed)
    num_systems, num_clusters, num_statistics = table.sums_NCS.shape
    columns_CK = np.concatenate([*table.sums_NCS, table.sizes_C[:, None]], axis=1)
    scores = []
    for size in _chunks(resamples, width=num_clusters):
        weights_RC = generator.standard_exponential((size, num_clusters))
        sums_RK, total_R = weights_RC @ columns_CK, weights_RC.sum(axis=1)
        if table.single and ends_N2 is not None:
            ends_2K = np.concatenate([ends_N2.T, np.ones((2, 1))], axis=1) * table.sizes_C.mean()
            weights_R2 = generator.standard_gamma(0.5, (size, 2))
            sums_RK, total_R = sums_RK + weights_R2 @ ends_2K, total_R + weights_R2.sum(axis=1)
        sums_RK *= (num_clusters / total_R)[:, None]
        sums_NRS = sums_RK[:, :-1].reshape(size, num_systems, num_statistics).swapaxes(0, 1)
        scores.append(aggregate.of_sums(sums_NRS, sums_RK[:, -1]))
    return np.concatenate(scores, axis=1)


# ---- is it luck ------------------------------------------------------------------------------------------------------


def mcnemar(rows_a: Floats, rows_b: Floats) -> float:
    """Two-sided p-value of McNemar's exact test for 0/1 rows [B]: of the rows on which the systems differ, are as many
    won by one as by the other?"""
    rows_a, rows_b = np.asarray(rows_a), np.asarray(rows_b)
    assert np.isin(np.stack([rows_a, rows_b]), (0, 1)).all(), "McNemar's test is for rows of 0 and 1"
    wins, losses = int((rows_a > rows_b).sum()), int((rows_a < rows_b).sum())
    return float(min(1.0, 2.0 * stats.binom.cdf(min(wins, losses), wins + losses, 0.5)))


def permutation(
    rows_a: Floats,
    rows_b: Floats,
    *,
    aggregate: Aggregate = FRACTION,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    clusters: Clusters = None,
) -> float:
    """Two-sided p-value: how often is the difference as large when each row's two answers are swapped at random?

    Rows are [B] or [B, S]; of a cluster all rows are swapped or none. Never 0: the rows as they are count as one of
    the permutations (Phipson and Smyth 2010). Errors as in `interval`.
    """
    table = _Table.of([rows_a, rows_b], clusters=clusters)
    generator = np.random.default_rng(seed)
    total_N1S, num_rows = table.sums_NCS.sum(axis=1)[:, None], table.sizes_C.sum(keepdims=True)
    change_CS = table.sums_NCS[1] - table.sums_NCS[0]
    change_CS = change_CS[(change_CS != 0).any(axis=1)]  # to swap equal answers changes nothing
    observed = abs(table.observed(aggregate))
    threshold = observed - 1e-9 * max(1.0, observed)  # a tie is as extreme, whatever the order of summation
    as_extreme = 1
    for size in _chunks(permutations, width=len(change_CS)):
        swapped_RC = generator.integers(0, 2, (size, len(change_CS)), dtype=np.int8)
        moved_RS = swapped_RC.astype(np.float64) @ change_CS
        sums_NRS = np.concatenate([total_N1S[:1] + moved_RS, total_N1S[1:] - moved_RS])
        as_extreme += int((np.abs(table.score(aggregate, sums_NRS=sums_NRS, num_rows_R=num_rows)) >= threshold).sum())
    return as_extreme / (permutations + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, in the order given: the step-down method of Holm (1979).

    Rejecting those below 0.05 makes one false rejection or more at most 5 % of the time, however they depend on each other.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


# With all differences in one direction, six rows are the fewest with p < 0.05 (2 / 2**6). To see six or more with
# probability 0.8, 7.9 must be expected (Poisson).
FEWEST_DIFFERING_ROWS = 6


def detectable(
    rows_a: Floats, rows_b: Floats, *, aggregate: Aggregate = FRACTION, power: float = 0.8, clusters: Clusters = None
) -> float | None:
    """The smallest true difference that this many rows would have shown at p < 0.05 with probability `power`.

    (t + z) times the jackknife's standard error, and for rows [B] at least what it takes to see six differing rows.
    None where it cannot be told: the two never differ (or there is one row) and the score has no bounds.
    """
    table = _Table.of([rows_a, rows_b], clusters=clusters)
    num_clusters, bounds = table.num_clusters, table.bounds(aggregate)
    at_least = 0.0
    if table.single:
        differences_C = np.abs(table.sums_NCS[0, :, 0] - table.sums_NCS[1, :, 0]) / table.sizes_C
        differing = differences_C[differences_C > 0]
        typical = float(differing.mean()) if len(differing) else (bounds[1] if bounds else 0.0)
        expected_rows = float(stats.gamma.ppf(power, FEWEST_DIFFERING_ROWS))
        at_least = expected_rows / num_clusters * typical
    if num_clusters > 1:
        at_least = max(
            at_least, _power_multiple(num_clusters, power=power) * _jackknife_error(table, aggregate=aggregate)
        )
    return at_least or None


def _power_multiple(num_clusters: int, *, power: float) -> float:
    return float(stats.t.ppf(0.5 + LEVEL / 2, num_clusters - 1) + stats.norm.ppf(power))


def _jackknife_error(table: _Table, *, aggregate: Aggregate) -> float:
    """Standard error of the score or difference, from leaving out each cluster in turn."""
    num_clusters = table.num_clusters
    left_NCS = table.sums_NCS.sum(axis=1, keepdims=True) - table.sums_NCS
    scores_C = table.score(aggregate, sums_NRS=left_NCS, num_rows_R=table.sizes_C.sum() - table.sizes_C)
    return float(math.sqrt((num_clusters - 1) ** 2 / num_clusters * scores_C.var(ddof=1)))


# ---- what is reported ------------------------------------------------------------------------------------------------


def compare(
    rows_a: Floats, rows_b: Floats, *, metric: Metric, seed: int = 0, clusters: Clusters = None
) -> dict[str, float | int | str | None]:
    """One entry of "differences" in evaluation.json, for a - b:
    `{"value", "low", "high", "p", "test", "better_rows", "worse_rows", "detectable"}`.

    `better_rows` counts the rows on which a is better than b in the metric's own direction. Errors as in `interval`.
    """
    rows_a, rows_b = np.asarray(rows_a, dtype=np.float64), np.asarray(rows_b, dtype=np.float64)
    difference = paired_bootstrap(rows_a, rows_b, aggregate=metric.aggregate, seed=seed, clusters=clusters)
    exact = metric.right_or_wrong and clusters is None
    if exact:
        p_value = mcnemar(rows_a, rows_b)
    else:
        p_value = permutation(rows_a, rows_b, aggregate=metric.aggregate, seed=seed, clusters=clusters)
    gain_B = metric.row_values(rows_a) - metric.row_values(rows_b)
    if not metric.higher_is_better:
        gain_B = -gain_B
    return {
        **difference.as_dict(),
        "p": p_value,
        "test": "mcnemar" if exact else "permutation",
        "better_rows": int((gain_B > 0).sum()),
        "worse_rows": int((gain_B < 0).sum()),
        "detectable": detectable(rows_a, rows_b, aggregate=metric.aggregate, clusters=clusters),
    }


SIGNIFICANCE = 0.05


def verdict(
    metrics: Mapping[str, Any], *, primary: str, rows: int, systems: tuple[str, str] = ("tuned", "base")
) -> tuple[str, str]:
    """("better" | "worse" | "undecided", a sentence for people) on the first of `systems` against the second.

    metrics: the "metrics" of evaluation.json. primary: the metric that decides. rows: rows of the test set. Decided
    only if the interval excludes 0 and p < 0.05.
    """
    ours, theirs = systems
    entry = metrics[primary]
    difference = entry["differences"][f"{ours} - {theirs}"]
    low, high, p_value = difference["low"], difference["high"], difference["p"]
    places = decimals(high - low)
    scores = " against ".join(f"{entry['systems'][system]['value']:.{places}f}" for system in systems)
    numbers = f"{scores}, difference {difference['value']:.{places}f}"
    evidence = f"95 % interval {low:.{places}f} to {high:.{places}f}, {p_text(p_value)}, {count_text(rows)}"
    if p_value < SIGNIFICANCE and (low > 0 or high < 0):
        if (low > 0) == entry["higher_is_better"]:
            return "better", f"{ours} beats {theirs} on {primary}: {numbers} ({evidence})"
        return "worse", f"{ours} is worse than {theirs} on {primary}: {numbers} ({evidence})"
    could = could_have_shown(difference["detectable"], primary=primary, rows=rows)
    return "undecided", f"{ours} and {theirs} cannot be told apart on {primary}: {numbers} ({evidence}); {could}"


def could_have_shown(smallest: float | None, *, primary: str, rows: int) -> str:
    """How large a difference the rows could have shown, as a clause."""
    bounds = METRICS[primary].aggregate.bounds if primary in METRICS else None
    if smallest is None:
        return "the two scored the same on every row"
    if bounds is not None and smallest > bounds[1] - bounds[0]:
        return (
            f"{count_text(rows)} are too few to show any difference" if rows > 1 else "one row cannot show a difference"
        )
    return f"these rows could have shown a difference of {smallest:.{decimals(smallest)}f} or more"


NO_WIDTH = 1e-9


def decimals(width: float) -> int:
    """Decimal places that give `width` two significant digits, at most 6; 2 for a width of nothing but rounding."""
    return min(6, max(0, 1 - math.floor(math.log10(width)))) if width > NO_WIDTH else 2


def p_text(p_value: float) -> str:
    """`p < 0.001` or `p = 0.034`."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.{2 if p_value >= 0.0995 else 3}f}"


def count_text(rows: int) -> str:
    """`1 row`, `1,200 rows`."""
    return f"{rows:,} row{'' if rows == 1 else 's'}"
