"""What every tuning method promises: one row a method. PEFT is the oracle for adapters."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tunesmith.data.pack import Pack, build_pack
from tunesmith.data.tokens import TokenStore
from tunesmith.data.types import Sequence
from tunesmith.errors import ModelError, RecipeError
from tunesmith.generate.runner import Generator
from tunesmith.generate.sampling import Sampling
from tunesmith.methods import METHODS, Method
from tunesmith.methods.adapters import Adapters
from tunesmith.methods.base import Frozen, num_trainable, set_trainable_dtype, trainable
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
from tunesmith.objectives.instruction import Instruction
from tunesmith.train.loop import Fit
from tunesmith.train.passes import autocast, forward
from tunesmith.train.settings import TrainSettings

BuildModel = Callable[..., Model]


@dataclass(frozen=True)
class Row:
    """A method, which of the parameters' names it trains, and what it promises beyond what every method does."""

    method: Method
    trains: Callable[[str], bool]
    starts_at_base: bool = True  # to the bit; `start_tolerance` where it is to rounding
    start_tolerance: float = 0.0
    draws: bool = True  # where it begins depends on the seed
    same_state: bool = True  # what is loaded has the parameters that were trained
    learning_rate: float = 0.01  # at which twenty steps on the toy rows bring the loss
    falls_to: float = 0.8  # to this share of its start
    only_on: tuple[str, ...] | None = None  # architectures; elsewhere it is refused


def leaf(*names: str) -> Callable[[str], bool]:
    return lambda name: name.rpartition(".")[2] in names


def is_virtual(name: str) -> bool:
    return name.startswith("virtual_tokens.")


def is_last_block(name: str) -> bool:
    return re.search(r"\b(layers\.1|h\.2)\.", name) is not None


def is_bias(name: str) -> bool:
    return name.endswith("bias")


def is_block_norm(name: str) -> bool:
    return re.search(r"\b(layers|h)\.\d+\..*(norm|\bln_)", name) is not None


is_update = leaf("lora_A", "lora_B")
is_bottleneck = leaf("down_weight", "down_bias", "up_weight", "up_bias")
WITH_BIASES = ("gpt2", "gpt_neox")
WITH_DOWN = ("llama", "gemma2", "gemma3_text", "phi3")

ROWS = {
    "full": Row(Full(), lambda name: True, draws=False),
    "lora": Row(Lora(rank=4), is_update),
    "lora, rank-stabilised": Row(Lora(rank=4, alpha=3.0, rank_stabilised=True), is_update),
    "lora with dropout": Row(Lora(rank=4, dropout=0.3), is_update),
    "lora, own ranks, fast B": Row(Lora(rank=4, ranks={"down_proj": 2}, b_rate_factor=4), is_update, only_on=WITH_DOWN),
    "lora, gaussian": Row(Lora(rank=4, init="gaussian"), is_update),
    "qlora": Row(Qlora(rank=4), is_update),
    "dora": Row(Lora(rank=4, dora=True), leaf("lora_A", "lora_B", "lora_magnitude_vector"), start_tolerance=1e-6),
    "pissa": Row(
        Lora(rank=4, init="pissa"), is_update, start_tolerance=1e-5, draws=False, same_state=False, learning_rate=0.003
    ),
    "layers": Row(Layers(last=1), is_last_block, draws=False),
    "layers, norms": Row(Layers(only="norms"), is_block_norm, draws=False, learning_rate=0.1),
    "prompt": Row(Prompt(num_tokens=5), is_virtual, starts_at_base=False, learning_rate=0.1, falls_to=0.92),
    "p_tuning": Row(
        PTuning(num_tokens=5, width=16),
        is_virtual, starts_at_base=False, same_state=False, learning_rate=0.05, falls_to=0.92,
    ),
    "p_tuning, lstm": Row(
        PTuning(num_tokens=5, width=16, encoder="lstm"),
        is_virtual, starts_at_base=False, same_state=False, learning_rate=0.05, falls_to=0.92),
    "prefix": Row(Prefix(num_tokens=5), is_virtual, starts_at_base=False, learning_rate=0.1, falls_to=0.92),
    "prefix by an mlp": Row(
        Prefix(num_tokens=5, reparameterise=True, width=16),
        is_virtual, starts_at_base=False, same_state=False, learning_rate=0.05, falls_to=0.92),
    "adapters": Row(Adapters(reduction=4), is_bottleneck, falls_to=0.9),
    "adapters, houlsby": Row(Adapters(reduction=4, placement="houlsby", activation="gelu"), is_bottleneck),
    "adapters, parallel": Row(Adapters(reduction=4, parallel=True, scaling=2.0), is_bottleneck),
    "ia3": Row(Ia3(), leaf("ia3_l"), draws=False, learning_rate=0.1, falls_to=0.85),
    "bitfit": Row(Bitfit(), is_bias, draws=False, only_on=WITH_BIASES, learning_rate=0.03, falls_to=0.9),
    "vera": Row(Vera(rank=8), leaf("vera_lambda_b", "vera_lambda_d"), draws=False, learning_rate=0.1),
}  # fmt: skip
ROWS |= {  # every method that leaves the base alone, on a base in few bits
    f"{name}, {bits}": replace(row, method=row.method.model_copy(update={"quantise": bits}))
    for name, row in ROWS.items()
    for bits in ("int8", "nf4")
    if isinstance(row.method, Frozen) and row.method.stored_in is None and "," not in name and "with" not in name
}
KINDS = ["llama", "gpt2", "gemma2", "phi3", "gpt_neox", "qwen3_moe"]


def test_every_method_is_in_the_table() -> None:
    assert {type(row.method) for row in ROWS.values()} == set(METHODS.values())
    assert all(METHODS[row.method.kind] is type(row.method) for row in ROWS.values())  # type: ignore[attr-defined]


def on(*architectures: str) -> pytest.MarkDecorator:
    """Each row of the table on each of the architectures that it takes."""
    cases = [
        pytest.param(row, architecture, id=f"{name}-{architecture}")
        for name, row in ROWS.items()
        for architecture in architectures
        if row.only_on is None or architecture in row.only_on
        if row.method.stored_in is None or architecture in ("llama", "gpt2")
    ]
    return pytest.mark.parametrize(("row", "architecture"), cases)


each_row = pytest.mark.parametrize(
    ("row", "architecture"), [pytest.param(row, (row.only_on or ("llama",))[0], id=name) for name, row in ROWS.items()]
)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.only_on])
def test_a_base_that_does_not_suit_is_refused(build_model: BuildModel, name: str) -> None:
    row = ROWS[name]
    for architecture in set(KINDS) - set(row.only_on or ()):
        with pytest.raises(RecipeError) as error:
            row.method.apply(build_model(architecture), seed=0)
        assert error.value.hint


def hidden(model: Model, pack: Pack) -> Tensor:
    model.causal.eval()
    with torch.no_grad():
        return model.hidden(model.attention(pack))


def stir(model: Model, *, seed: int = 1) -> None:
    """Move all that is trained away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(
                parameter.dtype
            )


def cast_parameters(model: Model, dtype: torch.dtype) -> None:
    """All parameters to `dtype`; buffers (rotary frequencies) stay as they are."""
    for parameter in model.causal.parameters():
        parameter.data = parameter.data.to(dtype)


def based(build_model: BuildModel, architecture: str, row: Row, *, dtype: torch.dtype = torch.float64) -> Model:
    """The base as the method stores it."""
    model = build_model(architecture, dtype=dtype)
    if row.method.stored_in is not None:
        quantise(model, row.method.stored_in)
    return model


def tuned(build_model: BuildModel, architecture: str, row: Row, *, dtype: torch.dtype = torch.float64) -> Model:
    """A model with the method in it, moved; in float64 what the method inserts is float64 too."""
    model = build_model(architecture, dtype=dtype)
    with _disable_current_modes():  # bitsandbytes stores from float32, also where a test is `exact`
        row.method.apply(model, seed=0)
    cast_parameters(model, dtype)
    stir(model)
    return model


@on(*KINDS)
def test_at_the_start_the_output_is_the_base_s(
    build_model: BuildModel, row: Row, architecture: str, tree_pack: Pack
) -> None:
    before = hidden(based(build_model, architecture, row, dtype=torch.float32), tree_pack)
    model = build_model(architecture, dtype=torch.float32)
    row.method.apply(model, seed=0)
    if row.starts_at_base:
        torch.testing.assert_close(hidden(model, tree_pack), before, rtol=0, atol=row.start_tolerance)
    else:  # virtual tokens are seen from the start; everything else is the base's
        with row.method.disabled(model):
            assert torch.equal(hidden(model, tree_pack), before)


@on(*KINDS)
def test_only_what_is_declared_gets_gradients(
    build_model: BuildModel, row: Row, architecture: str, tree_pack: Pack
) -> None:
    model = build_model(architecture, dtype=torch.float32)
    row.method.apply(model, seed=0)
    forward(model, tree_pack, objective=Instruction()).sum.backward()
    with_gradient = {name for name, p in model.causal.named_parameters() if p.grad is not None}
    assert with_gradient == set(trainable(model))
    assert with_gradient == {name for name, _ in model.causal.named_parameters() if row.trains(name)}
    assert num_trainable(model) == sum(p.numel() for n, p in model.causal.named_parameters() if row.trains(n)) > 0


@on(*KINDS)
def test_disabled_the_output_is_the_base_s(
    build_model: BuildModel, row: Row, architecture: str, tree_pack: Pack
) -> None:
    base = hidden(based(build_model, architecture, row), tree_pack)
    model = tuned(build_model, architecture, row)
    moved = hidden(model, tree_pack)
    assert not torch.allclose(moved, base, atol=1e-3)
    if not row.method.keeps_base:
        with pytest.raises(ModelError, match="keeps no base"), row.method.disabled(model):
            pass
        return
    with row.method.disabled(model):
        assert torch.equal(hidden(model, tree_pack), base)
    assert torch.equal(hidden(model, tree_pack), moved)
    with pytest.raises(ZeroDivisionError), row.method.disabled(model):
        _ = 1 // 0
    assert torch.equal(hidden(model, tree_pack), moved)


@on(*KINDS)
def test_merged_equals_unmerged(build_model: BuildModel, row: Row, architecture: str, tree_pack: Pack) -> None:
    names = [name for name, _ in build_model(architecture).causal.named_parameters()]
    model = tuned(build_model, architecture, row)
    before = hidden(model, tree_pack)
    if not row.method.merges:
        with pytest.raises(ModelError, match="cannot be merged") as error:
            row.method.merge(model)
        assert error.value.hint
        assert torch.equal(hidden(model, tree_pack), before)
        return
    row.method.merge(model)
    torch.testing.assert_close(hidden(model, tree_pack), before, rtol=0, atol=1e-5)
    assert [name for name, _ in model.causal.named_parameters()] == names
    assert not any(type(module).__module__.startswith("tunesmith") for module in model.causal.modules())


@pytest.mark.usefixtures("exact")
@on("llama", "gpt2")
def test_merged_equals_unmerged_exactly_in_float64(
    build_model: BuildModel, row: Row, architecture: str, tree_pack: Pack
) -> None:
    model = tuned(build_model, architecture, row)
    before = hidden(model, tree_pack)
    if row.method.merges:
        row.method.merge(model)
    torch.testing.assert_close(hidden(model, tree_pack), before, rtol=0, atol=1e-11)


@on(*KINDS)
def test_what_is_saved_comes_back_to_the_bit(
    build_model: BuildModel, row: Row, architecture: str, tree_pack: Pack, tmp_path: Path
) -> None:
    model = tuned(build_model, architecture, row, dtype=torch.float32)
    row.method.save(model, folder=tmp_path)
    again = build_model(architecture, dtype=torch.float32)
    row.method.load(again, folder=tmp_path)
    before, after = model.causal.state_dict(), again.causal.state_dict()
    if row.same_state:
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(hidden(model, tree_pack), hidden(again, tree_pack))
    assert not trainable(again)


@pytest.mark.usefixtures("exact")
@on("llama", "gpt2", "gemma3_text")
def test_the_loss_and_the_gradients_do_not_depend_on_packing(
    build_model: BuildModel, row: Row, architecture: str, tree_pack: Pack, flat_pack: Pack, tree_rows: list[Sequence]
) -> None:
    model = tuned(build_model, architecture, row)
    model.causal.eval()  # dropout draws for each token computed, so it is no part of this promise

    def measured(packs: list[Pack]) -> tuple[float, Tensor]:
        model.causal.zero_grad(set_to_none=True)
        losses = [forward(model, pack, objective=Instruction()).sum for pack in packs]
        torch.stack(losses).sum().backward()
        gradients = [p.grad for p in trainable(model).values() if p.grad is not None]
        assert len(gradients) == len(trainable(model))
        return float(torch.stack(losses).sum().detach()), torch.cat([g.flatten() for g in gradients])

    expected, gradient = measured([tree_pack])
    for packs in ([flat_pack], [build_pack([r]) for r in tree_rows]):
        loss, other = measured(packs)
        assert loss == pytest.approx(expected, rel=1e-11)
        torch.testing.assert_close(other, gradient, rtol=1e-8, atol=1e-9)


@on("llama", "gpt2", "gemma3_text")
def test_what_is_generated_is_what_the_whole_sequence_says(
    build_model: BuildModel, row: Row, architecture: str
) -> None:
    model = tuned(build_model, architecture, row)
    prompts = [[*range(20, 40), 7], [*range(20, 40), 8, 9], [5]]
    completions = Generator(model, stop_ids=[]).generate(prompts, sampling=Sampling(max_tokens=5))
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = list(prompt)
        for token, logprob in zip(completion.tokens, completion.logprobs, strict=True):
            pack = build_pack([Sequence(np.array(ids, np.int32), np.zeros(len(ids), np.float32))])
            logits_V = head_logits(hidden(model, pack)[-1:], head=model.head, softcap=model.softcap)[0]
            assert int(logits_V.argmax()) == token
            assert float(logits_V.log_softmax(-1)[token]) == pytest.approx(logprob, abs=1e-5)
            ids.append(token)


@on("llama", "gpt2")
def test_the_loss_falls_in_twenty_steps(
    build_model: BuildModel,
    row: Row,
    architecture: str,
    tree_rows: list[Sequence],
    token_store: Callable[..., TokenStore],
    tmp_path: Path,
    heard: Any,
) -> None:
    model = build_model(architecture, dtype=torch.float32)
    row.method.apply(model, seed=0)
    fit = Fit(
        model,
        method=row.method,
        objective=Instruction(),
        train=token_store([[r] for r in tree_rows], folder=tmp_path / "train"),
        validation=None,
        settings=TrainSettings(
            epochs=20, batch_rows=len(tree_rows), learning_rate=row.learning_rate, checkpoint_every=100
        ),
        folder=tmp_path,
        observer=heard,
    )
    fit.run()
    losses = [record["loss"] for record in heard.steps]
    assert len(losses) == 20
    assert losses[-1] < row.falls_to * losses[0]


@each_row
def test_the_start_depends_on_the_seed_alone(build_model: BuildModel, row: Row, architecture: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    states = []
    for seed in (3, 3, 4):
        model = build_model(architecture, dtype=torch.float32)
        torch.manual_seed(0)
        row.method.apply(model, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(torch.cat([p.detach().flatten() for p in trainable(model).values()]))
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2]) != row.draws


@each_row
def test_frozen_weights_can_be_half_as_wide(
    build_model: BuildModel, row: Row, architecture: str, tree_pack: Pack
) -> None:
    model = build_model(architecture, dtype=torch.float32)
    row.method.apply(model, seed=0)
    set_trainable_dtype(model, frozen=torch.bfloat16)
    for name, parameter in model.causal.named_parameters():
        if row.trains(name) or parameter.ndim > 1:
            assert parameter.dtype == (torch.float32 if row.trains(name) else torch.bfloat16)
    with autocast(model, TrainSettings(precision="bf16")):
        forward(model, tree_pack, objective=Instruction()).sum.backward()
    assert all(torch.isfinite(p.grad).all() for p in trainable(model).values())  # type: ignore[arg-type]


# Full


def test_full_refuses_weights_that_are_not_all_there(build_model: BuildModel, tmp_path: Path) -> None:
    model = build_model("llama", dtype=torch.float32)
    Full().save(model, folder=tmp_path)
    path = tmp_path / "model.safetensors"
    whole = load_file(str(path))
    for name in ("model.layers.0.mlp.up_proj.weight", "lm_head.weight"):
        save_file({k: v for k, v in whole.items() if k != name}, str(path))
        with pytest.raises(ModelError, match="the weights lack") as error:
            Full().load(build_model("llama", dtype=torch.float32), folder=tmp_path)
        assert error.value.hint
    with pytest.raises(ModelError):
        Full().load(build_model("gpt2", dtype=torch.float32), folder=tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError):
        Full().load(build_model("llama", dtype=torch.float32), folder=tmp_path)


# LoRA against PEFT

PEFT_CASES = {
    "llama": ("llama", Lora(rank=4)),
    "some layers": ("llama", Lora(rank=2, alpha=5.0, targets=("q_proj", "v_proj"))),
    "rank-stabilised": ("qwen3", Lora(rank=9, alpha=4.0, rank_stabilised=True)),
    "transposed layers": ("gpt2", Lora(rank=4)),
    "transposed, rank-stabilised": ("gpt2", Lora(rank=4, alpha=2.5, rank_stabilised=True, targets=("c_attn",))),
    "fused layers": ("phi3", Lora(rank=3)),
    "tied head": ("gemma3_text", Lora(rank=4)),
    "biases": ("gpt_neox", Lora(rank=4)),
}


@pytest.fixture(params=PEFT_CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, Lora]:
    return PEFT_CASES[request.param]


def their_hidden(peft_model: Any, rows: list[Sequence]) -> Tensor:
    base = peft_model.get_base_model().base_model
    with torch.no_grad():
        states = [base(input_ids=torch.from_numpy(r.tokens_T).long()[None], use_cache=False) for r in rows]
    return torch.cat([s.last_hidden_state[0] for s in states])


def our_hidden(model: Model, rows: list[Sequence]) -> Tensor:
    return torch.cat([hidden(model, build_pack([r])) for r in rows])


@pytest.mark.usefixtures("exact")
def test_peft_reads_our_adapter_and_computes_the_same(
    case: tuple[str, Lora],
    build_model: BuildModel,
    eager_twin: Callable[[Model], Any],
    tree_rows: list[Sequence],
    tmp_path: Path,
) -> None:
    from peft import PeftModel

    architecture, method = case
    base = build_model(architecture)
    twin = eager_twin(base)
    model = tuned(build_model, architecture, Row(method, is_update))
    method.save(model, folder=tmp_path)
    theirs = PeftModel.from_pretrained(twin, tmp_path, autocast_adapter_dtype=False).eval()
    ours = our_hidden(model, tree_rows)
    torch.testing.assert_close(their_hidden(theirs, tree_rows), ours, rtol=0, atol=1e-9)
    assert not torch.allclose(our_hidden(base, tree_rows), ours, atol=1e-3)


PEFT_HAS = {n: row for n, row in ROWS.items() if row.method.peft_type is not None and row.method.stored_in is None}


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    ("row", "architecture"),
    [
        pytest.param(row, architecture, id=f"{name}-{architecture}")
        for name, row in PEFT_HAS.items()
        for architecture in ("llama", "qwen3", "gpt2", "gpt_neox", "phi3")
        if row.only_on is None or architecture in row.only_on
    ],
)
def test_peft_computes_the_same_with_every_method_that_it_has(
    row: Row,
    architecture: str,
    build_model: BuildModel,
    eager_twin: Callable[[Model], Any],
    tree_rows: list[Sequence],
    tmp_path: Path,
) -> None:
    from peft import PeftModel

    twin = eager_twin(build_model(architecture))
    model = tuned(build_model, architecture, row)
    row.method.save(model, folder=tmp_path)
    theirs = PeftModel.from_pretrained(twin, tmp_path, autocast_adapter_dtype=False).eval()
    for parameter in theirs.parameters():
        parameter.data = parameter.data.double()
    for sequence in tree_rows:
        with torch.no_grad():
            expected = theirs(input_ids=torch.from_numpy(sequence.tokens_T).long()[None]).logits[0]
            ours = head_logits(hidden(model, build_pack([sequence])), head=model.head, softcap=model.softcap)
        tolerance = 1e-6 if row.trains is is_virtual else 1e-8  # PEFT keeps virtual tokens in float32
        torch.testing.assert_close(ours, expected[-len(ours) :].to(ours.dtype), rtol=0, atol=tolerance)


@pytest.mark.usefixtures("exact")
def test_we_read_peft_s_adapter_and_compute_the_same(
    case: tuple[str, Lora],
    build_model: BuildModel,
    eager_twin: Callable[[Model], Any],
    tree_rows: list[Sequence],
    tmp_path: Path,
) -> None:
    from peft import LoraConfig, get_peft_model

    architecture, method = case
    model = build_model(architecture)
    for parameter in model.causal.parameters():
        parameter.data = parameter.data.float().double()
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha or 2 * method.rank,  # type: ignore[arg-type]
        use_rslora=method.rank_stabilised,
        target_modules="all-linear" if method.targets == "all-linear" else list(method.targets),
        fan_in_fan_out=architecture == "gpt2",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(eager_twin(model), config, autocast_adapter_dtype=False).eval()
    for parameter in theirs.parameters():
        parameter.data = parameter.data.float().to(parameter.dtype)  # so that what we keep in float32 is exact
    theirs.save_pretrained(str(tmp_path))
    found = from_peft(tmp_path)
    assert found.scaling(method.rank) == pytest.approx(method.scaling(method.rank))
    found.load(model, folder=tmp_path)
    cast_parameters(model, torch.float64)
    torch.testing.assert_close(our_hidden(model, tree_rows), their_hidden(theirs, tree_rows), rtol=0, atol=1e-9)


def test_scaling_is_as_the_papers_have_it() -> None:
    assert Lora().scaling(16) == 2.0
    assert Lora(alpha=8.0).scaling(16) == 0.5
    assert Lora(alpha=8.0, rank_stabilised=True).scaling(16) == 2.0


def test_lora_by_hand(build_model: BuildModel) -> None:
    """One layer: h = W x + s B A x, with numbers that can be checked in the head."""
    model = build_model("llama", dtype=torch.float32)
    method = Lora(rank=1, alpha=3.0, targets=("down_proj",))
    method.apply(model, seed=0)
    layer: Any = model.causal.get_submodule("model.layers.0.mlp.down_proj")
    x = torch.zeros(48)
    x[5] = 2.0
    with torch.no_grad():
        layer.base.weight.zero_()
        layer.lora_A.zero_()[0, 5] = 0.5  # A x = 1
        layer.lora_B.zero_()[7, 0] = 4.0  # s B A x = 3 * 4
        assert layer(x).nonzero().flatten().tolist() == [7]
        assert float(layer(x)[7]) == 12.0


def test_dropout_is_on_in_training_and_off_in_use(build_model: BuildModel, tree_pack: Pack) -> None:
    model = build_model("llama", dtype=torch.float32)
    Lora(rank=4, dropout=0.5).apply(model, seed=0)
    stir(model)
    model.causal.train()
    losses = {float(forward(model, tree_pack, objective=Instruction()).sum.detach()) for _ in range(3)}
    assert len(losses) == 3
    model.causal.eval()
    losses = {float(forward(model, tree_pack, objective=Instruction()).sum.detach()) for _ in range(3)}
    assert len(losses) == 1


def test_the_vocabulary_head_is_left_alone_unless_named(build_model: BuildModel) -> None:
    model = build_model("llama", dtype=torch.float32)
    Lora(rank=2).apply(model, seed=0)
    assert not any(name.startswith("lm_head") for name in trainable(model))
    assert len(trainable(model)) == 2 * 7 * 2


@pytest.mark.parametrize("target", ["q_prj", "embed_tokens", "lm_head", "proj", ""])
def test_unknown_layers_are_refused_with_those_there_are(build_model: BuildModel, target: str) -> None:
    with pytest.raises(RecipeError, match=r"this base has down_proj, gate_proj, k_proj") as error:
        Lora(rank=2, targets=("q_proj", target)).apply(build_model("llama"), seed=0)
    assert error.value.hint


@pytest.mark.parametrize("saved_rank", [1, 4])
def test_an_adapter_of_another_rank_is_refused(build_model: BuildModel, tmp_path: Path, saved_rank: int) -> None:
    model = build_model("llama", dtype=torch.float32)
    method = Lora(rank=saved_rank)
    method.apply(model, seed=0)
    method.save(model, folder=tmp_path)
    with pytest.raises(ModelError):
        Lora(rank=8).load(build_model("llama", dtype=torch.float32), folder=tmp_path)


def test_an_adapter_for_another_base_is_refused(build_model: BuildModel, tmp_path: Path) -> None:
    model = build_model("llama", dtype=torch.float32)
    method = Lora(rank=2)
    method.apply(model, seed=0)
    method.save(model, folder=tmp_path)
    for kind, config in (("gpt2", {}), ("llama", {"num_hidden_layers": 3}), ("llama", {"intermediate_size": 40})):
        with pytest.raises(ModelError):
            method.load(build_model(kind, dtype=torch.float32, **config), folder=tmp_path)


@pytest.mark.parametrize("damage", ["absent", "cut off"])
def test_a_damaged_adapter_is_refused(build_model: BuildModel, tmp_path: Path, damage: str) -> None:
    model = build_model("llama", dtype=torch.float32)
    method = Lora(rank=2)
    method.apply(model, seed=0)
    method.save(model, folder=tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage == "cut off":
        path.write_bytes(content[:-10])
    with pytest.raises(ModelError, match="cannot be read"):
        method.load(build_model("llama", dtype=torch.float32), folder=tmp_path)


PLAIN = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none", "use_rslora": False,
    "target_modules": ["q_proj"], "init_lora_weights": True,
}  # fmt: skip


def write_config(folder: Path, **changes: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | changes), "utf-8")


def test_a_plain_adapter_s_settings_are_read(tmp_path: Path) -> None:
    write_config(tmp_path, lora_alpha=6, use_rslora=True, lora_dropout=0.1)
    expected = Lora(rank=4, alpha=6.0, dropout=0.1, rank_stabilised=True, targets=("q_proj",))
    assert from_peft(tmp_path) == expected
    write_config(tmp_path, target_modules="all-linear")
    assert from_peft(tmp_path).targets == "all-linear"


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "IA3"},
        {"bias": "all"},
        {"lora_bias": True},
        {"rank_pattern": {r"layers\\.\\d+\\.q_proj": 8}},
        {"alpha_pattern": {"q_proj": 8}},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": [0]},
        {"target_parameters": ["experts.down_proj"]},
        {"trainable_token_indices": [1]},
        {"alora_invocation_tokens": [1]},
        {"layer_replication": [[0, 2]]},
        {"target_modules": r".*\.q_proj"},
        {"target_modules": None},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"r": "four"},
    ],
    ids=str,
)
def test_what_is_not_plain_lora_is_refused_by_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_config(tmp_path, **changes)
    with pytest.raises(ModelError) as error:
        from_peft(tmp_path)
    assert error.value.hint
    assert error.value.file == str(tmp_path / "adapter_config.json")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"peft_type": "LORA"}'])
def test_a_broken_adapter_configuration_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "adapter_config.json").write_text(content, "utf-8")
    with pytest.raises(ModelError):
        from_peft(tmp_path)


def test_merging_rounds_once(build_model: BuildModel) -> None:
    """The sum is taken in float32 and rounded to the base's bfloat16 at the end, not the update before the sum."""
    model = build_model("llama", dtype=torch.bfloat16)
    method = Lora(rank=4)
    method.apply(model, seed=0)
    stir(model)
    name = "model.layers.0.self_attn.q_proj"
    layer: Any = model.causal.get_submodule(name)
    expected = (layer.base.weight.float() + layer.delta().float()).bfloat16()
    method.merge(model)
    assert torch.equal(model.causal.get_submodule(name).weight, expected)


def test_applying_a_method_leaves_other_copies_alone(build_model: BuildModel, tree_pack: Pack) -> None:
    model = build_model("llama", dtype=torch.float32)
    other = copy.deepcopy(model)
    before = hidden(other, tree_pack)
    Lora(rank=2).apply(model, seed=0)
    stir(model)
    assert np.array_equal(hidden(other, tree_pack).numpy(), before.numpy())


# Settings of the other methods


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Prefix(width=16), "width has no effect"),
        (lambda: Layers(last=1, first=1), "give one of them"),
        (lambda: Layers(last=1, unfreeze_by=0.5), "no effect on a single block"),
        (lambda: Adapters(parallel=True, placement="houlsby"), "leave out placement"),
        (lambda: Lora(dora=True, init="pissa"), "choose one"),
        (lambda: Lora(rank_stabilised=True, init="pissa"), "leave out rank_stabilised"),
        (lambda: Lora(ranks={"q_proj": 0}), "below 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(build: Callable[[], Method], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "method",
    [
        Layers(last=3),
        Layers(first=3),
        Layers(blocks=(0, 2)),
        Layers(only="biases"),
        Bitfit(),
        Prompt(num_tokens=128),
        Prefix(num_tokens=200),
        Ia3(outputs=("k_prj",)),
        Ia3(outputs=("down_proj",)),
        Adapters(reduction=64),
        Lora(rank=17, init="pissa"),
        Lora(rank=4, ranks={"k_prj": 2}),
        Vera(targets=("k_prj",)),
    ],
    ids=repr,
)
def test_what_does_not_suit_the_base_is_refused_with_what_would(build_model: BuildModel, method: Method) -> None:
    with pytest.raises(RecipeError) as error:
        method.apply(build_model("llama"), seed=0)
    assert error.value.hint


def test_blocks_are_chosen_by_number(build_model: BuildModel) -> None:
    def chosen(method: Layers) -> set[str]:
        return {name.split(".")[2] for name in method.chosen(model) if name.startswith("model.layers.")}

    model = build_model("llama", num_hidden_layers=4)
    assert chosen(Layers(last=2)) == {"2", "3"}
    assert chosen(Layers(first=1)) == {"0"}
    assert chosen(Layers(blocks=(1, 3))) == {"1", "3"}
    assert chosen(Layers()) == {"0", "1", "2", "3"}
    assert set(Layers(last=1, head=True).chosen(model)) - set(Layers(last=1).chosen(model)) == {
        "model.norm.weight", "lm_head.weight",
    }  # fmt: skip
    tied = build_model("llama", num_hidden_layers=4, tie_word_embeddings=True)
    assert set(Layers(last=1, head=True).chosen(tied)) - set(Layers(last=1).chosen(tied)) == {"model.norm.weight"}


def test_lower_blocks_move_more_slowly_and_later(
    build_model: BuildModel,
    tree_rows: list[Sequence],
    token_store: Callable[..., TokenStore],
    tmp_path: Path,
    heard: Any,
) -> None:
    method = Layers(last=3, depth_factor=0.5, unfreeze_by=0.6)
    model = build_model("llama", num_hidden_layers=4, dtype=torch.float32)
    factors = method.rate_factors(model)
    assert {factors[f"model.layers.{n}.mlp.up_proj.weight"] for n in (1, 2, 3)} == {0.25, 0.5, 1.0}
    assert factors["model.layers.1.mlp.up_proj.weight"] == 0.25
    method.apply(model, seed=0)
    start = {name: p.detach().clone() for name, p in trainable(model).items()}
    first_moved: dict[str, int] = {}

    class Watch(type(heard)):  # type: ignore[misc]
        def step(self, record: dict[str, Any]) -> None:
            for name, before in start.items():
                if name not in first_moved and not torch.equal(model.causal.get_parameter(name), before):
                    first_moved[name] = record["step"]

    Fit(
        model,
        method=method,
        objective=Instruction(),
        train=token_store([[r] for r in tree_rows], folder=tmp_path / "train"),
        validation=None,
        settings=TrainSettings(epochs=10, batch_rows=len(tree_rows), warmup=0, checkpoint_every=100),
        folder=tmp_path,
        observer=Watch(),
    ).run()
    moved = {n: {first_moved[name] for name in start if name.startswith(f"model.layers.{n}.")} for n in (1, 2, 3)}
    assert moved == {3: {1}, 2: {3}, 1: {5}}


def test_a_prefix_of_some_text_is_that_prompt_at_the_start(build_model: BuildModel) -> None:
    for architecture in ("llama", "gpt2", "qwen3"):
        base = build_model(architecture, dtype=torch.float32)
        text = "a short prompt"
        ids = base.tokenizer.encode_text([text])[0]
        asked = [40, 41, 42, 43]
        expected = hidden(base, build_pack([Sequence(np.array([*ids, *asked], np.int32), np.zeros(len(ids) + 4))]))[-4:]
        for method in (
            Prefix(num_tokens=len(ids), text=text),
            Prefix(num_tokens=len(ids), text=text, reparameterise=True, width=8),
            Prompt(num_tokens=len(ids), text=text),
            PTuning(num_tokens=len(ids), text=text, width=8),
        ):
            model = build_model(architecture, dtype=torch.float32)
            method.apply(model, seed=0)
            found = hidden(model, build_pack([Sequence(np.array(asked, np.int32), np.zeros(4))]))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
