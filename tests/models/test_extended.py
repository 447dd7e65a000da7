"""New rows beside a base's tables: the same as one larger table, and nothing of the base moves."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.data.pack import Pack, build_pack
from tunesmith.data.types import Sequence
from tunesmith.errors import ModelError
from tunesmith.generate.runner import Generator
from tunesmith.generate.sampling import Sampling
from tunesmith.methods.base import Method, trainable
from tunesmith.methods.full import Full
from tunesmith.methods.layers import Layers
from tunesmith.methods.lora import Lora, Qlora
from tunesmith.methods.prompt import Prompt
from tunesmith.models.blocks import num_frozen_blocks
from tunesmith.models.extended import (
    ExtendedEmbedding,
    ExtendedHead,
    extend_alike,
    extend_tables,
    fold_tables,
    new_rows,
    token_indices,
    train_new_rows,
)
from tunesmith.models.load import Model, load_model
from tunesmith.models.quantised import QuantisedLinear
from tunesmith.models.readout import head_logits, target_logprobs
from tunesmith.objectives.causal import Causal
from tunesmith.train.passes import autocast, forward
from tunesmith.train.settings import TrainSettings

BuildModel = Callable[..., Model]
FIRST, NUM_NEW = 262, 5  # the toy tokenizer has 262 tokens, the toy tables 264 rows
PIECES = [[10, 11], [12, 13, 14], [10, 10], [200, 201], [30, 31, 32, 33]]
KINDS = {
    "llama": {},
    "gpt2": {},
    "gemma2": {},
    "gemma3_text": {},
    "gpt_neox": {},
    "qwen3": {"tie_word_embeddings": True},
}


def build(build_model: BuildModel, kind: str, *, dtype: torch.dtype = torch.float64) -> Model:
    return build_model(kind, dtype=dtype, **KINDS[kind])


def extend(model: Model) -> Model:
    extend_tables(model, first=FIRST, num_new=NUM_NEW, pieces=PIECES)
    return model


def rows_with_new_tokens() -> list[Sequence]:
    random = np.random.default_rng(2)
    rows = []
    for row in range(4):
        tokens_T = random.integers(6, FIRST + NUM_NEW, 15).astype(np.int32)
        tokens_T[[3, 9]] = FIRST + row, FIRST + NUM_NEW - 1
        rows.append(Sequence(tokens_T, np.array([0] + [1] * 14, np.float32), row))
    return rows


@pytest.fixture(scope="module")
def new_pack() -> Pack:
    """Rows in which old and new tokens are read and predicted."""
    return build_pack(rows_with_new_tokens())


def logits(model: Model, pack: Pack) -> Tensor:
    with torch.no_grad():
        return head_logits(model.hidden(model.attention(pack)), head=model.head, softcap=model.softcap)


def stir(model: Model) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(
                parameter.dtype
            )


def adapted(build_model: BuildModel, kind: str, method: Method, *, dtype: torch.dtype = torch.float32) -> Model:
    """An extended model with a method in it, moved."""
    model = extend(build(build_model, kind, dtype=dtype))
    method.apply(model, seed=0)
    train_new_rows(model)
    stir(model)
    return model


# -------------------------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_old_tokens_have_the_logits_they_had(
    build_model: BuildModel, kind: str, tree_pack: Pack, new_pack: Pack
) -> None:
    base = build(build_model, kind)
    model = extend(build(build_model, kind))
    torch.testing.assert_close(
        logits(model, tree_pack)[:, :FIRST], logits(base, tree_pack)[:, :FIRST], rtol=0, atol=1e-6
    )
    assert logits(model, tree_pack).shape[1] == FIRST + NUM_NEW
    loss = forward(model, new_pack, objective=Causal())
    assert 0 < float(loss.sum.detach()) / loss.count < 3 * np.log(FIRST)


@pytest.mark.parametrize("kind", KINDS)
def test_new_rows_begin_as_the_mean_of_their_old_pieces(build_model: BuildModel, kind: str) -> None:
    base = build(build_model, kind)
    tables = {"input": base.causal.get_input_embeddings().weight, "head": base.head.weight}
    model = extend(build(build_model, kind))
    found = {"input": model.causal.get_input_embeddings().new_rows, "head": model.head.new_rows}
    for name, table in tables.items():
        for row, ids in zip(found[name], PIECES, strict=True):
            torch.testing.assert_close(row, sum(table[i] for i in ids) / len(ids))
    assert (found["input"] is found["head"]) == (tables["input"] is tables["head"])
    assert len(new_rows(model)) == 2 - (tables["input"] is tables["head"])


# ---------------------------------------------------------------------------------- one larger table computes the same


@pytest.mark.parametrize("kind", KINDS)
def test_folded_it_is_a_plain_model_that_computes_the_same(
    build_model: BuildModel, kind: str, new_pack: Pack, tmp_path: Path
) -> None:
    base = build(build_model, kind, dtype=torch.float32)
    model = adapted(build_model, kind, Prompt(num_tokens=2))
    model.causal.virtual_tokens.enabled = False
    before = logits(model, new_pack)
    del model.causal.virtual_tokens
    fold_tables(model)
    torch.testing.assert_close(logits(model, new_pack), before, rtol=0, atol=1e-5)
    assert type(model.head) is torch.nn.Linear
    shapes = {name: p.shape for name, p in base.causal.named_parameters()}
    for name, parameter in model.causal.named_parameters():
        enlarged = parameter.shape != shapes[name]
        assert not enlarged or (shapes[name][0], parameter.shape[0]) == (264, FIRST + NUM_NEW)
    assert model.causal.config.vocab_size == FIRST + NUM_NEW
    assert (model.head.weight is model.causal.get_input_embeddings().weight) == (
        base.head.weight is base.causal.get_input_embeddings().weight
    )
    fold_tables(model)  # nothing more to do
    model.save(tmp_path)
    assert torch.equal(logits(load_model(str(tmp_path)), new_pack), logits(model, new_pack))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_one_larger_table(build_model: BuildModel, kind: str, new_pack: Pack) -> None:
    apart, whole = (extend(build(build_model, kind)) for _ in range(2))
    fold_tables(whole)
    for model in (apart, whole):
        model.causal.requires_grad_(True)
    losses = [forward(model, new_pack, objective=Causal()).sum for model in (apart, whole)]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-12)
    for loss in losses:
        loss.backward()
    table = whole.causal.get_input_embeddings().weight
    embedding: Any = apart.causal.get_input_embeddings()
    torch.testing.assert_close(embedding.new_rows.grad, table.grad[FIRST:], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(embedding.base.weight.grad[:FIRST], table.grad[:FIRST], rtol=1e-8, atol=1e-9)
    head: Any = apart.head
    torch.testing.assert_close(head.new_rows.grad, whole.head.weight.grad[FIRST:], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(head.weight.grad[:FIRST], whole.head.weight.grad[:FIRST], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_head_with_biases(softcap: float | None) -> None:
    """Values and every gradient against log_softmax over logits put together."""
    torch.manual_seed(0)
    base = torch.nn.Linear(6, 9, dtype=torch.float64)
    rows = torch.nn.Parameter(torch.randn(3, 6, dtype=torch.float64))
    head = ExtendedHead(base, rows=rows, biases_N=torch.randn(3, dtype=torch.float64), first=7)
    hidden_TD = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    source_N, target_N = torch.arange(8), torch.tensor([0, 7, 9, 6, 8, 3, 3, 7])

    def expected(head: ExtendedHead) -> Tensor:
        logits_TV = head(hidden_TD)
        assert logits_TV.shape == (8, 10)
        return (logits_TV if softcap is None else softcap * torch.tanh(logits_TV / softcap)).log_softmax(-1)

    ours = target_logprobs(hidden_TD, head=head, source_N=source_N, target_N=target_N, softcap=softcap)
    theirs = expected(head)[source_N, target_N]
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(head_logits(hidden_TD, head=head, softcap=softcap).log_softmax(-1), expected(head))
    weight_N = torch.randn(8, dtype=torch.float64)
    inputs = [hidden_TD, *head.parameters()]
    for a, b in zip(*(torch.autograd.grad((x * weight_N).sum(), inputs) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)
    plain = head.folded(weight=None)
    torch.testing.assert_close(plain(hidden_TD), head(hidden_TD))


class _Largest(TorchDispatchMode):
    """The most numbers that one new tensor held."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor) and value._base is None:
                self.numbers = max(self.numbers, value.numel())
        return out


def test_the_gradient_of_new_rows_takes_no_second_look_at_the_old_ones() -> None:
    """With 5 new rows behind 40,000 the backward pass makes nothing as large as the old table, or as all logits."""
    head = ExtendedHead(
        torch.nn.Linear(16, 40_000, bias=False).requires_grad_(False),
        rows=torch.nn.Parameter(torch.randn(5, 16)),
        biases_N=None,
        first=40_000,
    )
    hidden_TD = torch.randn(300, 16, requires_grad=True)
    target_N = torch.randint(39_990, 40_005, (300,))
    logprob_N = target_logprobs(hidden_TD, head=head, source_N=torch.arange(300), target_N=target_N)
    with _Largest() as largest:
        logprob_N.sum().backward()
    assert largest.numbers <= 300 * 16
    assert head.weight.grad is None
    assert hidden_TD.grad is not None
    assert head.new_rows.grad.abs().sum() > 0  # type: ignore[union-attr]


# --------------------------------------------------------------------------------------------------- what is trained


METHODS: dict[str, Method] = {
    "lora": Lora(rank=2),
    "qlora": Qlora(rank=2, quantise="int8"),
    "layers": Layers(last=1, head=True),
    "prompt": Prompt(num_tokens=2),
}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("name", METHODS)
def test_new_rows_move_and_old_ones_do_not(build_model: BuildModel, kind: str, name: str, new_pack: Pack) -> None:
    model = extend(build(build_model, kind, dtype=torch.float32))
    METHODS[name].apply(model, seed=0)
    train_new_rows(model)
    embedding: Any = model.causal.get_input_embeddings()
    old = (
        [embedding.base.weight] if name == "layers" and kind == "llama" else [embedding.base.weight, model.head.weight]
    )
    before = [weight.clone() for weight in (*old, *new_rows(model).values())]
    forward(model, new_pack, objective=Causal()).sum.backward()
    optimiser = torch.optim.AdamW(trainable(model).values(), lr=0.1)
    optimiser.step()
    for weight, was in zip((*old, *new_rows(model).values()), before, strict=True):
        assert torch.equal(weight, was) == any(weight is w for w in old)
    assert all(weight.grad is None for weight in old)
    assert num_frozen_blocks(model, moving=set(trainable(model).values())) == 0
    assert {*new_rows(model).values()} <= model.vocabulary_weights()
    assert not isinstance(model.head, QuantisedLinear)


def test_under_full_tuning_the_larger_tables_are_the_model_s_own(build_model: BuildModel, new_pack: Pack) -> None:
    model = extend(build(build_model, "llama", dtype=torch.float32))
    fold_tables(model)
    Full().apply(model, seed=0)
    train_new_rows(model)
    assert not new_rows(model)
    forward(model, new_pack, objective=Causal()).sum.backward()
    assert all(p.grad is not None for p in model.causal.parameters())


def test_half_as_wide(build_model: BuildModel, new_pack: Pack) -> None:
    from tunesmith.methods.base import set_trainable_dtype

    model = adapted(build_model, "llama", Lora(rank=2))
    set_trainable_dtype(model, frozen=torch.bfloat16)
    assert {p.dtype for p in new_rows(model).values()} == {torch.float32}
    assert model.head.weight.dtype == torch.bfloat16
    with autocast(model, TrainSettings(precision="bf16")):
        forward(model, new_pack, objective=Causal()).sum.backward()
    for row in new_rows(model).values():
        assert row.grad is not None
        assert row.grad.dtype == torch.float32
        assert torch.isfinite(row.grad).all()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_new_tokens_are_generated_and_read_back(build_model: BuildModel, kind: str) -> None:
    model = adapted(build_model, kind, Lora(rank=2))
    prompt = [7, FIRST + 1, 30, FIRST + 4]
    (completion,) = Generator(model, stop_ids=[]).generate([prompt], sampling=Sampling(max_tokens=6, temperature=1.5))
    ids = list(prompt)
    for token, logprob in zip(completion.tokens, completion.logprobs, strict=True):
        pack = build_pack([Sequence(np.array(ids, np.int32), np.zeros(len(ids), np.float32))])
        found = float((logits(model, pack)[-1] / 1.5).log_softmax(-1)[token])
        assert found == pytest.approx(logprob, abs=1e-4)
        ids.append(token)


# ------------------------------------------------------------------------------------------------------ what is saved


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("name", METHODS)
def test_what_is_saved_comes_back_to_the_bit_at_the_size_it_needs(
    build_model: BuildModel, kind: str, name: str, new_pack: Pack, tmp_path: Path
) -> None:
    method = METHODS[name]
    model = adapted(build_model, kind, method)
    method.save(model, folder=tmp_path)
    tensors = load_file(str(tmp_path / "adapter_model.safetensors"))
    rows = {key: t for key, t in tensors.items() if "token_adapter" in key}
    tied = kind in ("qwen3", "gpt2")
    assert sorted(t.shape for t in rows.values()) == [(NUM_NEW, 32)] * (1 if tied else 2)
    assert not any(t.shape[0] == FIRST + NUM_NEW for t in tensors.values())
    again = build(build_model, kind, dtype=torch.float32)
    extend_alike(again, like=model)
    method.load(again, folder=tmp_path)
    assert torch.equal(logits(again, new_pack), logits(model, new_pack))
    assert not trainable(again)
    with pytest.raises(ModelError, match="does not fit"):  # rows that nothing takes are not dropped in silence
        method.load(build(build_model, kind, dtype=torch.float32), folder=tmp_path)


def test_an_embedding_of_another_kind_is_refused() -> None:
    class Hashed(torch.nn.Embedding):
        pass

    with pytest.raises(ModelError, match="Hashed") as error:
        ExtendedEmbedding(Hashed(4, 2), rows_ND=torch.zeros(1, 2), first=4)
    assert error.value.hint


def test_a_tokenizer_with_ids_beyond_the_table_is_refused(build_model: BuildModel) -> None:
    with pytest.raises(ModelError, match=r"264 and the input table has 264 rows") as error:
        extend_tables(build(build_model, "llama"), first=265, num_new=1)
    assert error.value.hint


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("method", [Lora(rank=2), Lora(rank=2, dora=True)], ids=["lora", "dora"])
def test_peft_computes_the_same_once_the_base_has_room(
    build_model: BuildModel, eager_twin: Callable[[Model], Any], kind: str, method: Lora, tmp_path: Path
) -> None:
    from peft import PeftModel

    twin = eager_twin(build(build_model, kind, dtype=torch.float32))
    twin.resize_token_embeddings(FIRST + NUM_NEW, mean_resizing=False)
    model = adapted(build_model, kind, method)
    method.save(model, folder=tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["trainable_token_indices"] == token_indices(model)
    theirs = PeftModel.from_pretrained(twin, tmp_path).eval()
    for sequence in rows_with_new_tokens():
        with torch.no_grad():
            expected = theirs(input_ids=torch.from_numpy(sequence.tokens_T).long()[None]).logits[0]
        torch.testing.assert_close(logits(model, build_pack([sequence])), expected, rtol=0, atol=1e-4)


def test_a_copy_is_a_copy(build_model: BuildModel, new_pack: Pack) -> None:
    model = adapted(build_model, "qwen3", Lora(rank=2))
    other = copy.deepcopy(model)
    before = logits(other, new_pack)
    stir(model)
    assert torch.equal(logits(other, new_pack), before)
    assert other.head.new_rows is other.causal.get_input_embeddings().new_rows  # type: ignore[attr-defined]
