"""An encoder-decoder from a recipe to an exported model, and what is refused on the way."""

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tunesmith import api
from tunesmith.cli import app
from tunesmith.errors import Interrupted, RecipeError, TemplateError, TunesmithError
from tunesmith.generate.sampling import Sampling
from tunesmith.models.load import Model
from tunesmith.registry.workspace import Workspace

COLOURS = ("red", "green", "blue", "grey")
SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>")
CHAT = [{"role": "user", "content": "0 red?"}, {"role": "assistant", "content": "red"}]


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.fixture(scope="module")
def project(
    build_model: Callable[..., Model],
    make_tokenizer_folder: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A small T5 and a decoder without chat templates, and rows to answer."""
    folder = tmp_path_factory.mktemp("seq2seq")
    tokenizer = make_tokenizer_folder(SPECIAL, eos="<|end|>", pad="<|pad|>")
    for name, kind in (("base", "t5_gated"), ("decoder", "llama")):
        (folder / name).mkdir()
        build_model(kind, dtype=torch.float32).save(folder / name)
        (folder / name / "chat_template.jinja").unlink()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name / file).write_bytes((tokenizer / file).read_bytes())
    rows = [{"prompt": f"{n} {c}?", "completion": c} for n, c in itertools.product(range(10), COLOURS)]
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "chat.jsonl", [{"messages": CHAT}, {"messages": CHAT * 2}])
    return folder


def recipe(project: Path, name: str, **changes: Any) -> Path:
    document: dict[str, Any] = {
        "name": name,
        "base": str(project / "base"),
        "data": {"train": str(project / "rows.jsonl"), "validation": 0.2},
        "objective": "seq2seq",
        "method": {"kind": "lora", "rank": 8},
        "train": {"epochs": 6, "batch_rows": 8, "learning_rate": 0.02},
        "evaluate": {"metrics": ["exact_match", "perplexity"], "max_tokens": 8},
    }
    path = project / f"{name}.yaml"
    path.write_text(json.dumps(document | changes), "utf-8")
    return path


def validation_losses(run: api.Run) -> list[float]:
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line["validation_loss"] for line in lines if "validation_loss" in line]


METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "rank": 8},
    "layers": {"kind": "layers", "last": 2},
    "adapters": {"kind": "adapters", "reduction": 4, "placement": "houlsby"},
    "ia3": {"kind": "ia3"},
    "vera": {"kind": "vera", "rank": 8},
    "qlora": {"kind": "qlora", "rank": 4, "quantise": "int8"},
}
MERGES, IN_PEFT = set(METHODS) - {"adapters"}, {"lora", "ia3", "vera", "qlora"}


@pytest.mark.parametrize("kind", METHODS)
def test_from_a_recipe_to_an_exported_model(project: Path, kind: str) -> None:
    workspace = Workspace(project / "w")
    settings = {
        "epochs": 6,
        "batch_rows": 8,
        "learning_rate": 0.02,
        "precision": "bf16",
        "gradient_checkpointing": True,
    }
    run = api.tune(recipe(project, kind, method=METHODS[kind], train=settings), workspace=workspace)
    losses = validation_losses(run)
    assert losses[-1] < losses[0]
    tuned = api.load(run)
    answers = tuned.generate_many(["1 red?", "2 blue?"], sampling=Sampling(max_tokens=6))
    assert answers == [tuned.generate(text, sampling=Sampling(max_tokens=6)) for text in ("1 red?", "2 blue?")]
    evaluation = api.evaluate(run, workspace=workspace).as_dict()
    assert evaluation["systems"] == ["tuned", "base", "few_shot"] or set(evaluation["systems"]) == {
        "base", "few_shot", "tuned",
    }  # fmt: skip
    perplexity = evaluation["metrics"]["perplexity"]["systems"]
    assert perplexity["tuned"]["value"] < perplexity["base"]["value"]
    for form, possible in (("merged", kind in MERGES), ("peft", kind in IN_PEFT)):
        out = project / f"{run.name}-{form}"
        if not possible:
            with pytest.raises(RecipeError):
                api.export(run, form=form, out=out, workspace=workspace)
        else:
            api.export(run, form=form, out=out, workspace=workspace)
    if kind in MERGES and kind != "qlora":
        check_transformers_answers(project / f"{run.name}-merged", tuned)


def check_transformers_answers(folder: Path, tuned: api.Tuned) -> None:
    """Plain transformers, with its own tokenizer, cache and generation settings, writes the same tokens."""
    from transformers import AutoModelForSeq2SeqLM

    theirs = AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation="eager").eval()
    for text in ("1 red?", "7 grey?"):
        ids = tuned.template.prompt(tuned._messages(text)).ids
        found = theirs.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, use_cache=False)[0, 1:].tolist()
        answer = tuned.model.tokenizer.decode([i for i in found if i != tuned.template.stop_ids()[0]])
        assert answer == tuned.generate(text, sampling=Sampling(max_tokens=6))


def test_it_learns_to_answer(project: Path) -> None:
    workspace = Workspace(project / "w")
    settings = {"epochs": 60, "batch_rows": 16, "learning_rate": 0.005}
    run = api.tune(recipe(project, "learns", method="full", train=settings), workspace=workspace)
    evaluation = api.evaluate(run, workspace=workspace).as_dict()
    systems = evaluation["metrics"]["exact_match"]["systems"]
    assert systems["tuned"]["value"] > systems["base"]["value"] + 0.3
    assert run.summary["tokens"] > run.summary["target_tokens"] > 0


def test_the_base_is_asked_anew_for_other_texts_with_the_same_answers(project: Path) -> None:
    workspace = Workspace(project / "w")
    settings = {"metrics": ["perplexity"], "against": ["base"]}
    run = api.tune(recipe(project, "asked", train={"max_steps": 1}, evaluate=settings), workspace=workspace)
    found = []
    for name, asked in (("one", "What?"), ("two", "Why, and where, and when?")):
        write_rows(project / f"{name}.jsonl", [{"prompt": f"{asked} {c}", "completion": c} for c in COLOURS])
        evaluation = api.evaluate(run, data=project / f"{name}.jsonl", workspace=workspace)
        found.append(evaluation.value("perplexity", system="base"))
    assert found[0] != found[1]


class StopsAt:
    """Interrupts a run after a step, as a signal does."""

    def __init__(self, step: int):
        self.last = step

    def start(self, *, num_steps: int, step: int) -> None:
        pass

    def step(self, record: dict[str, Any]) -> None:
        if record["step"] == self.last:
            os.kill(os.getpid(), signal.SIGTERM)

    def validation(self, record: dict[str, Any]) -> None:
        pass

    def message(self, text: str) -> None:
        pass


def test_a_resumed_run_comes_to_the_same_bits(project: Path) -> None:
    workspace = Workspace(project / "w2")
    whole = api.tune(recipe(project, "whole"), workspace=workspace)
    path = recipe(project, "halved")
    with pytest.raises(Interrupted):
        api.tune(path, workspace=workspace, observer=StopsAt(7))
    halved = api.tune(path, workspace=workspace, resume=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (halved.path / "model" / name).read_bytes() == (whole.path / "model" / name).read_bytes()


# Refusals


def refused(path: Path, project: Path, kind: type[TunesmithError] = RecipeError) -> TunesmithError:
    workspace = Workspace(project / "w3")
    with pytest.raises(kind) as error:
        api.tune(path, workspace=workspace)
    assert error.value.hint
    assert not list(workspace.run_folders())
    return error.value


@pytest.mark.parametrize("objective", ["instruction", "causal", "regression"])
def test_other_objectives_are_refused_on_an_encoder_decoder(project: Path, objective: str) -> None:
    error = refused(recipe(project, f"no-{objective}", objective=objective), project)
    assert f"objective '{objective}' does not work on an encoder-decoder" in error.message
    assert "objective: seq2seq" in error.hint


def test_a_decoder_is_refused(project: Path) -> None:
    error = refused(recipe(project, "decoder", base=str(project / "decoder")), project)
    assert "objective 'seq2seq' needs an encoder-decoder" in error.message
    assert "objective: instruction" in error.hint


def test_compiling_is_refused(project: Path) -> None:
    error = refused(recipe(project, "compiled", train={"compile": True}), project)
    assert "train.compile" in error.message


def test_a_conversation_is_refused_with_its_line(project: Path) -> None:
    path = recipe(project, "turns", data={"train": str(project / "chat.jsonl"), "validation": None})
    error = refused(path, project, TemplateError)
    assert (error.file, error.line) == (str(project / "chat.jsonl"), 2)
    assert "3 turns" in error.message


def test_rows_longer_than_t5_was_trained_on_are_taken_when_asked_for(project: Path) -> None:
    rows = [{"prompt": "long " * 150 + str(n), "completion": "x"} for n in range(4)]
    write_rows(project / "long.jsonl", rows)
    data = {"train": str(project / "long.jsonl"), "validation": None}
    error = refused(recipe(project, "long", data=data), project, TunesmithError)
    assert "512 are allowed" in error.message
    train = {"max_steps": 1}
    run = api.tune(
        recipe(project, "longer", data=data | {"max_tokens": 1000}, train=train), workspace=Workspace(project / "w4")
    )
    assert run.finished
    path = recipe(project, "cut", data=data | {"too_long": "truncate", "max_tokens": 20}, train=train)
    assert api.tune(path, workspace=Workspace(project / "w4")).summary["tokens"] == 4 * (20 + 3)


def test_on_the_command_line(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    workspace = ["--workspace", str(project / "w5")]
    api.tune(recipe(project, "cli", train={"max_steps": 2}), workspace=Workspace(project / "w5"))
    runner = CliRunner()
    found = runner.invoke(app, ["generate", "cli", "1 red?", "--max-tokens", "4", "--json", *workspace])
    assert found.exit_code == 0, found.output
    found = runner.invoke(app, ["chat", "cli", *workspace], input="hello\n")
    assert isinstance(found.exception, RecipeError) or found.exit_code == 2
    assert "holds no conversation" in f"{found.exception}{found.output}"
    found = runner.invoke(app, ["data", "check", "chat.jsonl", "--base", "base", "--json"])
    assert "3 turns" in found.output
