"""Trajectories: however rows are batched, and whatever stops a run on its way, it arrives at the same weights."""

import errno
import math
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tunesmith.data.pack import Pack, build_pack
from tunesmith.data.tokens import TokenStore
from tunesmith.data.types import Sequence
from tunesmith.errors import Interrupted, NumericalError, OutOfMemoryError, StorageError
from tunesmith.methods import Method
from tunesmith.methods.base import set_trainable_dtype, trainable
from tunesmith.methods.full import Full
from tunesmith.methods.lora import Lora
from tunesmith.models.load import Model
from tunesmith.objectives.instruction import Instruction
from tunesmith.train import checkpoint
from tunesmith.train.loop import Fit, epoch_order
from tunesmith.train.memory import is_out_of_memory
from tunesmith.train.passes import evaluate_loss, forward
from tunesmith.train.settings import TrainSettings

BuildModel = Callable[..., Model]
NUM_UNITS = 10


@pytest.fixture(scope="module")
def units(sequence: Callable[..., Sequence]) -> list[list[Sequence]]:
    """Rows that share a beginning in parts; two of them are two sequences each."""
    random = np.random.default_rng(17)
    shared = random.integers(6, 262, 20).tolist()
    made = []
    for number in range(NUM_UNITS):
        tokens = (shared if number % 2 else []) + random.integers(6, 262, 3 + number).tolist()
        unit = [sequence(tokens, first_trained=len(tokens) // 2, weight=1.0 + number % 3)]
        if number in (3, 4):
            unit.append(sequence(tokens[:-2] + random.integers(6, 262, 4).tolist(), first_trained=2))
        made.append(unit)
    return made


@pytest.fixture
def stores(
    units: list[list[Sequence]], token_store: Callable[..., TokenStore], tmp_path: Path
) -> tuple[TokenStore, TokenStore]:
    """Training rows and validation rows."""
    return token_store(units, folder=tmp_path / "train"), token_store(units[:4], folder=tmp_path / "validation")


MakeFit = Callable[..., Fit]


@pytest.fixture
def make_fit(build_model: BuildModel, stores: tuple[TokenStore, TokenStore], tmp_path: Path, heard: Any) -> MakeFit:
    """`make_fit(folder name, method=..., dtype=..., validation=bool, **settings)`: a run of a fresh model."""

    def make(
        name: str = "run",
        *,
        method: Method | None = None,
        dtype: torch.dtype = torch.float32,
        validation: bool = False,
        observer: Any = None,
        train: TokenStore | None = None,
        model: Model | None = None,
        **settings: Any,
    ) -> Fit:
        method = method or Lora(rank=4)
        settings = {"epochs": 2, "batch_rows": 4, "micro_batch_tokens": 30, "learning_rate": 0.01} | settings
        made = build_model("llama", dtype=dtype) if model is None else model
        method.apply(made, seed=3)
        if settings.get("precision") == "bf16":
            set_trainable_dtype(made, frozen=torch.bfloat16)
        for parameter in trainable(made).values():
            parameter.data = parameter.data.to(dtype)
        return Fit(
            made,
            method=method,
            objective=Instruction(),
            train=stores[0] if train is None else train,
            validation=stores[1] if validation else None,
            settings=TrainSettings(**settings),
            folder=tmp_path / name,
            observer=heard if observer is None else observer,
        )

    return make


def weights(fit: Fit) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in fit.parameters.items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def where_it_stands(fit: Fit) -> dict[str, Any]:
    """All of the progress but the clock."""
    return {k: v for k, v in asdict(fit.progress).items() if k != "seconds"}


class Hook:
    """An observer that does something after a step."""

    def __init__(self, action: Callable[[int], None], heard: Any):
        self.action, self.heard = action, heard
        self.start, self.validation, self.message = heard.start, heard.validation, heard.message

    def step(self, record: dict[str, Any]) -> None:
        self.heard.step(record)
        self.action(record["step"])


# However rows are batched


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("method", [Full(), Lora(rank=4)], ids=["full", "lora"])
def test_one_micro_batch_of_eight_equals_eight_of_one(make_fit: MakeFit, method: Method, heard: Any) -> None:
    trajectories, ends = [], []
    for number, tokens in enumerate((1, 60, 100_000)):
        heard.steps.clear()
        fit = make_fit(
            f"run {number}", method=method, dtype=torch.float64, batch_rows=8, micro_batch_tokens=tokens, epochs=4
        )
        fit.run()
        trajectories.append([(r["loss"], r["grad_norm"]) for r in heard.steps])
        ends.append(torch.cat([w.flatten() for w in weights(fit).values()]))
    assert len(trajectories[0]) == 8
    for trajectory, end in zip(trajectories[1:], ends[1:], strict=True):
        np.testing.assert_allclose(trajectory, trajectories[0], rtol=1e-9)
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-9)


def test_sharing_saves_computation_and_is_counted(make_fit: MakeFit, units: list[list[Sequence]]) -> None:
    apart, together = (
        make_fit("apart", micro_batch_tokens=1, epochs=1),
        make_fit("together", micro_batch_tokens=10_000, epochs=1, batch_rows=10),
    )
    for fit in (apart, together):
        fit.run()
    tokens = sum(len(s.tokens_T) for unit in units for s in unit)
    assert apart.progress.tokens == together.progress.tokens == apart.progress.computed_tokens == tokens
    assert together.progress.computed_tokens < 0.8 * tokens
    assert apart.progress.target_tokens == sum(s.num_targets for unit in units for s in unit)


def test_each_row_is_trained_once_an_epoch_in_an_order_of_its_own(make_fit: MakeFit) -> None:
    seen: list[list[int]] = []
    fit = make_fit(epochs=3)
    original = fit._packs

    def packs(units: list[int]) -> list[Pack]:
        seen.append(units)
        return original(units)

    fit._packs = packs  # type: ignore[method-assign]
    fit.run()
    assert [len(s) for s in seen] == [4, 4, 2] * 3
    epochs = [[unit for step in seen[i : i + 3] for unit in step] for i in (0, 3, 6)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(NUM_UNITS))] * 3
    assert epochs == [epoch_order(NUM_UNITS, seed=0, epoch=e).tolist() for e in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != epoch_order(NUM_UNITS, seed=1, epoch=0).tolist()
    assert fit.progress.rows == 3 * NUM_UNITS


def test_what_is_reported_after_a_step(make_fit: MakeFit, heard: Any) -> None:
    fit = make_fit(validation=True, validate_every=2)
    result = fit.run()
    assert heard.starts == [(6, 0)]
    assert [r["step"] for r in heard.steps] == [1, 2, 3, 4, 5, 6]
    for record in heard.steps:
        assert {"step", "time", "loss", "learning_rate", "tokens", "tokens_per_second", "grad_norm"} <= record.keys()
        assert all(math.isfinite(v) for v in record.values())
    assert [r["step"] for r in heard.validations] == [2, 4, 6]
    assert result.stopped == "finished"
    assert result.num_trainable == sum(w.numel() for w in weights(fit).values())
    assert result.progress.train_loss == heard.steps[-1]["loss"]
    assert heard.steps[-1]["tokens"] == result.progress.tokens


def test_the_loss_reported_is_the_loss_before_the_update(make_fit: MakeFit, heard: Any, stores: Any) -> None:
    fit = make_fit(batch_rows=NUM_UNITS, epochs=1)
    before = evaluate_loss(fit.model, stores[0], objective=Instruction(), settings=fit.settings)
    fit.run()
    assert before is not None
    assert heard.steps[0]["loss"] == pytest.approx(before.mean("loss"), rel=1e-5)


def test_the_gradient_is_clipped_to_its_norm(make_fit: MakeFit, heard: Any) -> None:
    for clip in (None, 1e-3):
        fit = make_fit(f"clip {clip}", method=Full(), max_steps=1, clip=clip)
        applied: list[float] = []
        step = fit.optimiser.step

        def record(*, learning_rate: float, fit: Fit = fit, step: Any = step, applied: list[float] = applied) -> None:
            applied.append(float(torch.cat([p.grad.flatten() for p in fit.parameters.values()]).norm()))  # type: ignore[union-attr]
            step(learning_rate=learning_rate)

        fit.optimiser.step = record  # type: ignore[method-assign]
        fit.run()
        norm = heard.steps[-1]["grad_norm"]
        assert norm > 1
        assert applied == [pytest.approx(norm if clip is None else clip, rel=1e-4)]


# Resuming

KINDS: dict[str, tuple[Method, dict[str, Any]]] = {
    "lora": (Lora(rank=4), {}),
    "lora with dropout": (Lora(rank=4, dropout=0.3), {}),
    "lora, muon": (Lora(rank=4, dropout=0.3), {"optimiser": "muon"}),
    "lora, bf16": (Lora(rank=4, dropout=0.3), {"precision": "bf16"}),
    "full": (Full(), {}),
    "full, muon": (Full(), {"optimiser": "muon"}),
}
STEPS = 6  # two epochs of 4 + 4 + 2 rows


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_at_any_step_is_the_same_run_to_the_bit(make_fit: MakeFit, heard: Any, kind: str) -> None:
    method, settings = KINDS[kind]
    settings = {"checkpoint_every": 1, "validate_every": 2} | settings
    whole = make_fit("whole", method=method, validation=True, **settings)
    losses: list[float] = []
    heard.steps.clear()
    whole.run()
    losses = [r["loss"] for r in heard.steps]
    assert len(losses) == STEPS
    for stop in range(STEPS):
        heard.steps.clear()
        fit = make_fit(f"stopped {stop}", method=method, validation=True, **settings)

        def ask(step: int, fit: Fit = fit, stop: int = stop) -> None:
            fit.signal_number = 15 if step == stop else None

        fit.observer = Hook(ask, heard)
        if stop == 0:
            fit.signal_number = 15
        with pytest.raises(Interrupted, match=f"after step {stop} of {STEPS}") as error:
            fit.run()
        assert error.value.signal_number == 15
        again = make_fit(f"stopped {stop}", method=method, validation=True, **settings)
        assert again.resume()
        assert again.progress.step == stop
        again.run()
        assert same_bits(weights(again), weights(whole))
        assert [r["loss"] for r in heard.steps] == losses
        assert where_it_stands(again) == where_it_stands(whole)
        again.restore_best()
        best = make_fit("whole", method=method, validation=True, **settings)
        best.restore_best()
        assert same_bits(weights(again), weights(best))


class PowerCut(BaseException):
    """Nothing runs after this, not even cleaning up."""


@pytest.fixture
def cut_power(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[int]]:
    """`cut_power(n)`: the n-th half of a rename of a file or folder never happens; even n: before it, odd n: after it.

    Returns the count of halves so far; `cut_power(None)` only counts. What would tidy up afterwards is dead as well.
    """
    state: dict[str, Any] = {"at": None, "count": [0], "dead": False}
    originals: dict[str, Callable[..., None]] = {"replace": os.replace, "unlink": os.unlink, "rmtree": shutil.rmtree}

    def half() -> None:
        if state["dead"] or state["count"][0] == state["at"]:
            state["dead"] = True
            raise PowerCut
        state["count"][0] += 1

    def replace(*arguments: Any, **keywords: Any) -> None:
        half()
        originals["replace"](*arguments, **keywords)
        half()

    def tidy(name: str) -> Callable[..., None]:
        def act(*arguments: Any, **keywords: Any) -> None:
            if state["dead"]:
                raise PowerCut
            originals[name](*arguments, **keywords)

        return act

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "unlink", tidy("unlink"))
    monkeypatch.setattr(shutil, "rmtree", tidy("rmtree"))

    def arm(at: int | None) -> list[int]:
        state.update(at=at, count=[0], dead=False)
        return state["count"]

    return arm


def test_a_power_cut_at_any_rename_loses_nothing(
    make_fit: MakeFit, cut_power: Callable[[int | None], list[int]]
) -> None:
    settings = {"validation": True, "checkpoint_every": 1, "validate_every": 1, "epochs": 1, "learning_rate": 0.003}
    counted = cut_power(None)
    whole = make_fit("whole", **settings)
    whole.run()
    halves = counted[0]
    assert halves >= 2 * (3 + 1 + 2)  # three step checkpoints, and a best one that is replaced
    end = weights(whole)
    whole.restore_best()
    best = weights(whole)
    for at in range(halves):
        cut_power(at)
        with pytest.raises(PowerCut):
            make_fit(f"cut {at}", **settings).run()
        cut_power(None)
        again = make_fit(f"cut {at}", **settings)
        again.resume()
        again.run()
        assert same_bits(weights(again), end)
        assert where_it_stands(again) == where_it_stands(whole)
        again.restore_best()
        assert same_bits(weights(again), best)


def damage(folder: Path, kind: str) -> None:
    tensors, state = folder / checkpoint.TENSORS, folder / checkpoint.STATE
    if kind == "cut off":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    elif kind == "one bit":
        content = bytearray(tensors.read_bytes())
        content[-3] ^= 1
        tensors.write_bytes(content)
    elif kind == "no tensors":
        tensors.unlink()
    elif kind == "no state":
        state.unlink()
    elif kind == "half a state":
        state.write_text(state.read_text("utf-8")[:40], "utf-8")
    elif kind == "empty state":
        state.write_text("{}", "utf-8")
    elif kind == "another number":
        before = state.read_text("utf-8")
        state.write_text(re.sub(r'"cursor": \d+', '"cursor": 1', before), "utf-8")
        assert state.read_text("utf-8") != before


DAMAGES = ["cut off", "one bit", "no tensors", "no state", "half a state", "empty state", "another number"]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_written_anew(make_fit: MakeFit, heard: Any, kind: str) -> None:
    whole = make_fit("whole", checkpoint_every=2)
    whole.run()
    fit = make_fit("damaged", checkpoint_every=2)

    def stop(step: int) -> None:
        fit.signal_number = 2 if step == 4 else None

    fit.observer = Hook(stop, heard)
    with pytest.raises(Interrupted):
        fit.run()
    found = checkpoint.steps(fit.folder)
    assert [p.name for p in found] == ["step-00000004", "step-00000002"]
    damage(found[0], kind)
    again = make_fit("damaged", checkpoint_every=2)
    assert again.resume()
    assert again.progress.step == 2
    assert len(heard.messages) == 1
    assert "step-00000004" in heard.messages[0]
    again.run()
    assert same_bits(weights(again), weights(whole))
    for path in checkpoint.steps(again.folder):
        checkpoint.verify(path)


def test_stopped_again_at_a_damaged_checkpoint_what_is_saved_is_good(make_fit: MakeFit, heard: Any) -> None:
    """The message says that everything is saved: so it must be, though a damaged one stands in its place."""
    for _ in range(2):
        fit = make_fit("damaged", checkpoint_every=2)
        fit.resume()

        def stop(step: int, fit: Fit = fit) -> None:
            fit.signal_number = 2 if step == 4 else None

        fit.observer = Hook(stop, heard)
        with pytest.raises(Interrupted, match="after step 4"):
            fit.run()
        newest = checkpoint.steps(fit.folder)[0]
        checkpoint.verify(newest)
        damage(newest, "cut off")


def test_without_a_good_checkpoint_there_is_nothing_to_resume(make_fit: MakeFit, heard: Any) -> None:
    assert not make_fit("nothing").resume()
    fit = make_fit("bad", max_steps=1)
    fit.run()
    damage(checkpoint.steps(fit.folder)[0], "cut off")
    assert not make_fit("bad").resume()
    assert len(heard.messages) == 1


def test_the_two_newest_checkpoints_are_kept(make_fit: MakeFit) -> None:
    fit = make_fit(checkpoint_every=1)
    fit.run()
    assert sorted(p.name for p in fit.folder.iterdir()) == ["step-00000005", "step-00000006"]


# A full disk


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """`full_disk(n)`: no file can grow beyond n bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [0, 200, 4096])
def test_a_full_disk_leaves_the_checkpoint_before(
    make_fit: MakeFit, heard: Any, full_disk: Callable[[int], None], limit: int
) -> None:
    whole = make_fit("whole", checkpoint_every=2)
    whole.run()
    fit = make_fit("full", checkpoint_every=2)
    fit.observer = Hook(lambda step: full_disk(limit) if step == 4 else None, heard)
    with pytest.raises(StorageError) as error:
        fit.run()
    full_disk(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert error.value.hint
    assert [p.name for p in fit.folder.iterdir()] == ["step-00000002"]
    again = make_fit("full", checkpoint_every=2)
    assert again.resume()
    assert again.progress.step == 2
    again.run()
    assert same_bits(weights(again), weights(whole))


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_an_error_of_the_system_while_saving_is_a_storage_error(
    make_fit: MakeFit, heard: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fit = make_fit("full", checkpoint_every=2)

    def fail(*arguments: Any, **keywords: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        fit.observer = Hook(lambda step: patch.setattr(os, name, fail) if step == 4 else None, heard)
        with pytest.raises(StorageError, match="No space left") as error:
            fit.run()
    assert "free some space" in error.value.hint
    assert [p.name for p in fit.folder.iterdir()] == ["step-00000002"]
    checkpoint.verify(fit.folder / "step-00000002")


# Numbers that are not finite


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("method", [Full(), Lora(rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("micro_batch_tokens", [1, 10_000])
def test_a_row_whose_loss_is_not_finite_is_named(
    build_model: BuildModel,
    make_fit: MakeFit,
    units: list[list[Sequence]],
    method: Method,
    value: float,
    micro_batch_tokens: int,
) -> None:
    model = build_model("llama", dtype=torch.float32)
    guilty = 6
    elsewhere = {int(t) for i, unit in enumerate(units) if i != guilty for s in unit for t in s.tokens_T}
    token = next(int(t) for t in units[guilty][0].tokens_T[:-1] if int(t) not in elsewhere)
    with torch.no_grad():
        model.causal.get_input_embeddings().weight[token, 0] = value
    fit = make_fit(method=method, model=model, batch_rows=NUM_UNITS, micro_batch_tokens=micro_batch_tokens)
    before = weights(fit)
    with pytest.raises(NumericalError, match=rf"at step 1: toy\.jsonl:{guilty + 1}$") as error:
        fit.run()
    assert error.value.hint
    after = weights(fit)
    assert all(torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before)
    assert not fit.folder.exists()


# Validation


def test_validation_is_the_mean_over_all_targets_with_dropout_off(make_fit: MakeFit, stores: Any, units: Any) -> None:
    fit = make_fit(method=Lora(rank=4, dropout=0.5))
    with torch.no_grad():
        for parameter in fit.parameters.values():
            parameter += 0.1
        fit.model.causal.eval()
        losses = [forward(fit.model, build_pack([s]), objective=Instruction()) for unit in units[:4] for s in unit]
        expected = sum(float(x.sum) for x in losses) / sum(x.count for x in losses)
    fit.model.causal.train()
    for tokens in (1, 10_000):
        settings = TrainSettings(micro_batch_tokens=tokens)
        totals = evaluate_loss(fit.model, stores[1], objective=Instruction(), settings=settings)
        assert totals is not None
        assert totals.mean("loss") == pytest.approx(expected, rel=1e-5)
    assert fit.model.causal.training
    assert (
        evaluate_loss(fit.model, stores[1], objective=Instruction(), settings=settings, interrupted=lambda: True)
        is None
    )


def test_early_stopping_ends_the_run_and_goes_back_to_the_best(make_fit: MakeFit, heard: Any, stores: Any) -> None:
    settings = {
        "validation": True,
        "validate_every": 1,
        "patience": 2,
        "epochs": 20,
        "schedule": "constant",
        "learning_rate": 0.2,
    }
    fit = make_fit("early", method=Full(), checkpoint_every=100, **settings)
    result = fit.run()
    losses = [r["validation_loss"] for r in heard.validations]
    best = int(np.argmin(losses)) + 1
    assert result.stopped == "early"
    assert result.progress.step == best + 2 < fit.num_steps
    assert (result.progress.best_step, result.progress.best_loss) == (best, min(losses))
    assert any("stopped early" in m for m in heard.messages)
    end = weights(fit)

    again = make_fit("early", method=Full(), checkpoint_every=100, **settings)
    assert again.resume()
    assert again.run().stopped == "early"  # it does not train on from where it had stopped
    assert same_bits(weights(again), end)

    fit.restore_best()
    totals = evaluate_loss(fit.model, stores[1], objective=Instruction(), settings=fit.settings)
    assert totals is not None
    assert totals.mean("loss") == min(losses)


def test_interrupted_while_validating_the_validation_is_made_up_for(make_fit: MakeFit, heard: Any) -> None:
    settings = {"validation": True, "validate_every": 2, "checkpoint_every": 1}
    whole = make_fit("whole", **settings)
    whole.run()
    expected = list(heard.validations)
    heard.validations.clear()
    fit = make_fit("stopped", **settings)

    def stop(step: int) -> None:
        fit.signal_number = 2 if step == 4 else None  # the validation of step 4 comes next

    fit.observer = Hook(stop, heard)
    with pytest.raises(Interrupted):
        fit.run()
    assert [r["step"] for r in heard.validations] == [2]
    again = make_fit("stopped", **settings)
    assert again.resume()
    again.run()
    assert heard.validations == expected
    assert where_it_stands(again) == where_it_stands(whole)


def test_learning_by_heart_is_said_so(
    make_fit: MakeFit, heard: Any, token_store: Any, tmp_path: Path, units: Any
) -> None:
    fit = make_fit(
        method=Full(),
        validation=True,
        validate_every=1,
        epochs=15,
        batch_rows=NUM_UNITS,
        learning_rate=0.05,
        train=token_store(units[5:], folder=tmp_path / "other"),
    )
    fit.run()
    assert sum("by heart" in m for m in heard.messages) >= 1


def test_without_validation_there_is_no_best_to_go_back_to(make_fit: MakeFit) -> None:
    fit = make_fit()
    fit.run()
    end = weights(fit)
    fit.restore_best()
    assert same_bits(weights(fit), end)
    assert fit.progress.best_step is None


# When memory does not hold it


def holds(fit: Fit, *, most_tokens: int) -> None:
    """From here on the model fails as on a full device where more tokens come at a time."""

    def check(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].numel() > most_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")

    fit.model.causal.base_model.register_forward_pre_hook(check, with_kwargs=True)


@pytest.mark.usefixtures("exact")
def test_out_of_memory_halves_what_goes_through_and_does_the_step_again(make_fit: MakeFit, heard: Any) -> None:
    settings = {"method": Full(), "dtype": torch.float64, "micro_batch_tokens": 200, "epochs": 3}
    whole = make_fit("whole", **settings)
    whole.run()
    losses = [record["loss"] for record in heard.steps]
    heard.steps.clear()
    short = make_fit("short", **settings)
    holds(short, most_tokens=60)
    short.run()
    assert short.progress.tokens_at_a_time == 50
    said = [message.partition(": ")[2] for message in heard.messages if message.startswith("out of memory at step")]
    then = "the step is done again with the same rows, so the loss stays the same"
    assert said == [
        f"{now} tokens at a time from here on, and not {before}; {then}" for before, now in ((200, 100), (100, 50))
    ]
    assert [record["loss"] for record in heard.steps] == pytest.approx(losses, rel=1e-10)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(short)[name], tensor, rtol=1e-8, atol=1e-10)
    assert (short.progress.tokens, short.progress.rows) == (whole.progress.tokens, whole.progress.rows)


def test_a_resumed_run_remembers_what_memory_held(make_fit: MakeFit, heard: Any) -> None:
    settings: dict[str, Any] = {"micro_batch_tokens": 200, "epochs": 3}
    whole = make_fit("whole", **settings)
    holds(whole, most_tokens=60)
    whole.run()

    def stop(step: int) -> None:
        if step == 4:
            stopped.signal_number = 15

    stopped = make_fit("run", observer=Hook(stop, heard), **settings)
    holds(stopped, most_tokens=60)
    with pytest.raises(Interrupted):
        stopped.run()
    again = make_fit("run", **settings)  # on a larger machine, which would have had room for more
    again.resume()
    again.run()
    assert again.settings.micro_batch_tokens == 50
    assert same_bits(weights(again), weights(whole))


def test_what_no_halving_helps_is_an_error_and_changes_nothing(make_fit: MakeFit) -> None:
    fit = make_fit()
    before = weights(fit)
    holds(fit, most_tokens=3)
    with pytest.raises(OutOfMemoryError, match="not even one row at a time fits into memory at step") as error:
        fit.run()
    assert "gradient_checkpointing" in error.value.hint
    assert same_bits(weights(fit), before)


def test_an_error_that_is_not_about_memory_stays_what_it_is(make_fit: MakeFit) -> None:
    fit = make_fit()

    def fails(module: Any, args: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    fit.model.causal.base_model.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fit.run()


def test_an_allocation_that_failed_on_a_cpu_is_known() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 52)
    assert is_out_of_memory(error.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
