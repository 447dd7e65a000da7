"""Whole weights combined: a run alone comes back to the bit, and every way is the formula, number by number."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith.errors import ModelError
from tunesmith.methods import Method, combine_weights
from tunesmith.methods.base import load_adapter, trainable
from tunesmith.methods.bitfit import Bitfit
from tunesmith.methods.combine import WAYS, updates_of
from tunesmith.methods.combine_weights import Change, LowRank, OwnWeights, Tensors, transposed_layers
from tunesmith.methods.full import Full
from tunesmith.methods.layers import Layers
from tunesmith.methods.lora import Lora
from tunesmith.models.load import Model

BuildModel = Callable[..., Model]


def saved(build_model: BuildModel, method: Method, *, folder: Path, kind: str = "llama", seed: int = 1) -> Change:
    """The change of a run: its model is tuned, that is stirred, and read back from its folder."""
    model = build_model(kind, dtype=torch.float32)
    method.apply(model, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    folder.mkdir()
    method.save(model, folder=folder)
    if isinstance(method, Lora):
        updates = updates_of(load_adapter(folder), method=method, run=folder.name)
        return LowRank(updates, transposed_layers(build_model(kind, dtype=torch.float32)))
    return OwnWeights(Tensors(folder), whole=method.saves_model)


def combined(build_model: BuildModel, changes: dict[str, Change], *, folder: Path, kind: str = "llama", **given: Any):
    """The base saved and the change added: the tensors before and after, and what is said of them."""
    folder.mkdir()
    build_model(kind, dtype=torch.float32).save(folder)
    before = {n: t.clone() for n, t in load_file(folder / "model.safetensors").items()}  # the file is mapped
    given = {"how": "linear", "weights": [1.0] * len(changes), "density": 0.5} | given
    moved = combine_weights.combine_weights(folder, changes, **given)
    return before, load_file(folder / "model.safetensors"), moved


METHODS: dict[str, tuple[Method, str]] = {
    "full": (Full(), "llama"),
    "experts": (Full(), "qwen3_moe"),  # a file has them one by one, a model all in one
    "renamed": (Full(), "gpt_neox"),  # its head has another name in a file
    "encoder-decoder": (Full(), "t5"),
    "layers": (Layers(last=1), "llama"),
    "bitfit": (Bitfit(), "gpt2"),
}


@pytest.mark.parametrize("name", METHODS)
def test_one_run_with_weight_one_gives_that_run_to_the_bit(build_model: BuildModel, tmp_path: Path, name: str) -> None:
    method, kind = METHODS[name]
    change = saved(build_model, method, folder=tmp_path / "run", kind=kind)
    before, after, moved = combined(build_model, {"run": change}, folder=tmp_path / "new", kind=kind)
    file = "model.safetensors" if method.saves_model else "adapter_model.safetensors"
    tuned = before | load_file(tmp_path / "run" / file)
    assert set(after) == set(before) == set(tuned)
    assert all(torch.equal(after[tensor], tuned[tensor]) for tensor in after)
    others = {tensor for tensor in after if not torch.equal(after[tensor], before[tensor])}
    assert (moved.tensors, moved.numbers) == (len(others), sum(after[tensor].numel() for tensor in others))
    assert len(others) == len(after) if method.saves_model else 0 < len(others) < len(after)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_lora_run_gives_its_merged_weights(build_model: BuildModel, tmp_path: Path, kind: str) -> None:
    """Also where the base stores its matrices as [I, O]."""
    method = Lora(rank=3, alpha=4.0)
    change = saved(build_model, method, folder=tmp_path / "run", kind=kind)
    before, after, moved = combined(build_model, {"run": change}, folder=tmp_path / "new", kind=kind)
    model = build_model(kind, dtype=torch.float32)
    method.load(model, folder=tmp_path / "run")
    method.merge(model)
    merged = model.causal.state_dict()
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-6)
    assert moved.tensors == len(change.names) == sum(not torch.equal(after[n], before[n]) for n in after)


# --------------------------------------------------------------------------------------------- a naive reference


def naive(deltas: list[np.ndarray], *, how: str, weights: list[float], density: float) -> np.ndarray:
    """The formulas of task arithmetic and TIES on one tensor, number by number."""
    if how == "ties":
        kept = []
        for delta in deltas:
            order = np.argsort(-np.abs(delta).ravel(), kind="stable")[: max(1, round(density * delta.size))]
            mask = np.zeros(delta.size, dtype=bool)
            mask[order] = True
            kept.append(np.where(mask.reshape(delta.shape), delta, 0.0))
        deltas = kept
    return voted(deltas, how=how, weights=weights)


def voted(deltas: list[np.ndarray], *, how: str, weights: list[float]) -> np.ndarray:
    """Changes that were thinned out already, weighted and added, or averaged where they have the sign of their sum."""
    out = np.zeros(deltas[0].size)
    for place, values in enumerate(zip(*(delta.ravel() for delta in deltas), strict=True)):
        votes = [weight * value for weight, value in zip(weights, values, strict=True)]
        if how.endswith("linear"):
            out[place] = sum(votes)
            continue
        agree = [(v, abs(w)) for v, w in zip(votes, weights, strict=True) if np.sign(v) == np.sign(sum(votes)) != 0]
        if agree:
            out[place] = sum(map(abs, weights)) * sum(v for v, _ in agree) / sum(w for _, w in agree)
    return out.reshape(deltas[0].shape)


def mixed(build_model: BuildModel, tmp_path: Path) -> tuple[dict[str, Change], list[dict[str, Tensor]]]:
    """Runs of three methods, and in float64 what each of them changed."""
    methods: dict[str, Method] = {"full": Full(), "layers": Layers(last=1), "lora": Lora(rank=2)}
    base = build_model("llama", dtype=torch.float32).causal.state_dict()
    changes, deltas = {}, []
    for seed, (name, method) in enumerate(methods.items()):
        changes[name] = saved(build_model, method, folder=tmp_path / name, seed=seed)
        if method.kind_name == "lora":
            updates = updates_of(load_adapter(tmp_path / name), method=Lora(rank=2), run=name)
            deltas.append({f"{layer}.weight": u.b_OR.double() @ u.a_RI.double() for layer, u in updates.items()})
        else:
            file = next((tmp_path / name).glob("*.safetensors"))
            deltas.append({n: tensor.double() - base[n].double() for n, tensor in load_file(file).items()})
    return changes, deltas


@pytest.mark.parametrize("how", ["linear", "ties"])
@pytest.mark.parametrize("part", [1 << 20, 50], ids=["whole", "in parts"])
def test_a_mix_of_methods_is_the_formula(
    build_model: BuildModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, part: int
) -> None:
    monkeypatch.setattr(combine_weights, "PART_NUMBERS", part)
    changes, moved = mixed(build_model, tmp_path)
    weights = [0.5, 1.0, -0.25]
    given = {"how": how, "weights": weights, "density": 0.3}
    before, after, _ = combined(build_model, changes, folder=tmp_path / "new", **given)
    for name, base in before.items():
        deltas = [run.get(name, torch.zeros_like(base).double()).numpy() for run in moved]
        expected = base.double().numpy() + naive(deltas, how=how, weights=weights, density=0.3)
        np.testing.assert_allclose(after[name].numpy(), expected, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
def test_what_dare_drops_is_drawn_by_the_seed(build_model: BuildModel, tmp_path: Path, how: str) -> None:
    """The masks are drawn tensor by tensor, run by run, as the names come."""
    changes = {name: saved(build_model, Full(), folder=tmp_path / name, seed=len(name)) for name in ("a", "bc")}
    tuned = [load_file(tmp_path / name / "model.safetensors") for name in changes]
    weights = [1.0, 0.5]
    given = {"how": how, "weights": weights, "density": 0.4}
    before, after, _ = combined(build_model, changes, folder=tmp_path / "new", seed=3, **given)
    drawn = torch.Generator().manual_seed(3)
    for name in sorted(before):
        base = before[name].double()
        deltas = []
        for run in tuned:
            mask = torch.bernoulli(torch.full((len(base), base[0].numel()), 0.4), generator=drawn).view(base.shape)
            deltas.append(((run[name].double() - base) * mask / 0.4).numpy())
        expected = base.numpy() + voted(deltas, how=how, weights=weights)
        np.testing.assert_allclose(after[name].numpy(), expected, rtol=0, atol=1e-6)
    _, again, _ = combined(build_model, changes, folder=tmp_path / "again", seed=3, **given)
    _, other, _ = combined(build_model, changes, folder=tmp_path / "other", seed=4, **given)
    assert all(torch.equal(after[name], again[name]) for name in after)
    assert not all(torch.equal(after[name], other[name]) for name in after)


@pytest.mark.parametrize("how", WAYS)
def test_no_more_than_a_part_of_a_tensor_is_read_at_a_time(
    build_model: BuildModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    read: list[int] = []
    rows = Tensors.rows

    def counted(self: Tensors, name: str, part: slice) -> Tensor:
        found = rows(self, name, part)
        read.append(found.numel())
        return found

    monkeypatch.setattr(combine_weights, "PART_NUMBERS", 100)
    monkeypatch.setattr(Tensors, "rows", counted)
    changes = {name: saved(build_model, Full(), folder=tmp_path / name) for name in ("a", "b")}
    _, after, _ = combined(build_model, changes, folder=tmp_path / "new", how=how)
    assert max(read) == 96
    assert sum(read) >= 3 * sum(tensor.numel() for tensor in after.values())


# ------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("damage", ["another shape", "one too few", "one too many", "not finite"])
def test_weights_that_are_not_the_base_s_are_refused_by_the_run_s_name(
    build_model: BuildModel, tmp_path: Path, damage: str
) -> None:
    saved(build_model, Full(), folder=tmp_path / "tickets")
    path = tmp_path / "tickets" / "model.safetensors"
    tensors = load_file(path)
    name = "model.norm.weight"
    if damage == "another shape":
        tensors[name] = torch.ones(5)
    elif damage == "one too few":
        del tensors[name]
    elif damage == "one too many":
        tensors["more"] = torch.ones(2)
    else:
        tensors[name][0] = float("nan")
    save_file(tensors, path)
    change = OwnWeights(Tensors(tmp_path / "tickets"), whole=True)
    with pytest.raises(ModelError, match="tickets") as error:
        combined(build_model, {"tickets": change}, folder=tmp_path / "new")
    assert ("more" if damage == "one too many" else name) in str(error.value)
    assert error.value.hint


def test_some_of_a_model_s_experts_have_no_tensor_of_their_own(build_model: BuildModel, tmp_path: Path) -> None:
    change = saved(build_model, Layers(last=1), folder=tmp_path / "tickets", kind="qwen3_moe")
    with pytest.raises(ModelError, match=r"tickets and its base do not have the same .*experts") as error:
        combined(build_model, {"tickets": change}, folder=tmp_path / "new", kind="qwen3_moe")
    assert "full or lora" in error.value.hint


def test_files_that_cannot_be_read_are_refused(build_model: BuildModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no \.safetensors"):
        Tensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="cannot be read") as error:
        Tensors(tmp_path)
    assert error.value.hint
