"""Scores by group: which rows are in which, which pairs are compared, and what is said of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunesmith.data.types import Example, Message, Origin
from tunesmith.errors import DataError
from tunesmith.evaluate.groups import by_group
from tunesmith.evaluate.metrics import METRICS
from tunesmith.evaluate.settings import GroupSettings
from tunesmith.evaluate.statistics import interval


def rows(groups: list[Any]) -> list[Example]:
    turns = (Message("system", "he and she"), Message("user", "?"), Message("assistant", "!"))
    return [Example(Origin("rows.jsonl", i), "chat", turns, columns={"region": g}) for i, g in enumerate(groups, 1)]


def grouped(groups: list[Any], **scores: Any) -> dict[str, Any]:
    found = {name.replace("_of_", " "): np.array(of, dtype=np.float64) for name, of in scores.items()}
    by_metric = {"exact_match": found}
    return by_group(by_metric, metrics=METRICS, examples=rows(groups), settings=GroupSettings(column="region"), seed=0)


def test_groups_are_scored_alone_and_the_widest_gap_is_compared() -> None:
    regions = ["north"] * 40 + ["south"] * 30 + ["east"] * 20 + ["west"] * 9 + [None]
    tuned = [1.0] * 38 + [0.0] * 2 + [1.0] * 15 + [0.0] * 15 + [1.0] * 16 + [0.0] * 4 + [0.0] * 10
    found = grouped(regions, tuned=tuned, base=[0.0] * 100)
    assert found["rows"] == {"north": 40, "south": 30, "east": 20, "west": 9}
    assert found["compared"] == ["north", "south", "east"]
    assert found["without_group"] == 1
    systems = found["metrics"]["exact_match"]["systems"]
    assert systems["tuned"]["groups"]["south"] == interval(np.array(tuned[40:70])).as_dict()
    assert systems["tuned"]["groups"]["west"]["value"] == 0  # listed, and the lowest of all
    gap = systems["tuned"]["gap"]
    assert gap["between"] == ["north", "south"]
    assert gap["value"] == pytest.approx(0.45)
    assert gap["low"] < 0.45 < gap["high"]
    assert (gap["p"], gap["pairs"]) == (pytest.approx(3e-4, abs=6e-4), 3)
    assert gap["told_apart"][0] == ["north", "south"]
    assert systems["base"]["gap"]["value"] == 0
    assert systems["base"]["gap"]["p"] == 1
    assert "exact_match of tuned differs between 'north' (40 rows) and 'south' (30 rows)" in found["sentence"]
    assert "3 pairs" in found["sentence"]


def test_a_row_in_two_groups_does_not_tell_them_apart() -> None:
    regions: list[Any] = [["a", "b"]] * 50 + ["a"] * 12 + ["b"] * 12
    found = grouped(regions, tuned=[0.0] * 50 + [1.0] * 12 + [0.0] * 12)
    assert found["rows"] == {"a": 62, "b": 62}
    gap = found["metrics"]["exact_match"]["systems"]["tuned"]["gap"]
    assert gap["value"] == 1
    assert gap["p"] == pytest.approx(1e-4)
    few = grouped([["a", "b"]] * 50 + ["a"] * 9 + ["b"] * 12, tuned=[1.0] * 71)
    assert few["metrics"]["exact_match"]["systems"]["tuned"]["gap"] is None
    assert "nothing is compared" in few["sentence"]


def test_alike_groups_are_said_not_to_differ() -> None:
    found = grouped(["a", "b"] * 20, tuned=[1.0, 1.0, 0.0, 0.0] * 10)
    assert found["sentence"].startswith("no two groups can be told apart on exact_match of tuned; the widest gap")


def test_a_gap_that_is_luck_does_not_hide_a_narrower_one_that_is_not() -> None:
    regions = ["a"] * 400 + ["b"] * 400 + ["c"] * 10
    tuned = [1.0] * 360 + [0.0] * 40 + [1.0] * 300 + [0.0] * 100 + [1.0] * 7 + [0.0] * 3
    found = grouped(regions, tuned=tuned)
    gap = found["metrics"]["exact_match"]["systems"]["tuned"]["gap"]
    assert gap["between"] == ["a", "c"]
    assert gap["p"] > 0.05
    assert gap["told_apart"] == [["a", "b"]]
    assert "differs between 'a' and 'b'; the widest gap" in found["sentence"]


def test_words_of_the_question_say_the_groups(tmp_path: Path) -> None:
    (tmp_path / "words.json").write_text(json.dumps({"women": ["she"], "men": ["he"]}), "utf-8")
    asked = ["Is she in?", "Is HE in?", "Is he or she in?", "Is the other in?"]
    examples = [
        Example(Origin("a", i), "chat", (Message("system", "he"), Message("user", t), Message("assistant", "!")))
        for i, t in enumerate(asked)
    ]
    settings = GroupSettings(words=str(tmp_path / "words.json"))
    scores = {"perplexity": {"tuned": np.array([[2.0, 1.0], [4.0, 2.0], [6.0, 2.0], [1.0, 1.0]])}}
    found = by_group(scores, metrics=METRICS, examples=examples, settings=settings, seed=0)
    assert found["rows"] == {"men": 2, "women": 2}
    assert found["without_group"] == 1
    groups = found["metrics"]["perplexity"]["systems"]["tuned"]["groups"]
    assert groups["men"]["value"] == pytest.approx(np.exp(10 / 4))
    assert groups["women"]["value"] == pytest.approx(np.exp(8 / 3))


def test_a_group_of_one_row_has_no_interval_and_no_group_at_all_is_refused() -> None:
    found = grouped(["a", "b", "b"], tuned=[1.0, 0.0, 1.0])
    assert found["metrics"]["exact_match"]["systems"]["tuned"]["groups"]["a"] == {"value": 1.0}
    with pytest.raises(DataError, match="no held-out row has the column 'region'") as error:
        grouped([None, None], tuned=[1.0, 0.0])
    assert error.value.hint


def test_one_of_column_and_words_is_given() -> None:
    for given in ({}, {"column": "a", "words": "b"}):
        with pytest.raises(ValueError, match="either column or words"):
            GroupSettings.model_validate(given)
