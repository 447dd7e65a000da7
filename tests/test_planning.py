"""A plan against the run it is for: steps and tokens to the last one, tensors to the byte; the run itself is unchanged."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith import api, cli, planning
from tunesmith.errors import RecipeError
from tunesmith.methods import METHODS
from tunesmith.methods.base import trainable
from tunesmith.models.load import Model, load_model
from tunesmith.models.outline import Tally, stored_bytes
from tunesmith.models.quantised import quantise
from tunesmith.planning import make_plan, set_up
from tunesmith.recipe import load_recipe
from tunesmith.registry.workspace import Workspace
from tunesmith.runs import make_trainable
from tunesmith.train import rehearsal
from tunesmith.train.optimiser import Optimiser
from tunesmith.train.rehearsal import rehearse

RECIPE = """\
name: toy
base: qwen2
data: {train: rows.jsonl, validation: null}
method: {kind: lora, rank: 4}
train: {epochs: 2, batch_rows: 8, micro_batch_tokens: 60}
"""
KINDS = {
    "full": ["method=full"],
    "lora": [],
    "bf16": ["train.precision=bf16"],
    "muon": ["method=full", "train.optimiser=muon"],
    "head": ["data.train=labelled.jsonl", "objective=classification"],
    "checkpointing": ["method=full", "train.gradient_checkpointing=true"],
    "layers": ["method={kind: layers, last: 1}"],
    "prefix": ["method={kind: prefix, num_tokens: 3}"],
}


@pytest.fixture(scope="module")
def project(build_model: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases, rows and a recipe."""
    folder = tmp_path_factory.mktemp("plan")
    for name in ("qwen2", "bert", "t5"):
        (folder / name).mkdir()
        build_model(name, dtype=torch.float32).save(folder / name)
    lines = [{"prompt": f"{'very ' * (i % 5)}number {i}?", "completion": ["red", "green"][i % 2]} for i in range(21)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = [{"text": line["prompt"], "label": line["completion"]} for line in lines]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    (folder / "toy.yaml").write_text(RECIPE)
    return folder


def plan(project: Path, *overrides: str, **given: Any) -> planning.Plan:
    recipe = load_recipe(project / "toy.yaml", overrides=list(overrides))
    return make_plan(recipe, workspace=Workspace(project / "w"), **given)


def ready(project: Path, *overrides: str, device: str = "cpu") -> planning.Stage:
    """What `train` has before its first step."""
    recipe = load_recipe(project / "toy.yaml", overrides=list(overrides))
    stage = set_up(recipe, workspace=Workspace(project / "w"), device=device)
    make_trainable(stage.model, stage.recipe)
    return stage


def size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize(
    "overrides", [[], ["train.max_steps=2"], ["train.epochs=1.5"], ["method=full", "train.seed=3"]]
)
def test_steps_and_tokens_are_those_of_the_run(project: Path, overrides: list[str]) -> None:
    found = plan(project, *overrides).as_dict()
    workspace = Workspace(project / "w")
    run = api.tune(project / "toy.yaml", workspace=workspace, overrides=overrides).summary
    names = ("steps", "tokens", "computed_tokens", "target_tokens", "parameters", "trainable_parameters")
    assert found["exact"]
    assert {name: found[name] for name in names} == {name: run[name] for name in names}


def test_of_a_long_run_the_first_epoch_stands_for_the_others(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = plan(project, "train.epochs=4").course
    monkeypatch.setattr(rehearsal, "MAX_ROWS", 30)
    found = plan(project, "train.epochs=4").course
    assert exact.exact
    assert not found.exact
    assert found.steps_laid_out == 3
    assert (found.steps, found.rows) == (exact.steps, exact.rows)
    assert abs(found.tokens - exact.tokens) <= found.steps  # each step is rounded
    assert found.computed_tokens == pytest.approx(exact.computed_tokens, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_gradients_and_optimiser_are_counted_to_the_byte(project: Path, kind: str) -> None:
    memory = plan(project, *KINDS[kind]).memory
    stage = ready(project, *KINDS[kind])
    model, parameters = stage.model, trainable(stage.model)
    optimiser = Optimiser(parameters, settings=stage.recipe.train, not_matrices=model.vocabulary_weights())
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step(learning_rate=0.0)
    buffers = {id(b): b for b in model.causal.buffers()}.values()
    assert memory.weights == size(p for _, p in model.named_parameters()) + size(buffers)
    assert memory.gradients == size(p.grad for p in parameters.values() if p.grad is not None)
    assert memory.optimiser == size(optimiser.state().values())


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_alone_keep_as_much_as_numbers(project: Path, kind: str) -> None:
    """The same steps on real tensors, tallied the same way."""
    found = plan(project, *KINDS[kind])
    stage = ready(project, *KINDS[kind])
    tokens, targets = stage.packs(found.course.most_tokens), stage.packs(found.course.most_targets)
    packs = [max(targets, key=lambda p: len(p.target_N)), max(tokens, key=lambda p: p.num_computed_tokens)]
    tally = Tally()
    tally.enter("weights")
    for tensor in [*stage.model.causal.buffers(), *(p for _, p in stage.model.named_parameters())]:
        tally.count(tensor)
    with tally:
        rehearse(
            stage.model,
            [[pack] for pack in packs],
            method=stage.recipe.method,
            objective=stage.recipe.objective,
            settings=stage.recipe.train,
            accumulates=found.course.num_packs > found.course.steps_laid_out,
            enter=tally.enter,
        )
    memory = found.memory
    predicted = memory.weights + memory.gradients + memory.optimiser + memory.activations + memory.readout
    assert predicted == pytest.approx(sum(tally.peak.values()), rel=0.02)


def test_less_is_kept_where_less_is_needed(project: Path) -> None:
    def kept(*overrides: str) -> int:
        return plan(project, *overrides).memory.activations

    whole = kept("method=full")
    assert kept("method=full", "train.gradient_checkpointing=true") < whole
    assert kept("method={kind: layers, last: 1}") < kept("method={kind: layers, last: 2}")
    assert kept("method=full", "train.micro_batch_tokens=120") > whole


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_planned(project: Path, method: str) -> None:
    more = {"layers": {"last": 1}, "vera": {"rank": 8}, "prompt": {"num_tokens": 3}, "prefix": {"num_tokens": 3}}
    more |= {"p_tuning": {"num_tokens": 3, "width": 8}, "qlora": {"rank": 4}}
    settings = json.dumps({"kind": method} | more.get(method, {}))
    found = plan(project, f"method={settings}", "train.precision=bf16", "train.gradient_checkpointing=true")
    assert found.memory.activations > 0
    assert 0 < found.trainable_parameters <= found.parameters
    assert found.seconds > 0


def test_other_kinds_of_bases_and_objectives_can_be_planned(project: Path) -> None:
    head = ["data.train=labelled.jsonl", "objective=classification"]
    teacher = json.dumps({"kind": "distillation", "teacher": str(project / "qwen2")})
    alone = plan(project, "method=full").memory.weights
    assert plan(project, "base=bert", *head).memory.activations > 0
    assert plan(project, "base=t5", "objective=seq2seq").memory.activations > 0
    assert plan(project, "method=full", f"objective={teacher}").memory.weights == 2 * alone


def test_what_few_bits_save_is_what_is_stored(project: Path) -> None:
    model = load_model(str(project / "qwen2"))
    saved, largest = stored_bytes(model, kind="int8")
    before = size(model.causal.parameters())
    quantise(model, "int8")
    layers = [m for m in model.causal.modules() if "codes" in dict(m.named_buffers(recurse=False))]
    stored = size(b for layer in layers for b in layer.buffers(recurse=False))
    assert before - size(model.causal.parameters()) - stored == saved
    assert largest == 48 * 32 * 4


def test_measuring_before_a_long_run_leaves_its_bits_alone(
    project: Path, heard: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(run: api.Run) -> str:
        return hashlib.sha256((run.path / "model" / "adapter_model.safetensors").read_bytes()).hexdigest()

    given = {"workspace": Workspace(project / "w"), "overrides": ["plan.price_per_hour=2"]}
    plain = api.tune(project / "toy.yaml", **given)
    monkeypatch.setattr(planning, "LONG_SECONDS", 0)
    measured = api.tune(project / "toy.yaml", observer=heard, **given)
    assert weights(measured) == weights(plain)
    assert any("measured: " in message and "cost: " in message for message in heard.messages)


def test_a_run_that_is_measured_to_need_more_than_there_is_is_refused(
    project: Path, tmp_path: Path, heard: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "LONG_SECONDS", 0)
    monkeypatch.setattr(planning, "available_memory_bytes", lambda device: 1 << 20)
    workspace = Workspace(tmp_path / "w")
    with pytest.raises(RecipeError, match=r"needs .* of memory and there are 1 MiB") as error:
        api.tune(project / "toy.yaml", workspace=workspace, observer=heard)
    assert error.value.hint == "use a smaller base or a larger machine"
    assert any("measured: " in message for message in heard.messages)
    assert not workspace.run_folders()


def test_the_hint_names_what_would_fit(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(project / "toy.yaml", overrides=["method=full"])
    found = plan(project, "method=full")
    needed = {name: make_plan(r, workspace=Workspace(project / "w")) for name, r in planning._smaller(recipe)}
    assert list(needed) == [
        "train.micro_batch_tokens=15", "train.gradient_checkpointing=true", "method=lora", "method=qlora",
    ]  # fmt: skip
    tensors = {name: p.memory.total - p.memory.process for name, p in needed.items()}
    assert all(bytes_ < found.memory.total - found.memory.process for bytes_ in tensors.values())
    monkeypatch.setattr(planning, "available_memory_bytes", lambda device: 1 << 40)
    error = planning._too_large(plan(project, "method=full"), recipe=recipe, workspace=Workspace(project / "w"))
    assert error.hint == "this would fit: " + " or ".join(f"--set {name}" for name in needed)


def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["tunesmith", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr()
    return int(end.value.code or 0), shown.out, shown.err


def test_the_command_prints_a_plan_or_one_document(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["plan", str(project / "toy.yaml"), "--workspace", str(project / "w")]
    code, out, _ = command(capsys, monkeypatch, *arguments, "--json", "--price-per-hour", "3600")
    document = json.loads(out)
    assert code == 0
    assert document["steps"] == 6
    assert document["cost"] == pytest.approx(document["seconds"], abs=0.1)
    assert document["measured"] is None
    assert document["peak_memory_bytes"] == document["predicted_peak_memory_bytes"]
    assert sum(document["memory"].values()) <= document["peak_memory_bytes"]
    code, out, _ = command(capsys, monkeypatch, *arguments, "--set", "plan={price_per_hour: 2, currency: CHF}")
    assert code == 0
    assert "6 steps" in out
    assert "CHF" in out
    assert "predicted: " in out


def test_measuring_corrects_the_plan(project: Path) -> None:
    found = plan(project, measure=True)
    assert found.measured is not None
    assert found.peak_memory_bytes == found.measured.peak_memory_bytes + found.memory.frozen_blocks
    assert found.seconds == pytest.approx(found.measured.seconds_per_token * found.course.computed_tokens, rel=0.01)
    assert not any((project / "w").glob("runs/*plan*"))


def test_a_currency_without_a_price_is_refused(project: Path) -> None:
    with pytest.raises(RecipeError, match="currency has no effect"):
        load_recipe(project / "toy.yaml", overrides=["plan.currency=USD"])


def test_a_control_groups_limit_is_the_memory_there_is(tmp_path: Path) -> None:
    from tunesmith.train.memory import _room_in_group

    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("100\n")
    assert _room_in_group(tmp_path, otherwise=7) == 7
    (tmp_path / "memory.max").write_text("1000\n")
    assert _room_in_group(tmp_path, otherwise=7) == 900
