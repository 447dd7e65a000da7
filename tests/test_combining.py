"""Runs combined and loaded together, on a toy base: what is written, what is measured, what is refused."""

import gc
import io
import json
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith import api, cli, combining
from tunesmith import tuned as tuned_module
from tunesmith.data.types import Message
from tunesmith.errors import ModelError, NotFoundError, RecipeError, StorageError, TunesmithError
from tunesmith.generate.sampling import Sampling
from tunesmith.models.load import Model, load_model
from tunesmith.models.readout import head_logits
from tunesmith.registry.compare import show_run
from tunesmith.registry.workspace import Workspace
from tunesmith.texts import combination_text

RECIPE = """\
name: {name}
base: base
data: {{train: {name}.jsonl, validation: 0.4}}
method: {{kind: lora, rank: 4}}
train: {{max_steps: 6, batch_rows: 8, learning_rate: 2e-2, checkpoint_every: 6, validate_every: 6}}
evaluate: {{metrics: [exact_match, perplexity], max_tokens: 6}}
"""
TASKS = {
    "colour": ("What colour has number {}?", ["red", "green"]),
    "size": ("How large is number {}?", ["big", "small"]),
}
PROMPT = "What colour has number 3?"
SHORT = Sampling(max_tokens=6)


@pytest.fixture(scope="session")
def original(build_model: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two tasks and a finished run of each. Tests that change something work on a copy."""
    folder = tmp_path_factory.mktemp("combining")
    build_model("llama", dtype=torch.float32, max_position_embeddings=256).save(folder / "base")
    for name, (prompt, answers) in TASKS.items():
        rows = [{"prompt": prompt.format(i), "completion": answers[i % 2]} for i in range(24)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(RECIPE.format(name=name))
        tune(folder, name)
    return folder


def tune(project: Path, name: str, *overrides: str) -> api.Run:
    return api.tune(project / f"{name}.yaml", workspace=Workspace(project / "w"), overrides=list(overrides))


def combine(project: Path, *runs: Any, **given: Any) -> api.Run:
    given = {"how": "linear"} | given
    return api.combine(runs or ("colour", "size"), workspace=Workspace(project / "w"), **given)


def document_of(run: api.Run) -> dict[str, Any]:
    return json.loads((run.path / "combination.json").read_text())


@pytest.fixture(scope="session")
def combined(original: Path) -> api.Run:
    return combine(original, weights=[0.5, 0.75], name="both")


@pytest.fixture
def project(original: Path, tmp_path: Path) -> Path:
    """A copy with its runs, whose recipes name the files of the original."""
    return Path(shutil.copytree(original, tmp_path / "project"))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be loaded."""

    def refuse(*arguments: Any, **given: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(combining, "load_model", refuse)


# ---------------------------------------------------------------------------------------------------- combining


def test_a_combination_is_a_run_like_any_other(original: Path, combined: api.Run, tmp_path: Path) -> None:
    assert combined.finished
    assert combined.name.startswith("both-")
    assert combined.recipe.method.kind == "lora"
    assert (combined.recipe.method.rank, combined.recipe.method.targets) == (8, "all-linear")
    tuned = api.load(combined)
    answer = tuned.generate(PROMPT, sampling=SHORT)
    assert isinstance(answer, str)
    workspace = Workspace(original / "w")
    assert api.evaluate(combined, workspace=workspace).document["systems"] == ["base", "few_shot", "tuned"]
    for form in ("peft", "merged"):
        api.export(combined, form=form, out=tmp_path / form)
    shown = show_run(combined.path, api.index_of(workspace)).as_text()
    colour, size = (api.find_run(name, workspace=workspace).name for name in TASKS)
    assert f"linear of {colour} (0.5), {size} (0.75)" in shown
    assert "verified" in shown
    assert shown.count(colour) > 1  # in the lineage too
    assert (combined.path / "report.html").is_file()


def test_the_weights_are_the_base_s_and_the_sum_of_the_changes(original: Path, combined: api.Run) -> None:
    def merged(run: Any) -> dict[str, torch.Tensor]:
        tuned = api.load(run, workspace=Workspace(original / "w"), device="cpu")
        tuned.method.merge(tuned.model)
        return tuned.model.causal.state_dict()

    both, colour, size = merged(combined), merged("colour"), merged("size")
    base = load_model(str(original / "base")).causal.state_dict()
    for name, weight in base.items():
        expected = weight + 0.5 * (colour[name] - weight) + 0.75 * (size[name] - weight)
        torch.testing.assert_close(both[name], expected, rtol=0, atol=1e-6)


def test_where_it_came_from_is_written_down(original: Path, combined: api.Run) -> None:
    runs = [api.find_run(name, workspace=Workspace(original / "w")) for name in TASKS]
    expected = {
        "how": "linear",
        "runs": [
            {"run": run.name, "path": str(run.path), "weight": w} for run, w in zip(runs, (0.5, 0.75), strict=True)
        ],
        "density": None,
        "rank": None,
        "seed": None,
    }
    document = document_of(combined)
    assert combined.resolved["combined"] == expected
    assert {name: document[name] for name in expected} == expected
    assert combined.resolved["hashes"]["base"] == runs[0].resolved["hashes"]["base"]
    assert (document["ranks"], document["lost_norm"], document["layers"]) == ([8], 0.0, 14)


def test_every_system_answers_every_task(original: Path, combined: api.Run) -> None:
    """The numbers of each run and of the base are those that `evaluate` gives."""
    workspace = Workspace(original / "w")
    document = document_of(combined)
    names = [api.find_run(name, workspace=workspace).name for name in TASKS]
    assert document["systems"] == ["base", *names, "combination"]
    assert [task["task"] for task in document["tasks"]] == names
    assert document["left_out"] == []
    for task in document["tasks"]:
        settings = api.evaluation_settings(api.find_run(task["task"], workspace=workspace), against=["base"])
        alone = api.evaluate(task["task"], settings=settings, workspace=workspace).document
        assert (task["rows"], task["primary"], task["data"]) == (alone["rows"], "exact_match", "validation")
        for metric, entry in task["metrics"].items():
            assert set(entry["systems"]) == set(document["systems"])
            ours, theirs = entry["systems"], alone["metrics"][metric]["systems"]
            assert (ours[task["task"]], ours["base"]) == (theirs["tuned"], theirs["base"])
            difference = entry["differences"][f"combination - {task['task']}"]
            expected = ours["combination"]["value"] - ours[task["task"]]["value"]
            assert difference["value"] == pytest.approx(expected)
            assert difference["low"] <= difference["value"] <= difference["high"]
    text = combination_text(document)
    for word in (*names, "combination - own run", "95 % interval", "exact_match", "of 2 tasks"):
        assert word in text


def test_a_combination_may_itself_be_combined(original: Path, combined: api.Run) -> None:
    again = combine(original, combined, "colour", weights=[1, -0.5], rows=2)
    assert again.recipe.method.rank == 12
    assert {task["rows"] for task in document_of(again)["tasks"]} == {2}


@pytest.mark.parametrize("how", ["ties", "dare_linear", "dare_ties"])
def test_the_other_ways(original: Path, how: str) -> None:
    run, again = (combine(original, how=how, rows=2) for _ in range(2))
    document = document_of(run)
    assert (document["density"], document["seed"]) == (0.5, None if how == "ties" else 0)
    assert document["ranks"] == [4]
    assert 0.1 < document["lost_norm"] < 0.95
    assert "of the change's norm lost" in combination_text(document)
    files = [(r.path / "model" / "adapter_model.safetensors").read_bytes() for r in (run, again)]
    assert files[0] == files[1]


# ------------------------------------------------------------------------------------------- whole weights


@pytest.fixture(scope="session")
def whole(original: Path) -> dict[str, api.Run]:
    """A run of each method that moves the base's own weights, two of them by full tuning."""
    overrides = {"full": ("colour", "method=full"), "other": ("size", "method=full")}
    overrides |= {"layers": ("size", "method={kind: layers, last: 1}")}
    return {
        name: tune(original, task, method, f"name={name}", "train.learning_rate=1e-2", "train.max_steps=4")
        for name, (task, method) in overrides.items()
    }


def weights_of(project: Path, run: Any) -> dict[str, torch.Tensor]:
    tuned = api.load(run, workspace=Workspace(project / "w"), device="cpu")
    tuned.method.merge(tuned.model)
    return tuned.model.causal.state_dict()


@pytest.mark.parametrize("mix", [("full", "other"), ("layers", "full"), ("colour", "layers"), ("other", "colour")])
def test_with_whole_weights_among_them_the_result_is_a_whole_model(
    original: Path, whole: dict[str, api.Run], tmp_path: Path, mix: tuple[str, str]
) -> None:
    """The base and the weighted changes, of runs that moved it and of LoRA runs; each task's rows answered as alone."""
    run = combine(original, *mix, weights=[0.5, -0.75], name="mixed")
    assert (run.finished, run.recipe.method.kind) == (True, "full")
    base = load_model(str(original / "base")).causal.state_dict()
    first, second = (weights_of(original, name) for name in mix)
    for name, weight in weights_of(original, run).items():
        expected = base[name] + 0.5 * (first[name] - base[name]) - 0.75 * (second[name] - base[name])
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)
        assert weight.dtype == base[name].dtype
    workspace, document = Workspace(original / "w"), document_of(run)
    names = [api.find_run(name, workspace=workspace).name for name in mix]
    assert document["systems"] == ["base", *names, "combination"]
    assert [task["task"] for task in document["tasks"]] == names
    assert (document["ranks"], document["lost_norm"], document["left_out"]) == ([], 0.0, [])
    for task in document["tasks"]:
        settings = api.evaluation_settings(api.find_run(task["task"], workspace=workspace), against=["base"])
        alone = api.evaluate(task["task"], settings=settings, workspace=workspace).document
        for metric, entry in task["metrics"].items():
            ours, theirs = entry["systems"], alone["metrics"][metric]["systems"]
            assert (ours[task["task"]], ours["base"]) == (theirs["tuned"], theirs["base"])
            assert f"combination - {task['task']}" in entry["differences"]
    losses = [entry["value"] for entry in document["tasks"][0]["metrics"]["perplexity"]["systems"].values()]
    assert len(set(losses)) == 4  # four models, and none of them twice
    assert "a whole model" in combination_text(document)
    api.export(run, form="merged", out=tmp_path / "merged")
    assert show_run(run.path, api.index_of(workspace)).lineage.verified


@pytest.mark.parametrize("how", ["ties", "dare_linear", "dare_ties"])
def test_the_other_ways_of_whole_weights(original: Path, whole: dict[str, api.Run], how: str) -> None:
    """What is thinned out leaves a tensor's other numbers the base's; the same command gives the same bytes."""
    run, again = (combine(original, "full", "layers", how=how, density=0.2, rows=2) for _ in range(2))
    files = [(r.path / "model" / "model.safetensors").read_bytes() for r in (run, again)]
    assert files[0] == files[1]
    base = load_model(str(original / "base")).causal.state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    share = float((weights_of(original, run)[name] != base[name]).float().mean())
    assert 0.2 < share < 0.4  # of two changes a fifth each


def test_one_model_at_a_time_is_in_memory(
    original: Path, whole: dict[str, api.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = []

    def counted(*given: Any, **more: Any) -> Model:
        gc.collect()
        most.append(len(alive) + 1)
        model = load_model(*given, **more)
        alive.add(model.causal)
        return model

    monkeypatch.setattr(combining, "load_model", counted)
    monkeypatch.setattr(tuned_module, "load_model", counted)
    combine(original, "full", "other", rows=2)
    assert max(most) == 1
    assert len(most) == 9  # the base, and then four systems for either task


def test_a_rank_means_nothing_for_whole_weights(
    original: Path, whole: dict[str, api.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(combining, "load_model", None)
    with pytest.raises(RecipeError, match="rank has no effect") as error:
        combine(original, "full", "colour", rank=4)
    assert error.value.hint


def test_damaged_weights_leave_no_run_behind(project: Path, whole: dict[str, api.Run]) -> None:
    run = tune(project, "size", "method=full", "train.max_steps=1")
    path = run.path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    before = Workspace(project / "w").run_folders()
    with pytest.raises(ModelError, match="cannot be read"):
        combine(project, "colour", run)
    assert Workspace(project / "w").run_folders() == before


# ---------------------------------------------------------------------------------------------------- left out


def test_rows_that_are_gone_leave_their_task_out_with_a_reason(project: Path) -> None:
    rows = [{"prompt": f"What colour has number {i}?", "completion": "red"} for i in range(24)]
    (project / "colour.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = [tune(project, name, "train.max_steps=1") for name in TASKS]
    (project / "colour.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    document = document_of(combine(project, *runs))
    assert [task["task"] for task in document["tasks"]] == [runs[1].name]
    assert [task["task"] for task in document["left_out"]] == [runs[0].name]
    assert "changed" in document["left_out"][0]["why"]
    assert document["left_out"][0]["why"] in combination_text(document)


def test_a_task_that_cannot_be_measured_is_left_out_with_a_reason(project: Path) -> None:
    (project / "one.jsonl").write_text('{"prompt": "How large is it?", "completion": "big"}\n')
    run = tune(project, "size", "train.max_steps=1", f"data.validation={project / 'one.jsonl'}")
    made = combine(project, "colour", run)
    document = document_of(made)
    assert made.finished
    assert [task["task"] for task in document["left_out"]] == [run.name]
    assert "one held-out row" in document["left_out"][0]["why"]
    assert len(document["tasks"]) == 1


def test_a_damaged_adapter_leaves_no_run_behind(project: Path) -> None:
    workspace = Workspace(project / "w")
    path = api.find_run("colour", workspace=workspace).path / "model" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    before = workspace.run_folders()
    with pytest.raises(ModelError, match="cannot be read") as error:
        combine(project)
    assert error.value.hint
    assert workspace.run_folders() == before


# ------------------------------------------------------------------------------------------------------ refused


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"how": "tie"}, "called 'tie'; there are linear, ties"),
        ({"density": 0.5}, "no effect on linear"),
        ({"how": "ties", "density": 0.0}, "density is 0"),
        ({"how": "dare_ties", "density": 1.5}, r"density is 1\.5"),
        ({"how": "ties", "seed": 1}, "no effect on ties"),
        ({"weights": [1.0]}, "1 weights are given for 2 runs"),
        ({"weights": [1.0, 0.0]}, "size-[0-9a-f]{8} is 0"),
        ({"weights": [1.0, float("nan")]}, "nan"),
        ({"rank": 9}, "allowed are 1 to 8"),
        ({"how": "ties", "rank": 33}, "allowed are 1 to 32"),
        ({"name": "latest"}, "name is 'latest'"),
        ({"rows": 1}, "rows is 1"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(original: Path, given: dict[str, Any], message: str) -> None:
    before = Workspace(original / "w").run_folders()
    with pytest.raises(RecipeError, match=message) as error:
        combine(original, **given)
    assert error.value.hint
    assert Workspace(original / "w").run_folders() == before


@pytest.mark.usefixtures("no_model")
def test_fewer_than_two_runs_are_refused(original: Path) -> None:
    for runs, message in ((["size"], "two or more"), (["size", "size"], "named twice")):
        with pytest.raises(RecipeError, match=message) as error:
            combine(original, *runs)
        assert error.value.hint


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method={kind: prompt, num_tokens: 2}", "method 'prompt'"),
        ("method={kind: lora, rank: 2, quantise: int8}", "int8"),
        ("method={kind: lora, rank: 2, dora: true}", "DoRA"),
    ],
)
def test_runs_that_do_not_fit_are_refused_before_any_model_is_loaded(
    project: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    run = tune(project, "size", override, "train.max_steps=1")
    monkeypatch.setattr(combining, "load_model", None)
    with pytest.raises(RecipeError, match=message) as error:
        combine(project, "colour", run)
    assert run.name in str(error.value)
    assert error.value.hint


def test_runs_of_another_base_or_template_are_refused_before_any_model_is_loaded(
    project: Path, monkeypatch: pytest.MonkeyPatch, build_model: Callable[..., Model]
) -> None:
    build_model("llama", dtype=torch.float32, max_position_embeddings=200).save(project / "other")
    other = tune(project, "size", f"base={project / 'other'}", "train.max_steps=1")
    source = (project / "base" / "chat_template.jinja").read_text()
    (project / "own.jinja").write_text(source.replace("<|begin|>", "<|begin|>OWN "))
    worded = tune(project, "size", "data.template=own.jinja", "train.max_steps=1")
    monkeypatch.setattr(combining, "load_model", None)
    for run, message in ((other, "tuned from the base"), (worded, "another chat template")):
        with pytest.raises(RecipeError, match=message) as error:
            combine(project, "colour", run)
        assert run.name in str(error.value)
        assert error.value.hint
    with pytest.raises(RecipeError, match="tuned from the base"):
        api.load_several(["colour", other], workspace=Workspace(project / "w"))


def test_a_base_that_changed_since_is_found(project: Path) -> None:
    runs = [tune(project, name, "train.max_steps=1") for name in TASKS]
    path = project / "base" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(StorageError, match="no longer the one"):
        combine(project, *runs)


def test_a_run_without_a_model_is_refused(project: Path) -> None:
    folder = api.find_run("size", workspace=Workspace(project / "w")).path
    shutil.rmtree(folder / "model")
    with pytest.raises(NotFoundError, match="no model yet"):
        combine(project)


# -------------------------------------------------------------------------------------------- several on one base


def logits(tuned: Any) -> torch.Tensor:
    from tunesmith.data.pack import build_pack
    from tunesmith.data.types import Sequence

    ids = tuned.template.prompt([Message("user", PROMPT)]).ids
    pack = build_pack([Sequence(torch.tensor(ids, dtype=torch.int32).numpy(), torch.zeros(len(ids)).numpy())])
    with torch.no_grad():
        return head_logits(tuned.model.hidden(tuned.model.attention(pack)), head=tuned.model.head)


def test_several_runs_answer_from_one_base_each_as_alone(original: Path, combined: api.Run) -> None:
    workspace = Workspace(original / "w")
    prefix = tune(original, "size", "method={kind: prefix, num_tokens: 3}", "train.max_steps=2", "name=prefixed")
    several = api.load_several(
        {"colour": "colour", "size": "size", "both": combined, "prefix": prefix}, workspace=workspace
    )
    for name, run in several.runs.items():
        alone = api.load(run)
        with several.using(name) as tuned:
            assert torch.equal(logits(tuned), logits(alone))
        assert several.generate(PROMPT, adapter=name, sampling=SHORT) == alone.generate(PROMPT, sampling=SHORT)
    with several.using("colour") as tuned, tuned.method.disabled(tuned.model):
        expected = logits(tuned)
    assert several.several.active is None
    with several.using("colour") as tuned, several.several.using(None):
        assert torch.equal(logits(tuned), expected)
    with pytest.raises(NotFoundError, match="there are colour, size, both, prefix"):
        several.generate(PROMPT, adapter="taste")


def test_several_are_known_by_their_runs_names_unless_given_others(original: Path) -> None:
    workspace = Workspace(original / "w")
    colour = api.find_run("colour", workspace=workspace)
    several = api.load_several([colour], workspace=workspace)
    assert list(several.runs) == [colour.name]
    with pytest.raises(RecipeError, match="no run is given"):
        api.load_several([])


# ------------------------------------------------------------------------------------------------ the command


def call(monkeypatch: pytest.MonkeyPatch, project: Path, *arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "argv", ["tunesmith", "combine", *arguments, "--workspace", str(project / "w")])
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0), out.getvalue(), err.getvalue()


def test_the_command_prints_the_document_or_the_table(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [
        "colour",
        "size",
        "--how",
        "ties",
        "--weights",
        "1,0.5",
        "--density",
        "0.3",
        "--rank",
        "6",
        "--rows",
        "3",
    ]
    code, out, _ = call(monkeypatch, original, *arguments, "--name", "mixed", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["run"].startswith("mixed-")
    assert [run["weight"] for run in document["runs"]] == [1.0, 0.5]
    assert (document["density"], document["rank"], document["ranks"]) == (0.3, 6, [6])
    code, out, _ = call(monkeypatch, original, *arguments[:4], "--rows", "2")
    assert code == 0
    assert "combination - own run" in out
    assert "next: tunesmith evaluate combined-" in out


def test_the_command_combines_whole_weights(
    original: Path, whole: dict[str, api.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["full", "colour", "--how", "dare_ties", "--density", "0.5", "--seed", "3", "--rows", "2"]
    code, out, _ = call(monkeypatch, original, *arguments, "--name", "command", "--json")
    document = json.loads(out)
    assert code == 0
    assert (document["seed"], document["layers"], document["ranks"]) == (3, 21, [])
    code, out, _ = call(monkeypatch, original, *arguments)
    assert code == 0
    assert "a whole model, 21 of its tensors changed" in out
    assert "combination - own run" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["colour", "--how", "linear"], "two or more"),
        (["colour", "size", "--how", "linear", "--weights", "a,b"], "no numbers between commas"),
        (["colour", "size"], "--how"),
        (["colour", "sise", "--how", "linear"], "no run 'sise'"),
    ],
)
def test_the_command_s_errors_are_two_lines(
    original: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    code, out, err = call(monkeypatch, original, *arguments)
    error, hint = err.splitlines()
    assert (code, out) == (2, "")
    assert message in error
    assert hint.startswith("hint: ")


def test_a_run_that_was_not_combined_has_no_combination(original: Path) -> None:
    with pytest.raises(TunesmithError) as error:
        combining.read_combination(api.find_run("colour", workspace=Workspace(original / "w")))
    assert error.value.hint
