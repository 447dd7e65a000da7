"""General rows: flips from right to wrong against the margin."""

from typing import Any

from tunesmith.evaluate.general import MAX_FLIPS, entry_of
from tunesmith.evaluate.result import Evaluation


def test_answers_that_were_right_before_are_listed() -> None:
    rows: list[dict[str, Any]] = [
        {
            "origin": f"g:{n}", "prompt": [], "reference": "r", "outputs": {},
            "scores": {"base": {"exact_match": before}, "tuned": {"exact_match": after}},
        }
        for n, (before, after) in enumerate([(1.0, 0.0), (1.0, 1.0), (0.0, 1.0)] * 60)
    ]  # fmt: skip
    difference = {"value": 0.0, "low": -0.1, "high": 0.1, "p": 1.0}
    document = {
        "primary": "exact_match", "data": "g", "rows": 180,
        "metrics": {"exact_match": {"higher_is_better": True, "systems": {}, "differences": {"tuned - base": difference}}},
    }  # fmt: skip
    entry = entry_of(Evaluation(document, rows), margin=0.2)
    assert (entry["right_before"], len(entry["flips"]), entry["outcome"]) == (60, MAX_FLIPS, "kept")
    assert [flip["origin"] for flip in entry["flips"][:2]] == ["g:0", "g:3"]
