"""Packs of few shapes, and blocks that are compiled once for packs of all shapes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from tunesmith.data.pack import FILLED_TO, build_pack
from tunesmith.data.types import Sequence
from tunesmith.methods.base import trainable
from tunesmith.methods.lora import Lora
from tunesmith.methods.prefix import Prefix
from tunesmith.models.attention import register
from tunesmith.models.load import Model
from tunesmith.objectives.instruction import Instruction
from tunesmith.train.passes import forward, packed
from tunesmith.train.settings import TrainSettings


@pytest.fixture(scope="module")
def rows() -> list[Sequence]:
    random = np.random.default_rng(0)
    tokens = [random.integers(6, 260, length).astype(np.int32) for length in (9, 14, 30)]
    return [Sequence(t, (np.arange(len(t)) > 4).astype(np.float32), row) for row, t in enumerate(tokens)]


@pytest.mark.parametrize(("kind", "prefix"), [("llama", False), ("llama", True), ("gemma2", False), ("bert", False)])
def test_filling_a_pack_up_changes_no_hidden_state(
    build_model: Callable[..., Model], rows: list[Sequence], kind: str, prefix: bool
) -> None:
    model = build_model(kind)
    if prefix:
        Prefix(num_tokens=3).apply(model, seed=0)
    pack = build_pack(rows)
    with torch.no_grad():
        plain, filled = (model.hidden(model.attention(p)) for p in (pack, pack.padded()))
    assert filled.shape[0] == FILLED_TO != plain.shape[0]
    assert torch.allclose(filled[: len(plain)], plain, rtol=0, atol=1e-12)


def test_packs_are_filled_up_in_bf16_alone(build_model: Callable[..., Model], rows: list[Sequence]) -> None:
    model: Any = build_model("llama")
    lengths = {
        precision: [len(p.tokens_T) for p in packed([[r] for r in rows], model=model, settings=settings)]
        for precision in ("fp32", "bf16")
        for settings in [TrainSettings(precision=precision)]
    }
    assert lengths == {"fp32": [53], "bf16": [64]}


def test_compiled_blocks_are_compiled_once_for_packs_of_every_shape(
    build_model: Callable[..., Model],
) -> None:
    model, plain = build_model("llama"), build_model("llama")
    for made in (model, plain):
        Lora(rank=2).apply(made, seed=0)
    counters.clear()
    try:
        model.compile_blocks(backend="aot_eager")
        check_graphs(model, plain)
    finally:
        register()
        torch.compiler.reset()


def check_graphs(model: Model, plain: Model) -> None:
    random = np.random.default_rng(1)
    root = random.integers(6, 260, 20)
    graphs = []
    for number in range(5):
        tails = [random.integers(6, 260, int(random.integers(5, 30))) for _ in range(2 + number)]
        tokens = [np.concatenate([root, tail]) if n % 2 else tail for n, tail in enumerate(tails)]
        rows = [Sequence(t.astype(np.int32), (np.arange(len(t)) > 3).astype(np.float32)) for t in tokens]
        losses = [forward(m, build_pack(rows), objective=Instruction()).sum for m in (model, plain)]
        for loss in losses:
            loss.backward()
        assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=1e-12)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert set(graphs) == {graphs[0]}
    gradients = [[p.grad for p in trainable(m).values()] for m in (model, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
