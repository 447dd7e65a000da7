"""Packs that are filled up, so that products have few shapes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.data.pack import FILLED_TO, build_pack
from tunesmith.data.types import Sequence
from tunesmith.methods.prefix import Prefix
from tunesmith.models.load import Model
from tunesmith.train.passes import packed
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
