"""Looking back shows what the runs left, says what is missing, and never hides one run because another is damaged."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.errors import NotFoundError, StorageError
from tunesmith.registry.compare import aligned, compare_runs, runs_table, runs_text, show_run
from tunesmith.registry.index import Index
from tunesmith.registry.workspace import Workspace, timestamp
from tunesmith.storage import write_json

SETTINGS = {
    "name": "triage",
    "data": {"train": "tickets.jsonl", "test": "test.jsonl"},
    "method": {"kind": "lora", "rank": 16, "targets": ["q", "v"]},
    "train": {"learning_rate": 2e-4, "epochs": 3, "patience": None},
}
EVALUATION = {
    "rows": 120,
    "systems": ["base", "tuned"],
    "metrics": {
        "exact_match": {
            "higher_is_better": True,
            "systems": {
                "base": {"value": 0.02, "low": 0.0, "high": 0.05},
                "tuned": {"value": 0.91, "low": 0.85, "high": 0.95},
            },
            "differences": {"tuned - base": {"value": 0.89, "low": 0.81, "high": 0.95, "p": 0.0001}},
        }
    },
    "verdict": "better",
    "sentence": "tuned beats base on exact_match: 0.91 against 0.02",
}


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path / ".tunesmith")


@pytest.fixture
def index(workspace) -> Index:
    return Index(workspace.index)


def run_folder(
    workspace: Workspace, *, settings: dict = SETTINGS, loss: float = 0.4, evaluation: dict | None = None
) -> Path:
    """A finished run as training and evaluation leave it."""
    folder = workspace.new_run("triage")
    (folder / "recipe.yaml").write_text("name: triage\n")
    write_json(folder / "resolved.json", value=settings)
    numbers = {"rows": 400, "steps": 75, "tokens_per_second": 12345.6, "train_loss": loss, "validation_loss": None}
    head = {"run": folder.name, "path": str(folder), "created": timestamp(), "state": "finished", "stopped": "early"}
    write_json(folder / "run.json", value=head | numbers)
    write_json(folder / "ledger.json", value={"rows": 400, "states": {"trained": 1398, "bad": 2, "dropped": 0}})
    (folder / "model").mkdir()
    (folder / "model" / "adapter.bin").write_bytes(b"12345")
    if evaluation is not None:
        write_json(folder / "evaluation.json", value=evaluation)
    return folder


def recorded(folder: Path, index: Index, tmp_path: Path) -> Path:
    """The same run, known to the index."""
    (tmp_path / "tickets.jsonl").write_text("{}\n")
    (tmp_path / "base").mkdir(exist_ok=True)
    (tmp_path / "base" / "weights.bin").write_bytes(b"w")
    data = index.record_dataset([tmp_path / "tickets.jsonl"], rows=400, form="chat")
    base = index.record_base(tmp_path / "base", name="starter", model_type="llama", parameters=4)
    index.start_run(folder, datasets={"train": data}, base=base)
    index.finish_run(folder.name, state="finished")
    if (folder / "evaluation.json").exists():
        index.record_evaluation(folder.name)
    return folder


def test_only_settings_that_differ_are_named(workspace):
    other = json.loads(json.dumps(SETTINGS))
    other["method"] = {"kind": "prefix", "tokens": 8}
    other["train"]["learning_rate"] = 1e-5
    comparison = compare_runs(run_folder(workspace), run_folder(workspace, settings=other))
    assert {(s.name, json.dumps(s.a), json.dumps(s.b)) for s in comparison.settings} == {
        ("method.kind", '"lora"', '"prefix"'),
        ("method.rank", "16", "null"),
        ("method.targets", '["q", "v"]', "null"),
        ("method.tokens", "null", "8"),
        ("train.learning_rate", "0.0002", "1e-05"),
    }


values = st.recursive(
    st.none() | st.integers(0, 2) | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("xyz"), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=40)
@given(resolved=st.dictionaries(st.sampled_from("abc"), values, max_size=3))
def test_equal_settings_never_differ_and_a_changed_one_always_does(resolved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, value in (("a", resolved), ("same", resolved), ("changed", resolved | {"new": {"value": 1}})):
        write_json(folder / name / "resolved.json", value=value)
        write_json(folder / name / "run.json", value={})
    assert compare_runs(folder / "a", folder / "same").settings == []
    assert [s.name for s in compare_runs(folder / "a", folder / "changed").settings] == ["new.value"]


def test_results_stand_side_by_side_with_their_intervals(workspace):
    better = json.loads(json.dumps(EVALUATION))
    better["metrics"]["exact_match"]["systems"]["tuned"] = {"value": 0.95, "low": 0.9, "high": 0.98}
    comparison = compare_runs(
        run_folder(workspace, evaluation=EVALUATION), run_folder(workspace, loss=0.3, evaluation=better)
    )
    results = {result.name: result for result in comparison.results}
    assert (results["train_loss"].a, results["train_loss"].b) == (0.4, 0.3)
    assert results["stopped"].a == "early"
    tuned = results["exact_match (tuned)"]
    assert (tuned.a, tuned.a_interval, tuned.b, tuned.b_interval) == (0.91, (0.85, 0.95), 0.95, (0.9, 0.98))
    assert tuned.higher_is_better is True
    assert results["exact_match (tuned - base)"].a_interval == (0.81, 0.95)
    assert comparison.notes == []
    assert json.loads(json.dumps(comparison.as_dict()))["results"][0]["name"] == "rows"


def test_the_text_of_a_comparison_is_aligned(workspace):
    comparison = compare_runs(
        run_folder(workspace, evaluation=EVALUATION),
        run_folder(workspace, settings=SETTINGS | {"name": "quotes " * 20, "data": {}}),
    )
    text = comparison.as_text()
    lines = text.splitlines()
    header = next(line for line in lines if line.startswith("results"))
    tuned = next(line for line in lines if line.startswith("exact_match (tuned) "))
    assert tuned[header.index("a", len("results")) :].startswith("0.91 [0.85, 0.95]")
    assert tuned[header.index("b", len("results")) :] == "-"
    assert "12,346" in text
    assert max(map(len, lines)) < 160
    assert "no setting differs" in compare_runs(run_folder(workspace), run_folder(workspace)).as_text()


@pytest.mark.parametrize("other", [{"rows": 60}, {"rows_sha256": "other"}])
def test_different_test_rows_are_pointed_out(workspace, other):
    comparison = compare_runs(
        run_folder(workspace, evaluation=EVALUATION),
        run_folder(workspace, evaluation=EVALUATION | other),
    )
    assert len(comparison.notes) == 1
    assert "not evaluated on the same rows" in comparison.as_text()


def test_a_run_that_only_started_compares_without_results(workspace):
    started = workspace.new_run("triage")
    with pytest.raises(NotFoundError, match=r"resolved\.json"):
        compare_runs(started, started)
    write_json(started / "resolved.json", value=SETTINGS)
    results = {result.name: result for result in compare_runs(run_folder(workspace), started).results}
    assert (results["state"].a, results["state"].b) == ("finished", "started")
    assert results["train_loss"].b is None


def test_a_damaged_file_is_named(workspace):
    folder = run_folder(workspace)
    (folder / "resolved.json").write_text("[]")
    with pytest.raises(StorageError, match=r"resolved\.json: not a JSON object"):
        compare_runs(folder, folder)


def test_the_table_has_every_run_newest_first(workspace, index, tmp_path):
    first = recorded(run_folder(workspace, evaluation=EVALUATION), index, tmp_path)
    unrecorded = run_folder(workspace)
    gone = recorded(run_folder(workspace), index, tmp_path)
    shutil.rmtree(gone)
    damaged = workspace.new_run("triage")
    (damaged / "run.json").write_text("{")
    table = runs_table(index)
    assert [(run.run, run.state, run.base, run.verdict) for run in table] == [
        (gone.name, "missing", "starter", None),
        (unrecorded.name, "finished", None, None),
        (first.name, "finished", "starter", "better"),
    ]
    by_name = {run.run: run.as_dict() for run in table}
    assert by_name[first.name]["train_loss"] == 0.4
    assert by_name[first.name]["rows"] == 400
    assert by_name[first.name]["path"] == str(first)
    text = runs_text(table)
    assert text.splitlines()[0].split()[:4] == ["run", "created", "(UTC)", "state"]
    assert len(text.splitlines()) == 4


def test_no_runs_yet(workspace, index):
    assert runs_table(index) == []
    assert runs_text([]) == "no runs yet"
    assert not workspace.path.exists()


def test_a_run_in_full(workspace, index, tmp_path):
    folder = recorded(run_folder(workspace, evaluation=EVALUATION), index, tmp_path)
    details = show_run(folder, index)
    assert details.files["model/"] == 5
    assert details.lineage.verified
    document = json.loads(json.dumps(details.as_dict()))
    assert document["sentence"] == EVALUATION["sentence"]
    assert document["ledger"]["states"]["bad"] == 2
    assert document["lineage"]["datasets"]["train"]["state"] == "verified"
    text = details.as_text()
    for part in (
        folder.name,
        "1,398 trained, 2 bad",
        EVALUATION["sentence"],
        "starter",
        "verified",
        "train data",
        "recipe.yaml",
    ):
        assert part in text
    assert "dropped" not in text
    (tmp_path / "tickets.jsonl").write_text("changed\n")
    assert "changed" in show_run(folder, index).as_text()
    assert "unchecked" in show_run(folder, index, verify=False).as_text()


def test_a_run_of_elsewhere_is_shown_without_lineage(workspace, index):
    folder = workspace.new_run("triage")
    details = show_run(folder, index)
    assert (details.lineage, details.ledger, details.sentence) == (None, None, None)
    text = details.as_text()
    assert f"not evaluated: `tunesmith evaluate {folder.name}`" in text
    assert "not recorded in this workspace" in text


@settings(deadline=None)
@given(st.lists(st.tuples(st.text("ab -", max_size=5), st.text("cd", max_size=5)), min_size=1, max_size=5))
def test_columns_begin_at_the_same_place(rows):
    lines = aligned(rows).split("\n")
    start = max(len(first) for first, _ in rows) + 2
    for line, (first, second) in zip(lines, rows, strict=True):
        assert line.ljust(start)[:start].rstrip() == first.rstrip()
        assert line[start:] == second


def test_looking_back_needs_no_torch():
    code = "import sys, tunesmith.registry.compare; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
