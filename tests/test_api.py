"""The verbs as Python functions, on a toy base: tune, stop, go on, evaluate, load, export."""

import hashlib
import html
import http.server
import json
import math
import re
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith import api, storage
from tunesmith.checks import check_data
from tunesmith.data.types import Message
from tunesmith.errors import (
    DataError,
    Interrupted,
    ModelError,
    NotFoundError,
    NumericalError,
    RecipeError,
    StorageError,
    TemplateError,
    TunesmithError,
)
from tunesmith.evaluate.settings import EvaluateSettings
from tunesmith.generate.sampling import Sampling
from tunesmith.models import base as models_base
from tunesmith.models.embed import load_embedder
from tunesmith.models.load import Model, load_model
from tunesmith.recipe import Recipe, load_recipe
from tunesmith.registry import store
from tunesmith.registry.workspace import Workspace
from tunesmith.texts import evaluation_text
from tunesmith.train.observers import Silent

SUMMARY_KEYS = {
    "run", "path", "steps", "rows", "tokens", "target_tokens", "seconds", "tokens_per_second", "peak_memory_bytes",
    "trainable_parameters", "parameters", "train_loss", "validation_loss", "best_step", "stopped", "computed_tokens",
}  # fmt: skip
RECIPE = """\
name: toy
base: base
data: {train: rows.jsonl, validation: 0.25}
method: {kind: lora, rank: 4}
train: {max_steps: 6, batch_rows: 8, learning_rate: 2e-2, validate_every: 2, checkpoint_every: 3}
evaluate: {metrics: [exact_match, perplexity], max_tokens: 6, few_shot: 2}
"""


@pytest.fixture(scope="session")
def original(build_model: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, some rows and a recipe. Tests that change something work on a copy."""
    folder = tmp_path_factory.mktemp("project")
    build_model("llama", dtype=torch.float32, max_position_embeddings=256).save(folder / "base")
    rows = [{"prompt": f"What colour has number {i}?", "completion": ["red", "green"][i % 2]} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text(
        "".join(json.dumps(row | {"prompt": row["prompt"] + "?"}) + "\n" for row in rows[:5])
    )
    (folder / "toy.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="session")
def shared(original: Path) -> api.Run:
    """A finished run that no test changes."""
    return tune(original)


@pytest.fixture
def project(original: Path, tmp_path: Path) -> Path:
    """A copy of the base, the rows and the recipe, without any run."""
    return Path(shutil.copytree(original, tmp_path / "project", ignore=shutil.ignore_patterns("w")))


def tune(project: Path, *overrides: str, **given: Any) -> api.Run:
    return api.tune(project / "toy.yaml", workspace=Workspace(project / "w"), overrides=list(overrides), **given)


def evaluate(project: Path, run: Any = "latest", **given: Any) -> Any:
    return api.evaluate(run, workspace=Workspace(project / "w"), **given)


def weights(run: api.Run) -> str:
    return hashlib.sha256((run.path / "model" / "adapter_model.safetensors").read_bytes()).hexdigest()


def metrics(run: api.Run) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock decides."""
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "tokens_per_second")} for line in lines]


# --------------------------------------------------------------------------------------------------------- tune


def test_a_run_leaves_everything_that_is_promised(shared):
    assert shared.finished
    assert set(shared.summary) >= SUMMARY_KEYS
    assert {entry.name for entry in shared.path.iterdir()} >= {
        "recipe.yaml", "resolved.json", "ledger.json", "metrics.jsonl", "checkpoints", "model", "token_contract.json",
    }  # fmt: skip
    summary = shared.as_dict()
    assert (summary["run"], summary["path"], summary["steps"]) == (shared.name, str(shared.path), 6)
    assert summary["stopped"] == "finished"
    assert summary["trainable_parameters"] < summary["parameters"]
    assert summary["computed_tokens"] < summary["tokens"]
    ledger = json.loads((shared.path / "ledger.json").read_text())
    assert ledger["rows"] == 24
    assert summary["rows"] == ledger["states"]["trained"]
    validations = [line for line in metrics(shared) if "validation_loss" in line]
    assert [line["step"] for line in validations] == [2, 4, 6]
    assert summary["validation_loss"] == min(line["validation_loss"] for line in validations)
    assert set(shared.resolved["hashes"]) >= {"data", "files", "base", "tokenizer", "code"}
    assert "torch" in shared.resolved["versions"]
    assert shared.recipe.method.rank == 4


def test_the_same_recipe_gives_the_same_bytes_and_another_name(project, shared):
    again = tune(project)
    assert weights(again) == weights(shared)
    assert metrics(again) == metrics(shared)
    assert again.name != shared.name
    assert weights(tune(project, "train.seed=1")) != weights(shared)


def test_a_run_can_be_made_again_from_its_own_recipe(project, shared, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = api.tune(shared.path / "recipe.yaml", workspace=Workspace(project / "w"))
    assert weights(run) == weights(shared)


def test_a_recipe_may_be_an_object_a_path_or_a_text(project, monkeypatch):
    monkeypatch.chdir(project)
    recipe = load_recipe(project / "toy.yaml", overrides=["train.max_steps=1"])
    assert isinstance(recipe, Recipe)
    assert api.tune(recipe).path.parent == project / ".tunesmith" / "runs"
    assert api.tune("toy.yaml", overrides=["train.max_steps=1"]).summary["steps"] == 1


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("data.max_tokens=257", RecipeError, "257"),
        ("data.train=gone.jsonl", NotFoundError, "gone.jsonl"),
        ("data.template=gone.jinja", NotFoundError, "gone.jinja"),
        ("base=gone", NotFoundError, "gone"),
        ("base=rows.jsonl", ModelError, "file"),
        ("method.targets=[nothing]", RecipeError, "nothing"),
        ("method.rank=1000000000", RecipeError, "rank"),
        ("objective=causal", DataError, "plain text"),
        ("data.max_tokens=20", DataError, "20 are allowed"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_leaves_no_run_that_looks_whole(project, override, error, message):
    with pytest.raises(error, match=message) as caught:
        tune(project, override)
    assert caught.value.hint
    assert not any(api.Run(folder).finished for folder in Workspace(project / "w").run_folders())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(project):
    with pytest.raises(RecipeError, match="no GPU"):
        tune(project, "train.device=cuda")


def test_a_loss_that_is_not_finite_fails_the_run_and_names_the_rows(project):
    with pytest.raises(NumericalError) as caught:
        tune(project, "train.learning_rate=1e30", "train.clip=null", "train.schedule=constant", "train.warmup=0")
    assert caught.value.hint
    (folder,) = Workspace(project / "w").run_folders()
    assert not api.Run(folder).finished
    (known,) = api.index_of(Workspace(project / "w")).runs()
    assert known.state == "failed"
    with pytest.raises(NotFoundError, match="has no model yet"):
        api.load(folder)


def test_a_validation_loss_that_is_not_finite_fails_the_run(project):
    with pytest.raises(NumericalError, match="validation") as caught:
        tune(project, "train.learning_rate=1e300", "train.max_steps=1", "train.warmup=0")
    assert caught.value.hint
    (folder,) = Workspace(project / "w").run_folders()
    assert not api.Run(folder).finished


# ------------------------------------------------------------------------------------------------ stop and go on


class Stopping(Silent):
    """Sends signals to this process once a step is done."""

    def __init__(self, step: int, *numbers: int):
        self.at, self.numbers = step, numbers

    def step(self, record: dict[str, Any]) -> None:
        if record["step"] == self.at:
            for number in self.numbers:
                signal.raise_signal(number)


class Failing(Silent):
    """A fault that nobody foresaw, once a step is done."""

    def __init__(self, step: int):
        self.at = step

    def step(self, record: dict[str, Any]) -> None:
        if record["step"] == self.at:
            raise ZeroDivisionError


@pytest.mark.parametrize("step", [1, 2, 3, 5, 6])
def test_a_stopped_run_goes_on_to_the_same_bits(project, shared, step):
    number = signal.SIGTERM if step % 2 else signal.SIGINT
    with pytest.raises(Interrupted) as caught:
        tune(project, observer=Stopping(step, number))
    assert caught.value.signal_number == number
    assert f"step {step} of 6" in caught.value.message
    assert "--resume" in caught.value.hint
    (folder,) = Workspace(project / "w").run_folders()
    stopped = api.Run(folder)
    assert (stopped.summary["state"], stopped.summary["stopped"], stopped.summary["steps"]) == (
        "stopped",
        "signal",
        step,
    )
    assert not stopped.finished
    with pytest.raises(NotFoundError, match="stopped and has no model yet"):
        api.load(folder)
    resumed = tune(project, resume=True)
    assert resumed.path == folder
    assert resumed.finished
    assert weights(resumed) == weights(shared)
    assert metrics(resumed) == metrics(shared)
    for name in ("steps", "tokens", "train_loss", "validation_loss", "best_step", "stopped"):
        assert resumed.summary[name] == shared.summary[name], name


@pytest.mark.parametrize("step", [1, 4])
def test_a_run_that_failed_or_was_killed_goes_on_to_the_same_bits(project, shared, step):
    with pytest.raises(ZeroDivisionError):
        tune(project, observer=Failing(step))
    resumed = tune(project, resume=True)
    assert weights(resumed) == weights(shared)
    assert metrics(resumed) == metrics(shared)


def test_an_early_stop_is_not_undone_by_going_on(project):
    how = (
        "train.patience=1",
        "train.learning_rate=0.5",
        "train.max_steps=40",
        "train.validate_every=1",
        "train.clip=null",
    )
    whole = tune(project, *how)
    assert whole.summary["stopped"] == "early"
    shutil.rmtree(project / "w" / "runs" / whole.name / "model")
    summary = whole.summary | {"state": "started"}  # as after a kill between the last checkpoint and the model
    (whole.path / "run.json").write_text(json.dumps(summary))
    resumed = tune(project, *how, resume=True)
    assert (resumed.summary["steps"], resumed.summary["stopped"]) == (whole.summary["steps"], "early")


def test_the_best_step_is_the_one_that_is_kept(project):
    contrary = project / "contrary.jsonl"  # validation asks for other answers than training gives
    contrary.write_text("".join(json.dumps({"prompt": f"ask {i}", "completion": "no"}) + "\n" for i in range(20)))
    run = tune(
        project,
        f"data.validation={contrary}",
        "train.learning_rate=0.1",
        "train.validate_every=1",
        "train.max_steps=12",
    )
    assert run.summary["best_step"] < run.summary["steps"]
    perplexity = evaluate(project, run).value("perplexity")  # of the same validation rows
    assert perplexity == pytest.approx(math.exp(run.summary["validation_loss"]), rel=1e-5)


def test_a_second_signal_stops_at_once_and_says_how_to_go_on(project, shared):
    with pytest.raises(Interrupted) as caught:
        tune(project, observer=Stopping(4, signal.SIGINT, signal.SIGTERM))
    assert caught.value.signal_number == signal.SIGTERM
    assert "--resume" in caught.value.hint
    assert weights(tune(project, resume=True)) == weights(shared)


def test_signals_are_handled_as_before_once_a_run_is_over(project):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted):
        tune(project, observer=Stopping(1, signal.SIGINT))
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_there_must_be_something_to_go_on_with(project):
    with pytest.raises(NotFoundError, match="no unfinished run of 'toy'"):
        tune(project, resume=True)
    tune(project, "train.max_steps=1")
    with pytest.raises(NotFoundError, match="no unfinished run of 'toy'"):
        tune(project, "train.max_steps=1", resume=True)


def test_a_run_goes_on_only_as_it_was(project):
    with pytest.raises(Interrupted):
        tune(project, observer=Stopping(2, signal.SIGINT))
    with pytest.raises(RecipeError, match=r"recipe\.train changed") as caught:
        tune(project, "train.learning_rate=1e-3", resume=True)
    assert "without --resume" in caught.value.hint
    with (project / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "one more?", "completion": "red"}) + "\n")
    with pytest.raises(RecipeError, match=r"hashes\.data, hashes\.files changed"):
        tune(project, resume=True)


# --------------------------------------------------------------------------------------------------------- load


def test_a_tuned_model_answers(shared):
    tuned = api.load(shared)
    answer = tuned.generate("What colour has number 3?", sampling=Sampling(max_tokens=6))
    asked = [{"role": "user", "content": "What colour has number 3?"}]
    assert tuned.generate(asked, sampling=Sampling(max_tokens=6)) == answer
    assert tuned.generate([Message("user", asked[0]["content"])], sampling=Sampling(max_tokens=6)) == answer
    many = tuned.generate_many(["What colour has number 3?", "And 4?"], sampling=Sampling(max_tokens=6))
    assert many[0] == answer
    drawn = Sampling(max_tokens=6, temperature=1.0, seed=3)
    assert tuned.generate("a?", sampling=drawn) == tuned.generate("a?", sampling=drawn)
    assert tuned.generate("a?", sampling=drawn) != tuned.generate(
        "a?", sampling=Sampling(max_tokens=6, temperature=1.0)
    )
    pieces = list(tuned.stream("a?", sampling=Sampling(max_tokens=6, seed=1)))
    assert "".join(pieces).rstrip("\ufffd") == tuned.generate("a?", sampling=Sampling(max_tokens=6)).rstrip("\ufffd")


@pytest.mark.parametrize("prompt", ["\ud83d", [Message("user", "half \udc00")], "x" * 400])
def test_a_prompt_that_cannot_be_read_is_refused(shared, prompt):
    with pytest.raises(TunesmithError) as caught:
        api.load(shared).generate(prompt)
    assert caught.value.hint


def test_the_system_prompt_of_the_recipe_is_used(project):
    tuned = api.load(tune(project, "data.system=Be brief.", "train.max_steps=1"))
    messages = [Message("system", "Be brief."), Message("user", "hello")]
    limit = Sampling(max_tokens=8)
    assert tuned.generate("hello", sampling=limit) == tuned.generate(messages, sampling=limit)
    assert tuned.generate("hello", sampling=limit) != tuned.generate(messages[1:], sampling=limit)


def test_a_run_is_found_by_its_names(project, shared):
    run = tune(project, "train.max_steps=1")
    workspace = Workspace(project / "w")
    for name in (run.name, run.name[:-3], "toy", "latest", str(run.path), run.path, run):
        assert api.find_run(name, workspace=workspace).path.resolve() == run.path.resolve()
    with pytest.raises(NotFoundError, match="toy"):
        api.find_run("tony", workspace=workspace)


def test_a_name_means_the_newest_finished_run_where_a_model_is_needed(project, shared, capsys):
    """And the newest of all where runs are looked at."""
    done = tune(project, "train.max_steps=1")
    newer = tune(project, "train.max_steps=1")
    other = tune(project, "name=other", "train.max_steps=1")
    for run, state in ((newer, "stopped"), (other, "started")):
        summary = json.loads((run.path / "run.json").read_text())
        (run.path / "run.json").write_text(json.dumps(summary | {"state": state}))
    workspace = Workspace(project / "w")
    for name, unfinished in (("toy", f"{newer.name} is stopped"), ("latest", f"{other.name} is started")):
        capsys.readouterr()
        assert api.load(name, workspace=workspace).run.name == done.name
        assert f"{unfinished}: taking {done.name}, the newest finished run" in capsys.readouterr().err
    assert api.find_run("toy", workspace=workspace).name == newer.name
    assert evaluate(project, "toy", settings=EvaluateSettings(against=("base",))).document["run"] == done.name
    api.export("toy", form="peft", out=project / "out", workspace=workspace)
    capsys.readouterr()
    for name in (newer.name, newer.name[:-1], str(newer.path), "other"):
        with pytest.raises(NotFoundError, match="has no model yet"):
            api.load(name, workspace=workspace)
    assert api.load(done.name, workspace=workspace).run.name == done.name
    assert capsys.readouterr().err == ""


def test_the_base_is_read_once_to_be_hashed(project, monkeypatch):
    read = []
    hashed = storage.sha256_file

    def counted(path: Path) -> str:
        read.append(Path(path).resolve())
        return hashed(path)

    for module in (models_base, store):
        monkeypatch.setattr(module, "sha256_file", counted)
    run = tune(project, "train.max_steps=1")
    files = [path for path in read if path.parent == (project / "base").resolve()]
    assert sorted(files) == sorted(path.resolve() for path in (project / "base").iterdir())
    assert api.index_of(Workspace(project / "w")).lineage(run.name).base.state == "verified"  # its bytes are read again


def test_a_run_is_usable_from_any_folder(project, monkeypatch, tmp_path):
    monkeypatch.chdir(project)
    run = api.tune("toy.yaml", overrides=["train.max_steps=1"])
    (project / "below").mkdir()
    for folder in (project / "below", tmp_path):
        monkeypatch.chdir(folder)
        assert isinstance(api.load(run.path).generate("a?", sampling=Sampling(max_tokens=2)), str)
        assert api.evaluate(run.path, workspace=Workspace(project / ".tunesmith")).document["rows"] > 1


def change_file(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def test_another_base_is_found(project):
    run = tune(project, "train.max_steps=1")
    change_file(project / "base" / "model.safetensors")
    with pytest.raises(StorageError, match="no longer the one"):
        api.load(run)


def test_another_template_is_found(project):
    run = tune(project, "train.max_steps=1")
    template = run.path / "model" / "chat_template.jinja"
    template.write_text(
        template.read_text().replace("<|user|>", "<|user|> ").replace("<|{{ m.role }}|>", "<|{{ m.role }}|> ")
    )
    with pytest.raises(TemplateError, match="token contract broken"):
        api.load(run)


@pytest.mark.parametrize(
    "name", ["run.json", "resolved.json", "token_contract.json", "model/adapter_model.safetensors"]
)
def test_a_damaged_run_is_refused(project, name):
    run = tune(project, "train.max_steps=1")
    path = run.path / name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(TunesmithError) as caught:
        api.load(run.path)
    assert name.split("/")[0] in str(caught.value)
    assert caught.value.hint


def test_a_run_without_its_model_is_refused(project):
    run = tune(project, "train.max_steps=1")
    shutil.rmtree(run.path / "model")
    with pytest.raises(NotFoundError):
        api.load(run.path)


# ----------------------------------------------------------------------------------------------------- evaluate


@pytest.fixture(scope="session")
def evaluation(original: Path, shared: api.Run) -> Any:
    return evaluate(original, shared)


def test_an_evaluation_is_kept_with_the_run(shared, evaluation):
    assert evaluation.document["systems"] == ["base", "few_shot", "tuned"]
    assert evaluation.document["data"] == "validation"
    assert evaluation.document["rows"] == 24 - shared.summary["rows"]
    assert json.loads((shared.path / "evaluation.json").read_text()) == evaluation.document
    assert "<html" in (shared.path / "report.html").read_text()
    assert evaluation.value("perplexity") < evaluation.value("perplexity", system="base")


def test_what_the_base_said_is_known_to_the_next_run(project):
    first = evaluate(project, tune(project, "train.max_steps=1")).document
    entries = list((project / "w" / "cache" / "answers").iterdir())
    assert len(entries) == 2  # the base, with examples in its prompt and without
    for path in entries:
        known = json.loads(path.read_text())
        path.write_text(json.dumps(known | {"texts": ["red"] * len(known["texts"])}))
    run = tune(project, "method=full", "train.max_steps=1", "train.learning_rate=1e-3")
    second = evaluate(project, run).document
    shown = [json.loads(line) for line in (run.path / "examples.jsonl").read_text().splitlines()]
    assert {row["outputs"][system] for row in shown for system in ("base", "few_shot")} == {"red"}
    for system in ("base", "few_shot"):
        perplexities = [d["metrics"]["perplexity"]["systems"][system] for d in (first, second)]
        assert perplexities[0] == perplexities[1]


def test_other_rows_and_settings_may_be_given(original, shared):
    settings = EvaluateSettings(metrics=("perplexity",), against=("base",), rows=3)
    again = evaluate(original, shared, data=original / "test.jsonl", settings=settings)
    assert (again.document["rows"], again.document["systems"]) == (3, ["base", "tuned"])
    assert again.document["data"] == str(original / "test.jsonl")
    chosen = api.evaluation_settings(shared, against=["base"], rows=2)
    assert (chosen.against, chosen.rows, chosen.metrics) == (("base",), 2, ("exact_match", "perplexity"))
    assert api.evaluation_settings(shared) == shared.recipe.evaluate
    with pytest.raises(RecipeError):
        api.evaluation_settings(shared, against=["peer"])


def test_what_is_forgotten_is_measured_and_the_gate_says_no(project):
    text = "".join(f"Number {i} of a text that has nothing to do with colours.\n" for i in range(80))
    (project / "general.txt").write_text(text)
    rules = '{general: "not worse by 0.02", exact_match: "> 2"}'
    run = tune(project, f"evaluate={{general: general.txt, gate: {rules}, max_tokens: 4}}")
    document = evaluate(project, run).document
    general = document["general"]
    assert (general["data"].endswith("general.txt"), general["metric"]) == (True, "bits_per_byte")
    assert general["rows"] == -(-len(text) // 1200)
    before, after = (general["systems"][system]["value"] for system in ("base", "tuned"))
    assert after < before  # this base knows nothing, so there is nothing to forget
    assert general["difference"]["value"] == pytest.approx(after - before)
    assert general["outcome"] == "kept"
    assert [rule["passed"] for rule in document["gate"]["rules"]] == [True, False]
    assert not document["gate"]["passed"]
    assert json.loads((run.path / "evaluation.json").read_text()) == document
    report = (run.path / "report.html").read_text()
    assert general["sentence"][1:] in html.unescape(report)
    assert "The gate says no" in report


GENERAL = "".join(f"Number {i} of a text that has nothing to do with colours.\n" for i in range(80))


def test_general_rows_are_read_while_training_and_a_run_stops_where_they_cost_too_much(project):
    (project / "general.txt").write_text(GENERAL)
    watching = "evaluate={general: general.txt, every: 1}"
    whole = tune(project, watching)
    read = [line for line in metrics(whole) if "general_bits_per_byte" in line]
    assert [line["step"] for line in read] == [0, 1, 2, 3, 4, 5, 6]
    assert weights(whole) == weights(tune(project))  # looking changes nothing
    document = evaluate(
        project, whole, settings=EvaluateSettings(general=str(project / "general.txt"), max_tokens=2)
    ).document
    before, after = (document["general"]["systems"][system]["value"] for system in ("base", "tuned"))
    costs = {line["step"]: line["general_bits_per_byte"] for line in read}
    assert costs[0] == pytest.approx(before, rel=1e-4)
    assert costs[whole.summary["best_step"]] == pytest.approx(after, rel=1e-4)
    assert document["general"]["divergence"] > 0

    # A base that knows the text forgets it: the rows of the task are other ones.
    (project / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in GENERAL.splitlines()))
    knowing = [
        "objective=causal",
        "method=full",
        "data.train=text.jsonl",
        "train.max_steps=40",
        "train.learning_rate=3e-3",
    ]
    taught = tune(project, *knowing, "name=taught", "evaluate={}")
    limited = [f"base={taught.path / 'model'}", "method=full", "train.max_steps=30", "train.learning_rate=1e-2"]
    run = tune(project, *limited, watching, "train.general_limit=0.2", "train.validate_every=1")
    costs = {line["step"]: line["general_bits_per_byte"] for line in metrics(run) if "general_bits_per_byte" in line}
    assert (run.summary["stopped"], run.summary["steps"]) == ("early", max(costs))
    rises = {step: cost - costs[0] for step, cost in costs.items()}
    assert rises.pop(max(rises)) > 0.2 >= max(rises.values())
    assert run.summary["best_step"] in rises

    # Stopped by a signal and resumed, it ends at the same place with the same weights.
    halted = [*limited, watching, "train.general_limit=0.2", "train.validate_every=1", "name=halted"]
    with pytest.raises(Interrupted):
        tune(project, *halted, observer=Stopping(2, signal.SIGTERM))
    again = tune(project, *halted, resume=True)
    assert (again.summary["steps"], again.summary["best_step"]) == (run.summary["steps"], run.summary["best_step"])
    model = "model.safetensors"
    assert (again.path / "model" / model).read_bytes() == (run.path / "model" / model).read_bytes()
    assert metrics(again) == metrics(run)


def test_without_a_step_within_the_limit_the_model_stays_the_base(project):
    (project / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in GENERAL.splitlines()))
    (project / "general.txt").write_text(GENERAL)
    taught = tune(
        project, "objective=causal", "method=full", "data.train=text.jsonl", "train.max_steps=40", "name=taught",
        "train.learning_rate=3e-3", "evaluate={}",
    )  # fmt: skip
    run = tune(
        project, f"base={taught.path / 'model'}", "evaluate={general: general.txt, every: 2}", "train.general_limit=1e-9",
        "train.validate_every=null", "data.validation=null", "data.test=0.25", "method=full", "train.learning_rate=1e-2",
    )  # fmt: skip
    assert (run.summary["stopped"], run.summary["steps"]) == ("early", 2)
    files = [(path / "model" / "model.safetensors") for path in (taught.path, run.path)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_base_as_a_teacher_holds_the_model_back_and_replay_teaches_the_general_rows(project):
    (project / "replayed.txt").write_text(GENERAL[:2400])
    (project / "general.txt").write_text(GENERAL[2400:])
    given = EvaluateSettings(general=str(project / "general.txt"), against=("base",), max_tokens=2)

    def general(*overrides: str) -> dict[str, Any]:
        run = tune(project, *overrides, "train.max_steps=12")
        return evaluate(project, run, settings=given).document["general"]

    free = general()
    held = general("objective={kind: distillation, teacher: base, share: 0.9}")
    assert held["divergence"] < 0.5 * free["divergence"]
    replayed = general("data.replay=replayed.txt", "data.replay_share=0.3")
    assert replayed["systems"]["tuned"]["value"] < free["systems"]["tuned"]["value"]
    run = tune(project, "data.replay=replayed.txt", "train.max_steps=1")
    (entry,) = run.resolved["hashes"]["files"]["replay"]
    assert "replayed.txt" in entry


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate={every: 2}"], "every has no effect without general"),
        (["train.general_limit=0.1"], "needs evaluate.general and evaluate.every"),
        (["data.replay=rows.jsonl"], "holds rows of the task"),
        (["data.replay_share=0.2"], "no effect without `replay`"),
        (["data.replay=a.txt", "objective=classification"], "has no place in objective 'classification'"),
        (["data.replay=a.txt", "evaluate={general: a.txt}"], "must not be trained on"),
    ],
)
def test_settings_about_forgetting_that_would_have_no_effect_are_refused(project, overrides, message):
    with pytest.raises(RecipeError, match=message):
        tune(project, *overrides)


@pytest.mark.parametrize(
    "setting",
    [
        "general: nowhere.txt", "documents: nowhere, against: [retrieval]",
        "look_up_by: embeddings, embedder: ./nowhere, against: [retrieval]",
    ],
)  # fmt: skip
def test_what_the_evaluation_will_read_must_be_there_before_the_training(project, setting):
    with pytest.raises(NotFoundError) as caught:
        tune(project, f"evaluate={{{setting}}}")
    assert "nowhere" in str(caught.value)
    assert not list((project / "w").rglob("resolved.json"))


def test_a_schema_is_read_before_the_training(project):
    (project / "schema.json").write_text('{"type": "objekt"}')
    with pytest.raises(RecipeError, match="objekt") as caught:
        tune(project, "evaluate={json_schema: schema.json}")
    assert caught.value.file == str(project / "schema.json")
    assert not list((project / "w").rglob("resolved.json"))


def test_rows_keep_their_tests_through_preparation(project):
    rows = [
        json.loads(line) | {"t": [f"assert {i} >= 0", "x = 1"]}
        for i, line in enumerate((project / "rows.jsonl").open())
    ]
    (project / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = "data={train: rows.jsonl, validation: 0.25, mapping: {prompt: prompt, completion: completion, tests: t}}"
    with pytest.raises(RecipeError, match=r"data\.mapping\.tests has no effect"):
        tune(project, data)
    try:
        run = tune(project, data, "evaluate={max_tokens: 4}", "train.max_steps=1")
    except RecipeError as error:
        assert "cannot be shut in" in error.message
        pytest.skip(error.message)
    document = evaluate(project, run).document
    assert list(document["metrics"]) == ["code_passes", "chrf", "perplexity"]
    assert document["primary"] == "code_passes"


class LongerWins(http.server.BaseHTTPRequestHandler):
    """A judge at an OpenAI-compatible address."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        one, other = re.findall(r"\[Answer .\]\n(.*?)\n\[End of", body["messages"][1]["content"], re.DOTALL)
        said = "[[C]]" if len(one) == len(other) else "[[A]]" if len(one) > len(other) else "[[B]]"
        content = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_judge_compares_the_answers(project, monkeypatch):
    with pytest.raises(RecipeError, match="NO_KEY is not set"):
        tune(project, "evaluate.judge={url: 'http://127.0.0.1:9/v1', model: m, key_environment: NO_KEY}")
    monkeypatch.setenv("A_KEY", "sk-0123456789")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), LongerWins) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        judge = f"{{url: 'http://127.0.0.1:{server.server_address[1]}/v1', model: longer, key_environment: A_KEY}}"
        run = tune(project, f"evaluate.judge={judge}", "evaluate.metrics=[perplexity]", "train.max_steps=2")
        document = evaluate(project, run).document
        server.shutdown()
    again = evaluate(project, run).document  # what was answered is kept, so nobody needs to be there
    assert again["judge"] == document["judge"]
    rows = [json.loads(line)["outputs"] for line in (run.path / "examples.jsonl").read_text().splitlines()]
    for other in ("base", "few_shot"):
        found = document["judge"]["pairs"][f"tuned - {other}"]
        lengths = [(len(row["tuned"]), len(row[other])) for row in rows if row["tuned"].strip() != row[other].strip()]
        assert (found["wins"], found["losses"]) == (sum(a > b for a, b in lengths), sum(a < b for a, b in lengths))
    assert "What a judge says" in (run.path / "report.html").read_text()
    assert document["judge"]["sentence"] in evaluation_text(document)
    assert not any(b"sk-0123456789" in path.read_bytes() for path in (project / "w").rglob("*") if path.is_file())


def test_base_and_tuned_may_look_up_rows_or_passages(original, shared, project):
    settings = EvaluateSettings(against=("base", "retrieval", "tuned_retrieval"), look_up=2, max_tokens=4)
    document = evaluate(original, shared, settings=settings).document
    assert document["systems"] == ["base", "retrieval", "tuned", "tuned_retrieval"]
    shown = [json.loads(line) for line in (shared.path / "examples.jsonl").read_text().splitlines()]
    trained = {f"{original / 'rows.jsonl'}:{line}" for line in range(1, 25)} - {row["origin"] for row in shown}
    for row in shown:
        assert set(row["looked_up"]) == {"retrieval", "tuned_retrieval"}
        assert len(row["looked_up"]["retrieval"]) == 2
        assert set(row["looked_up"]["retrieval"]) <= trained
    (project / "library").mkdir()
    (project / "library" / "colours.txt").write_text("What colour has number 3? It is green.")
    settings = settings.model_copy(update={"documents": str(project / "library"), "against": ("retrieval",)})
    document = evaluate(original, shared, settings=settings).document
    assert document["systems"] == ["retrieval", "tuned"]
    shown = [json.loads(line) for line in (shared.path / "examples.jsonl").read_text().splitlines()]
    assert {origin for row in shown for origin in row["looked_up"]["retrieval"]} == {"colours.txt:1"}
    with pytest.raises(ValueError, match="look_up has no effect"):
        EvaluateSettings(look_up=3)


def test_what_is_looked_up_may_be_near_in_meaning(project, build_model):
    build_model("bert", dtype=torch.float32).save(project / "encoder")
    by = "look_up_by: embeddings, against: [retrieval], look_up: 2, metrics: [perplexity], max_tokens: 4"
    run = tune(project, "train.max_steps=1", f"evaluate={{{by}, embedder: encoder}}")
    assert run.recipe.evaluate.embedder == str(project / "encoder")
    assert evaluate(project, run).document["systems"] == ["retrieval", "tuned"]
    embed = load_embedder(str(project / "encoder"))
    rows = [json.loads(line)["prompt"] for line in (project / "rows.jsonl").read_text().splitlines()]
    shown = [json.loads(line) for line in (run.path / "examples.jsonl").read_text().splitlines()]
    held = {int(row["origin"].rpartition(":")[2]) for row in shown}
    trained = [line for line in range(1, 25) if line not in held]
    for row in shown:
        cosine_N = embed([rows[line - 1] for line in trained]) @ embed([row["prompt"][0]["content"]])[0]
        nearest = [trained[place] for place in np.argsort(-cosine_N, kind="stable")[:2]]
        assert row["looked_up"]["retrieval"] == [f"{project / 'rows.jsonl'}:{line}" for line in nearest]
    with pytest.raises(RecipeError, match="base' is no encoder"):
        tune(project, f"evaluate={{{by}, embedder: base}}")
    for odd in ("look_up_by: embeddings, against: [retrieval]", "embedder: encoder, against: [retrieval]"):
        with pytest.raises(RecipeError, match="go together"):
            tune(project, f"evaluate={{{odd}}}")


def test_a_run_trained_with_passages_is_asked_with_them(project):
    (project / "library").mkdir()
    for number in range(24):
        (project / "library" / f"{number}.txt").write_text(
            f"Number {number} has the colour {['red', 'green'][number % 2]}."
        )
    run = tune(
        project, "train.max_steps=2", "data.look_up={documents: library, passages: 1, share: 0.9}",
        "evaluate={against: [base, tuned_retrieval], metrics: [perplexity], max_tokens: 4, look_up: 1}",
    )  # fmt: skip
    assert run.recipe.data.look_up.documents == str(project / "library")
    counts = run.resolved["hashes"]["files"]
    assert len(counts["look_up"]) == 24
    for entry in counts["look_up"]:  # each a file and its digest; the bytes are kept
        store.Store(Workspace(project / "w").store).verify(entry.split()[-1])
    trained = json.loads((run.path / "ledger.json").read_text())["reasons"]["trained"]
    assert trained["with passages found"] > trained.get("with other passages", 0)
    document = evaluate(project, run).document
    assert document["systems"] == ["base", "tuned", "tuned_retrieval"]
    shown = [json.loads(line) for line in (run.path / "examples.jsonl").read_text().splitlines()]
    for row in shown:
        number = row["prompt"][0]["content"].split()[-1].removesuffix("?")
        assert row["looked_up"] == {"tuned_retrieval": [f"{number}.txt:1"]}
        assert row["prompt"][0]["content"] == f"What colour has number {number}?"
    with pytest.raises(
        RecipeError, match="puts passages or rows before questions, and objective 'causal' answers none"
    ):
        tune(project, "data.look_up={documents: library}", "objective=causal")


def test_rows_that_the_base_finds_hard_are_chosen_by_the_base_as_it_is(project):
    run = tune(project, "train.max_steps=1", "data.select={keep: 6, by: difficulty}")
    prepared = next((project / "w" / "cache" / "prepared").iterdir())
    kept, held = (
        {json.loads(line)[0][1] for line in (prepared / f"{side}.jsonl").read_text().splitlines()}
        for side in ("train", "validation")
    )
    report = check_data(str(project / "rows.jsonl"), base=str(project / "base"), only=("difficulty",))
    scores = {row["line"]: row["difficulty"] for row in report.scored.rows()}
    order = sorted(
        set(scores) - held, key=lambda line: scores[line] if scores[line] < 1 else -scores[line], reverse=True
    )
    assert kept == set(order[:6])
    assert any("model.safetensors" in name for name in run.resolved["hashes"]["files"]["scorer"])
    new = ("base={config: base/config.json, tokenizer: base}", "method=full")
    with pytest.raises(RecipeError, match="a new base finds nothing hard or easy"):
        tune(project, *new, "data.select={keep: 6, by: difficulty}")


def test_a_run_trained_with_other_rows_is_asked_with_them(project):
    run = tune(
        project, "train.max_steps=2", "data.look_up={passages: 2}",
        "evaluate={against: [base, tuned_retrieval], metrics: [perplexity], max_tokens: 4, look_up: 2}",
    )  # fmt: skip
    trained = json.loads((run.path / "ledger.json").read_text())["reasons"]["trained"]
    assert set(trained) == {"with rows found", "with other rows"}
    assert "look_up" not in run.resolved["hashes"]["files"]  # the rows are what they are looked up in
    evaluate(project, run)
    shown = [json.loads(line) for line in (run.path / "examples.jsonl").read_text().splitlines()]
    held = {row["origin"] for row in shown}
    for row in shown:
        assert len(row["looked_up"]["tuned_retrieval"]) == 2
        assert not held & set(row["looked_up"]["tuned_retrieval"])


def test_the_seeds_of_a_recipe_are_told_together(project):
    brief = ("train.max_steps=2", "evaluate={against: [base], metrics: [perplexity]}")
    documents = [evaluate(project, tune(project, *brief, f"train.seed={seed}")).document for seed in (0, 1)]
    assert "seeds" not in documents[0]
    found = documents[1]["seeds"]
    values = [document["metrics"]["perplexity"]["systems"]["tuned"]["value"] for document in documents]
    assert [entry["value"] for entry in found["runs"]] == values
    assert [entry["seed"] for entry in found["runs"]] == [0, 1]
    assert found["sentence"] in evaluation_text(documents[1])
    assert found["sentence"] in html.unescape((project / "w/runs" / documents[1]["run"] / "report.html").read_text())


def test_the_best_prompt_is_chosen_on_rows_that_are_not_evaluated(original, shared):
    settings = EvaluateSettings(against=("base", "few_shot"), few_shot="best", metrics=("perplexity",))
    for data, side in ((None, "train"), (original / "test.jsonl", "validation")):
        document = evaluate(original, shared, data=data, settings=settings).document
        choice = document["few_shot_choice"]
        assert (choice["from"], choice["examples"]) == (side, document["few_shot_examples"])
        assert document["systems"] == ["base", "few_shot", "tuned"]
        assert choice["sentence"] in html.unescape((shared.path / "report.html").read_text())
        assert f"few-shot: {choice['sentence']}" in evaluation_text(document)
        assert min(choice["candidates"], key=lambda c: c["nats_a_token"])["examples"] == choice["examples"]
    with pytest.raises(ValueError, match="1 to 64 is expected, or best"):
        EvaluateSettings(few_shot=0)


@pytest.mark.parametrize("against", ["[base]", "[few_shot]", "[]"])
def test_a_run_may_be_compared_with_less(project, against):
    run = tune(project, "train.max_steps=1", f"evaluate={{against: {against}, max_tokens: 4, metrics: [perplexity]}}")
    document = evaluate(project, api.Run(run.path)).document
    assert document["systems"] == [*against.strip("[]").split(), "tuned"]
    assert document["verdict"] in ("better", "worse", "undecided")


def test_a_run_that_holds_nothing_back_needs_rows(project):
    run = tune(project, "train.max_steps=1", "data.validation=null", "train.validate_every=null")
    with pytest.raises(DataError, match="holds no rows back") as caught:
        evaluate(project, run)
    assert "--data" in caught.value.hint
    assert evaluate(project, run, data=project / "test.jsonl").document["rows"] == 5


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, NotFoundError, "no such file"),
        ("", DataError, "no rows"),
        ("{broken\n", DataError, "broken JSON"),
        ('{"prompt": "a", "completion": ""}\n', DataError, "empty"),
        ('{"text": "plain"}\n{"text": "text"}\n', DataError, "plain text"),
    ],
)
def test_rows_that_cannot_be_evaluated_are_refused(original, shared, tmp_path, content, error, message):
    if content is not None:
        (tmp_path / "other.jsonl").write_text(content)
    with pytest.raises(error, match=message) as caught:
        evaluate(original, shared, data=tmp_path / "other.jsonl")
    assert caught.value.hint


def test_rows_that_changed_since_are_not_taken_for_held_out(project):
    run = tune(project, "train.max_steps=1")
    text = (project / "rows.jsonl").read_text()
    (project / "rows.jsonl").write_text(text.replace("What colour", "Which colour"))
    with pytest.raises(TunesmithError, match=r"rows\.jsonl|changed") as caught:
        evaluate(project, run)
    assert "--data" in caught.value.hint
    assert evaluate(project, run, data=project / "test.jsonl").document["rows"] == 5


def test_rows_that_are_gone_are_not_needed_where_others_are_given(project):
    run = tune(project, "train.max_steps=1")
    (project / "rows.jsonl").unlink()
    settings = api.evaluation_settings(run, against=["base"])
    assert evaluate(project, run, data=project / "test.jsonl", settings=settings).document["rows"] == 5


# ------------------------------------------------------------------------------------------------ other methods


def test_full_tuning_keeps_the_base_to_compare_with(project, evaluation):
    run = tune(project, "method=full", "train.max_steps=3", "train.learning_rate=1e-2")
    document = evaluate(project, run).document
    for name, entry in document["metrics"].items():
        for system in ("base", "few_shot"):  # here the base is loaded apart, there the adapter was switched off
            assert entry["systems"][system] == evaluation.document["metrics"][name]["systems"][system]
    perplexity = document["metrics"]["perplexity"]["systems"]
    assert perplexity["tuned"]["value"] < perplexity["base"]["value"]
    with pytest.raises(RecipeError, match="no adapter"):
        api.export(run, form="peft", out=project / "out")
    api.export(run, form="merged", out=project / "out")
    exported, tuned = (model.causal.state_dict() for model in (load_model(str(project / "out")), api.load(run).model))
    assert all(torch.equal(exported[name], tuned[name]) for name in tuned)


def test_a_new_model_is_made_and_trained_on_text(project):
    config = json.loads((project / "base" / "config.json").read_text())
    (project / "config.json").write_text(json.dumps(config))
    (project / "text.txt").write_text("\n<|doc|>\n".join(f"This is text number {i}." for i in range(30)))
    overrides = [
        "base={config: config.json, tokenizer: base}",
        "method=full",
        "objective=causal",
        "data.train=text.txt",
    ]
    run = tune(project, *overrides, "evaluate={}", "train.max_steps=4", "train.learning_rate=1e-2")
    document = evaluate(project, run).document
    assert list(document["metrics"]) == ["bits_per_byte", "perplexity"]
    assert document["verdict"] == "better"
    assert math.isclose(document["metrics"]["perplexity"]["systems"]["base"]["value"], 264, rel_tol=0.2)


@pytest.mark.parametrize(
    "override", ["train.precision=bf16", "train.gradient_checkpointing=true", "train.optimiser=muon"]
)
def test_other_ways_to_train_end_in_a_usable_run(project, override):
    run = tune(project, override, "train.max_steps=2")
    assert isinstance(api.load(run).generate("a?", sampling=Sampling(max_tokens=2)), str)


def test_a_template_of_the_recipes_own_is_trained_saved_and_used(project):
    source = (project / "base" / "chat_template.jinja").read_text()
    (project / "own.jinja").write_text(source.replace("<|begin|>", "<|begin|>OWN "))
    run = tune(project, "data.template=own.jinja", "train.max_steps=1")
    (project / "own.jinja").unlink()
    tuned = api.load(api.Run(run.path))
    assert tuned.template.prompt([Message("user", "a")]).text.startswith("<|begin|>OWN ")


def test_a_base_without_a_chat_template_takes_prompts_and_answers(project):
    (project / "base" / "chat_template.jinja").unlink()
    run = tune(project, "train.max_steps=1")
    assert api.load(run).template.plain
    assert evaluate(project, run).document["systems"] == ["base", "few_shot", "tuned"]


# ------------------------------------------------------------------------------------------------------- export


def test_an_export_goes_into_a_new_or_empty_folder(original, shared, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("file", "full"):
        with pytest.raises(StorageError) as caught:
            api.export(shared, form="merged", out=tmp_path / name)
        assert "--out" in caught.value.hint
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "mine").read_text() == "mine"
    assert api.export(shared, form="peft", out=tmp_path / "empty") == tmp_path / "empty"
    assert (tmp_path / "empty" / "adapter_config.json").is_file()
    with pytest.raises(RecipeError, match="peft, merged"):
        api.export(shared, form="onnx", out=tmp_path / "new")
    assert not (tmp_path / "new").exists()
