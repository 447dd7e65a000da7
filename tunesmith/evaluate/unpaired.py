"""Two sets of rows that share none: how far apart their scores are, and is that luck?

The interval draws each set on its own with the Bayesian bootstrap of statistics.py; the p-value is the share of random
divisions of all rows into sets of these sizes whose scores are as far apart.

Shapes: A and B rows of the two sets, K statistics of a row, R resamples.
"""

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.answers import Floats
from tunesmith.evaluate.metric import Aggregate, as_statistics
from tunesmith.evaluate.statistics import CHUNK_NUMBERS, PERMUTATIONS, Interval, resampled, student_tail


def apart(rows_a: Floats, rows_b: Floats, *, aggregate: Aggregate, seed: int = 0) -> Interval:
    """The difference a - b of the scores of two sets of two rows or more ([A] or [A, K]), with its 95 % interval."""
    drawn_a, drawn_b = (
        resampled([rows], aggregate=aggregate, seed=seed + number)[0] for number, rows in enumerate((rows_a, rows_b))
    )
    tail = student_tail(min(len(rows_a), len(rows_b)))
    value = aggregate(rows_a) - aggregate(rows_b)
    low, high = np.quantile(drawn_a - drawn_b, [tail, 1 - tail])
    return Interval(value, min(value, float(low)), max(value, float(high)))


def side_permutation(
    scored: list[tuple[Floats, Aggregate]],
    *,
    first_B: NDArray[np.bool_],
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> list[float]:
    """Two-sided p-values of several scores of the same rows ([B] or [B, K]): the rows of `first_B` against the others.

    Never 0: the rows as they are count as one of the permutations (Phipson and Smyth 2010).
    """
    tables = [as_statistics(rows) for rows, _ in scored]
    rows_BK = np.concatenate(tables, axis=1)
    ends = np.cumsum([table.shape[1] for table in tables])[:-1]
    total_K, num_first, num_rows = rows_BK.sum(axis=0), int(first_B.sum()), len(first_B)

    def distances(first_RB: Floats) -> list[Floats]:
        first_RK = first_RB @ rows_BK
        sides = zip(np.split(first_RK, ends, axis=1), np.split(total_K - first_RK, ends, axis=1), strict=True)
        sizes = np.asarray(num_first), np.asarray(num_rows - num_first)
        return [
            np.abs(of.of_sums(first, sizes[0]) - of.of_sums(second, sizes[1]))
            for (first, second), (_, of) in zip(sides, scored, strict=True)
        ]

    observed = [float(found[0]) for found in distances(first_B[None].astype(np.float64))]
    thresholds = [value - 1e-9 * max(1.0, value) for value in observed]  # a tie is as extreme, however it was summed
    generator = np.random.default_rng(seed)
    as_extreme = [1] * len(scored)
    size = max(1, CHUNK_NUMBERS // num_rows)
    for start in range(0, permutations, size):
        shape = min(size, permutations - start), num_rows
        shuffled_RB = generator.permuted(np.broadcast_to(first_B, shape), axis=1)
        for number, found in enumerate(distances(shuffled_RB.astype(np.float64))):
            as_extreme[number] += int((found >= thresholds[number]).sum())
    return [count / (permutations + 1) for count in as_extreme]
