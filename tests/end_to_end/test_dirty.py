"""The dirty files as training data: refused with file and line, or counted row by row; never half a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

DIRTY = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "dirty"
EXPECTED: dict[str, Any] = json.loads((DIRTY / "expected.json").read_text()) if DIRTY.is_dir() else {}
PREFERENCES = {"dpo_equal_openai.jsonl", "dpo_bad.jsonl"}  # no objective here takes such rows
ODD_BUT_LEGAL = {"special_tokens.jsonl", "duplicates_exact.jsonl", "duplicates_near.jsonl", "private_data.jsonl"}
ODD_BUT_LEGAL |= {"leak_train.jsonl", "leak_test.jsonl", "rare_class.jsonl"}
TOO_LONG = {"long_row_200k.jsonl"}
ALSO_BAD = {"mixed_schemas.jsonl": {5}}  # plain text, which instruction tuning cannot use
MAPPINGS = {
    "one_class.jsonl": {"prompt": "text", "completion": "label"},
    "bad_labels.jsonl": {"prompt": "text", "completion": "label"},
    "rare_class.jsonl": {"prompt": "text", "completion": "label"},
    "quoted_newline.csv": {"prompt": "text", "completion": "label"},
    "ragged.csv": {"prompt": "text", "completion": "label"},
}

pytestmark = pytest.mark.skipif(not EXPECTED, reason="the shared dirty files are not here")
Command = Callable[..., Any]


def bad_lines(name: str) -> set[int]:
    """The rows that cannot be trained on."""
    if name in ODD_BUT_LEGAL:
        return set()
    if name in PREFERENCES:
        return set(range(1, EXPECTED[name]["rows"] + 1))
    if name == "bad_labels.jsonl":
        return {5, 6, 8, 9}  # the others contradict each other, which each of them alone does not show
    return set(EXPECTED[name]["affected_rows"]) | ALSO_BAD.get(name, set())


def write_recipe(folder: Path, base: Path, name: str, **data: Any) -> None:
    recipe = {
        "name": "dirty",
        "base": str(base),
        "data": {"train": str((DIRTY / name).resolve()), "validation": None, **data},
        "train": {"max_steps": 1},
        "method": {"kind": "lora", "rank": 1},
    }
    (folder / "dirty.yaml").write_text(yaml.safe_dump(recipe))


def no_run(tunesmith: Command, folder: Path) -> None:
    """Nothing that looks like a run is there."""
    assert tunesmith("runs", "--json", folder=folder).document == []
    error, _ = tunesmith("generate", "dirty", "hello", folder=folder).refusal
    assert "holds no runs" in error


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_at_fault_is_refused_at_a_bad_row(tunesmith, base, tmp_path, name):
    write_recipe(tmp_path, base, name, mapping=MAPPINGS.get(name, {}))
    bad, rows = bad_lines(name), EXPECTED[name]["rows"]
    if rows and not bad:
        document = tunesmith("data", "prepare", "dirty.yaml", "--json", folder=tmp_path).document
        assert document["ledger"]["states"]["trained"] == document["train"]["rows"] == rows
        return
    error, hint = tunesmith("train", "dirty.yaml", "--json", folder=tmp_path).refusal
    places = [f"{name}:{line}: " for line in bad] or [f"{name}: "]
    assert any(place in error for place in places)
    assert hint
    no_run(tunesmith, tmp_path)


@pytest.mark.parametrize("name", EXPECTED)
def test_where_bad_rows_are_dropped_each_is_counted(tunesmith, base, tmp_path, name):
    write_recipe(tmp_path, base, name, bad_rows="drop", too_long="drop", mapping=MAPPINGS.get(name, {}))
    bad, rows = bad_lines(name), EXPECTED[name]["rows"]
    if len(bad) == rows:
        error, _ = tunesmith("train", "dirty.yaml", folder=tmp_path).refusal
        assert "no row is left to train on" in error
        no_run(tunesmith, tmp_path)
        return
    summary = tunesmith("train", "dirty.yaml", "--json", folder=tmp_path).document
    assert (summary["steps"], summary["rows"], summary["stopped"]) == (1, rows - len(bad), "finished")
    ledger = json.loads((Path(summary["path"]) / "ledger.json").read_text())
    assert ledger["rows"] == sum(ledger["states"].values()) == rows
    assert ledger["states"]["trained"] == rows - len(bad)
    state = "dropped" if name in TOO_LONG else "bad"
    assert ledger["states"][state] == len(bad)
    assert {detail["line"] for detail in ledger["details"]} == bad
    assert all(detail["reason"] for detail in ledger["details"])


def test_rows_that_leak_are_taken_out_of_training(tunesmith, base, tmp_path):
    write_recipe(tmp_path, base, "leak_train.jsonl", test=str((DIRTY / "leak_test.jsonl").resolve()))
    document = tunesmith("data", "prepare", "dirty.yaml", "--json", folder=tmp_path).document
    assert document["ledger"]["states"]["held_out_test"] == EXPECTED["leak_test.jsonl"]["rows"]
    assert document["ledger"]["reasons"]["duplicate"] == {
        "also in test": 1
    }  # the exact one; data check finds the others
    assert document["train"]["rows"] == EXPECTED["leak_train.jsonl"]["rows"] - 1


def test_repeated_rows_are_dropped_where_asked(tunesmith, base, tmp_path):
    write_recipe(tmp_path, base, "duplicates_exact.jsonl", duplicates="drop")
    document = tunesmith("data", "prepare", "dirty.yaml", "--json", folder=tmp_path).document
    assert document["ledger"]["states"]["duplicate"] == 3
    lines = [detail["line"] for detail in document["ledger"]["details"]]
    assert lines == EXPECTED["duplicates_exact.jsonl"]["affected_rows"]
