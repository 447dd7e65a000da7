"""The advice is the cheapest way that is not shown to be worse than the best."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunesmith import api, cli
from tunesmith.advice import WAYS, advise, advised, find_named
from tunesmith.errors import NotFoundError, RecipeError
from tunesmith.evaluate.result import Evaluation
from tunesmith.evaluate.statistics import holm
from tunesmith.registry.workspace import Workspace
from tunesmith.texts import advice_text


def evaluation(shares: dict[str, float], *, num_rows: int = 200, metric: str = "exact_match") -> Evaluation:
    """Rows of one difficulty for all ways, so that a larger share right is better on every row or as good."""
    place = (np.arange(num_rows) + 0.5) / num_rows
    scores = {way: (place < share).astype(float) for way, share in shares.items()}
    systems = {way: {"value": float(rows.mean())} for way, rows in scores.items()}
    costs = {"seconds": 1.0, "tokens_per_prompt": 10.0, "tokens_per_answer": 5.0}
    document: dict[str, Any] = {
        "run": "toy-1", "data": "test", "rows": num_rows, "primary": metric,
        "metrics": {metric: {"systems": systems}}, "costs": dict.fromkeys(shares, costs),
    }  # fmt: skip
    return Evaluation(document, [], {metric: scores})


@pytest.mark.parametrize(
    ("shares", "chosen"),
    [
        ({"base": 0.2, "few_shot": 0.3, "retrieval": 0.5, "tuned": 0.8, "tuned_retrieval": 0.8}, "tuned"),
        ({"base": 0.2, "few_shot": 0.3, "retrieval": 0.5, "tuned": 0.6, "tuned_retrieval": 0.8}, "tuned_retrieval"),
        ({"base": 0.2, "few_shot": 0.3, "retrieval": 0.8, "tuned": 0.6, "tuned_retrieval": 0.8}, "retrieval"),
        ({"base": 0.2, "few_shot": 0.7, "retrieval": 0.7, "tuned": 0.71, "tuned_retrieval": 0.71}, "few_shot"),
        ({"base": 0.5, "few_shot": 0.5, "retrieval": 0.5, "tuned": 0.5, "tuned_retrieval": 0.5}, "base"),
        ({"base": 0.2, "tuned": 0.8, "tuned_retrieval": 0.2}, "tuned"),
    ],
)
def test_the_cheapest_way_that_is_not_worse_is_advised(shares: dict[str, float], chosen: str) -> None:
    found = advised(evaluation(shares))
    assert (found["advised"], found["because"]) == (chosen, WAYS[chosen])
    assert [entry["way"] for entry in found["ways"]] == [way for way in WAYS if way in shares]
    assert f"advice: {WAYS[chosen]}" in advice_text(found)


def test_a_gap_that_is_not_shown_says_how_many_rows_would_show_it() -> None:
    found = advised(evaluation({"base": 0.70, "tuned": 0.72}), curve={"sentence": "more rows help: so they do"})
    assert (found["advised"], found["best"]) == ("base", "tuned")
    assert "tuned scored 0.02" in found["would_change"][0]
    assert "held-out rows do not show" in found["would_change"][0]
    assert advice_text(found).endswith("more rows help: so they do")
    more = advised(evaluation({"base": 0.70, "tuned": 0.72}, num_rows=20_000))
    assert more["advised"] == "tuned"
    assert "base comes nearest without tuning" in more["would_change"][0]


def test_holm_is_worked_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("advice")
    rows = [{"prompt": f"Colour of {n}?", "completion": ["red", "green"][n % 2]} for n in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "toy.yaml").write_text(
        "name: toy\nbase: starter\ndata: {train: rows.jsonl, validation: 0.3}\nmethod: {kind: lora, rank: 2}\n"
        "train: {epochs: 1, batch_rows: 16}\nevaluate: {metrics: [exact_match], max_tokens: 4}\n"
    )
    api.tune(folder / "toy.yaml", workspace=Workspace(folder / "w"))
    return folder


def test_a_run_or_its_recipe_is_advised_on(
    tuned: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["tunesmith", "advise", str(tuned / "toy.yaml"), "--rows", "6", "--workspace", str(tuned / "w"), "--json"]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    document = json.loads(capsys.readouterr().out)
    assert [entry["way"] for entry in document["ways"]] == list(WAYS)
    assert document["rows"] == 6
    asked = {entry["way"]: entry["costs"]["tokens_per_prompt"] for entry in document["ways"]}
    assert asked["base"] == asked["tuned"] <= asked["few_shot"]
    assert "is the best of 16 on" in document["few_shot"]
    assert asked["retrieval"] == asked["tuned_retrieval"] > asked["base"]


def test_what_cannot_be_advised_on_is_refused(tuned: Path) -> None:
    workspace = Workspace(tuned / "w")
    with pytest.raises(NotFoundError):
        find_named("nothing", workspace=workspace)
    overrides = [
        "objective=classification",
        "data.mapping={text: prompt, label: completion}",
        "evaluate={}",
        "name=head",
    ]
    run = api.tune(tuned / "toy.yaml", workspace=workspace, overrides=[*overrides, "train.max_steps=1"])
    with pytest.raises(RecipeError, match="writes no text"):
        advise(run, workspace=workspace)
