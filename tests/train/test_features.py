"""What frozen blocks gave is read back: the same losses and weights, fewer computed blocks, and resumed to the bit."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tunesmith import storage
from tunesmith.data.pack import Forest, build_pack
from tunesmith.data.tokens import TokenStore
from tunesmith.data.types import Sequence
from tunesmith.errors import Interrupted
from tunesmith.methods.base import Method, trainable
from tunesmith.methods.full import Full
from tunesmith.methods.layers import Layers
from tunesmith.methods.lora import Lora
from tunesmith.models.blocks import block_output, hidden_below, hidden_from, num_frozen_blocks
from tunesmith.models.load import Model
from tunesmith.objectives.instruction import Instruction
from tunesmith.storage import make_room
from tunesmith.train import features
from tunesmith.train.loop import Fit
from tunesmith.train.settings import TrainSettings

BuildModel = Callable[..., Model]
NUM_ROWS = 12
KINDS = ["llama", "gpt2", "gemma2", "gemma3_text", "phi3", "gpt_neox", "qwen3_moe", "smollm3"]


@pytest.fixture(scope="module")
def rows() -> list[Sequence]:
    """Rows of which half begin alike."""
    random = np.random.default_rng(0)
    root = random.integers(6, 264, 30)
    found = []
    for number in range(NUM_ROWS):
        own = random.integers(6, 264, int(random.integers(5, 25)))
        tokens_T = np.concatenate([root, own] if number % 2 else [own]).astype(np.int32)
        weight_T = np.where(np.arange(len(tokens_T)) < len(tokens_T) - 4, 0, 1).astype(np.float32)
        found.append(Sequence(tokens_T, weight_T, number))
    return found


@pytest.fixture
def fit_in(
    build_model: BuildModel, rows: list[Sequence], token_store: Callable[..., TokenStore], tmp_path: Path, heard: Any
) -> Callable[..., Fit]:
    def make(name: str, *, architecture: str = "llama", method: Method | None = None, **settings: Any) -> Fit:
        model = build_model(architecture, dtype=torch.float32)
        method = Layers(last=1) if method is None else method
        method.apply(model, seed=0)
        settings = {
            "epochs": 3,
            "batch_rows": 4,
            "learning_rate": 0.01,
            "validate_every": 3,
            "checkpoint_every": 2,
        } | settings
        stores = tmp_path / "stores"
        if not stores.exists():
            token_store([[r] for r in rows], folder=stores / "train")
            token_store([[r] for r in rows[:5]], folder=stores / "validation")
        return Fit(
            model,
            method=method,
            objective=Instruction(),
            train=TokenStore(stores / "train"),
            validation=TokenStore(stores / "validation"),
            settings=TrainSettings.model_validate(settings),
            folder=tmp_path / name,
            observer=heard,
            cache=tmp_path / "cache",
        )

    return make


def weights(fit: Fit) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainable(fit.model).values()])


def same_but_for_rounding(found: Fit, expected: Fit) -> bool:
    """AdamW blows rounding up where a gradient is all but zero (the bias of keys), so a few may differ."""
    close = torch.isclose(weights(found), weights(expected), rtol=0, atol=2e-4)
    return float(close.float().mean()) > 0.99


def count_blocks(fit: Fit) -> list[int]:
    """How often the lowest block really ran: its first parameter's product is called only then."""
    calls: list[int] = []
    block: Any = fit.model.layers[0]
    norm = next(m for m in block.modules() if not list(m.children()) and "norm" in type(m).__name__.lower())
    norm.register_forward_hook(lambda *given: calls.append(1))
    return calls


@pytest.mark.parametrize("architecture", KINDS)
def test_the_run_is_the_same_and_the_frozen_blocks_ran_once_for_each_row(
    fit_in: Callable[..., Fit], architecture: str, heard: Any
) -> None:
    plain = fit_in("plain", architecture=architecture, reuse_frozen="off")
    assert plain.features is None
    plain.run()
    expected = [step["loss"] for step in heard.steps]
    validated = [line["validation_loss"] for line in heard.validations]
    kept = fit_in("kept", architecture=architecture)
    calls = count_blocks(kept)
    assert kept.features is not None
    kept.run()
    assert [step["loss"] for step in heard.steps[len(expected) :]] == pytest.approx(expected, rel=1e-5)
    assert [line["validation_loss"] for line in heard.validations[len(validated) :]] == pytest.approx(
        validated, rel=1e-5
    )
    assert same_but_for_rounding(kept, plain)
    assert len(calls) == 1 + 1  # a pack of all rows, and one of the validation rows
    again = fit_in("again", architecture=architecture)
    calls = count_blocks(again)
    again.run()
    assert not calls
    assert torch.equal(weights(again), weights(kept))


def test_bf16_is_kept_as_it_is(fit_in: Callable[..., Fit], heard: Any, tmp_path: Path) -> None:
    from tunesmith.methods.base import set_trainable_dtype

    losses = []
    for name, reuse in (("plain", "off"), ("kept", "auto")):
        heard.steps.clear()
        method = Layers(last=1)
        fit = fit_in(name, method=method, precision="bf16", reuse_frozen=reuse)
        set_trainable_dtype(fit.model, frozen=torch.bfloat16)
        fit = Fit(
            fit.model, method=method, objective=Instruction(), train=fit.train, validation=None,
            settings=fit.settings, folder=fit.folder.parent / "again", observer=heard, cache=tmp_path / "cache",
        )  # fmt: skip
        if fit.features is not None:
            assert fit.features.output.dtype == torch.bfloat16
            assert fit.features.num_bytes == fit.features._shape[0] * 32 * 2
        fit.run()
        losses.append([step["loss"] for step in heard.steps])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


@pytest.mark.parametrize(("stop_after", "lost"), [(2, False), (7, False), (7, True)])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(
    fit_in: Callable[..., Fit], stop_after: int, lost: bool
) -> None:
    whole = fit_in("whole")
    whole.run()

    class Killed(Exception):
        pass

    cut = fit_in("cut")
    told = cut.observer.step

    def step(record: dict[str, Any]) -> None:
        told(record)
        if record["step"] == stop_after:
            raise Killed

    cut.observer.step = step  # type: ignore[method-assign]
    with pytest.raises(Killed):
        cut.run()
    cut.observer.step = told  # type: ignore[method-assign]
    assert cut.features is not None
    if lost:
        cut.features.remove()
    again = fit_in("cut")
    assert again.resume() == (stop_after > 2)
    again.run()
    assert torch.equal(weights(again), weights(whole))
    assert again.progress.validation_loss == whole.progress.validation_loss


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_signal_while_they_are_computed_keeps_what_was_done(
    fit_in: Callable[..., Fit], monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    monkeypatch.setattr(features, "UNITS_AT_A_TIME", 4)
    whole = fit_in("whole")
    whole.run()
    assert whole.features is not None
    whole.features.remove()
    cut = fit_in("cut")
    asked: list[int] = []

    def signalled() -> bool:
        asked.append(1)
        if len(asked) > after:
            cut.signal_number = 2
        return cut.signal_number is not None

    monkeypatch.setattr(cut, "_signalled", signalled)
    with pytest.raises(Interrupted):
        cut.run()
    again = fit_in("cut")
    calls = count_blocks(again)
    again.resume()
    again.run()
    assert len(calls) == 3 - after  # packs of four rows each; those of the validation rows are there
    assert torch.equal(weights(again), weights(whole))


def test_a_file_of_another_size_is_computed_anew(fit_in: Callable[..., Fit]) -> None:
    whole = fit_in("whole")
    whole.run()
    assert whole.features is not None
    os.truncate(whole.features.folder / "hidden.bin", 100)
    again = fit_in("again")
    again.run()
    assert torch.equal(weights(again), weights(whole))


def test_what_was_used_longest_ago_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "hidden.bin").write_bytes(bytes(100))
        os.utime(tmp_path / str(number), (number, number))
    os.utime(tmp_path / "0", (9, 9))
    assert not make_room(tmp_path, num_bytes=451, max_bytes=450)
    assert len(list(tmp_path.iterdir())) == 4
    assert make_room(tmp_path, num_bytes=150, max_bytes=450)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "2", "3"]
    usage = shutil.disk_usage("/")._replace(free=100)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage)
    assert make_room(tmp_path, num_bytes=150, max_bytes=10_000, max_share_of_free=0.5)  # 350 in all
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "3"]


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (Layers(last=1), 2),
        (Layers(last=2), 1),
        (Layers(blocks=(0, 2)), 0),
        (Lora(rank=2, targets=("layers.2.mlp.down_proj",)), 2),
        (Lora(rank=2), 0),
        (Full(), 0),
    ],
    ids=repr,
)
def test_blocks_below_everything_that_moves_are_frozen(build_model: BuildModel, method: Method, count: int) -> None:
    model = build_model("llama", num_hidden_layers=3, dtype=torch.float32)
    method.apply(model, seed=0)
    assert num_frozen_blocks(model, moving=set(trainable(model).values())) == count


@pytest.mark.parametrize("architecture", KINDS)
def test_beginning_in_the_middle_gives_the_same(
    build_model: BuildModel, rows: list[Sequence], architecture: str
) -> None:
    model = build_model(architecture)
    output = block_output(model)
    pack = build_pack(rows)
    with torch.no_grad():
        attention = model.attention(pack)
        whole = model.hidden(attention)
        for count in range(1, len(model.layers)):
            given_TD = hidden_below(model, attention, num_blocks=count)
            found = hidden_from(model, attention, num_blocks=count, given_TD=given_TD, output=output)
            assert torch.equal(found, whole)
        assert torch.equal(model.hidden(attention), whole)  # nothing of it stays


def test_a_place_is_a_beginning(rows: list[Sequence]) -> None:
    forest = Forest(rows, min_shared=1)
    beginnings: dict[tuple[int, ...], int] = {}
    for index, row in enumerate(rows):
        places = forest.places(index).tolist()
        assert len(places) == len(row.tokens_T)
        for length, place in enumerate(places, start=1):
            assert beginnings.setdefault(tuple(row.tokens_T[:length].tolist()), place) == place
    assert sorted(beginnings.values()) == list(range(forest.num_tokens))


def test_no_room_on_the_disk_is_said_and_the_run_goes_on(
    fit_in: Callable[..., Fit], heard: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=10_000)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage)
    fit = fit_in("small")
    assert fit.features is None
    assert any("is not kept" in message for message in heard.messages)
    fit.run()
    monkeypatch.undo()
    monkeypatch.setattr(features, "MAX_TOKENS", 100)
    assert fit_in("long").features is None
    assert "more than 100 tokens" in heard.messages[-1]
    monkeypatch.undo()

    def full(*given: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(features.os, "posix_fallocate", full)
    fit = fit_in("full")
    assert fit.features is None
    assert not list((fit.folder.parent).rglob("hidden.bin"))


def test_one_epoch_keeps_nothing(fit_in: Callable[..., Fit]) -> None:
    fit = fit_in("once", epochs=1, validate_every=None)
    assert fit.features is None
