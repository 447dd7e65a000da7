"""Matrices in few bits against their definitions."""

import math
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.data.pack import build_pack
from tunesmith.data.types import Sequence
from tunesmith.errors import RecipeError
from tunesmith.export import requantised_cost
from tunesmith.models.load import Model
from tunesmith.models.quantised import Int8Linear, Nf4Linear, QuantisedLinear, check_installed, quantise, restore

BuildModel = Callable[..., Model]


def test_int8_by_hand() -> None:
    layer = Int8Linear(torch.tensor([[127.0, -63.6, 0.4], [0.0, 0.0, 0.0]]), torch.tensor([1.0, 2.0]), transposed=False)
    assert layer.restored(torch.float32).tolist() == [[127.0, -64.0, 0.0], [0.0, 0.0, 0.0]]
    assert layer(torch.tensor([[1.0, 1.0, 5.0]])).tolist() == [[64.0, 2.0]]


@pytest.mark.parametrize("seed", range(3))
def test_int8_is_off_by_half_a_step_at_most(seed: int) -> None:
    weight_OI = torch.randn(40, 70, generator=torch.Generator().manual_seed(seed))
    step_O1 = weight_OI.abs().amax(1, keepdim=True) / 127
    error = (Int8Linear(weight_OI, None, transposed=False).restored(torch.float32) - weight_OI).abs()
    assert (error <= step_O1 * 0.5001).all()
    assert error.max() > 0


def test_nf4_takes_the_nearest_of_sixteen_levels_in_each_block() -> None:
    """The levels are quantiles of a normal distribution (Dettmers et al. 2023, appendix E); one scale a block of 64."""
    levels = torch.tensor([
        -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
    ])  # fmt: skip
    weight_OI = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    blocks = weight_OI.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = levels[(blocks / scale)[..., None].sub(levels).abs().argmin(-1)] * scale
    found = Nf4Linear(weight_OI, None, transposed=False).restored(torch.float32).reshape(-1, 64)
    # the scales themselves are stored in 8 bits, so they are off by up to a few per cent
    assert (found - nearest).abs().max() < 0.05 * scale.max()
    assert ((found - nearest).abs() > 0.3).sum() == 0
    assert torch.corrcoef(torch.stack([found.flatten(), nearest.flatten()]))[0, 1] > 0.999


@pytest.mark.parametrize(("kind", "most_bytes"), [("int8", 1.1), ("nf4", 0.6)])
def test_it_takes_the_bytes_that_it_should(kind: str, most_bytes: float) -> None:
    layer = {"int8": Int8Linear, "nf4": Nf4Linear}[kind](torch.randn(256, 512), None, transposed=False)
    stored = sum(b.numel() * b.element_size() for b in layer.buffers())
    assert stored / (256 * 512) < most_bytes
    assert not list(layer.parameters())


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_gradient_is_that_of_the_restored_weight(kind: str) -> None:
    layer = {"int8": Int8Linear, "nf4": Nf4Linear}[kind](torch.randn(12, 64), torch.randn(12), transposed=False)
    x, weight_OI = torch.randn(2, 5, 64, requires_grad=True), layer.restored(torch.float32)
    out = layer(x)
    torch.testing.assert_close(out, x @ weight_OI.T + layer.bias)
    grad = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, x, grad)
    torch.testing.assert_close(found, grad @ weight_OI)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text"])
def test_a_restored_base_is_the_kind_of_model_it_was(build_model: BuildModel, architecture: str, kind: str) -> None:
    model = build_model(architecture, dtype=torch.float32)
    before = {
        name: (type(m), m.weight.shape) for name, m in model.causal.named_modules() if isinstance(m, nn.Linear | Conv1D)
    }
    head, parameters = model.head, model.num_parameters()
    quantise(model, kind)  # type: ignore[arg-type]
    assert model.num_parameters() == parameters
    quantised = [n for n, m in model.causal.named_modules() if isinstance(m, QuantisedLinear)]
    assert len(quantised) == len(before) - 1  # all but the head
    assert model.head is head
    restore(model)
    after = {
        name: (type(m), m.weight.shape) for name, m in model.causal.named_modules() if isinstance(m, nn.Linear | Conv1D)
    }
    assert after == before


def test_the_cost_of_few_bits_is_the_divergence_of_the_next_token(build_model: BuildModel) -> None:
    model = build_model("llama", dtype=torch.float32)
    contract = {"probes": [{"sequences": [{"ids": [5, 6, 7]}, {"ids": [9, 8]}]}]}

    def probabilities() -> list[Tensor]:
        packs = [build_pack([Sequence(np.array(ids), np.zeros(len(ids)))]) for ids in ([5, 6, 7], [9, 8])]
        with torch.no_grad():
            return [p for pack in packs for p in model.head(model.hidden(model.attention(pack))).softmax(-1)]

    before = probabilities()
    cost = requantised_cost(model, kind="nf4", contract=contract)
    pairs = list(zip(before, probabilities(), strict=True))
    naive = sum(p * math.log(p / q) for ps, qs in pairs for p, q in zip(ps.tolist(), qs.tolist(), strict=True))
    assert cost == pytest.approx(naive / 5, rel=1e-3)
    assert cost > 0


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    check_installed("int8")
    check_installed(None)
    with pytest.raises(RecipeError, match="needs bitsandbytes") as error:
        check_installed("nf4")
    assert error.value.hint == "pip install 'tunesmith[qlora]'"
