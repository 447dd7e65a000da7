"""Every tuning method on an encoder: what it promises there, and PEFT as the oracle for adapters."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from tunesmith.data.pack import NEVER, Pack, build_pack
from tunesmith.data.types import Sequence
from tunesmith.errors import RecipeError
from tunesmith.methods import METHODS, Method
from tunesmith.methods.adapters import Adapters
from tunesmith.methods.base import set_trainable_dtype, trainable
from tunesmith.methods.bitfit import Bitfit
from tunesmith.methods.full import Full
from tunesmith.methods.ia3 import Ia3
from tunesmith.methods.layers import Layers
from tunesmith.methods.lora import Lora, Qlora
from tunesmith.methods.vera import Vera
from tunesmith.models.heads import attach_head
from tunesmith.models.load import Model
from tunesmith.models.quantised import quantise

BuildModel = Callable[..., Model]
LIKE_BERT = ("bert", "roberta", "xlm-roberta", "electra")
ENCODERS = (*LIKE_BERT, "distilbert", "modernbert")


@dataclass(frozen=True)
class Row:
    """A method, which of the parameters' names it trains, and where it is refused with which words."""

    method: Method
    trains: str  # a regular expression, searched for
    refused_on: tuple[str, ...] = ()
    words: str = ""


UPDATE = r"\.lora_[AB]$"
BOTTLENECK = r"\.(down|up)_(weight|bias)$"
ROWS = {
    "full": Row(Full(), ""),
    "lora": Row(Lora(rank=4), UPDATE),
    "dora": Row(Lora(rank=4, dora=True), r"\.lora_([AB]|magnitude_vector)$"),
    "pissa": Row(Lora(rank=4, init="pissa"), UPDATE),
    "qlora": Row(Qlora(rank=4), UPDATE),
    "qlora, int8": Row(Qlora(rank=4, quantise="int8"), UPDATE),
    "layers": Row(Layers(last=1), r"\b(layer\.1|layers\.2)\."),
    "layers, norms": Row(Layers(only="norms"), r"(?i)\blayers?\.\d\..*norm"),
    "layers, biases": Row(Layers(only="biases"), r"\blayers?\.\d\..*bias$", ("modernbert",), "have no biases"),
    "bitfit": Row(Bitfit(), r"bias$", ("modernbert",), "has none"),
    "adapters": Row(Adapters(reduction=4), BOTTLENECK),
    "adapters, houlsby": Row(Adapters(reduction=4, placement="houlsby", activation="gelu"), BOTTLENECK),
    "adapters, parallel": Row(
        Adapters(reduction=4, parallel=True, scaling=2.0), BOTTLENECK, LIKE_BERT, "several modules, and no one of them"
    ),
    "ia3": Row(Ia3(), r"\.ia3_l$"),
    "vera": Row(Vera(rank=8), r"\.vera_lambda_[bd]$"),
}
CELLS = [
    pytest.param(row, architecture, id=f"{name}-{architecture}")
    for name, row in ROWS.items()
    for architecture in ENCODERS
    if architecture not in row.refused_on
]
each = pytest.mark.parametrize(("row", "architecture"), CELLS)


def cells(chosen: Callable[[Method], bool]) -> pytest.MarkDecorator:
    """Those of the table whose method is one of the `chosen`."""
    found = [cell for cell in CELLS if chosen(cell.values[0].method)]  # type: ignore[union-attr]
    return pytest.mark.parametrize(("row", "architecture"), found)


def test_every_method_without_virtual_tokens_is_in_the_table() -> None:
    expected = {method for method in METHODS.values() if not method().num_virtual_tokens}
    assert {type(row.method) for row in ROWS.values()} == expected


@pytest.fixture(scope="module")
def rows() -> list[Sequence]:
    """Texts of several lengths, each read at all of its tokens."""
    random = np.random.default_rng(3)
    return [
        Sequence(random.integers(6, 262, length).astype(np.int32), np.ones(length, np.float32), row, np.zeros(1))
        for row, length in enumerate((9, 1, 23, 2))
    ]


@pytest.fixture(scope="module")
def pack(rows: list[Sequence]) -> Pack:
    return build_pack(rows, min_shared=NEVER)


def hidden(model: Model, pack: Pack) -> Tensor:
    model.causal.eval()
    with torch.no_grad():
        return model.hidden(model.attention(pack))


def tuned(build_model: BuildModel, architecture: str, method: Method, *, dtype: torch.dtype = torch.float64) -> Model:
    """A model with the method in it, moved away from where it starts."""
    model = build_model(architecture, dtype=dtype)
    with _disable_current_modes():  # bitsandbytes stores from float32, also where a test is `exact`
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
def test_a_method_starts_at_the_base_and_moves_what_it_says(
    build_model: BuildModel, pack: Pack, row: Row, architecture: str
) -> None:
    base, model = build_model(architecture, dtype=torch.float32), build_model(architecture, dtype=torch.float32)
    if row.method.stored_in is not None:
        quantise(base, row.method.stored_in)
    row.method.apply(model, seed=0)
    exact = not isinstance(row.method, Lora)  # DoRA and PiSSA begin at the base to rounding
    torch.testing.assert_close(hidden(model, pack), hidden(base, pack), rtol=0, atol=0 if exact else 1e-5)
    attach_head(model, num_outputs=2)
    torch.nn.init.ones_(model.outputs.weight)  # type: ignore[union-attr]
    model.outputs_at(pack).sin().sum().backward()
    with_gradient = {name for name, p in model.causal.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in model.causal.named_parameters() if re.search(row.trains, name)}
    assert {*with_gradient, "outputs.weight"} == set(trainable(model))
    assert len(with_gradient) >= 2


@each
def test_disabled_the_output_is_the_base_s(build_model: BuildModel, pack: Pack, row: Row, architecture: str) -> None:
    base = build_model(architecture, dtype=torch.float32)
    if row.method.stored_in is not None:
        quantise(base, row.method.stored_in)
    before, model = hidden(base, pack), tuned(build_model, architecture, row.method, dtype=torch.float32)
    moved = hidden(model, pack)
    assert not torch.allclose(moved, before, atol=1e-3)
    if not row.method.keeps_base:
        return
    with row.method.disabled(model):
        torch.testing.assert_close(hidden(model, pack), before, rtol=0, atol=0)
    assert torch.equal(hidden(model, pack), moved)


@each
def test_what_is_saved_comes_back_to_the_bit(
    build_model: BuildModel, pack: Pack, row: Row, architecture: str, tmp_path: Path
) -> None:
    model = tuned(build_model, architecture, row.method, dtype=torch.float32)
    row.method.save(model, folder=tmp_path)
    again = build_model(architecture, dtype=torch.float32)
    row.method.load(again, folder=tmp_path)
    assert torch.equal(hidden(again, pack), hidden(model, pack))
    assert not trainable(again)


@pytest.mark.usefixtures("exact")
@cells(lambda method: method.merges and method.stored_in is None)
def test_merged_is_a_plain_model_with_the_same_output(
    build_model: BuildModel, eager_twin: Callable[[Model], Any], rows: list[Sequence], row: Row, architecture: str
) -> None:
    names = [name for name, _ in build_model(architecture).causal.named_parameters()]
    model = tuned(build_model, architecture, row.method)
    before = ours(model, rows)
    row.method.merge(model)
    assert [name for name, _ in model.causal.named_parameters()] == names
    torch.testing.assert_close(ours(model, rows), before, rtol=0, atol=1e-10)
    torch.testing.assert_close(theirs(eager_twin(model), rows), before, rtol=0, atol=1e-10)


@cells(lambda method: method.keeps_base)
def test_frozen_weights_can_be_half_as_wide(build_model: BuildModel, pack: Pack, row: Row, architecture: str) -> None:
    model = build_model(architecture, dtype=torch.float32)
    row.method.apply(model, seed=0)
    set_trainable_dtype(model, frozen=torch.bfloat16)
    model.checkpoint_activations()
    model.causal.train()
    with torch.autocast("cpu", torch.bfloat16):
        model.hidden(model.attention(pack)).sin().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in trainable(model).values())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "architecture"),
    [
        pytest.param(row, architecture, id=f"{name}-{architecture}")
        for name, row in ROWS.items()
        for architecture in row.refused_on
    ],
)
def test_what_does_not_suit_is_refused_by_name(build_model: BuildModel, row: Row, architecture: str) -> None:
    with pytest.raises(RecipeError, match=row.words) as error:
        row.method.apply(build_model(architecture), seed=0)
    assert error.value.hint


# ------------------------------------------------------------------------------------------------------- against PEFT


def ours(model: Model, rows: list[Sequence]) -> Tensor:
    return torch.cat([hidden(model, build_pack([row])) for row in rows])


def theirs(encoder: Any, rows: list[Sequence]) -> Tensor:
    ids = [torch.from_numpy(row.tokens_T).long()[None] for row in rows]
    with torch.no_grad():
        return torch.cat([encoder(input_ids=i, attention_mask=torch.ones_like(i)).last_hidden_state[0] for i in ids])


@pytest.mark.usefixtures("exact")
@cells(lambda method: method.peft_type is not None and method.stored_in is None)
def test_peft_computes_the_same_from_our_adapter(
    build_model: BuildModel,
    eager_twin: Callable[[Model], Any],
    rows: list[Sequence],
    row: Row,
    architecture: str,
    tmp_path: Path,
) -> None:
    from peft import PeftModel, PeftModelForFeatureExtraction

    twin = eager_twin(build_model(architecture))
    model = tuned(build_model, architecture, row.method)
    row.method.save(model, folder=tmp_path)
    peft_model = PeftModel.from_pretrained(twin, tmp_path, autocast_adapter_dtype=False).eval()
    assert type(peft_model) is PeftModelForFeatureExtraction
    for parameter in peft_model.parameters():
        parameter.data = parameter.data.double()
    torch.testing.assert_close(theirs(peft_model, rows), ours(model, rows), rtol=0, atol=1e-8)


@pytest.mark.usefixtures("exact")
def test_we_compute_the_same_from_peft_s_own_ia3_on_bert(
    build_model: BuildModel, eager_twin: Callable[[Model], Any], rows: list[Sequence], tmp_path: Path
) -> None:
    """Its default on BERT scales the input of attention's last layer too; ours does where it is told to."""
    from peft import IA3Config, get_peft_model

    model = build_model("bert")
    peft_model: Any = get_peft_model(eager_twin(model), IA3Config(task_type="FEATURE_EXTRACTION"))
    generator = torch.Generator().manual_seed(1)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:  # float32 numbers, which is what we keep
            parameter.data = (1 + 0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    peft_model.eval().save_pretrained(str(tmp_path))
    Ia3(outputs=("key", "value"), inputs=("output.dense",)).load(model, folder=tmp_path)
    assert len([name for name, _ in model.causal.named_parameters() if name.endswith("ia3_l")]) == 2 * 4
    torch.testing.assert_close(ours(model, rows), theirs(peft_model, rows), rtol=0, atol=1e-10)


# ---------------------------------------------------------------------------------------------------- where they stand

BLOCK = r"^.*layers?\.\d\."
AFTER = {"distilbert": ("ffn", "attention.out_lin"), "modernbert": ("mlp", "attn.Wo")} | dict.fromkeys(
    LIKE_BERT, ("output.dense", "attention.output.dense")
)
SCALED = {"distilbert": ("attention.k_lin", "attention.v_lin", "ffn.lin2"), "modernbert": ("attn.Wqkv", "mlp.Wo")}
SCALED |= dict.fromkeys(LIKE_BERT, ("attention.self.key", "attention.self.value", "output.dense"))


@pytest.mark.parametrize("architecture", ENCODERS)
def test_each_block_has_them_at_the_places_of_the_papers(build_model: BuildModel, architecture: str) -> None:
    model = build_model(architecture)
    feed_forward, attention = AFTER[architecture]
    for method, leaves in (
        (Adapters(reduction=4), [feed_forward]),
        (Adapters(reduction=4, placement="houlsby"), [feed_forward, attention]),
        (Ia3(), SCALED[architecture]),
    ):
        found = [re.sub(BLOCK, "", name) for name in method.places(model)]
        assert sorted(found) == sorted([*leaves] * len(model.layers))
    moved = {name: tuple(p.shape) for name, p in trainable(tuned(build_model, architecture, Ia3())).items()}
    wide = {re.sub(BLOCK, "", name) for name, shape in moved.items() if shape == (1, 48)}
    assert wide == {f"{SCALED[architecture][-1]}.ia3_l"}  # the one vector that scales an input, as wide as it


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_a_block_of_bert_by_hand(build_model: BuildModel, rows: list[Sequence], placement: Any) -> None:
    """Post-norm: LayerNorm(x + adapter(attention(x))), then LayerNorm(a + adapter(feed-forward(a)))."""
    method = Adapters(reduction=4, placement=placement, activation="silu", scaling=0.5)
    model = tuned(build_model, "bert", method)
    seen: dict[str, Tensor] = {}
    block = model.layers[0]
    block.register_forward_hook(lambda module, given, out: seen.update(x=given[0][0], y=out[0]))
    hidden(model, build_pack([rows[0]]))
    weights = {name: p.detach() for name, p in block.named_parameters()}

    def linear(name: str, x_TD: Tensor) -> Tensor:
        return x_TD @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def adapted(name: str, h_TD: Tensor) -> Tensor:
        w = {leaf: weights[f"{name}.{leaf}"] for leaf in ("down_weight", "down_bias", "up_weight", "up_bias")}
        inner_TW = h_TD @ w["down_weight"].T + w["down_bias"]
        return h_TD + 0.5 * ((inner_TW * inner_TW.sigmoid()) @ w["up_weight"].T + w["up_bias"])

    def normed(name: str, h_TD: Tensor) -> Tensor:
        centred = h_TD - h_TD.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    q, k, v = (linear(f"attention.self.{n}", seen["x"]).unflatten(-1, (4, 8)) for n in ("query", "key", "value"))
    shares_HTT = (torch.einsum("ihe,jhe->hij", q, k) / 8**0.5).softmax(-1)
    context_TD = torch.einsum("hij,jhe->ihe", shares_HTT, v).flatten(1)
    out, wrapped = "attention.output.dense", placement == "houlsby"
    attended = adapted(out, linear(f"{out}.base", context_TD)) if wrapped else linear(out, context_TD)
    a_TD = normed("attention.output.LayerNorm", seen["x"] + attended)
    inner_TF = functional.gelu(linear("intermediate.dense", a_TD))
    expected = normed("output.LayerNorm", a_TD + adapted("output.dense", linear("output.dense.base", inner_TF)))
    torch.testing.assert_close(seen["y"], expected, rtol=0, atol=1e-11)
