"""What an evaluation says besides scores, of runs on a toy base: groups, swapped words, memory, and the best step."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith import api
from tunesmith.errors import DataError, NotFoundError, RecipeError
from tunesmith.evaluate.settings import EvaluateSettings
from tunesmith.models.load import Model
from tunesmith.registry.workspace import Workspace
from tunesmith.texts import evaluation_text

COLOURS = ("red", "green")
SECRET = "the quick brown fox number {} jumps over {} lazy dogs"
ASKED = [
    {"prompt": f"What is told of {i}?", "completion": SECRET.format(i, (7 * i) % 40), "side": ["north", "south"][i % 2]}
    for i in range(40)
]
TEXTS = [{"text": f"{i} {('he', 'she')[i % 2]} {COLOURS[i // 2 % 2]}", "label": COLOURS[i // 2 % 2]} for i in range(40)]
TUNED = {"max_steps": 30, "batch_rows": 8, "learning_rate": 0.02, "validate_every": 10}
BY_HEART = {"epochs": 1000, "max_steps": 250, "batch_rows": 8, "learning_rate": 0.01}
TESTED = {"validation": None, "test": 0.5}
Tune = Callable[..., api.Run]


@pytest.fixture
def tune(build_model: Callable[..., Model], tmp_path: Path) -> Tune:
    """`tune(rows, **sections)`: a run on a toy base."""

    def tune(rows: list[dict[str, Any]], **sections: Any) -> api.Run:
        (tmp_path / "base").mkdir()
        build_model("llama", dtype=torch.float32, max_position_embeddings=256).save(tmp_path / "base")
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        data = {"train": "rows.jsonl", "validation": 0.5} | sections.pop("data", {})
        recipe = {"base": "base", "method": {"kind": "lora", "rank": 4}, "train": TUNED, "data": data} | sections
        (tmp_path / "toy.yaml").write_text(json.dumps(recipe), "utf-8")
        return api.tune(tmp_path / "toy.yaml", workspace=Workspace(tmp_path / "w"))

    return tune


def evaluate(run: api.Run, **given: Any) -> dict[str, Any]:
    return api.evaluate(run, workspace=Workspace(run.path.parents[1]), **given).as_dict()


def test_a_run_that_learned_its_rows_by_heart_is_told_from_its_base(tune: Tune) -> None:
    evaluation = {"metrics": ["chrf", "perplexity"], "max_tokens": 80, "memorised": 40, "groups": "side"}
    run = tune(ASKED, data=TESTED, method="full", train=BY_HEART, evaluate=evaluation)
    document = evaluate(run)
    found = document["memorised"]
    assert found["rows"]["train"] == run.summary["rows"]
    assert found["rows"]["train"] + found["rows"]["held_out"] == len(ASKED)
    whole = found["verbatim"]["whole"]["systems"]
    assert whole["tuned"]["train"]["value"] > 0.8
    assert whole["tuned"]["difference"]["low"] > 0
    assert whole["base"]["train"]["value"] == 0
    loss = found["gap"]["loss"]
    assert loss["unit"] == "nats a token"
    assert loss["systems"]["tuned"]["difference"]["high"] < 0
    assert abs(loss["systems"]["base"]["difference"]["value"]) < abs(loss["systems"]["tuned"]["difference"]["value"])
    held_out = document["metrics"]["perplexity"]["systems"]["tuned"]["value"]
    assert loss["systems"]["tuned"]["held_out"]["value"] == pytest.approx(math.log(held_out))
    assert found["origins"][0]["origin"].startswith(str(run.path.parents[2] / "rows.jsonl:"))
    assert "whole answers: tuned gives back" in found["sentences"][0]
    assert found["sentences"][0].endswith("which held-out rows do not explain")
    # the rows that were evaluated, by the column that the recipe did not name as data
    groups = document["groups"]
    assert sum(groups["rows"].values()) == document["rows"]
    assert set(groups["rows"]) == {"north", "south"}
    rows = [json.loads(line) for line in (run.path / "examples.jsonl").read_text("utf-8").splitlines()]
    assert all(set(row["columns"]) == {"side"} for row in rows)
    of_north = [row["scores"]["tuned"]["perplexity"] for row in rows if row["columns"]["side"] == "north"]
    north = groups["metrics"]["perplexity"]["systems"]["tuned"]["groups"]["north"]["value"]
    assert min(of_north) < north < max(of_north)
    page, text = (run.path / "report.html").read_text("utf-8"), evaluation_text(document)
    for said in (groups["sentence"], *found["sentences"]):
        assert said in text
    assert "Learned by heart?" in page
    assert "By side" in page
    assert "stopping" not in document


def test_what_the_best_step_spared_a_run_is_said(tune: Tune) -> None:
    run = tune(ASKED, method="full", train=BY_HEART | {"max_steps": 100, "validate_every": 20})
    document = evaluate(run)
    stopping = document["stopping"]
    assert stopping["best_step"] == run.summary["best_step"] < stopping["last_step"] == 100
    assert stopping["best_loss"] == run.summary["validation_loss"] < stopping["last_loss"]
    assert stopping["sentence"] in evaluation_text(document)
    assert stopping["sentence"] in (run.path / "report.html").read_text("utf-8")


def test_the_middle_of_texts_is_asked_after_their_beginning(tune: Tune) -> None:
    texts = [{"text": f"{i} " + "".join(chr(97 + (i * k * k + k) % 26) for k in range(110))} for i in range(24)]
    evaluation = {"memorised": 24, "metrics": ["bits_per_byte"]}
    run = tune(
        texts, objective="causal", data=TESTED, method="full", train=BY_HEART | {"max_steps": 150}, evaluate=evaluation
    )
    found = evaluate(run)["memorised"]
    whole, in_a_row = (found["verbatim"][kind]["systems"]["tuned"] for kind in ("whole", "50_tokens"))
    assert whole == in_a_row
    assert whole["train"]["value"] > 0.5
    assert whole["held_out"]["value"] == 0
    assert {entry["tokens"] for entry in found["origins"]} == {50}
    assert found["gap"]["bits_per_byte"]["systems"]["tuned"]["difference"]["high"] < 0


def test_words_are_swapped_under_a_head_and_its_gap_is_measured(tune: Tune, tmp_path: Path) -> None:
    (tmp_path / "swaps.yaml").write_text("- [he, she]\n", "utf-8")
    (tmp_path / "groups.yaml").write_text("men: [he]\nwomen: [she]\n", "utf-8")
    evaluation = {"swaps": "swaps.yaml", "groups": {"words": "groups.yaml"}, "memorised": 20}
    run = tune(TEXTS, objective="classification", evaluate=evaluation)
    assert run.recipe.evaluate.swaps == str(tmp_path / "swaps.yaml")
    document = evaluate(run)
    swaps = document["swaps"]
    assert swaps["rows"] == document["rows"]
    assert set(swaps["systems"]) == {"tuned", "base"}
    assert swaps["systems"]["tuned"]["flip_rate"]["value"] == pytest.approx(
        sum(flip["system"] == "tuned" for flip in swaps["flips"]) / swaps["rows"]
    )
    assert set(document["groups"]["rows"]) == {"men", "women"}
    gap = document["memorised"]["gap"]
    assert gap.keys() == {"accuracy", "loss"}
    assert gap["accuracy"]["systems"].keys() == {"tuned"}
    held_out = document["metrics"]["log_loss"]["systems"]["tuned"]["value"]
    assert gap["loss"]["systems"]["tuned"]["held_out"]["value"] == pytest.approx(held_out)
    assert "verbatim" not in document["memorised"]
    assert swaps["sentence"] in evaluation_text(document)
    assert "With words swapped" in (run.path / "report.html").read_text("utf-8")


def test_a_label_that_depends_on_the_words_flips_with_them(tune: Tune, tmp_path: Path) -> None:
    (tmp_path / "swaps.json").write_text('[["he", "she"]]', "utf-8")
    rows = [{"text": f"{i} {('he', 'she')[i % 2]}", "label": COLOURS[i % 2]} for i in range(40)]
    how = {"swaps": "swaps.json", "against": ["majority"]}
    document = evaluate(
        tune(rows, objective="label_words", train=TUNED | {"epochs": 100, "max_steps": 80}, evaluate=how)
    )
    tuned = document["swaps"]["systems"]["tuned"]
    assert document["metrics"]["accuracy"]["systems"]["tuned"]["value"] > 0.8
    assert tuned["flip_rate"]["value"] > 0.8
    assert tuned["change"]["value"] < -0.5
    assert document["swaps"]["flips"][0]["origin"].startswith(str(tmp_path / "rows.jsonl:"))


@pytest.mark.parametrize(
    ("evaluation", "error", "message"),
    [
        ({"swaps": "gone.yaml"}, RecipeError, "evaluate.swaps"),
        ({"groups": {"words": "gone.yaml"}}, NotFoundError, "gone"),
        ({"groups": "nothing"}, DataError, "no row has the column 'nothing'"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_training(
    tune: Tune, evaluation: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tune(ASKED, evaluate=evaluation)


def test_too_few_rows_to_compare_are_refused(tune: Tune) -> None:
    run = tune(ASKED[:12], train=TUNED | {"max_steps": 2, "validate_every": 1})
    with pytest.raises(DataError, match=r"evaluate\.memorised compares") as error:
        evaluate(run, settings=EvaluateSettings(memorised=10))
    assert error.value.hint
    assert not (run.path / "evaluation.json").exists()
