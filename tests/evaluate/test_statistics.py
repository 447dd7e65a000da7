"""Intervals that cover, tests that do not cry wolf: checked by simulation, and against closed forms."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tunesmith.errors import DataError, NumericalError
from tunesmith.evaluate import statistics
from tunesmith.evaluate.metric import FRACTION, MEAN
from tunesmith.evaluate.metrics import METRICS
from tunesmith.evaluate.statistics import (
    Interval,
    compare,
    decimals,
    detectable,
    interval,
    mcnemar,
    p_text,
    paired_bootstrap,
    permutation,
    verdict,
)

SIMULATIONS = 400
RESAMPLES = 800
LEAST, MOST = 0.925, 0.995  # 95 % give or take two standard errors of 400 simulations; few distinct values cover more


def graded(generator, shape):
    """Scores like token F1: often 0, often 1, else between. Mean 0.5."""
    kind, between = generator.random(shape), generator.beta(2, 2, shape)
    return np.where(kind < 0.3, 0.0, np.where(kind < 0.6, 1.0, between))


SINGLE = {
    "rare": (lambda g, shape: (g.random(shape) < 0.05) * 1.0, 0.05, FRACTION),
    "even": (lambda g, shape: (g.random(shape) < 0.5) * 1.0, 0.5, FRACTION),
    "graded": (graded, 0.5, FRACTION),
    "near zero": (lambda g, shape: g.beta(0.5, 5, shape), 0.5 / 5.5, FRACTION),
    "skewed": (lambda g, shape: g.exponential(1, shape), 1.0, MEAN),
}


def coverage(intervals, truth):
    return float(np.mean([low - 1e-12 <= truth <= high + 1e-12 for _, low, high in intervals]))


@pytest.mark.parametrize("rows", [30, 100])
@pytest.mark.parametrize("kind", SINGLE)
def test_interval_covers(kind, rows):
    draw, truth, aggregate = SINGLE[kind]
    data = draw(np.random.default_rng(1), (SIMULATIONS, rows))
    found = [interval(x, aggregate=aggregate, resamples=RESAMPLES, seed=i) for i, x in enumerate(data)]
    assert LEAST - 0.015 * (kind == "skewed") <= coverage(found, truth) <= MOST


def right_or_wrong_pairs(generator, shape, *, only_a, only_b):
    """Two systems that are both right on half of the other rows."""
    kind = generator.random(shape)
    both = (generator.random(shape) < 0.5) * 1.0
    a = np.where(kind < only_a, 1.0, np.where(kind < only_a + only_b, 0.0, both))
    b = np.where(kind < only_a, 0.0, np.where(kind < only_a + only_b, 1.0, both))
    return a, b


PAIRED = {
    "few differ": (lambda g, s: right_or_wrong_pairs(g, s, only_a=0.03, only_b=0.03), 0.0),
    "many differ": (lambda g, s: right_or_wrong_pairs(g, s, only_a=0.3, only_b=0.05), 0.25),
    "nearly all": (lambda g, s: right_or_wrong_pairs(g, s, only_a=0.9, only_b=0.0), 0.9),
    "graded": (lambda g, s: (graded(g, s), graded(g, s)), 0.0),
}


@pytest.mark.parametrize("rows", [30, 100])
@pytest.mark.parametrize("kind", PAIRED)
def test_paired_interval_covers(kind, rows):
    draw, truth = PAIRED[kind]
    a, b = draw(np.random.default_rng(2), (SIMULATIONS, rows))
    found = [paired_bootstrap(x, y, resamples=RESAMPLES, seed=i) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    assert LEAST <= coverage(found, truth) <= MOST


def perplexity_rows(generator, rows, *, mean):
    """Rows of unequal length whose tokens cost `mean` nats on average, and a row's own difficulty."""
    tokens = generator.integers(5, 60, rows).astype(float)
    return np.stack([tokens * mean * generator.gamma(4, 0.25, rows), tokens], axis=1)


def test_perplexity_interval_covers():
    generator = np.random.default_rng(3)
    aggregate = METRICS["perplexity"].aggregate
    found = [
        interval(perplexity_rows(generator, 60, mean=1.5), aggregate=aggregate, resamples=RESAMPLES)
        for _ in range(SIMULATIONS)
    ]
    assert 0.91 <= coverage(found, math.exp(1.5)) <= MOST


@pytest.mark.parametrize("rows", [30, 100])
@pytest.mark.parametrize("kind", ["few differ", "graded", "perplexity"])
def test_no_more_false_alarms_than_promised(kind, rows):
    generator = np.random.default_rng(4)
    metric = METRICS[{"few differ": "exact_match", "graded": "token_f1", "perplexity": "perplexity"}[kind]]
    alarms = {"p": 0, "verdict": 0}
    for _ in range(SIMULATIONS):
        if kind == "perplexity":
            a = perplexity_rows(generator, rows, mean=1.5)
            b = a * np.array([1.0, 1.0])
            b[:, 0] *= generator.permutation(np.tile([0.8, 1.25], rows))[:rows]
            b[:, 0], a[:, 0] = np.where(generator.random(rows) < 0.5, [a[:, 0], b[:, 0]], [b[:, 0], a[:, 0]])
        else:
            a, b = PAIRED[kind][0](generator, rows)
        p_value = (
            mcnemar(a, b) if metric.right_or_wrong else permutation(a, b, aggregate=metric.aggregate, permutations=499)
        )
        difference = paired_bootstrap(a, b, aggregate=metric.aggregate, resamples=RESAMPLES)
        alarms["p"] += p_value < 0.05
        alarms["verdict"] += p_value < 0.05 and (difference.low > 0 or difference.high < 0)
    # Two standard errors of 400 simulations at 5 % are 2.2 %.
    assert alarms["p"] <= 0.07 * SIMULATIONS
    assert alarms["verdict"] <= 0.06 * SIMULATIONS


# ---- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "rows"), [(0, 40), (20, 40), (60, 200), (200, 200)])
def test_right_or_wrong_interval_is_close_to_jeffreys(right, rows):
    found = interval(np.arange(rows) < right, resamples=20_000)
    low, high = stats.beta(right + 0.5, rows - right + 0.5).ppf([0.025, 0.975])
    assert found.value == right / rows
    np.testing.assert_allclose(found[1:], [low if right else 0, high if right < rows else 1], atol=0.012)


def test_interval_of_many_rows_is_the_normal_one():
    rows = np.random.default_rng(0).normal(3, 2, 4000)
    found = interval(rows, aggregate=MEAN, resamples=20_000)
    half = 1.96 * rows.std(ddof=1) / math.sqrt(4000)
    np.testing.assert_allclose(found, [rows.mean(), rows.mean() - half, rows.mean() + half], atol=half / 20)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 0), (6, 0), (9, 3), (40, 41), (3, 30)])
def test_mcnemar_is_the_binomial_test(wins, losses):
    a, b = np.array([1] * wins + [0] * losses + [1, 0]), np.array([0] * wins + [1] * losses + [1, 0])
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1
    assert mcnemar(a, b) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["token_f1", "perplexity", "bleu"])
def test_permutation_is_the_full_enumeration(name):
    metric, generator = METRICS[name], np.random.default_rng(5)
    if name == "token_f1":
        a, b = generator.random(8), generator.random(8)
    elif name == "perplexity":
        a, b = perplexity_rows(generator, 8, mean=1.5), perplexity_rows(generator, 8, mean=1.8)
    else:
        a, b = (
            metric.score_rows([" ".join(generator.choice(list("abc"), 9)) for _ in range(8)], ["a b c a b c a b c"] * 8)
            for _ in "ab"
        )
    observed = abs(metric.aggregate(a) - metric.aggregate(b))
    extreme = 0
    for swap in itertools.product([False, True], repeat=8):
        chosen = np.array(swap).reshape(-1, *[1] * (a.ndim - 1))
        x, y = np.where(chosen, b, a), np.where(chosen, a, b)
        extreme += abs(metric.aggregate(x) - metric.aggregate(y)) >= observed - 1e-9
    assert permutation(a, b, aggregate=metric.aggregate) == pytest.approx(extreme / 256, abs=0.02)


def test_detectable_has_the_power_it_promises():
    generator, rows = np.random.default_rng(6), 60
    a, b = generator.normal(0, 1, (2, rows))
    smallest = detectable(a, b, aggregate=MEAN)
    assert smallest == pytest.approx((2.0 + 0.84) * math.sqrt(2 / rows), rel=0.25)
    shown = sum(
        permutation(generator.normal(smallest, 1, rows), generator.normal(0, 1, rows), aggregate=MEAN, permutations=399)
        < 0.05
        for _ in range(200)
    )
    assert 0.68 <= shown / 200 <= 0.95


def test_detectable_of_right_or_wrong_rows():
    same = np.ones(100)
    assert detectable(same, same) == pytest.approx(0.079, abs=0.001)  # 6 differing rows, expected 7.9
    assert detectable(np.ones(4), np.ones(4)) > 1
    assert detectable(same, same, aggregate=MEAN) is None
    rows = METRICS["bleu"].score_rows(["a b c d"] * 5, ["a b c d"] * 5)
    assert detectable(rows, rows, aggregate=METRICS["bleu"].aggregate) is None
    # More rows show smaller differences.
    a, b = right_or_wrong_pairs(np.random.default_rng(7), 100, only_a=0.2, only_b=0.2)
    assert detectable(np.tile(a, 4), np.tile(b, 4)) == pytest.approx(detectable(a, b) / 2, rel=0.05)


# ---- clusters --------------------------------------------------------------------------------------------------------


def test_copies_of_rows_in_clusters_count_once():
    a, b = right_or_wrong_pairs(np.random.default_rng(8), 40, only_a=0.3, only_b=0.1)
    labels = [f"conversation {i}" for i in range(40)]
    five_a, five_b, five_labels = np.tile(a, 5), np.tile(b, 5), labels * 5
    np.testing.assert_allclose(
        paired_bootstrap(five_a, five_b, clusters=five_labels, resamples=8000),
        paired_bootstrap(a, b, resamples=8000),
        atol=0.02,
    )
    assert permutation(five_a, five_b, clusters=five_labels) == pytest.approx(permutation(a, b), abs=0.02)
    assert detectable(five_a, five_b, clusters=five_labels) == pytest.approx(detectable(a, b))
    metric = METRICS["exact_match"]
    assert compare(five_a, five_b, metric=metric, clusters=five_labels)["test"] == "permutation"
    assert compare(five_a, five_b, metric=metric)["test"] == "mcnemar"


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40), st.data())
@settings(max_examples=40, deadline=None)
def test_clusters_of_one_are_rows_and_order_is_irrelevant(pairs, data):
    a, b = np.array(pairs, dtype=float).T
    order = np.array(data.draw(st.permutations(range(len(a)))))
    found = paired_bootstrap(a, b, resamples=50, clusters=order.tolist())
    assert found == pytest.approx(paired_bootstrap(a[np.argsort(order)], b[np.argsort(order)], resamples=50))


# ---- properties and edges --------------------------------------------------------------------------------------------

fractions = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30)


@given(fractions)
@settings(max_examples=60, deadline=None)
def test_difference_is_antisymmetric_and_bounded(pairs):
    a, b = np.array(pairs).T
    there, back = paired_bootstrap(a, b, resamples=400), paired_bootstrap(b, a, resamples=400)
    assert -1 <= there.low <= there.value <= there.high <= 1
    assert there.value == pytest.approx(-back.value)
    assert permutation(a, b, permutations=99) == permutation(b, a, permutations=99)
    assert 0 < permutation(a, b, permutations=99) <= 1


@given(fractions)
@settings(max_examples=40, deadline=None)
def test_comparison_is_plain_json_and_counts_every_row(pairs):
    a, b = np.array(pairs).T
    entry = compare(a, b, metric=METRICS["token_f1"])
    assert list(entry) == ["value", "low", "high", "p", "test", "better_rows", "worse_rows", "detectable"]
    assert all(
        type(value) in (float, int, str) and (isinstance(value, str) or math.isfinite(value))
        for value in entry.values()
    )
    assert entry["better_rows"] + entry["worse_rows"] + int((a == b).sum()) == len(pairs)


def test_interval_is_antisymmetric():
    a, b = right_or_wrong_pairs(np.random.default_rng(8), 40, only_a=0.3, only_b=0.1)
    _, low, high = paired_bootstrap(a, b, resamples=8000)
    np.testing.assert_allclose(paired_bootstrap(b, a, resamples=8000)[1:], (-high, -low), atol=0.02)


def test_lower_is_better_counts_the_other_way():
    a, b = np.array([[1.0, 1], [2, 1], [3, 1]]), np.array([[2.0, 1], [3, 1], [1, 1]])
    entry = compare(a, b, metric=METRICS["perplexity"])
    assert (entry["better_rows"], entry["worse_rows"]) == (2, 1)


def test_one_row():
    assert interval([1.0]) == Interval(1, 0, 1)
    assert paired_bootstrap([1.0], [0.0]) == Interval(1, -1, 1)
    entry = compare([1.0], [0.0], metric=METRICS["exact_match"])
    assert entry["p"] == 1
    assert entry["detectable"] > 1
    rows = METRICS["bleu"].score_rows(["a b c d e"], ["a b c d f"])
    assert interval(rows, aggregate=METRICS["bleu"].aggregate)[1:] == (0, 100)
    with pytest.raises(DataError, match="one row"):
        interval([[3.0, 4.0]], aggregate=METRICS["perplexity"].aggregate)


def test_all_equal():
    found = interval(np.ones(120))
    assert found.value == found.high == 1
    assert 0.96 < found.low < 1
    entry = compare(np.zeros(50), np.zeros(50), metric=METRICS["json_fields"])
    assert (entry["value"], entry["p"], entry["better_rows"], entry["worse_rows"]) == (0, 1, 0, 0)
    assert entry["low"] < 0 < entry["high"]
    same = np.array([[3.0, 2.0]] * 9)
    assert interval(same, aggregate=METRICS["perplexity"].aggregate) == pytest.approx([math.exp(1.5)] * 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_is_refused(bad):
    with pytest.raises(NumericalError, match="row 2"):
        interval([1.0, bad])
    with pytest.raises(NumericalError, match="row 1"):
        compare([1.0, 1.0], [bad, 1.0], metric=METRICS["token_f1"])


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="different shapes"):
        paired_bootstrap([1.0, 0.0], [1.0])
    with pytest.raises(DataError, match="no rows"):
        interval([])
    with pytest.raises(DataError, match="3 cluster labels for 2 rows"):
        interval([1.0, 0.0], clusters=["a", "b", "c"])


def test_same_seed_same_interval_and_memory_is_flat(monkeypatch):
    rows = np.random.default_rng(0).random(3000)
    whole = interval(rows, resamples=200)
    assert whole == interval(rows, resamples=200) != interval(rows, resamples=200, seed=1)
    monkeypatch.setattr(statistics, "CHUNK_NUMBERS", 9000)
    tracemalloc.start()
    interval(rows, resamples=200)
    permutation(rows, rows[::-1], permutations=200)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1_500_000  # 200 x 3000 weights at once would be 4.8 MB


# ---- the sentence ----------------------------------------------------------------------------------------------------


def evaluation(tuned, base, *, name):
    metric = METRICS[name]
    systems = {"tuned": tuned, "base": base}
    return {
        name: {
            "higher_is_better": metric.higher_is_better,
            "systems": {k: interval(rows, aggregate=metric.aggregate).as_dict() for k, rows in systems.items()},
            "differences": {"tuned - base": compare(tuned, base, metric=metric)},
        }
    }


def test_verdict_better():
    tuned, base = (np.arange(120) < 109) * 1.0, (np.arange(120) >= 118) * 1.0
    word, sentence = verdict(evaluation(tuned, base, name="exact_match"), primary="exact_match", rows=120)
    assert word == "better"
    assert sentence == (
        "tuned beats base on exact_match: 0.91 against 0.02, difference 0.89 "
        "(95 % interval 0.81 to 0.94, p < 0.001, 120 rows)"
    )


def test_verdict_worse_where_lower_is_better():
    generator = np.random.default_rng(0)
    tuned, base = perplexity_rows(generator, 80, mean=2.5), perplexity_rows(generator, 80, mean=1.5)
    word, sentence = verdict(evaluation(tuned, base, name="perplexity"), primary="perplexity", rows=80)
    assert word == "worse"
    assert sentence.startswith("tuned is worse than base on perplexity: ")
    assert verdict(evaluation(base, tuned, name="perplexity"), primary="perplexity", rows=80)[0] == "better"


def test_verdict_undecided_says_what_could_have_been_seen():
    a, b = right_or_wrong_pairs(np.random.default_rng(9), 100, only_a=0.1, only_b=0.1)
    word, sentence = verdict(evaluation(a, b, name="exact_match"), primary="exact_match", rows=100)
    assert word == "undecided"
    assert sentence.startswith("tuned and base cannot be told apart on exact_match: ")
    assert "; these rows could have shown a difference of 0.1" in sentence


def test_verdict_of_too_few_rows_and_of_identical_answers():
    word, sentence = verdict(evaluation(np.ones(5), np.zeros(5), name="exact_match"), primary="exact_match", rows=5)
    assert word == "undecided"
    assert sentence.endswith("5 rows are too few to show any difference")
    rows = METRICS["chrf"].score_rows(["abc"] * 5, ["abd"] * 5)
    word, sentence = verdict(evaluation(rows, rows, name="chrf"), primary="chrf", rows=5)
    assert word == "undecided"
    assert sentence.endswith("the two scored the same on every row")


@pytest.mark.parametrize(
    ("width", "places"), [(0.14, 2), (0.0083, 4), (1.3, 1), (14, 0), (130, 0), (0, 2), (1e-8, 6), (1e-12, 2)]
)
def test_decimals(width, places):
    assert decimals(width) == places


def test_p_text():
    assert [p_text(p) for p in (0.0001, 0.0012, 0.034, 0.0999, 0.5, 1.0)] == [
        "p < 0.001",
        "p = 0.001",
        "p = 0.034",
        "p = 0.10",
        "p = 0.50",
        "p = 1.00",
    ]
