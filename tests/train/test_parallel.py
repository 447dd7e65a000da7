"""Several processes take the steps that one takes: the same losses and weights, whoever holds what, however many go on."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith import api
from tunesmith.data.tokens import TokenStore
from tunesmith.data.types import Sequence
from tunesmith.errors import DataError, ElsewhereError, Interrupted, NumericalError, RecipeError
from tunesmith.methods import Method
from tunesmith.methods.base import trainable
from tunesmith.methods.full import Full
from tunesmith.methods.layers import Layers
from tunesmith.methods.lora import Lora
from tunesmith.methods.prefix import Prefix
from tunesmith.models.heads import attach_head
from tunesmith.models.load import Model
from tunesmith.objectives.base import Objective
from tunesmith.objectives.classification import Classification
from tunesmith.objectives.instruction import Instruction
from tunesmith.registry.workspace import Workspace
from tunesmith.train.loop import Fit
from tunesmith.train.observers import Silent
from tunesmith.train.parallel import ALONE, Processes, launched
from tunesmith.train.settings import TrainSettings

BuildModel = Callable[..., Model]
NUM_UNITS = 11
CLASSES = Classification(labels=("a", "b", "c"), several=False, pooling="last")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _work(rank: int, count: int, port: int, settings: TrainSettings, work: Callable[[Processes], None]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with launched(settings) as processes:
        work(processes)


def together(work: Callable[[Processes], None], *, settings: TrainSettings, count: int = 2) -> None:
    """Do `work` in so many processes at once, as torchrun would start them; each must come to its end."""
    context, port = multiprocessing.get_context("fork"), _free_port()
    children = [context.Process(target=_work, args=(rank, count, port, settings, work)) for rank in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0] * count


class Curve(Silent):
    """Every loss, and what was said; does something after a step."""

    def __init__(self, after: Callable[[int], None] = lambda step: None):
        self.losses: list[float] = []
        self.said: list[str] = []
        self._after = after

    def step(self, record: dict[str, Any]) -> None:
        self.losses += [record["loss"], record["grad_norm"]]
        self._after(record["step"])

    def validation(self, record: dict[str, Any]) -> None:
        self.losses.append(record["validation_loss"])

    def message(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def rows() -> list[list[Sequence]]:
    """Rows of 4 to 24 tokens, each of a class."""
    random, made = np.random.default_rng(3), []
    for number in range(NUM_UNITS):
        tokens_T = random.integers(6, 262, 4 + 2 * number).astype(np.int32)
        weight_T = np.zeros(len(tokens_T), np.float32)
        weight_T[-3:] = 1 + number % 2
        made.append([Sequence(tokens_T, weight_T, 0, np.array([number % 3], np.float32))])
    return made


@pytest.fixture
def fit_of(
    build_model: BuildModel, rows: list[list[Sequence]], token_store: Callable[..., TokenStore], tmp_path: Path
) -> Callable[..., Fit]:
    """`fit_of(folder name, method=..., processes=..., observer=...)`: a run of a fresh model in float64."""
    train, validation = (token_store(some, folder=tmp_path / str(len(some))) for some in (rows, rows[:3]))

    def make(
        name: str,
        *,
        method: Method,
        processes: Processes = ALONE,
        observer: Curve,
        objective: Objective | None = None,
        **settings: Any,
    ) -> Fit:
        objective = objective or Instruction()
        model = build_model("llama", dtype=torch.float64)
        method.apply(model, seed=3)
        if objective.num_outputs:
            attach_head(model, num_outputs=objective.num_outputs)
        for parameter in trainable(model).values():
            parameter.data = parameter.data.to(torch.float64)
        settings = {"epochs": 3, "batch_rows": 4, "micro_batch_tokens": 20, "learning_rate": 0.01} | settings
        if settings.get("gradient_checkpointing"):
            model.checkpoint_activations()
        processes.divide(model)
        return Fit(
            model,
            method=method,
            objective=objective,
            train=train,
            validation=validation,
            settings=TrainSettings(validate_every=3, **settings),
            folder=tmp_path / name,
            observer=observer,
            processes=processes,
        )

    return make


def whole_weights(fit: Fit) -> dict[str, Tensor]:
    return {name: fit.processes.whole(p.detach()).clone().contiguous() for name, p in fit.parameters.items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------------------------- the same trajectory


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("parallel", ["data", "fsdp"])
@pytest.mark.parametrize(
    ("method", "objective", "settings"),
    [
        (Full(), None, {}),
        (Full(), None, {"gradient_checkpointing": True, "batch_rows": 2}),
        (Lora(rank=4), None, {}),
        (Lora(rank=4), CLASSES, {}),
        (
            Layers(last=1),
            CLASSES,
            {"batch_rows": 1, "reuse_frozen": "off"},
        ),  # one of the two has no row of its own, ever
        (Prefix(num_tokens=3), None, {}),
    ],
    ids=["full", "full, recomputed", "lora", "lora, classes", "layers, one row", "prefix"],
)
def test_two_processes_take_the_steps_of_one(
    fit_of: Callable[..., Fit],
    tmp_path: Path,
    parallel: str,
    method: Method,
    objective: Objective | None,
    settings: dict[str, Any],
) -> None:
    alone = Curve()
    expected = fit_of("alone", method=method, observer=alone, objective=objective, **settings)
    expected.run()

    def work(processes: Processes) -> None:
        curve = Curve()
        fit = fit_of(
            "two",
            method=method,
            observer=curve,
            objective=objective,
            processes=processes,
            parallel=parallel,
            **settings,
        )
        fit.run()
        found = whole_weights(fit) | {"losses": torch.tensor(curve.losses, dtype=torch.float64)}
        progress = fit.progress
        counts = [progress.step, progress.rows, progress.tokens, progress.target_tokens, progress.best_step]
        if processes.is_first:
            save_file(found | {"counts": torch.tensor(counts)}, tmp_path / "found.safetensors")

    together(work, settings=TrainSettings(parallel=parallel))
    found = load_file(tmp_path / "found.safetensors")
    torch.testing.assert_close(found.pop("losses").tolist(), alone.losses, rtol=1e-9, atol=1e-11)
    was = expected.progress
    assert found.pop("counts").tolist() == [was.step, was.rows, was.tokens, was.target_tokens, was.best_step]
    assert_close(found, whole_weights(expected))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("before", ["alone", "data", "fsdp"])
@pytest.mark.parametrize("after", ["alone", "data", "fsdp"])
def test_another_number_of_processes_goes_on(
    fit_of: Callable[..., Fit], tmp_path: Path, before: str, after: str
) -> None:
    expected = fit_of("whole", method=Full(), observer=Curve())
    expected.run()

    def part(kind: str, work: Callable[[Processes], None]) -> None:
        if kind == "alone":
            work(ALONE)
        else:
            together(work, settings=TrainSettings(parallel=kind))

    def stopped(processes: Processes) -> None:
        def stop(step: int) -> None:
            if step == 5 and processes.rank == processes.count - 1:
                fit.signal_number = signal.SIGTERM  # one process hears of it, and all must stop

        settings = {} if before == "alone" else {"parallel": before}
        fit = fit_of("run", method=Full(), observer=Curve(stop), processes=processes, **settings)
        with pytest.raises(Interrupted) as error:
            fit.run()
        assert (fit.progress.step, error.value.signal_number) == (5, signal.SIGTERM)

    def resumed(processes: Processes) -> None:
        settings = {} if after == "alone" else {"parallel": after}
        fit = fit_of("run", method=Full(), observer=Curve(), processes=processes, **settings)
        assert fit.resume()
        fit.run()
        found = whole_weights(fit)
        if processes.is_first:
            save_file(found, tmp_path / "found.safetensors")

    part(before, stopped)
    part(after, resumed)
    assert_close(load_file(tmp_path / "found.safetensors"), whole_weights(expected))


def test_the_blocks_are_divided_and_the_rest_is_not(fit_of: Callable[..., Fit]) -> None:
    def work(processes: Processes) -> None:
        fit = fit_of("run", method=Full(), observer=Curve(), processes=processes, parallel="fsdp")
        alone = fit_of("alone", method=Full(), observer=Curve())
        for name, parameter in fit.parameters.items():
            held = parameter.to_local().numel() if ".layers." in name else parameter.numel()  # type: ignore[operator]
            share = held / alone.parameters[name].numel()
            assert share == (0.5 if ".layers." in name else 1.0), name
        fit.run()
        for name, state in fit.optimiser.state().items():
            if ".layers." in name and state.ndim:
                assert state.to_local().numel() * 2 == state.numel(), name  # type: ignore[operator]

    together(work, settings=TrainSettings(parallel="fsdp"))


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_a_loss_that_is_not_finite_is_everyones(fit_of: Callable[..., Fit], rows: list[list[Sequence]]) -> None:
    def work(processes: Processes) -> None:
        fit = fit_of("run", method=Full(), observer=Curve(), processes=processes, batch_rows=NUM_UNITS)
        with torch.no_grad():
            table = fit.model.causal.get_input_embeddings().weight
            table[int(rows[4][0].tokens_T[0])] = float("inf")
        with pytest.raises(NumericalError, match=r"is not finite at step 1: .*:5"):
            fit.run()

    together(work, settings=TrainSettings())


@pytest.mark.usefixtures("exact")
def test_memory_that_one_process_lacks_is_everyones(fit_of: Callable[..., Fit], tmp_path: Path) -> None:
    settings = {"method": Full(), "batch_rows": NUM_UNITS}
    expected = fit_of("alone", observer=Curve(), **settings)
    expected.run()

    def check(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].numel() > 50:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def work(processes: Processes) -> None:
        curve = Curve()
        fit = fit_of("two", observer=curve, processes=processes, **settings | {"micro_batch_tokens": 80})
        if processes.rank == 1:
            fit.model.causal.base_model.register_forward_pre_hook(check, with_kwargs=True)
        fit.run()
        assert fit.progress.tokens_at_a_time == 40
        assert any("out of memory at step 1" in said for said in curve.said)
        if processes.is_first:
            save_file(whole_weights(fit), tmp_path / "found.safetensors")

    together(work, settings=TrainSettings())
    assert_close(load_file(tmp_path / "found.safetensors"), whole_weights(expected))


def test_an_error_of_the_first_is_told_to_the_others() -> None:
    def fails() -> None:
        raise DataError("a row is wrong", hint="mend it")

    def work(processes: Processes) -> None:
        for do in (processes.first, processes.first_before_others):
            expected: type[Exception] = DataError if processes.is_first else ElsewhereError
            with pytest.raises(expected):
                do(fails)
        assert processes.first(lambda: processes.rank) == 0
        assert processes.first_before_others(lambda: processes.rank) == processes.rank
        assert processes.sums([1.5, processes.rank]) == [3 * 1.5, 3.0]
        assert processes.most([processes.rank, -processes.rank]) == [2, 0]
        assert processes.share(range(7)) == list(range(processes.rank, 7, 3))

    together(work, settings=TrainSettings(), count=3)


def test_what_cannot_be_divided_is_refused(build_model: BuildModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="does not divide an encoder-decoder"):
        Processes(2, 0, 0, divides=True).divide(build_model("t5"))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with (
        pytest.raises(RecipeError, match="muon needs whole matrices"),
        launched(TrainSettings(parallel="fsdp", optimiser="muon")),
    ):
        pass


# ------------------------------------------------------------------------------------------------- from the command line


RECIPE = """
name: several
base: starter
data: {{train: rows.jsonl, validation: 0.2}}
method: {{kind: lora, rank: 4}}
train: {{epochs: 50, max_steps: {steps}, batch_rows: 8, checkpoint_every: 1, micro_batch_tokens: 128, parallel: {parallel}}}
"""


@pytest.fixture
def project(tmp_path: Path) -> Callable[..., Path]:
    lines = [f'{{"prompt": "What is {n} and {n}?", "completion": "It is {2 * n}."}}' for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), "utf-8")

    def write(*, parallel: str, steps: int) -> Path:
        (tmp_path / "recipe.yaml").write_text(RECIPE.format(parallel=parallel, steps=steps), "utf-8")
        return tmp_path / "recipe.yaml"

    return write


def torchrun(recipe: Path, *arguments: str) -> "subprocess.Popen[str]":
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", f"--master-port={_free_port()}"]
    line += ["-m", "tunesmith", "train", recipe.name, "--workspace", "several", "--json", *arguments]
    return subprocess.Popen(line, cwd=recipe.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_torchrun_stopped_and_gone_on_alone(project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM to torchrun saves; one process goes on and ends where an undisturbed run ends."""
    path = project(parallel="fsdp", steps=12)
    monkeypatch.chdir(path.parent)
    process = torchrun(path)
    deadline = time.monotonic() + 120
    while not list(path.parent.glob("several/runs/*/checkpoints/step-*2")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert out == ""
    assert err.count("everything up to there is saved") >= 1, err
    (folder,) = path.parent.glob("several/runs/*")
    resumed = api.tune(path, workspace=Workspace(path.parent / "several"), resume=True)
    assert resumed.path == folder
    alone = api.tune(path, workspace=Workspace(path.parent / "alone"))
    assert resumed.summary["steps"] == alone.summary["steps"] == 12
    assert resumed.summary["rows"] == alone.summary["rows"]
    assert resumed.summary["validation_loss"] == pytest.approx(alone.summary["validation_loss"], rel=1e-4)
    found, expected = (load_file(run.path / "model" / "adapter_model.safetensors") for run in (resumed, alone))
    for name, tensor in expected.items():
        assert float((found[name] - tensor).norm()) <= 1e-3 * float(tensor.norm()) + 1e-6, name
