"""What is recorded is found again, by several processes at once, and leads down to bytes that verify or do not."""

import hashlib
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.errors import NotFoundError, StorageError
from tunesmith.registry.index import SCHEMA_VERSION, Index
from tunesmith.registry.store import Store, digest_of
from tunesmith.registry.workspace import Workspace
from tunesmith.storage import write_json


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path / ".tunesmith")


@pytest.fixture
def index(workspace) -> Index:
    return Index(workspace.index)


@pytest.fixture
def data(tmp_path) -> Path:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    return tmp_path / "train.jsonl"


@pytest.fixture
def base(tmp_path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "weights.bin").write_bytes(b"weights")
    return tmp_path / "base"


def started(workspace: Workspace, index: Index, data: Path, base: Path, parent: str | None = None) -> Path:
    """A run that has begun, recorded with its data and base."""
    folder = workspace.new_run("triage")
    (folder / "recipe.yaml").write_text("name: triage\n")
    write_json(folder / "resolved.json", value={"train": {"epochs": 3}})
    dataset = index.record_dataset([data], rows=1, form="text")
    digest = index.record_base(base, name="starter", model_type="llama", parameters=7)
    index.start_run(folder, datasets={"train": dataset}, base=digest, parent=parent)
    return folder


def finished(workspace: Workspace, index: Index, data: Path, base: Path, parent: str | None = None) -> Path:
    folder = started(workspace, index, data, base, parent)
    write_json(folder / "run.json", value={"run": folder.name, "steps": 5})
    (folder / "model").mkdir()
    (folder / "model" / "adapter.bin").write_text(folder.name)
    index.finish_run(folder.name, state="finished")
    return folder


def test_an_index_that_is_not_there_is_empty_and_stays_so(index, workspace):
    assert index.runs() == []
    with pytest.raises(NotFoundError, match="knows no run 'x'"):
        index.run("x")
    assert not workspace.path.exists()


def test_a_run_from_beginning_to_evaluation(index, workspace, data, base):
    folder = started(workspace, index, data, base)
    run = index.run(folder.name)
    assert (run.recipe, run.state, run.summary, run.evaluation, run.model_digest) == (
        "triage",
        "started",
        None,
        None,
        None,
    )
    assert run.resolved == {"train": {"epochs": 3}}
    assert run.recipe_digest == hashlib.sha256(b"name: triage\n").hexdigest()
    assert (run.base.name, run.base.model_type, run.base.parameters) == ("starter", "llama", 7)
    [used] = run.datasets
    assert (used.role, used.dataset.rows, used.dataset.form, used.digest) == ("train", 1, "text", digest_of(data))

    write_json(folder / "run.json", value={"steps": 5})
    index.finish_run(folder.name, state="stopped")
    write_json(folder / "evaluation.json", value={"verdict": "better"})
    index.record_evaluation(folder.name)
    run = Index(workspace.index).run(folder.name)
    assert (run.state, run.summary, run.evaluation) == ("stopped", {"steps": 5}, {"verdict": "better"})
    assert run.model_digest is None


def test_a_resumed_run_stays_one_run(index, workspace, data, base):
    folder = started(workspace, index, data, base)
    index.finish_run(folder.name, state="stopped")
    first = index.run(folder.name)
    data.write_text("other\n")
    other = index.record_dataset([data], rows=2, form="text")
    index.start_run(folder, datasets={"train": other, "test": other}, base=first.base_digest)
    [run] = index.runs()
    assert (run.state, run.created) == ("started", first.created)
    assert {used.role: used.digest for used in run.datasets} == {"train": other, "test": other}


def test_newest_first(index, workspace, data, base):
    names = [started(workspace, index, data, base).name for _ in range(3)]
    assert [run.name for run in index.runs()] == names[::-1]


def test_the_same_bytes_are_one_dataset_wherever_they_lie(index, workspace, data, base, tmp_path):
    folder = started(workspace, index, data, base)
    data.rename(tmp_path / "moved.jsonl")
    again = index.record_dataset([tmp_path / "moved.jsonl"], rows=1, form="text")
    [used] = index.run(folder.name).datasets
    assert used.digest == again
    assert used.dataset.files == [str(tmp_path / "moved.jsonl")]
    assert index.lineage(folder.name).datasets["train"].state == "verified"


def test_several_files_are_one_dataset_in_their_order(index, data, tmp_path):
    (tmp_path / "more.jsonl").write_text("x\n")
    both = index.record_dataset([data, tmp_path / "more.jsonl"], rows=2, form="text")
    turned = index.record_dataset([tmp_path / "more.jsonl", data], rows=2, form="text")
    assert len({both, turned, digest_of(data)}) == 3


def test_what_a_run_rests_on_must_be_recorded(index, workspace, data, base):
    folder = started(workspace, index, data, base)
    good = index.run(folder.name)
    new = workspace.new_run("other")
    shutil.copy(folder / "recipe.yaml", new)
    with pytest.raises(NotFoundError, match="no such file"):
        index.start_run(new, datasets={}, base=good.base_digest)
    shutil.copy(folder / "resolved.json", new)
    for datasets, base_digest, parent, where in (
        ({}, "0" * 64, None, "bases"),
        ({"train": "1" * 64}, good.base_digest, None, "datasets"),
        ({}, good.base_digest, "none-00000000", "runs"),
    ):
        with pytest.raises(NotFoundError, match=f"is not among the recorded {where}"):
            index.start_run(new, datasets=datasets, base=base_digest, parent=parent)
    for change in (lambda: index.finish_run(new.name, state="finished"), lambda: index.record_evaluation(new.name)):
        with pytest.raises(NotFoundError, match="knows no run"):
            change()
    assert [run.name for run in index.runs()] == [folder.name], "a refused change leaves nothing behind"


def test_lineage_leads_through_the_parents_to_exact_bytes(index, workspace, data, base):
    first = finished(workspace, index, data, base)
    second = finished(workspace, index, data, first / "model", parent=first.name)
    lineage = index.lineage(second.name)
    assert lineage.verified
    assert [(node.kind, node.digest) for node in lineage.nodes] == [
        ("run", digest_of(second / "model")),
        ("dataset", digest_of(data)),
        ("base", digest_of(first / "model")),
        ("run", digest_of(first / "model")),
        ("dataset", digest_of(data)),
        ("base", digest_of(base)),
    ]
    assert lineage.as_dict()["parent"]["base"]["name"] == "starter"
    assert lineage.parent.parent is None


def test_lineage_tells_changed_from_missing_from_unfinished(index, workspace, data, base):
    folder = started(workspace, index, data, base)
    data.write_text("changed\n")
    shutil.rmtree(base)
    lineage = index.lineage(folder.name)
    assert not lineage.verified
    states = (lineage.run.state, lineage.datasets["train"].state, lineage.base.state)
    assert states == ("unfinished", "changed", "missing")
    assert {node.state for node in index.lineage(folder.name, verify=False).nodes} == {"unchecked"}


def test_bytes_in_the_store_still_verify(workspace, data, base):
    store = Store(workspace.store)
    index = Index(workspace.index, store=store)
    folder = finished(workspace, index, data, base)
    store.put_file(data)
    store.put_folder(base)
    data.unlink()
    shutil.rmtree(base)
    assert index.lineage(folder.name).verified
    [damaged] = [p for p in workspace.store.rglob("*") if p.is_file() and p.read_bytes() == b"weights"]
    damaged.chmod(0o644)
    damaged.write_bytes(b"changed")
    assert index.lineage(folder.name).base.state == "missing"


def test_a_workspace_may_be_moved(index, workspace, data, base, tmp_path):
    folder = finished(workspace, index, data, base)
    shutil.move(workspace.path, tmp_path / "elsewhere")
    moved = Index(tmp_path / "elsewhere" / "index.sqlite")
    assert moved.located(moved.run(folder.name).path) == tmp_path / "elsewhere" / "runs" / folder.name
    assert moved.lineage(folder.name).verified


def test_a_newer_schema_is_refused_and_left_alone(index, workspace, data, base):
    started(workspace, index, data, base)
    with sqlite3.connect(workspace.index) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    newer = Index(workspace.index)
    for call in (newer.runs, lambda: newer.record_dataset([data], rows=1, form="text")):
        with pytest.raises(StorageError, match=f"schema {SCHEMA_VERSION + 1}") as caught:
            call()
        assert "upgrade" in caught.value.hint


def test_a_file_that_is_no_index_is_a_storage_error(index, workspace):
    workspace.create()
    workspace.index.write_text("this is no database, and it is long enough to be seen as none " * 20)
    with pytest.raises(
        StorageError, match=r"index\.sqlite: the index cannot be used: file is not a database"
    ) as caught:
        index.runs()
    assert "move that file away" in caught.value.hint


def test_an_index_that_cannot_be_opened_is_a_storage_error(index, workspace, data):
    workspace.index.mkdir(parents=True)
    for call in (index.runs, lambda: index.record_dataset([data], rows=1, form="text")):
        with pytest.raises(StorageError, match="unable to open") as caught:
            call()
        assert "--workspace" in caught.value.hint


def test_the_log_is_written_ahead(index, workspace, data):
    index.record_dataset([data], rows=1, form="text")
    with sqlite3.connect(workspace.index) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    connection.close()


WRITER = """
import pathlib, sys, time
from tunesmith.registry.index import Index
from tunesmith.registry.workspace import Workspace
from tunesmith.storage import write_json, write_text

workspace, data, base = Workspace(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
index = Index(workspace.index)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(5):
    folder = workspace.new_run("triage")
    write_text(folder / "recipe.yaml", text="name: triage")
    write_json(folder / "resolved.json", value={})
    dataset = index.record_dataset([data], rows=1, form="text")
    digest = index.record_base(base, name="starter", model_type="llama", parameters=7)
    index.start_run(folder, datasets={"train": dataset}, base=digest)
    index.finish_run(folder.name, state="finished")
"""


def test_several_processes_make_the_index_and_write_at_once(index, workspace, data, base):
    command = [sys.executable, "-c", WRITER, str(workspace.path), str(data), str(base)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, text=True, **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert [run.state for run in index.runs()] == ["finished"] * 15
    assert len({run.base_digest for run in index.runs()}) == 1
