"""The head: zeros at the start, read where the pack says, saved and loaded to the bit, for every method."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tunesmith.data.pack import Pack, build_pack
from tunesmith.data.types import Sequence
from tunesmith.errors import ModelError
from tunesmith.methods import METHODS
from tunesmith.methods.base import trainable
from tunesmith.models.heads import attach_head, load_head, save_head
from tunesmith.models.load import Model

BuildModel = Callable[..., Model]
CASES = [(method, "qwen2") for method in METHODS] + [(method, "bert") for method in ("lora", "full", "layers", "vera")]


@pytest.fixture(scope="module")
def pack() -> Pack:
    """Texts of which the last token is read, or several."""
    random = np.random.default_rng(0)
    texts = []
    for row, length in enumerate([5, 9, 20]):
        weight_T = np.zeros(length, np.float32)
        weight_T[[0, -1] if row == 1 else [-1]] = 1
        texts.append(Sequence(random.integers(6, 262, length).astype(np.int32), weight_T, row, np.zeros(1, np.float32)))
    return build_pack(texts)


@pytest.mark.parametrize(("method", "architecture"), CASES)
def test_a_tuned_model_with_a_head_comes_back_to_the_bit(
    method: str, architecture: str, build_model: BuildModel, pack: Pack, tmp_path: Path
) -> None:
    tuning = METHODS[method]()
    model = build_model(architecture, dtype=torch.float32)
    tuning.apply(model, seed=0)
    attach_head(model, num_outputs=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        model.causal.eval()
        before = model.outputs_at(pack)
    tuning.save(model, folder=tmp_path)
    save_head(model, folder=tmp_path, document={"calibration": {"temperature": 1.5}, "text": "ä"})
    again = build_model(architecture, dtype=torch.float32)
    tuning.load(again, folder=tmp_path)
    assert load_head(again, folder=tmp_path) == {"calibration": {"temperature": 1.5}, "text": "ä"}
    again.causal.eval()
    with torch.no_grad():
        assert torch.equal(again.outputs_at(pack), before)
    assert before.shape == (4, 3)
    assert not trainable(again)


def test_it_starts_at_zero_and_is_trained_whatever_the_method(build_model: BuildModel, pack: Pack) -> None:
    model = build_model("qwen2", dtype=torch.bfloat16)
    METHODS["lora"]().apply(model, seed=0)
    before = model.num_parameters()
    attach_head(model, num_outputs=2)
    assert model.num_parameters() == before + 2 * 32
    found = model.outputs_at(pack)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.zeros(4, 2))
    assert list(trainable(model))[-1] == "outputs.weight"
    assert model.outputs is not None
    assert model.outputs.weight in model.vocabulary_weights()


def test_it_is_read_at_the_tokens_that_the_pack_names(build_model: BuildModel, pack: Pack) -> None:
    model = build_model("gpt2")
    attach_head(model, num_outputs=2)
    assert model.outputs is not None
    torch.nn.init.normal_(model.outputs.double().weight, generator=torch.Generator().manual_seed(1))
    hidden_TD = model.hidden(model.attention(pack))
    expected = model.outputs(hidden_TD)[torch.from_numpy(pack.source_N)]
    torch.testing.assert_close(model.outputs_at(pack), expected)
    assert torch.equal(model.outputs_at(pack, hidden_TD=hidden_TD), model.outputs_at(pack))
    ends = {int(row): node for row, node in zip(pack.rows_S, pack.nodes, strict=True)}
    assert set(pack.source_N.tolist()) == {ends[1].start, *(node.stop - 1 for node in pack.nodes)}
    assert pack.target_N.tolist() == pack.tokens_T[pack.source_N].tolist()


def test_a_head_that_cannot_be_read_or_does_not_fit_is_refused(build_model: BuildModel, tmp_path: Path) -> None:
    model = build_model("qwen2", dtype=torch.float32)
    attach_head(model, num_outputs=2)
    save_head(model, folder=tmp_path, document={})
    narrow = build_model("qwen2", dtype=torch.float32, hidden_size=16)
    with pytest.raises(ModelError, match="does not fit") as error:
        load_head(narrow, folder=tmp_path)
    assert error.value.hint
    for name, content in (("head.json", b"{"), ("head.safetensors", b"x"), ("head.safetensors", None)):
        path = tmp_path / name
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ModelError, match="cannot be read"):
            load_head(model, folder=tmp_path)
