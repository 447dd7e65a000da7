"""Every tuning method on an encoder-decoder: what it promises there, and PEFT as the oracle for adapters."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.data.pack import build_pack
from tunesmith.data.types import Sequence
from tunesmith.errors import RecipeError
from tunesmith.methods import METHODS, Method
from tunesmith.methods.adapters import Adapters
from tunesmith.methods.base import set_trainable_dtype, trainable
from tunesmith.methods.bitfit import Bitfit
from tunesmith.methods.full import Full
from tunesmith.methods.ia3 import Ia3
from tunesmith.methods.layers import Layers
from tunesmith.methods.lora import Lora, Qlora, from_peft
from tunesmith.methods.p_tuning import PTuning
from tunesmith.methods.prefix import Prefix
from tunesmith.methods.prompt import Prompt
from tunesmith.methods.vera import Vera
from tunesmith.models.load import Model
from tunesmith.models.quantised import quantise
from tunesmith.models.readout import head_logits
from tunesmith.objectives.seq2seq import Seq2seq
from tunesmith.train.passes import autocast, forward
from tunesmith.train.settings import TrainSettings

BuildModel = Callable[..., Model]

ROWS: dict[str, Method] = {
    "full": Full(),
    "lora": Lora(rank=4),
    "dora": Lora(rank=4, dora=True),
    "pissa": Lora(rank=4, init="pissa"),
    "lora on some": Lora(rank=2, targets=("q", "EncDecAttention.v", "wo")),
    "qlora": Qlora(rank=4, quantise="int8"),
    "qlora, nf4": Qlora(rank=4),
    "layers": Layers(last=1),
    "layers, norms": Layers(only="norms"),
    "adapters": Adapters(reduction=4),
    "adapters, houlsby": Adapters(reduction=4, placement="houlsby"),
    "adapters, parallel": Adapters(reduction=4, parallel=True),
    "ia3": Ia3(),
    "vera": Vera(rank=8),
}
REFUSED: dict[str, Method] = {
    "bitfit": Bitfit(),
    "prefix": Prefix(),
    "prompt": Prompt(),
    "p_tuning": PTuning(),
    "layers, biases": Layers(only="biases"),
}
each = pytest.mark.parametrize("method", [pytest.param(method, id=name) for name, method in ROWS.items()])
kinds = pytest.mark.parametrize("kind", ["t5", "t5_gated"])


def test_every_method_is_in_a_table() -> None:
    assert {type(method) for method in (*ROWS.values(), *REFUSED.values())} == set(METHODS.values())


def logits(model: Model, rows: list[Sequence]) -> Tensor:
    model.causal.eval()
    with torch.no_grad():
        return torch.cat(
            [head_logits(model.hidden(model.attention(build_pack([row]))), head=model.head) for row in rows]
        )


def their_logits(causal: Any, rows: list[Sequence]) -> Tensor:
    def ids(tokens_T: Any) -> Tensor:
        return torch.from_numpy(tokens_T).long()[None]

    with torch.no_grad():
        found = [causal(input_ids=ids(r.encoder_T), decoder_input_ids=ids(r.tokens_T)).logits[0] for r in rows]
    return torch.cat(found)


def tuned(build_model: BuildModel, kind: str, method: Method, *, dtype: torch.dtype = torch.float64) -> Model:
    """A model with the method in it, moved away from where it starts."""
    model = build_model(kind, dtype=dtype)
    method.apply(model, seed=0)
    for parameter in model.causal.parameters():
        parameter.data = parameter.data.to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model).values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += (0.1 * noise).to(parameter.dtype)
    return model


@each
@kinds
def test_a_method_starts_at_the_base_and_moves_what_it_says(
    build_model: BuildModel, pair_rows: list[Sequence], kind: str, method: Method
) -> None:
    base, model = build_model(kind, dtype=torch.float32), build_model(kind, dtype=torch.float32)
    if method.stored_in is not None:
        quantise(base, method.stored_in)
    before = logits(base, pair_rows)
    method.apply(model, seed=0)
    torch.testing.assert_close(logits(model, pair_rows), before, rtol=0, atol=1e-4)
    model.causal.train()
    forward(model, build_pack(pair_rows), objective=Seq2seq()).sum.backward()
    with_gradient = {name for name, p in model.causal.named_parameters() if p.grad is not None}
    assert with_gradient == set(trainable(model)) != set()
    if method.keeps_base and method.stored_in is None:
        moved = tuned(build_model, kind, method, dtype=torch.float32)
        assert not torch.allclose(logits(moved, pair_rows), before, atol=1e-3)
        with method.disabled(moved):
            torch.testing.assert_close(logits(moved, pair_rows), before, rtol=0, atol=0)


@each
@kinds
def test_what_is_saved_comes_back_to_the_bit(
    build_model: BuildModel, pair_rows: list[Sequence], kind: str, method: Method, tmp_path: Path
) -> None:
    model = tuned(build_model, kind, method, dtype=torch.float32)
    method.save(model, folder=tmp_path)
    again = build_model(kind, dtype=torch.float32)
    method.load(again, folder=tmp_path)
    assert torch.equal(logits(again, pair_rows), logits(model, pair_rows))
    if not method.saves_model:
        config = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
        assert config["task_type"] == "SEQ_2_SEQ_LM"


@pytest.mark.usefixtures("exact")
@kinds
@pytest.mark.parametrize("name", [n for n, m in ROWS.items() if m.merges and m.stored_in is None])
def test_merged_is_a_plain_model_with_the_same_logits(
    build_model: BuildModel, pair_twin: Callable[[Model], Any], pair_rows: list[Sequence], kind: str, name: str
) -> None:
    method = ROWS[name]
    names = [n for n, _ in build_model(kind).causal.named_parameters()]
    model = tuned(build_model, kind, method)
    before = logits(model, pair_rows)
    method.merge(model)
    assert [n for n, _ in model.causal.named_parameters()] == names
    torch.testing.assert_close(logits(model, pair_rows), before, rtol=0, atol=1e-9)
    torch.testing.assert_close(their_logits(pair_twin(model), pair_rows), before, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("exact")
@kinds
@pytest.mark.parametrize("name", [n for n, m in ROWS.items() if m.peft_type is not None and m.stored_in is None])
def test_peft_computes_the_same_from_our_adapter(
    build_model: BuildModel,
    pair_twin: Callable[[Model], Any],
    pair_rows: list[Sequence],
    kind: str,
    name: str,
    tmp_path: Path,
) -> None:
    from peft import PeftModelForSeq2SeqLM

    twin = pair_twin(build_model(kind))
    model = tuned(build_model, kind, ROWS[name])
    ROWS[name].save(model, folder=tmp_path)
    theirs = PeftModelForSeq2SeqLM.from_pretrained(twin, tmp_path, autocast_adapter_dtype=False).eval()
    for parameter in theirs.parameters():
        parameter.data = parameter.data.double()
    torch.testing.assert_close(their_logits(theirs, pair_rows), logits(model, pair_rows), rtol=0, atol=1e-8)


@pytest.mark.usefixtures("exact")
def test_we_compute_the_same_from_peft_s_adapter(
    build_model: BuildModel, pair_twin: Callable[[Model], Any], pair_rows: list[Sequence], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    model = build_model("t5_gated")
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="SEQ_2_SEQ_LM"
    )
    theirs = get_peft_model(pair_twin(model), config, autocast_adapter_dtype=False).eval()
    for parameter in theirs.parameters():
        parameter.data = parameter.data.float().double()
    for parameter in model.causal.parameters():
        parameter.data = parameter.data.float().double()
    theirs.save_pretrained(str(tmp_path))
    from_peft(tmp_path).load(model, folder=tmp_path)
    for parameter in model.causal.parameters():
        parameter.data = parameter.data.double()
    torch.testing.assert_close(logits(model, pair_rows), their_logits(theirs, pair_rows), rtol=0, atol=1e-9)


@each
def test_frozen_weights_can_be_half_as_wide(build_model: BuildModel, pair_rows: list[Sequence], method: Method) -> None:
    model = build_model("t5_gated", dtype=torch.float32)
    method.apply(model, seed=0)
    set_trainable_dtype(model, frozen=torch.bfloat16)
    model.checkpoint_activations()
    model.causal.train()
    with autocast(model, TrainSettings(precision="bf16")):
        forward(model, build_pack(pair_rows), objective=Seq2seq()).sum.backward()
    assert all(torch.isfinite(p.grad).all() for p in trainable(model).values())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_suit_is_refused_by_name(build_model: BuildModel, name: str) -> None:
    with pytest.raises(RecipeError, match=r"method '\w+'|have no biases") as error:
        REFUSED[name].apply(build_model("t5"), seed=0)
    assert error.value.hint


def test_ia3_scales_keys_values_and_inner_activations(build_model: BuildModel) -> None:
    leaves = {re.sub(r"\d+", "N", name) for name in Ia3().places(build_model("t5_gated"))}
    assert leaves == {
        "encoder.block.N.layer.N.SelfAttention.k", "encoder.block.N.layer.N.SelfAttention.v",
        "encoder.block.N.layer.N.DenseReluDense.wo", "decoder.block.N.layer.N.DenseReluDense.wo",
        "decoder.block.N.layer.N.SelfAttention.k", "decoder.block.N.layer.N.SelfAttention.v",
        "decoder.block.N.layer.N.EncDecAttention.k", "decoder.block.N.layer.N.EncDecAttention.v",
    }  # fmt: skip


def test_adapters_stand_after_each_attention_and_feed_forward(build_model: BuildModel) -> None:
    model = build_model("t5")
    assert len(Adapters(reduction=4).places(model)) == 4
    places = Adapters(reduction=4, placement="houlsby").places(model)
    assert len(places) == 2 * 2 + 2 * 3


def test_layers_count_from_the_encoder_to_the_decoder(build_model: BuildModel) -> None:
    model = build_model("t5_gated")

    def chosen(method: Layers) -> set[str]:
        return {".".join(name.split(".")[:3]) for name in method.chosen(model)}

    assert chosen(Layers(last=1)) == {"decoder.block.2"}
    assert chosen(Layers(first=1)) == {"encoder.block.0"}
    assert chosen(Layers(blocks=(1, 2))) == {"encoder.block.1", "decoder.block.0"}
    head = set(Layers(last=1, head=True).chosen(model)) - set(Layers(last=1).chosen(model))
    assert head == {"encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"}
