"""The gate: rules that mean what they say, and say why."""

from typing import Any

import pytest
from pydantic import ValidationError

from tunesmith.errors import RecipeError
from tunesmith.evaluate.gate import judged
from tunesmith.evaluate.general import non_inferiority
from tunesmith.evaluate.settings import EvaluateSettings


def score(value: float, low: float, high: float, **more: Any) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high} | more


def document(**general: Any) -> dict[str, Any]:
    """Answers are better than the base's and not apart from few_shot's; the loss is lower, which is better."""
    return {
        "metrics": {
            "exact_match": {
                "higher_is_better": True,
                "systems": {"tuned": score(0.8, 0.75, 0.84)},
                "differences": {
                    "tuned - base": score(0.2, 0.1, 0.3, p=0.001),
                    "tuned - few_shot": score(-0.01, -0.03, 0.02, p=0.6),
                },
            },
            "perplexity": {
                "higher_is_better": False,
                "systems": {"tuned": score(2.0, 1.8, 2.2)},
                "differences": {"tuned - base": score(-3.0, -4.0, -2.0, p=0.001)},
            },
        }
    } | general


@pytest.mark.parametrize(
    ("metric", "rule", "passed"),
    [
        ("exact_match", "> base", True),
        ("exact_match", ">base", True),
        ("exact_match", "> few_shot", False),
        ("perplexity", "> base", True),
        ("exact_match", "> 0.7", True),
        ("exact_match", "> 0.75", False),  # the interval begins there
        ("exact_match", "< 0.85", True),
        ("exact_match", "< .8", False),
        ("perplexity", "< 2.3", True),
        ("perplexity", "> 1e-1", True),
        ("exact_match", "not worse by 0.02", True),
        ("exact_match", "not worse than few_shot by 0.03", True),
        ("exact_match", "not worse than few_shot by 0.02", False),
        ("perplexity", "not worse than base by 0.001", True),
    ],
)
def test_a_rule_decides_by_the_interval(metric: str, rule: str, passed: bool) -> None:
    found = judged(document(), {metric: rule})
    assert found["passed"] is passed
    assert found["rules"][0]["passed"] is passed
    assert "95 % interval" in found["rules"][0]["because"]


def test_all_rules_must_hold() -> None:
    found = judged(document(), {"exact_match": "> base", "perplexity": "> 3"})
    assert [rule["passed"] for rule in found["rules"]] == [True, False]
    assert not found["passed"]


@pytest.mark.parametrize(("margin", "outcome"), [(0.02, "undecided"), (0.03, "kept"), (0.004, "lost")])
def test_general_rows_are_judged_against_the_margin(margin: float, outcome: str) -> None:
    difference = score(0.016, 0.005, 0.027, p=0.01)
    assert non_inferiority(difference, metric="bits_per_byte", higher=False, margin=margin)[0] == outcome
    general = {"metric": "bits_per_byte", "higher_is_better": False, "systems": {}, "difference": difference}
    found = judged(document(general=general), {"general": f"not worse by {margin}"})
    assert found["passed"] is (outcome == "kept")
    better = score(0.1, 0.05, 0.15, p=0.01)
    assert non_inferiority(better, metric="exact_match", higher=True, margin=margin)[0] == "kept"


@pytest.mark.parametrize(
    ("gate", "message", "hint"),
    [
        ({"general": "not worse by 0.1"}, "was not measured", "evaluate.general"),
        ({"chrf": "> base"}, "was not measured", "evaluate.metrics"),
        ({"perplexity": "> few_shot"}, "not compared with 'few_shot'", "base"),
    ],
)
def test_a_rule_about_what_was_not_measured_is_refused(gate: dict[str, str], message: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        judged(document(), gate)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate": {"exact_mach": "> base"}}, "no metric 'exact_mach'"),
        ({"gate": {"exact_match": "better"}}, "is no rule"),
        ({"gate": {"exact_match": "> base or so"}}, "is no rule"),
        ({"gate": {"general": "not worse by 0.02"}}, "general names no file"),
        ({"general_margin": 0.1}, "no effect without general"),
        ({"general_rows": 10}, "no effect without general"),
    ],
)
def test_a_rule_that_means_nothing_is_refused_with_the_recipe(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EvaluateSettings(**settings)
