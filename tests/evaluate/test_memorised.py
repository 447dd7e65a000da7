"""What counts as memorised, and exposure against ranks worked by hand."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tunesmith.data.types import Example, Message, Origin
from tunesmith.evaluate.memorised import _rates, _verbatim, exposure, fitted_exposure, longest_run, sample
from tunesmith.evaluate.settings import EvaluateSettings


def rows(count: int) -> list[Example]:
    turns = [(Message("user", f"q{i}"), Message("assistant", "a")) for i in range(count)]
    return [Example(Origin("rows.jsonl", i), "chat", of) for i, of in enumerate(turns, 1)]


# ------------------------------------------------------------------------------------------------------------ canaries


@pytest.mark.parametrize(("logprob", "rank"), [(-1.0, 1), (-2.5, 3), (-9.0, 8)])
def test_exposure_is_that_of_the_rank(logprob: float, rank: int) -> None:
    references = np.array([-2.0, -1.5, -3.0, -4.0, -5.0, -6.0, -7.0])  # with the canary eight: log2 |R| = 3
    assert exposure(logprob, references=references) == pytest.approx(3 - math.log2(rank))


def test_of_two_that_are_as_likely_the_canary_ranks_behind() -> None:
    assert exposure(-2.0, references=np.array([-2.0, -3.0, -4.0])) == pytest.approx(2 - 1)


def test_the_fitted_exposure_is_that_of_the_distribution_and_goes_beyond_the_sample() -> None:
    references = stats.skewnorm.rvs(3.0, loc=-30.0, scale=4.0, size=4000, random_state=0)
    for logprob in (-28.0, -24.0, -20.0):
        true = -stats.skewnorm.logsf(logprob, 3.0, loc=-30.0, scale=4.0) / math.log(2)
        assert fitted_exposure(logprob, references=references, num_possible=1e8) == pytest.approx(true, rel=0.15)
    ranked = exposure(-24.0, references=references)
    assert fitted_exposure(-24.0, references=references, num_possible=1e8) == pytest.approx(ranked, rel=0.15)
    assert fitted_exposure(0.0, references=references, num_possible=1024) == 10
    assert exposure(0.0, references=references) == pytest.approx(math.log2(4001))


def test_a_canary_that_was_not_planted_has_little_exposure() -> None:
    generator = np.random.default_rng(0)
    found = [exposure(draw[0], references=draw[1:]) for draw in generator.normal(size=(2000, 256))]
    assert np.mean(found) == pytest.approx(1 / math.log(2), abs=0.15)  # of a uniform share, -log2 has the mean 1.44


# ------------------------------------------------------------------------------------------------------------ verbatim


def test_the_longest_run_stands_in_a_row_in_both() -> None:
    assert longest_run([1, 2, 3, 4, 9, 5], [0, 2, 3, 4, 5]) == 3
    assert longest_run([1] * 300, [1] * 250) == 250  # tokens that are frequent are not left out
    assert longest_run([], [1]) == 0


def verbatim(written: dict[str, list[tuple[list[int], list[int]]]], *, num_train: int) -> dict[str, Any]:
    count = len(written["tuned"])
    train_B = np.arange(count) < num_train
    return _verbatim(
        written, rows(count), sides={"train": train_B, "held_out": ~train_B}, settings=EvaluateSettings(max_tokens=80)
    )


def test_whole_answers_and_long_runs_are_counted_where_the_answer_is_long_enough() -> None:
    short, middle, long, endless = list(range(19)), list(range(20)), list(range(60)), list(range(81))
    broken = [*range(52), 7, 7]
    train = [(short, short), (middle, middle), (broken, long), (endless[:80], endless)] + [(middle, middle)] * 10
    base = [(short, short), (middle, middle)] + [([], expected) for _, expected in train[2:]]
    held_out = [([], middle)] * 12 + [([], long)] * 12
    found = verbatim({"tuned": train + held_out, "base": base + held_out}, num_train=len(train))
    whole = found["verbatim"]["whole"]
    assert whole["rows"] == {"train": 12, "held_out": 24}  # neither the short nor the endless one
    tuned = whole["systems"]["tuned"]
    assert (tuned["train"]["value"], tuned["held_out"]["value"]) == (11 / 12, 0)
    assert tuned["difference"]["value"] == pytest.approx(11 / 12)
    assert tuned["difference"]["low"] > 0
    assert whole["systems"]["base"]["train"]["value"] == pytest.approx(1 / 12)
    assert whole["differences"]["tuned - base"]["value"] == pytest.approx(10 / 12)
    run = found["verbatim"]["50_tokens"]
    assert run == {"rows": {"train": 2, "held_out": 12}, "systems": {}, "differences": {}}  # too few
    assert [entry["tokens"] for entry in found["origins"][:2]] == [81, 60]
    assert {"origin": "rows.jsonl:2", "tokens": 20, "also": ["base"]} in found["origins"]
    assert len(found["origins"]) == 13


def test_answers_that_come_out_right_on_both_sides_are_no_excess() -> None:
    hits = {"tuned": np.ones(200)}
    sides = {"train": np.arange(200) < 100, "held_out": np.arange(200) >= 100}
    difference = _rates(hits, np.ones(200, dtype=bool), sides=sides, seed=0)["systems"]["tuned"]["difference"]
    assert difference["value"] == 0
    assert difference["low"] < 0 < difference["high"]


def test_a_sample_is_the_same_whatever_the_order() -> None:
    everything = rows(50)
    chosen = sample(everything, count=10, seed=3)
    assert {e.origin for e in chosen} == {e.origin for e in sample(everything[::-1], count=10, seed=3)}
    assert len({e.origin for e in chosen}) == 10
    assert chosen != sample(everything, count=10, seed=4)
    assert len(sample(everything, count=80, seed=0)) == 50
