"""Adapters combined, against numbers by hand, a naive reference in float64, and PEFT where it means the same."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tunesmith.errors import ModelError, RecipeError
from tunesmith.methods import Method
from tunesmith.methods.adapters import Adapters
from tunesmith.methods.base import inserted, load_adapter, save_tensors, trainable
from tunesmith.methods.combine import (
    WAYS,
    Factors,
    Way,
    check_combinable,
    combine_adapters,
    combined_delta,
    dropped,
    elected,
    narrowed,
    trimmed,
    truncated,
    updates_of,
)
from tunesmith.methods.ia3 import Ia3
from tunesmith.methods.lora import Lora, LoraLinear, Qlora
from tunesmith.methods.prefix import Prefix
from tunesmith.methods.prompt import Prompt
from tunesmith.methods.vera import Vera
from tunesmith.models.load import Model

BuildModel = Callable[..., Model]


def stir(model: Model, *, seed: int) -> None:
    """Move all that is trained away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def tuned(build_model: BuildModel, method: Method, *, seed: int, kind: str = "llama", **config: Any) -> Model:
    model = build_model(kind, dtype=torch.float32, **config)
    method.apply(model, seed=seed)
    stir(model, seed=seed)
    return model


def saved(build_model: BuildModel, method: Lora, *, seed: int, folder: Path, **given: Any) -> dict[str, Factors]:
    """The updates of a tuned adapter, through its file."""
    model = tuned(build_model, method, seed=seed, **given)
    folder.mkdir()
    method.save(model, folder=folder)
    return updates_of(load_adapter(folder), method=method, run=folder.name)


def some(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def changes(count: int, *, rank: int = 3, rows: int = 7, columns: int = 5) -> dict[str, dict[str, Factors]]:
    """Adapters of two layers, in float64; the second layer is wider."""
    return {
        f"run {k}": {
            "first": Factors(some(rank, columns, seed=4 * k), some(rows, rank, seed=4 * k + 1)),
            "second": Factors(some(rank, 12, seed=4 * k + 2), some(10, rank, seed=4 * k + 3)),
        }
        for k in range(count)
    }


def dense(tensors: dict[str, Tensor], layer: str) -> Tensor:
    """The change that a saved adapter of scaling 2 makes to a layer."""
    return 2 * tensors[f"base_model.model.{layer}.lora_B.weight"] @ tensors[f"base_model.model.{layer}.lora_A.weight"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -------------------------------------------------------------------------------------------------- by hand


def test_trimming_by_hand() -> None:
    delta = torch.tensor([[4.0, -1.0], [-3.0, 2.0]])
    assert trimmed(delta, density=0.5).tolist() == [[4.0, 0.0], [-3.0, 0.0]]
    assert trimmed(delta, density=1.0).tolist() == delta.tolist()
    assert trimmed(delta, density=0.001).tolist() == [[4.0, 0.0], [0.0, 0.0]]  # at least one is kept


@pytest.mark.parametrize(("density", "expected"), [(1.0, [3.0, 3.0, 2.0, 0.5]), (0.5, [3.0, 3.0, 2.0, 0.0])])
def test_ties_by_hand(density: float, expected: list[float]) -> None:
    """The average of those that have the elected sign: of 4 and 2, of 3 alone, of 2 alone, of 0.5 alone unless trimmed."""
    deltas = [torch.tensor([[4.0, -1.0, 2.0, 0.0]]), torch.tensor([[2.0, 3.0, -1.0, 0.5]])]
    found = combined_delta(deltas, how="ties", weights=[0.5, 0.5], density=density, generator=generator())
    assert found.tolist() == [expected]


def test_elected_by_hand_with_unequal_and_negative_weights() -> None:
    votes = torch.tensor([[[3.0, 1.0, 2.0]], [[1.0, -4.0, -2.0]]])
    # weights 3 and -1: where both agree 4 * (3 + 1) / 4; the second's -4 alone 4 * -4 / 1; nothing where they cancel
    assert elected(votes, weights=[3.0, -1.0]).tolist() == [[4.0, -16.0, 0.0]]


def test_one_dimension_by_hand() -> None:
    one = {"layer": Factors(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0]]))}
    other = {"layer": Factors(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0], [5.0]]))}
    combined = combine_adapters({"one": one, "other": other}, how="linear", weights=[2.0, -1.0])
    assert dense(combined.tensors, "layer").tolist() == [[6.0, 12.0], [0.0, -5.0]]
    assert (combined.method.rank, combined.method.scaling(2), combined.lost) == (2, 2.0, 0.0)
    cut = combine_adapters({"one": one, "other": other}, how="linear", weights=[0.0001, -1.0], rank=1)
    assert cut.lost == pytest.approx(0.0001 * math.sqrt(9) / 5, rel=1e-3)  # of [3, 6] what [0, 1] does not hold


# --------------------------------------------------------------------------------------------- a naive reference


def naive(deltas: list[np.ndarray], *, how: str, weights: list[float], density: float, seed: int) -> np.ndarray:
    """The formulas, number by number."""
    drawn = generator(seed)
    if how.startswith("dare"):
        masks = [torch.bernoulli(torch.full(d.shape, density), generator=drawn).double().numpy() for d in deltas]
        deltas = [d * m / density for d, m in zip(deltas, masks, strict=True)]
    if how == "ties":
        kept = []
        for delta in deltas:
            least = np.sort(np.abs(delta).ravel())[::-1][round(density * delta.size) - 1]
            kept.append(np.where(np.abs(delta) >= least, delta, 0.0))
        deltas = kept
    out = np.zeros_like(deltas[0])
    for place in np.ndindex(out.shape):
        votes = [weight * delta[place] for weight, delta in zip(weights, deltas, strict=True)]
        if how.endswith("linear"):
            out[place] = sum(votes)
            continue
        sign = np.sign(sum(votes))
        agree = [(vote, abs(weight)) for vote, weight in zip(votes, weights, strict=True) if np.sign(vote) == sign != 0]
        if agree:
            out[place] = sum(abs(w) for w in weights) * sum(v for v, _ in agree) / sum(w for _, w in agree)
    return out


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.0, 1.0], [2.0, 0.25], [1.0, -0.5], [0.2, 0.3, 0.5]], ids=str)
@pytest.mark.parametrize("density", [0.2, 0.6, 1.0])
def test_every_way_is_the_formula(how: Way, weights: list[float], density: float) -> None:
    deltas = [some(10, 15, seed=k) for k in range(len(weights))]
    found = combined_delta(deltas, how=how, weights=weights, density=density, generator=generator(3))
    expected = naive([d.numpy() for d in deltas], how=how, weights=weights, density=density, seed=3)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", WAYS)
def test_the_layers_of_adapters_are_combined_one_by_one(how: Way) -> None:
    adapters = changes(3)
    del adapters["run 1"]["second"]  # a layer that one of them leaves alone has no change there
    weights = [0.5, 1.0, -0.25]
    combined = combine_adapters(adapters, how=how, weights=weights, density=0.5, seed=5, rank=None)
    drawn = generator(5)
    for layer, shape in (("first", (7, 5)), ("second", (10, 12))):
        deltas = [u[layer].dense() if layer in u else torch.zeros(shape).double() for u in adapters.values()]
        exact = combined_delta(deltas, how=how, weights=weights, density=0.5, generator=drawn)
        rank = combined.method.rank_of(layer)
        assert rank == {"linear": {"first": 5, "second": 6}}.get(how, {"first": 3, "second": 3})[layer]
        u, s, vt = np.linalg.svd(exact.numpy())
        nearest = u[:, :rank] * s[:rank] @ vt[:rank]
        np.testing.assert_allclose(dense(combined.tensors, layer).numpy(), nearest, rtol=0, atol=1e-12)


def test_what_dare_drops_depends_on_the_seed_alone_and_keeps_the_mean() -> None:
    delta = torch.ones(200, 200)
    first, again = (dropped(delta, density=0.25, generator=generator(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, dropped(delta, density=0.25, generator=generator(2)))
    assert set(first.unique().tolist()) == {0.0, 4.0}
    assert float(first.mean()) == pytest.approx(1.0, abs=4 * math.sqrt(3 / delta.numel()))
    files = [combine_adapters(changes(2), how="dare_ties", weights=[0.5, 0.5], seed=seed).tensors for seed in (1, 1, 2)]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert not all(torch.equal(files[0][name], files[2][name]) for name in files[0])


@pytest.mark.parametrize("how", ["linear", "ties"])
def test_the_order_does_not_matter(how: Way) -> None:
    adapters, weights = changes(3), [0.5, 2.0, -1.0]
    one = combine_adapters(adapters, how=how, weights=weights)
    turned = combine_adapters(dict(reversed(adapters.items())), how=how, weights=weights[::-1])
    for layer in ("first", "second"):
        torch.testing.assert_close(dense(one.tensors, layer), dense(turned.tensors, layer), rtol=0, atol=1e-12)


def test_ties_of_what_agrees_is_linear_and_of_copies_is_the_copy() -> None:
    delta = some(6, 9, seed=1).abs() + 0.1
    for weights in ([0.5, 0.5], [1.0, 3.0]):
        given: Any = {"weights": weights, "density": 1.0, "generator": generator()}
        ties = combined_delta([delta, 2 * delta], how="ties", **given)
        torch.testing.assert_close(ties, combined_delta([delta, 2 * delta], how="linear", **given))
    mixed = some(6, 9, seed=2)
    same = combined_delta([mixed] * 3, how="ties", weights=[1 / 3] * 3, density=1.0, generator=generator())
    torch.testing.assert_close(same, mixed)


# ------------------------------------------------------------------------------------------------------ ranks


def test_the_share_lost_is_that_of_the_singular_values_cut_off() -> None:
    adapters = changes(2)
    for how in ("linear", "ties"):
        combined = combine_adapters(adapters, how=how, weights=[1.0, 1.0], rank=2, density=0.5)
        cut = kept = 0.0
        for layer in ("first", "second"):
            deltas = [updates[layer].dense() for updates in adapters.values()]
            exact = combined_delta(deltas, how=how, weights=[1.0, 1.0], density=0.5, generator=generator())
            values = np.linalg.svd(exact.numpy(), compute_uv=False)
            cut, kept = cut + (values[2:] ** 2).sum(), kept + (values**2).sum()
        assert combined.lost == pytest.approx(math.sqrt(cut / kept), rel=1e-9)
        assert 0.05 < combined.lost < 0.95


def test_a_sum_of_more_ranks_than_a_layer_is_wide_is_exact() -> None:
    adapters = changes(4)  # twelve ranks side by side; the layers are 5 and 10 wide
    combined = combine_adapters(adapters, how="linear", weights=[1.0, 0.5, -2.0, 1.0])
    assert (combined.method.rank_of("first"), combined.method.rank_of("second"), combined.lost) == (5, 10, 0.0)
    for layer in ("first", "second"):
        exact = sum(w * u[layer].dense() for w, u in zip([1.0, 0.5, -2.0, 1.0], adapters.values(), strict=True))
        torch.testing.assert_close(dense(combined.tensors, layer), exact, rtol=0, atol=1e-12)


def test_both_ways_to_cut_find_the_same() -> None:
    update = changes(1)["run 0"]["second"]
    torch.testing.assert_close(narrowed(update, rank=2).dense(), truncated(update.dense(), rank=2).dense())


@pytest.mark.parametrize(("how", "rank", "highest"), [("linear", 7, 6), ("ties", 11, 10), ("ties", 0, 10)])
def test_a_rank_that_no_layer_can_have_is_refused(how: Way, rank: int, highest: int) -> None:
    with pytest.raises(RecipeError, match=f"allowed are 1 to {highest}") as error:
        combine_adapters(changes(2), how=how, weights=[0.5, 0.5], rank=rank)
    assert error.value.hint
    combine_adapters(changes(2), how=how, weights=[0.5, 0.5], rank=highest)


def test_an_adapter_that_changes_nothing_is_no_trouble() -> None:
    zero = {"layer": Factors(torch.ones(2, 6), torch.zeros(5, 2))}
    for how in WAYS:
        combined = combine_adapters({"a": zero, "b": zero}, how=how, weights=[0.5, 0.5], rank=1)
        assert combined.lost == 0.0
        assert dense(combined.tensors, "layer").tolist() == torch.zeros(5, 6).tolist()


def test_layers_of_another_shape_are_refused() -> None:
    adapters = changes(1) | {"other": changes(1, rows=8)["run 0"]}
    with pytest.raises(ModelError, match="first is 8 x 5 for other and 7 x 5 for run 0") as error:
        combine_adapters(adapters, how="linear", weights=[0.5, 0.5])
    assert error.value.hint


# ------------------------------------------------------------------------------------------- adapters in files


VARIANTS = {
    "plain": Lora(rank=4),
    "alpha": Lora(rank=4, alpha=3.0),
    "rank-stabilised": Lora(rank=4, alpha=3.0, rank_stabilised=True),
    "own ranks": Lora(rank=4, ranks={"down_proj": 2}),
    "pissa": Lora(rank=4, init="pissa"),
    "pissa with alpha and ranks": Lora(rank=4, alpha=6.0, ranks={"q_proj": 2}, init="pissa"),
    "some layers": Lora(rank=2, targets=("q_proj", "down_proj")),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_file_s_updates_are_what_the_layers_add(build_model: BuildModel, tmp_path: Path, name: str) -> None:
    method = VARIANTS[name]
    model = tuned(build_model, method, seed=1)
    method.save(model, folder=tmp_path)
    updates = updates_of(load_adapter(tmp_path), method=method, run="a")
    layers = inserted(model)
    assert set(updates) == set(layers)
    for place, layer in layers.items():
        assert isinstance(layer, LoraLinear)
        torch.testing.assert_close(updates[place].dense(), layer.delta().detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("how", WAYS)
def test_the_saved_adapter_adds_the_combined_change(
    build_model: BuildModel, tmp_path: Path, how: Way, kind: str
) -> None:
    """Adapters of other ranks, scalings and layers, through their files and back into a model."""
    names = ("c_attn", "c_fc") if kind == "gpt2" else ("q_proj", "down_proj")
    methods = [Lora(rank=4), Lora(rank=2, alpha=3.0, rank_stabilised=True), Lora(rank=3, targets=names[:1])]
    methods[1] = methods[1].model_copy(update={"targets": names})
    adapters = {
        f"run{k}": saved(build_model, method, seed=k, folder=tmp_path / str(k), kind=kind)
        for k, method in enumerate(methods)
    }
    combined = combine_adapters(adapters, how=how, weights=[0.5, 1.0, -1.0], density=0.5, seed=2)
    folder = tmp_path / "combined"
    folder.mkdir()
    save_tensors(combined.tensors, path=folder / "adapter_model.safetensors")
    model = build_model(kind, dtype=torch.float32)
    combined.method.load(model, folder=folder)
    assert set(inserted(model)) == set(adapters["run0"])
    drawn = generator(2)
    for place, layer in inserted(model).items():
        assert isinstance(layer, LoraLinear)
        here = [updates.get(place) for updates in adapters.values()]
        shape = adapters["run0"][place].dense()
        deltas = [torch.zeros_like(shape) if update is None else update.dense() for update in here]
        exact = combined_delta(deltas, how=how, weights=[0.5, 1.0, -1.0], density=0.5, generator=drawn)
        delta = layer.delta().detach()
        rank = len(layer.lora_A)
        expected = exact if how == "linear" else truncated(exact, rank=rank).dense()
        torch.testing.assert_close(delta.T if layer.transposed else delta, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("damage", ["no B", "other tensors", "not finite", "empty"])
def test_a_file_that_is_no_lora_adapter_is_refused_by_the_run_s_name(
    build_model: BuildModel, tmp_path: Path, damage: str
) -> None:
    method = Lora(rank=2, targets=("q_proj",))
    method.save(tuned(build_model, method, seed=1), folder=tmp_path)
    tensors = load_file(str(tmp_path / "adapter_model.safetensors"))
    name = next(name for name in sorted(tensors) if "lora_B" in name)
    if damage == "no B":
        del tensors[name]
    elif damage == "not finite":
        tensors[name][0, 0] = float("nan")
    elif damage == "empty":
        tensors = {}
    else:
        tensors["base_model.model.lm_head.weight"] = torch.ones(1)
    with pytest.raises(ModelError, match="tickets") as error:
        updates_of(tensors, method=method, run="tickets")
    assert error.value.hint


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Prefix(), "method 'prefix'"),
        (Prompt(), "method 'prompt'"),
        (Adapters(), "method 'adapters'"),
        (Ia3(), "method 'ia3'"),
        (Vera(), "method 'vera'"),
        (Qlora(), r"few bits \(nf4\)"),
        (Lora(quantise="int8"), r"few bits \(int8\)"),
        (Lora(dora=True), "DoRA"),
    ],
    ids=repr,
)
def test_what_cannot_be_combined_is_refused_by_name(method: Method, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        check_combinable(method, run="tickets")
    assert "tickets" in str(error.value)
    assert error.value.hint


# ------------------------------------------------------------------------------------------------------- PEFT

# Ours, its name in PEFT, and PEFT's weights for ours of 0.5 each: its `ties` divides by the number of adapters that agree.
PEFT_WAYS: list[tuple[Way, str, float]] = [
    ("linear", "cat", 0.5),
    ("linear", "svd", 0.5),
    ("ties", "ties_svd", 1.0),
]


@pytest.mark.parametrize(
    ("how", "theirs", "weight"),
    [("ties", "ties", 1.0), ("dare_linear", "dare_linear", 1 / 3), ("dare_ties", "dare_ties", 1.0)],
)
def test_peft_s_functions_give_the_same_change(how: Way, theirs: str, weight: float) -> None:
    """Its functions of dense changes, with what they drop drawn from the same seed."""
    from peft.utils import merge_utils

    deltas = [some(40, 30, seed=k).float() for k in range(3)]
    torch.manual_seed(11)
    expected = getattr(merge_utils, theirs)(deltas, torch.full((3,), weight), 0.3)
    found = combined_delta(deltas, how=how, weights=[1 / 3] * 3, density=0.3, generator=generator(11))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("how", "theirs", "weight"), PEFT_WAYS, ids=[name for _, name, _ in PEFT_WAYS])
def test_peft_combines_to_the_same_change(
    build_model: BuildModel,
    eager_twin: Callable[[Model], Any],
    tmp_path: Path,
    how: Way,
    theirs: str,
    weight: float,
    kind: str,
) -> None:
    from peft import PeftModel

    name = "c_proj" if kind == "gpt2" else "down_proj"
    config = {"n_layer": 1} if kind == "gpt2" else {"num_hidden_layers": 1}
    place = "transformer.h.0.mlp.c_proj" if kind == "gpt2" else "model.layers.0.mlp.down_proj"
    ranks = (3, 5)
    adapters = {
        f"a{rank}": saved(
            build_model, Lora(rank=rank, alpha=4.0, targets=(place,)), seed=rank,
            folder=tmp_path / f"a{rank}", kind=kind, **config,
        )
        for rank in ranks
    }  # fmt: skip
    twin = eager_twin(build_model(kind, dtype=torch.float32, **config))
    model = PeftModel.from_pretrained(twin, tmp_path / "a3", adapter_name="a3", autocast_adapter_dtype=False)
    model.load_adapter(str(tmp_path / "a5"), adapter_name="a5", autocast_adapter_dtype=False)
    rank = None if theirs == "cat" else 4
    density = {} if how == "linear" else {"density": 0.5}
    model.add_weighted_adapter(["a3", "a5"], [weight] * 2, "both", combination_type=theirs, svd_rank=rank, **density)
    layer = next(m for n, m in model.named_modules() if n.endswith(f"{name}") and hasattr(m, "get_delta_weight"))
    delta = layer.get_delta_weight("both")
    combined = combine_adapters(adapters, how=how, weights=[0.5, 0.5], density=0.5, rank=rank)
    ours = dense(combined.tensors, place)
    torch.testing.assert_close(ours, delta.T if kind == "gpt2" else delta, rtol=0, atol=1e-5)
    assert float(ours.abs().max()) > 0.01
