"""Two sets of rows that share none: numbers against those of a naive computation and of scipy."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from tunesmith.evaluate.metric import FRACTION, MEAN
from tunesmith.evaluate.metrics import METRICS
from tunesmith.evaluate.unpaired import apart, side_permutation

FIRST_B = np.array([True] * 4 + [False] * 6)


def test_the_p_value_is_the_share_of_all_divisions_that_are_as_far_apart() -> None:
    rows_B = np.array([5.0, 7.0, 3.0, 6.0, 1.0, 2.0, 4.0, 2.5, 3.5, 0.5])
    distances = []
    for chosen in combinations(range(10), 4):
        is_first = np.isin(np.arange(10), chosen)
        distances.append(abs(rows_B[is_first].mean() - rows_B[~is_first].mean()))
    observed = abs(rows_B[:4].mean() - rows_B[4:].mean())
    exact = np.mean(np.array(distances) >= observed - 1e-12)
    (found,) = side_permutation([(rows_B, MEAN)], first_B=FIRST_B, permutations=40_000)
    assert found == pytest.approx(exact, abs=4 * np.sqrt(exact / 40_000))


def test_several_scores_are_tested_each_as_if_it_were_alone() -> None:
    generator = np.random.default_rng(0)
    first_B = np.arange(60) < 25
    scored = [
        ((generator.random(60) < 0.5).astype(float), FRACTION),
        (np.stack([generator.gamma(2, 1, 60), np.full(60, 2.0)], axis=1), METRICS["perplexity"].aggregate),
    ]
    together = side_permutation(scored, first_B=first_B)
    assert together == [side_permutation([one], first_B=first_B)[0] for one in scored]


def test_rows_that_are_alike_are_rarely_told_apart_and_different_ones_are() -> None:
    generator = np.random.default_rng(1)
    p_values = []
    for seed in range(100):
        rows_B = (generator.random(80) < 0.7).astype(float)
        p_values += side_permutation([(rows_B, FRACTION)], first_B=np.arange(80) < 30, permutations=500, seed=seed)
    assert np.mean(np.array(p_values) < 0.05) <= 0.1
    rows_B = np.repeat([1.0, 0.0], 40)
    (found,) = side_permutation([(rows_B, FRACTION)], first_B=np.arange(80) < 40)
    assert found == pytest.approx(1e-4)  # no permutation of 9,999 is as extreme


def test_the_interval_is_about_that_of_welch_and_holds_the_difference() -> None:
    generator = np.random.default_rng(2)
    one, other = generator.normal(1.0, 1.0, 200), generator.normal(0.0, 2.0, 150)
    found = apart(one, other, aggregate=MEAN)
    low, high = stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    assert found.value == pytest.approx(one.mean() - other.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06)


def test_all_right_against_all_right_is_no_certainty() -> None:
    found = apart(np.ones(20), np.ones(30), aggregate=FRACTION)
    assert found.value == 0
    assert found.low < -0.05
    assert found.high > 0.03
