"""The learning curve: its extrapolation is the power law's, its intervals hold, and the runs are those it names."""

import contextlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunesmith import cli
from tunesmith.curve import fitted, learning_curve, twice_of
from tunesmith.data.split import is_in
from tunesmith.errors import RecipeError
from tunesmith.evaluate.result import Evaluation
from tunesmith.recipe import load_recipe
from tunesmith.registry.workspace import Workspace
from tunesmith.texts import curve_text
from tunesmith.train.observers import Silent

SHARES = [0.125, 0.25, 0.5, 1.0]


@pytest.mark.parametrize(("best", "power"), [(1.0, 0.35), (1.0, 0.0), (0.0, 0.5), (0.0, -0.1)])
def test_the_extrapolation_is_the_power_law(best: float, power: float) -> None:
    rows = np.array([100, 200, 400, 800])
    missing = 0.8 * (rows / 100.0) ** -power
    scores = best - missing if best else missing
    expected = 0.8 * 16.0**-power
    found = twice_of(scores[:, None], rows_P=rows, best=best)
    assert found[0] == pytest.approx(best - expected if best else expected)


class Run:
    def __init__(self, rows: int):
        self.name, self.summary = f"run-{rows}", {"rows": rows}


def simulated(generator: np.random.Generator, *, power: float, num_rows: int, seeds: int = 1) -> dict[str, Any]:
    """Rows have one difficulty for all runs; the more training rows, the more of them are right."""
    difficulty = generator.random(num_rows)
    found: list[Any] = []
    for share in SHARES:
        scored = []
        for _ in range(seeds):
            right = (difficulty < 1 - 0.6 * (8 * share) ** -power).astype(float)
            document = {"primary": "exact_match", "rows": num_rows}
            document["metrics"] = {"exact_match": {"systems": {"tuned": {"value": right.mean()}}}}
            scored.append((Run(int(800 * share)), Evaluation(document, [], {"exact_match": {"tuned": right}})))
        found.append(scored)
    return fitted("toy", shares=SHARES, found=found)


@pytest.mark.parametrize("power", [0.3, 0.0])
def test_the_interval_of_twice_the_rows_holds_what_comes(power: float) -> None:
    truth, inside, claims = 1 - 0.6 * 16**-power, 0, 0
    for seed in range(60):
        document = simulated(np.random.default_rng(seed), power=power, num_rows=150)
        inside += document["twice"]["low"] <= truth <= document["twice"]["high"]
        claims += document["sentence"].startswith("more rows help")
    assert inside >= 54
    assert claims == (60 if power else 0)


def test_the_document_says_what_it_found() -> None:
    document = simulated(np.random.default_rng(0), power=0.4, num_rows=300, seeds=2)
    assert [(point["share"], point["rows"], len(point["runs"])) for point in document["points"]] == [
        (0.125, 100, 2), (0.25, 200, 2), (0.5, 400, 2), (1.0, 800, 2),
    ]  # fmt: skip
    assert document["sentence"].startswith("more rows help: 1,600 rows would give 0.")
    text = curve_text(document)
    assert re.search(r"^twice +1,600 +0\.\d+ ", text, re.MULTILINE)
    assert text.endswith(document["sentence"])
    flat = simulated(np.random.default_rng(0), power=0.0, num_rows=300)
    assert flat["sentence"].startswith("it is not shown")


def test_a_share_holds_every_smaller_one() -> None:
    keys = [f"{number:032x}" for number in range(4000)]
    kept = [{key for key in keys if is_in(key, share=share)} for share in (0.1, 0.3, 1.0)]
    assert kept[0] < kept[1] < kept[2] == set(keys)
    assert len(kept[1]) == pytest.approx(1200, abs=100)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rows = [{"prompt": f"Colour of {n}?", "completion": ["red", "green"][n % 2]} for n in range(80)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "toy.yaml").write_text(
        "name: toy\nbase: starter\ndata: {train: rows.jsonl, validation: 0.2}\nmethod: {kind: lora, rank: 2}\n"
        "train: {epochs: 1, batch_rows: 16}\nevaluate: {metrics: [exact_match], max_tokens: 4}\n"
    )
    return tmp_path / "toy.yaml"


def test_the_runs_of_a_curve_are_nested_and_kept(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["tunesmith", "curve", str(recipe), "--parts", "3", "--workspace", str(tmp_path / "w"), "--json"]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    document = json.loads(capsys.readouterr().out)
    rows = [point["rows"] for point in document["points"]]
    assert rows == sorted(rows)
    assert rows[0] < rows[-1]
    trained = []
    for point in document["points"]:
        folder = tmp_path / "w" / "runs" / point["runs"][0]
        ledger = json.loads((folder / "ledger.json").read_text())
        assert ledger["states"]["trained"] == point["rows"]
        dropped = ledger["reasons"].get("dropped", {}).get("train_share", 0)
        assert dropped + point["rows"] == rows[-1]
        trained.append(json.loads((folder / "evaluation.json").read_text())["rows_sha256"])
    assert len(set(trained)) == 1


def test_of_a_share_a_share_of_the_rows_is_selected(recipe: Path, tmp_path: Path) -> None:
    document = learning_curve(
        load_recipe(recipe, overrides=["data.select={keep: 16, by: quality}"]),
        workspace=Workspace(tmp_path / "w"),
        parts=3,
        progress=lambda: contextlib.nullcontext(Silent()),
    )
    assert [point["rows"] for point in document["points"]] == [4, 8, 16]


def test_rows_must_be_held_out(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="holds no rows out"):
        learning_curve(
            load_recipe(recipe, overrides=["data.validation=null"]),
            workspace=Workspace(tmp_path / "w"),
            progress=lambda: contextlib.nullcontext(None),  # type: ignore[arg-type,return-value]
        )
