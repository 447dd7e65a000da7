"""The newcomer's path, command by command, on a toy base: from a file of rows to a model that plain transformers loads."""

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith as package
from tunesmith import quickstart
from tunesmith.data.formats import examine
from tunesmith.data.sources import read_rows
from tunesmith.data.types import Example
from tunesmith.models.base import STARTER
from tunesmith.recipe import load_recipe

Command = Callable[..., Any]
TRAIN_KEYS = {
    "run", "path", "steps", "rows", "tokens", "target_tokens", "seconds", "tokens_per_second", "peak_memory_bytes",
    "trainable_parameters", "parameters", "train_loss", "validation_loss", "best_step", "stopped",
}  # fmt: skip
FASTER = ["--set", "train.learning_rate=2e-2", "--set", "evaluate.few_shot=2", "--set", "train.epochs=4"]
SHORT = ["--set", "train.max_steps=1", "--set"]
QUESTION = "What colour has number 3?"


def write_rows(path: Path, count: int) -> None:
    rows = [{"prompt": f"What colour has number {i}?", "completion": ["red", "green"][i % 2]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def project(base: Path, tunesmith: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows and the recipe that `init` wrote for them."""
    folder = tmp_path_factory.mktemp("newcomer")
    write_rows(folder / "colours.jsonl", 40)
    result = tunesmith("init", "--from", "colours.jsonl", "--base", base, "--json", folder=folder)
    assert result.document == {
        "recipe": "recipe.yaml",
        "form": "prompt_completion",
        "rows": 40,
        "why": "40 rows of the form prompt_completion (short answers)",
    }
    return folder


@pytest.fixture(scope="session")
def trained(project: Path, tunesmith: Command) -> dict[str, Any]:
    """What `train --json` printed."""
    document: dict[str, Any] = tunesmith("train", "recipe.yaml", "--json", *FASTER, folder=project).document
    return document


@pytest.fixture(scope="session")
def evaluated(project: Path, tunesmith: Command, trained: dict[str, Any]) -> dict[str, Any]:
    """What `evaluate --json` printed."""
    document: dict[str, Any] = tunesmith("evaluate", trained["run"], "--json", folder=project).document
    return document


@pytest.fixture(scope="session")
def merged(project: Path, tunesmith: Command, trained: dict[str, Any]) -> Path:
    result = tunesmith("export", trained["run"], "--out", "merged", "--json", folder=project)
    assert result.document == {"path": "merged", "format": "merged"}
    return project / "merged"


# ------------------------------------------------------------------------------------------------- step by step


def test_the_rows_are_checked(project, base, tunesmith):
    document = tunesmith("data", "check", "colours.jsonl", "--base", base, "--json", folder=project).document
    assert (document["rows"], document["form"]) == (40, "prompt_completion")
    assert [p for p in document["problems"] if p["severity"] == "error"] == []
    text = tunesmith("data", "check", "colours.jsonl", "--recipe", "recipe.yaml", folder=project).out
    assert "colours.jsonl: 40 rows" in text


def test_the_rows_are_prepared_as_the_check_said(project, base, tunesmith, trained):
    check = tunesmith("data", "check", "colours.jsonl", "--recipe", "recipe.yaml", "--json", folder=project).document
    prepared = tunesmith("data", "prepare", "recipe.yaml", "--json", folder=project).document
    assert prepared["ledger"]["states"] == check["ledger"]
    assert prepared["train"]["rows"] + prepared["validation"]["rows"] == 40 == prepared["ledger"]["rows"]
    assert prepared["train"]["rows"] == trained["rows"]
    assert Path(prepared["folder"]).is_dir()
    assert "to train:" in tunesmith("data", "prepare", "recipe.yaml", folder=project).out


def test_training_prints_its_numbers(trained):
    assert set(trained) >= TRAIN_KEYS
    assert trained["run"].startswith("colours-")
    assert trained["stopped"] in ("finished", "early")
    assert trained["validation_loss"] < 5  # bits of a uniform guess: ln 264 = 5.58
    lines = [json.loads(line) for line in (Path(trained["path"]) / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, trained["steps"] + 1))
    needed = {"step", "time", "loss", "learning_rate", "tokens", "tokens_per_second", "grad_norm"}
    assert all(set(line) >= needed for line in steps)
    assert all("step" in line for line in lines if "validation_loss" in line)
    assert steps[-1]["tokens"] == trained["tokens"]


def test_the_tuned_model_is_compared_with_its_base(project, trained, evaluated, tunesmith):
    assert evaluated["run"] == trained["run"]
    assert evaluated["systems"] == ["base", "few_shot", "tuned"]
    assert list(evaluated["metrics"]) == ["exact_match", "token_f1", "perplexity"]
    perplexity = evaluated["metrics"]["perplexity"]
    assert perplexity["higher_is_better"] is False
    assert perplexity["systems"]["tuned"]["high"] < perplexity["systems"]["base"]["low"]
    assert perplexity["differences"]["tuned - base"]["better_rows"] == evaluated["rows"]
    assert evaluated["verdict"] in ("better", "worse", "undecided")
    assert json.loads((Path(trained["path"]) / "evaluation.json").read_text()) == evaluated


def test_it_is_evaluated_on_other_rows_and_against_less(project, tunesmith):
    run = tunesmith("train", "recipe.yaml", "--json", *SHORT, "name=other", folder=project).document["run"]
    write_rows(project / "others.jsonl", 5)
    document = tunesmith("evaluate", run, "--data", "others.jsonl", "--json", folder=project).document
    assert (document["rows"], document["data"]) == (5, "others.jsonl")
    shown = tunesmith("evaluate", run, "--against", "base", "--rows", "2", folder=project)
    assert "difference" in shown.out
    assert "on 2 held-out rows" in shown.out
    assert "few" not in shown.out.splitlines()[2]


def test_the_report_holds_the_result(project, evaluated, tunesmith):
    path = Path(tunesmith("report", evaluated["run"], "--json", folder=project).document["report"])
    text = path.read_text()
    assert evaluated["run"] in text
    assert "exact_match" in text
    assert not re.search(r"""(?:src|href)=["']https?://""", text)  # it can be read without a network


def test_runs_are_listed_shown_and_compared(project, trained, evaluated, tunesmith):
    other = tunesmith("train", "recipe.yaml", "--json", *SHORT, "train.seed=1", folder=project).document
    listed = {run["run"]: run for run in tunesmith("runs", "--json", folder=project).document}
    assert next(iter(listed)) == other["run"]  # the newest first
    assert {run["state"] for run in listed.values()} == {"finished"}
    assert listed[trained["run"]]["verdict"] == evaluated["verdict"]
    assert trained["run"] in tunesmith("runs", folder=project).out
    shown = tunesmith("show", trained["run"], "--json", folder=project).document
    assert shown["summary"] == {k: trained[k] for k in shown["summary"]}
    assert shown["lineage"]["base"]["state"] == "verified"
    assert shown["ledger"]["rows"] == 40
    comparison = tunesmith("compare", trained["run"], other["run"], "--json", folder=project).document
    settings = {s["name"]: (s["a"], s["b"]) for s in comparison["settings"]}
    assert settings["recipe.train.max_steps"] == (None, 1)
    assert settings["recipe.train.learning_rate"][0] == 2e-2
    assert other["run"] in tunesmith("show", "colours", folder=project).out  # the newest of that name
    assert trained["run"] in tunesmith("compare", trained["run"], "latest", folder=project).out


def test_it_answers(project, trained, tunesmith):
    run = trained["run"]
    document = tunesmith("generate", run, QUESTION, "--max-tokens", "8", "--json", folder=project).document
    assert set(document) == {"prompt", "answer"}
    piped = tunesmith("generate", run, "--max-tokens", "8", folder=project, stdin=QUESTION + "\n")
    assert piped.out == document["answer"] + "\n"
    base = tunesmith("generate", run, QUESTION, "--max-tokens", "8", "--base", "--json", folder=project).document
    assert base["answer"] != document["answer"]
    drawn = ["generate", run, QUESTION, "--max-tokens", "8", "--temperature", "1.5", "--json", "--seed"]
    first, again, other = (tunesmith(*drawn, seed, folder=project).document["answer"] for seed in (1, 1, 2))
    assert first == again != other


def test_it_talks(project, trained, tunesmith):
    run = trained["run"]
    limit = ["--max-tokens", "8"]
    alone = tunesmith("generate", run, QUESTION, *limit, folder=project).out
    piped = f"{QUESTION}\n\n/reset\n{QUESTION}\n/quit\nnever read\n"
    result = tunesmith("chat", run, *limit, folder=project, stdin=piped)
    assert (result.code, result.out) == (0, alone * 2)
    until_the_end = tunesmith("chat", run, *limit, folder=project, stdin=f"{QUESTION}\n{'x' * 5000}\n{QUESTION}\n")
    assert until_the_end.code == 0
    assert until_the_end.out.startswith(alone)
    assert "error: " in until_the_end.err  # of the turn that is too long, which is then forgotten
    assert until_the_end.out.count("\n") >= 2


def test_a_prompt_that_is_no_text_is_refused(project, trained, tunesmith):
    error, _ = tunesmith("generate", trained["run"], "\udcff", folder=project).refusal
    assert error
    error, _ = tunesmith("generate", trained["run"], "", folder=project).refusal
    assert "empty" in error


def test_a_run_is_used_from_python(project, trained, monkeypatch):
    monkeypatch.chdir(project)
    tuned = package.load(trained["run"])
    assert isinstance(tuned.generate(QUESTION), str)
    assert package.find_run(trained["run"]).summary == trained
    run = package.tune("recipe.yaml", overrides=["train.max_steps=1", "name=second"])
    assert package.evaluate(run).verdict in ("better", "worse", "undecided")
    assert package.export(run, form="merged", out=project / "second").is_dir()
    with pytest.raises(AttributeError, match="nothing"):
        _ = package.nothing


def test_every_command_tells_what_is_missing(project, tunesmith, tmp_path):
    error, hint = tunesmith("train", "recipe.yml", folder=project).refusal
    assert "no such recipe" in error
    assert "recipe.yaml" in hint
    error, hint = tunesmith("evaluate", "colors", folder=project).refusal
    assert "colours" in error + hint
    error, _ = tunesmith("train", "recipe.yaml", "--set", "data.train=colors.jsonl", folder=project).refusal
    assert "colors.jsonl" in error


# ------------------------------------------------------------------------------------------------------- taking away


def packed_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """The run's own logits after every token."""
    import numpy as np

    from tunesmith.data.pack import build_pack
    from tunesmith.data.types import Sequence

    pack = build_pack([Sequence(np.array(ids, np.int32), np.zeros(len(ids), np.float32))])
    with torch.no_grad():
        return model.head(model.hidden(model.attention(pack)))


@pytest.fixture
def tuned(project: Path, trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(project)
    return package.load(trained["run"])


@pytest.fixture
def prompt_ids(tuned: Any) -> list[int]:
    from tunesmith.data.types import Message

    ids: list[int] = tuned.template.prompt([Message("user", QUESTION)]).ids
    return ids


def test_the_merged_model_is_the_tuned_one_in_plain_transformers(merged, tuned, prompt_ids):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = AutoModelForCausalLM.from_pretrained(merged, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = plain(torch.tensor([prompt_ids])).logits[0]
    torch.testing.assert_close(logits, packed_logits(tuned.model, prompt_ids), rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    conversation = [{"role": "user", "content": QUESTION}]
    rendered = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert rendered["input_ids"] == prompt_ids
    answer = plain.generate(torch.tensor([prompt_ids]), max_new_tokens=8, do_sample=False)[
        0, len(prompt_ids) :
    ].tolist()
    from tunesmith.generate.sampling import Sampling

    text = tokenizer.decode(answer, skip_special_tokens=True)
    assert text == tuned.generate(QUESTION, sampling=Sampling(max_tokens=8))


def test_the_merged_model_is_a_base_itself(merged, project, tunesmith):
    settings = [*SHORT, f"base={merged}", "--set", "name=again"]
    assert tunesmith("train", "recipe.yaml", "--json", *settings, folder=project).document["steps"] == 1


def test_the_adapter_is_the_tuned_model_in_peft(project, base, tuned, prompt_ids, tunesmith, trained):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    tunesmith("export", trained["run"], "--format", "peft", "--out", "adapter", folder=project)
    plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    adapted = peft.PeftModel.from_pretrained(plain, project / "adapter").eval()
    with torch.no_grad():
        logits = adapted(torch.tensor([prompt_ids])).logits[0]
        with adapted.disable_adapter():
            untouched = adapted(torch.tensor([prompt_ids])).logits[0]
    torch.testing.assert_close(logits, packed_logits(tuned.model, prompt_ids), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(untouched, logits, atol=1e-2)
    assert (project / "adapter" / "token_contract.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "gguff", "--out", "new"], "gguff"),
        (["--out", "merged"], "not empty"),
        (["--out", "colours.jsonl"], "file"),
    ],
)
def test_an_export_that_cannot_be_is_refused(project, merged, trained, tunesmith, arguments, message):
    error, _ = tunesmith("export", trained["run"], *arguments, folder=project).refusal
    assert message in error
    assert not (project / "new").exists()


def test_the_quickstart_recipe_fits_its_rows():
    recipe = load_recipe(quickstart.RECIPE)
    for source in (*recipe.data.train_paths, str(recipe.data.test)):
        rows = [examine(row, settings=recipe.data) for row in read_rows(source, on_bad=pytest.fail)]
        assert len(rows) > 100
        assert all(isinstance(row, Example) for row in rows)


@pytest.mark.skipif(not (STARTER / "config.json").is_file(), reason="the starter's weights are not here")
def test_the_starter_takes_its_sample_as_it_is(tunesmith, tmp_path):
    source = load_recipe(quickstart.RECIPE).data.train_paths[0]
    document = tunesmith("data", "check", source, "--json", folder=tmp_path).document  # exit 0: no row at fault
    assert document["rows"] == sum(document["ledger"].values())
    assert document["tokens"]["longest"] <= document["tokens"]["limit"]
    written = tunesmith("init", "--from", source, "--json", folder=tmp_path).document
    assert written["rows"] == document["rows"]
    assert load_recipe(tmp_path / "recipe.yaml").base == "starter"


# ------------------------------------------------------------------------------------------------- being stopped

STEPS = ["--set", "train.max_steps=240", "--set", "train.epochs=200", "--set", "train.patience=null", *FASTER[:4]]


def weights(run: str | Path) -> str:
    return hashlib.sha256((Path(run) / "model" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def uninterrupted(project: Path, tunesmith: Command) -> dict[str, Any]:
    result = tunesmith("train", "recipe.yaml", "--json", *STEPS, "--workspace", "whole", folder=project)
    document: dict[str, Any] = result.document
    return document


@pytest.fixture
def training(project: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A real `tunesmith train` in the middle of its work."""
    workspace = project / f"stopped-{request.node.callspec.id}"
    command = [
        sys.executable,
        "-m",
        "tunesmith",
        "train",
        "recipe.yaml",
        "--json",
        *STEPS,
        "--workspace",
        str(workspace),
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(package.__file__).parents[1])}
    with subprocess.Popen(
        command, cwd=project, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        while process.poll() is None:
            metrics = list(workspace.glob("runs/*/metrics.jsonl"))
            if metrics and metrics[0].read_bytes().count(b"\n") >= 30:
                break
            time.sleep(0.01)
        yield process
        process.kill()


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)],
    ids=["int", "term", "kill"],
)
def test_a_stopped_training_goes_on_to_the_same_bits(project, training, uninterrupted, tunesmith, number, status):
    training.send_signal(number)
    out, err = training.communicate(timeout=120)
    assert (training.returncode, out) == (status, "")
    workspace = Path(training.args[-1])
    (run,) = (workspace / "runs").iterdir()
    if number != signal.SIGKILL:
        assert err.splitlines()[-1] == "hint: go on with the same command and --resume"
        assert "everything up to there is saved" in err
        summary = json.loads((run / "run.json").read_text())
        assert (summary["state"], summary["stopped"]) == ("stopped", "signal")
        assert 0 < summary["steps"] < 240
    error, _ = tunesmith("generate", run.name, "hello", "--workspace", workspace, folder=project).refusal
    assert "has no model yet" in error
    resume = ["train", "recipe.yaml", "--json", *STEPS, "--workspace", workspace, "--resume"]
    resumed = tunesmith(*resume, folder=project).document
    assert resumed["path"] == str(run)
    assert weights(run) == weights(uninterrupted["path"])
    for name in ("steps", "tokens", "train_loss", "validation_loss", "best_step", "stopped"):
        assert resumed[name] == uninterrupted[name], name


def test_input_that_is_no_text_is_refused_at_the_terminal(project, trained, tunesmith, monkeypatch):
    from tunesmith import cli

    stream = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8")
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "stdin", stream)
    monkeypatch.setattr(sys, "argv", ["tunesmith", "generate", trained["run"]])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
