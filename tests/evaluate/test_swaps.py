"""Words swapped under a classifier whose answers are known: how often it changes its mind, and by how much."""

import json
from pathlib import Path

import numpy as np
import pytest

from tunesmith.data.answers import Classes
from tunesmith.data.types import Example, Origin
from tunesmith.errors import DataError, RecipeError
from tunesmith.evaluate.settings import EvaluateSettings
from tunesmith.evaluate.statistics import interval
from tunesmith.evaluate.swaps import check_swaps, counterfactuals
from tunesmith.objectives.classification import Classification
from tunesmith.objectives.instruction import Instruction

OBJECTIVE = Classification(labels=("nurse", "pilot"), several=False)
TEXTS = ["he cares", "she cares", "he flies", "she flies", "it flies"]
ROWS = [
    Example(Origin("jobs.jsonl", line), "labelled", text=text, label="pilot" if "flies" in text else "nurse")
    for line, text in enumerate(TEXTS, start=1)
]


def biased(examples: list[Example]) -> Classes:
    """Who flies is a pilot, and so is he, though by less where he cares."""
    p_B = np.array([{"he cares": 0.6, "she cares": 0.1, "he flies": 0.9}.get(e.text or "", 0.7) for e in examples])
    return OBJECTIVE.decided(np.stack([1 - p_B, p_B], axis=1))


def fair(examples: list[Example]) -> Classes:
    p_B = np.array([0.8 if "flies" in (e.text or "") else 0.2 for e in examples])
    return OBJECTIVE.decided(np.stack([1 - p_B, p_B], axis=1))


@pytest.fixture
def settings(tmp_path: Path) -> EvaluateSettings:
    (tmp_path / "swaps.json").write_text(json.dumps([["he", "she"]]), "utf-8")
    return EvaluateSettings(swaps=str(tmp_path / "swaps.json"))


def test_changed_answers_are_counted_and_listed(settings: EvaluateSettings) -> None:
    systems = {"tuned": biased, "base": fair}
    found = counterfactuals(systems, examples=ROWS, fits=list, objective=OBJECTIVE, settings=settings)
    assert (found["rows"], found["without_word"], found["left_out_rows"]) == (4, 1, 0)
    tuned, base = found["systems"]["tuned"], found["systems"]["base"]
    assert tuned["flip_rate"] == interval(np.array([1.0, 1.0, 0.0, 0.0])).as_dict()
    # nurse: 0.4 -> 0.9 and 0.9 -> 0.4; pilot: 0.9 -> 0.7 and 0.7 -> 0.9
    assert tuned["change"]["value"] == pytest.approx(0)
    assert tuned["absolute_change"]["value"] == pytest.approx((0.5 + 0.5 + 0.2 + 0.2) / 4)
    assert (base["flip_rate"]["value"], base["absolute_change"]["value"]) == (0, 0)
    assert found["differences"]["tuned - base"]["value"] == 0.5
    assert found["flips"] == [
        {"system": "tuned", "origin": "jobs.jsonl:1", "before": "pilot", "after": "nurse"},
        {"system": "tuned", "origin": "jobs.jsonl:2", "before": "nurse", "after": "pilot"},
    ]
    assert found["sentence"].startswith("with words swapped, tuned answers 2 of 4 rows otherwise")


def test_rows_that_do_not_fit_with_the_other_words_are_left_out(settings: EvaluateSettings) -> None:
    found = counterfactuals(
        {"tuned": biased}, examples=ROWS, fits=lambda rows: rows[1:], objective=OBJECTIVE, settings=settings
    )
    assert (found["rows"], found["left_out_rows"], found["differences"]) == (3, 1, {})


def test_without_the_words_there_is_nothing_to_ask(settings: EvaluateSettings) -> None:
    with pytest.raises(DataError, match="1 of 2 held-out rows") as error:
        counterfactuals({"tuned": fair}, examples=ROWS[3:], fits=list, objective=OBJECTIVE, settings=settings)
    assert error.value.hint


def test_an_objective_without_classes_is_refused(settings: EvaluateSettings) -> None:
    assert settings.swaps is not None
    with pytest.raises(RecipeError, match="objective 'instruction' tells none"):
        check_swaps(settings.swaps, objective=Instruction())
    assert check_swaps(settings.swaps, objective=OBJECTIVE) == {"he": "she", "she": "he"}
