"""p-values of several metrics, corrected by hand, and what is said of them."""

from typing import Any

import pytest

from tunesmith.evaluate.correction import corrected, outcome, with_holm


def difference(p: float, *, low: float = 0.1, high: float = 0.3) -> dict[str, Any]:
    return {"value": (low + high) / 2, "low": low, "high": high, "p": p}


def metrics(**found: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {"higher_is_better": name != "loss", "systems": {}, "differences": {"tuned - base": found[name]}}
        for name in found
    }


def test_each_pair_is_a_family_of_its_own() -> None:
    given = metrics(a=difference(0.01), b=difference(0.04), loss=difference(0.03))
    given["a"]["differences"]["tuned - few_shot"] = difference(0.02)
    found = with_holm(given)
    assert [entry["differences"]["tuned - base"]["p_holm"] for entry in found.values()] == pytest.approx(
        [0.03, 0.06, 0.06]
    )
    assert found["a"]["differences"]["tuned - few_shot"]["p_holm"] == 0.02
    assert "p_holm" not in given["a"]["differences"]["tuned - base"]


def test_metrics_are_counted_after_correction() -> None:
    given = metrics(
        a=difference(0.001), b=difference(0.04), c=difference(0.001, low=-0.3, high=-0.1), loss=difference(0.002)
    )
    found = corrected(with_holm(given), pair="tuned - base")
    assert found is not None
    assert (found["better"], found["worse"], found["undecided"]) == (["a", "b"], ["c", "loss"], [])
    given["b"] = metrics(b=difference(0.05))["b"]
    found = corrected(with_holm(given), pair="tuned - base")
    assert found is not None
    assert found["undecided"] == ["b"]
    assert found["sentence"] == (
        "after Holm's correction for 4 metrics, tuned against base is better on 1 (a), worse on 2 (c, loss) and "
        "undecided on 1"
    )
    assert corrected(with_holm(metrics(a=difference(0.001))), pair="tuned - base") is None
    assert corrected(with_holm(given), pair="tuned - nobody") is None


@pytest.mark.parametrize(
    ("low", "high", "p", "higher", "word"),
    [
        (0.1, 0.2, 0.04, True, "better"), (0.1, 0.2, 0.04, False, "worse"), (-0.2, -0.1, 0.04, False, "better"),
        (0.1, 0.2, 0.05, True, "undecided"), (0.0, 0.2, 0.01, True, "undecided"), (-0.1, 0.2, 0.01, True, "undecided"),
    ],
)  # fmt: skip
def test_a_difference_is_decided_by_interval_and_p(low: float, high: float, p: float, higher: bool, word: str) -> None:
    assert outcome(difference(p, low=low, high=high), higher_is_better=higher) == word
