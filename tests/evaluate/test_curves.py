"""Coordinates of the curves."""

import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tunesmith.evaluate.curves import CHART, LABEL_GAP, MAX_POINTS, Scale, curves, ticks

numbers = st.floats(-1e6, 1e6)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@given(numbers, numbers)
@example(0.0, 5e-324)
@example(0.0, 3e-323)
def test_ticks_are_round_and_inside(first, second):
    low, high = sorted((first, second))
    found = ticks(low, high)
    slack = 1e-6 * (high - low)
    assert 1 <= len(found) <= 6
    if high - low > 1e-6 * max(abs(low), abs(high), 1):
        assert all(low - slack <= tick <= high + slack for tick in found)
        step = (found[-1] - found[0]) / (len(found) - 1) if len(found) > 1 else high - low
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert len(found) == 1 or min(abs(mantissa - round_step) for round_step in (1, 2, 5)) < 1e-3


def test_scale():
    scale = Scale(0, 10, start=100, end=50)
    assert [scale(value) for value in (0, 5, 10)] == [100, 75, 50]
    assert Scale(3, 3, start=0, end=8)(3) == 4


def test_curves_stay_inside_and_show_both_losses(tmp_path):
    records = [{"step": s, "loss": 3 / s, "grad_norm": 1.0 + s} for s in range(1, 2001)]
    records += [{"step": s, "validation_loss": 3 / s + 0.001} for s in range(100, 2001, 100)]
    found = curves(write(tmp_path / "metrics.jsonl", records), best_step=2000)
    assert [line["kind"] for line in found["lines"]] == ["train", "validation"]
    right, bottom = CHART["width"] - CHART["right"], CHART["height"] - CHART["bottom"]
    for x, y in [point for line in found["lines"] for point in line["points"]]:
        assert CHART["left"] <= x <= right
        assert CHART["top"] <= y <= bottom
    assert len(found["raw"]) <= MAX_POINTS + 1
    assert found["raw"][-1][0] == found["best"] == right
    labels = [line["label_y"] for line in found["lines"]]
    assert abs(labels[0] - labels[1]) == pytest.approx(LABEL_GAP)
    assert [small["label"] for small in found["small"]] == ["gradient norm"]
    assert found["small"][0]["high"] == "2,000"


def test_the_later_line_of_a_step_counts_and_a_torn_end_is_skipped(tmp_path):
    path = write(
        tmp_path / "metrics.jsonl", [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 1.0}]
    )
    once = write(tmp_path / "once.jsonl", [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 1.0}])
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert curves(path, best_step=None) == curves(once, best_step=None)


def test_moving_average_is_the_mean_of_a_straight_line(tmp_path):
    records = [{"step": s, "loss": 10 - s / 100} for s in range(1, 501)]
    found = curves(write(tmp_path / "metrics.jsonl", records), best_step=None)
    assert found["lines"][0]["points"] == found["raw"]


@pytest.mark.parametrize("records", [[], [{"step": 1, "loss": None}], [{"step": 3, "tokens": 5}]])
def test_nothing_to_draw(tmp_path, records):
    assert curves(write(tmp_path / "metrics.jsonl", records), best_step=None) is None
    assert curves(tmp_path / "missing.jsonl", best_step=None) is None


def test_one_step_and_not_finite_losses(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n')
    found = curves(path, best_step=None)
    assert len(found["raw"]) == 1
    assert found["y_ticks"]
