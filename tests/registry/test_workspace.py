"""The workspace is found as git finds its folder, and a run by whatever a person writes for it."""

import json
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.errors import NotFoundError, RecipeError, StorageError
from tunesmith.registry.workspace import RUN_NAME, Workspace, find_workspace, recipe_name
from tunesmith.storage import read_json, write_json


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Workspace:
    monkeypatch.delenv("TUNESMITH_WORKSPACE", raising=False)
    monkeypatch.chdir(tmp_path)
    return Workspace(tmp_path / ".tunesmith")


def made(workspace: Workspace, name: str, created: str) -> Path:
    """A run folder with a chosen name and moment."""
    write_json(workspace.runs / name / "run.json", value={"run": name, "created": f"2026-01-{created}T00:00:00+00:00"})
    return workspace.runs / name


def test_found_upward_and_never_created_by_looking(workspace, monkeypatch):
    project = workspace.path.parent
    below = project / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert find_workspace().path == below / ".tunesmith"
    assert not (below / ".tunesmith").exists()
    workspace.create()
    assert find_workspace() == workspace


def test_option_overrides_variable_overrides_folder(workspace, monkeypatch, tmp_path):
    workspace.create()
    monkeypatch.setenv("TUNESMITH_WORKSPACE", str(tmp_path / "by_variable"))
    assert find_workspace().path == tmp_path / "by_variable"
    assert find_workspace(tmp_path / "by_option").path == tmp_path / "by_option"
    assert find_workspace(Path("relative")).path == tmp_path / "relative"
    assert find_workspace(tmp_path).path == workspace.path, "a folder that holds a workspace means that workspace"
    monkeypatch.setenv("TUNESMITH_WORKSPACE", "")
    assert find_workspace() == workspace


def test_a_file_is_no_workspace(workspace, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RecipeError, match="is a file"):
        find_workspace(tmp_path / "file")


def test_git_does_not_see_the_workspace(workspace):
    subprocess.run(["git", "init", "-q", "."], check=True)
    workspace.new_run("triage")
    seen = subprocess.run(["git", "status", "--porcelain"], check=True, capture_output=True, text=True).stdout
    assert seen == ""


def test_files_of_others_are_never_hidden_from_git(workspace, tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "code.py").write_text("x = 1\n")
    Workspace(tmp_path / "project").new_run("triage")
    assert not (tmp_path / "project" / ".gitignore").exists()


def test_an_own_gitignore_is_kept(workspace):
    workspace.create()
    (workspace.path / ".gitignore").write_text("cache\n")
    workspace.create()
    assert (workspace.path / ".gitignore").read_text() == "cache\n"


def test_a_new_run_is_marked_as_started(workspace):
    folder = workspace.new_run("support-triage")
    summary = json.loads((folder / "run.json").read_text())
    assert folder.parent == workspace.runs
    assert RUN_NAME.fullmatch(folder.name)
    assert recipe_name(folder.name) == "support-triage"
    assert summary["run"] == folder.name
    assert summary["state"] == "started"
    assert datetime.fromisoformat(summary["created"]).utcoffset().total_seconds() == 0


def test_runs_of_one_recipe_have_their_own_folders(workspace):
    assert len({workspace.new_run("x") for _ in range(20)}) == 20


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "-x", ".x", "latest", "x" * 65, "a b", "x\n", "\0", "é"]
)
def test_unsafe_names_are_refused_before_anything_is_written(workspace, name):
    with pytest.raises(RecipeError, match="allowed are"):
        workspace.new_run(name)
    assert not workspace.path.exists()


@settings(deadline=None)
@given(name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True), digits=st.integers(0, 2**32 - 1))
def test_the_recipe_is_read_back_from_any_run_name(name, digits):
    run = f"{name}-{digits:08x}"
    assert RUN_NAME.fullmatch(run)
    assert recipe_name(run) == name


def test_an_unwritable_place_is_a_storage_error(workspace, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot write"):
        Workspace(tmp_path / "file" / ".tunesmith").new_run("triage")


def test_every_way_to_name_a_run(workspace, tmp_path, monkeypatch):
    old = made(workspace, "triage-aaaaaaaa", "01")
    new = made(workspace, "triage-abbbbbbb", "03")
    other = made(workspace, "triage-quotes-cccccccc", "02")
    assert workspace.run_folders() == [new, other, old]
    assert workspace.find_run("latest") == new
    assert workspace.find_run("triage-aaaaaaaa") == old
    assert workspace.find_run("triage") == new, "a recipe's name means its newest run, though others begin with it"
    assert workspace.find_run("triage-q") == other
    assert workspace.find_run(str(old)) == old
    assert workspace.find_run(".tunesmith/runs/triage-aaaaaaaa/") == old
    monkeypatch.chdir(old)
    assert workspace.find_run(".") == old


def test_a_run_folder_anywhere_is_found_by_its_path(workspace, tmp_path):
    write_json(tmp_path / "copied" / "run.json", value={})
    assert workspace.find_run("copied") == tmp_path / "copied"


def test_an_ambiguous_beginning_lists_the_runs(workspace):
    made(workspace, "triage-aaaaaaaa", "01")
    made(workspace, "triage-abbbbbbb", "02")
    with pytest.raises(NotFoundError, match="beginning of 2 runs: triage-abbbbbbb, triage-aaaaaaaa"):
        workspace.find_run("triage-a")


def test_a_misspelt_run_names_the_nearest(workspace):
    made(workspace, "support-triage-aaaaaaaa", "01")
    made(workspace, "quotes-bbbbbbbb", "02")
    with pytest.raises(NotFoundError, match="nearest: support-triage"):
        workspace.find_run("suport-triage")
    with pytest.raises(NotFoundError, match="it holds: quotes-bbbbbbbb, support-triage-aaaaaaaa"):
        workspace.find_run("")


@pytest.mark.parametrize("text", ["", "latest", "x", "x" * 5000, "a\0b"])
def test_an_empty_workspace_says_so(workspace, text):
    with pytest.raises(NotFoundError, match="holds no runs") as caught:
        workspace.find_run(text)
    assert "--workspace" in caught.value.hint


def test_folders_that_are_no_runs_are_passed_over(workspace):
    (workspace.runs / "triage-aaaaaaaa").mkdir(parents=True)
    made(workspace, ".triage-bbbbbbbb.old", "01")
    assert workspace.run_folders() == []


def test_a_damaged_summary_does_not_hide_the_other_runs(workspace):
    good = made(workspace, "triage-aaaaaaaa", "01")
    damaged = made(workspace, "triage-bbbbbbbb", "01")
    for text in ("{", "[]", '{"created": 3}', '{"created": "noon"}'):
        (damaged / "run.json").write_text(text)
        assert workspace.run_folders() == [damaged, good], "its place comes from the folder's own time"


def test_read_json_says_what_is_wrong_and_where(tmp_path):
    with pytest.raises(NotFoundError, match="no such file"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{\n"a": }')
    with pytest.raises(StorageError, match=r"bad\.json:2: not JSON"):
        read_json(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_bytes(b'"\xff"')
    with pytest.raises(StorageError, match="cannot be read"):
        read_json(tmp_path / "bad.json")
