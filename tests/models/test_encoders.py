"""Encoders: packed hidden states and gradients are those of transformers' own model, a row at a time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith.data.pack import Pack, build_pack
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.types import Sequence
from tunesmith.errors import ModelError, RecipeError
from tunesmith.models.attention import PackAttention
from tunesmith.models.heads import attach_head
from tunesmith.models.load import Model, load_model
from tunesmith.objectives.causal import Causal
from tunesmith.objectives.classification import Classification
from tunesmith.objectives.headed import Headed
from tunesmith.objectives.instruction import Instruction
from tunesmith.objectives.regression import Regression
from tunesmith.train.passes import forward

BuildModel = Callable[..., Model]
CPU = torch.device("cpu")
ARCHITECTURES = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "modernbert")
NOT_SHARED = 1 << 30

encoders = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.fixture(scope="module")
def rows() -> list[Sequence]:
    """Texts of all lengths up to the context, longer together than it, two of them alike; what is read is marked."""
    random = np.random.default_rng(3)
    found = []
    for row, length in enumerate([9, 1, 23, 64, 17, 2]):
        tokens_T = random.integers(6, 262, length).astype(np.int32)
        found.append(Sequence(tokens_T, np.ones(length, np.float32), row, np.array([row % 3], np.float32)))
    found.append(Sequence(found[2].tokens_T, found[2].weight_T, 6, np.array([1], np.float32)))
    return found


@pytest.fixture(scope="module")
def pack(rows: list[Sequence]) -> Pack:
    pack = build_pack(rows, min_shared=NOT_SHARED)
    assert len(pack.tokens_T) > 64
    return pack


def places(pack: Pack) -> list[tuple[int, slice]]:
    """The number of each row, and where its tokens stand."""
    return [(int(row), slice(n.start, n.stop)) for row, n in zip(pack.rows_S, pack.nodes, strict=True)]


@pytest.mark.usefixtures("exact")
@encoders
def test_hidden_states_and_gradients_are_those_of_transformers(
    architecture: str, build_model: BuildModel, eager_twin: Callable[[Model], Any], pack: Pack, rows: list[Sequence]
) -> None:
    model = build_model(architecture)
    twin = eager_twin(model)
    hidden_TD = model.hidden(model.attention(pack))
    weight_TD = torch.randn(hidden_TD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (hidden_TD * weight_TD).sum().backward()
    total = torch.zeros((), dtype=torch.float64)
    for row, place in places(pack):
        ids = torch.from_numpy(rows[row].tokens_T).long()[None]
        expected_TD = twin(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        torch.testing.assert_close(hidden_TD[place], expected_TD, rtol=1e-10, atol=1e-10)
        total = total + (expected_TD * weight_TD[place]).sum()
    total.backward()
    expected = {name: p.grad for name, p in twin.named_parameters()}
    assert all(gradient is not None for gradient in expected.values())
    for name, parameter in model.causal.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.usefixtures("exact")
@encoders
@pytest.mark.parametrize("objective", [Classification(labels=("a", "b", "c"), pooling="mean"), Regression()])
def test_packed_is_one_row_at_a_time_in_loss_and_gradients(
    architecture: str, objective: Headed, build_model: BuildModel, pack: Pack, rows: list[Sequence]
) -> None:
    model = build_model(architecture)
    attach_head(model, num_outputs=objective.num_outputs)
    assert model.outputs is not None
    model.outputs.double()
    torch.nn.init.normal_(model.outputs.weight, generator=torch.Generator().manual_seed(1))

    def measured(packs: list[Pack]) -> tuple[float, dict[str, Tensor]]:
        model.causal.zero_grad(set_to_none=True)
        model.outputs.zero_grad(set_to_none=True)  # type: ignore[union-attr]
        total = sum(forward(model, p, objective=objective).sum for p in packs)
        total.backward()  # type: ignore[union-attr]
        return float(total.detach()), {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }

    loss, gradients = measured([pack])
    alone, alone_gradients = measured([build_pack([row]) for row in rows])
    assert loss == pytest.approx(alone, rel=1e-11)
    assert gradients.keys() == alone_gradients.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, alone_gradients[name], rtol=1e-7, atol=1e-9, msg=name)


@encoders
def test_one_text_sees_all_of_itself_and_nothing_of_another(
    architecture: str, build_model: BuildModel, pack: Pack, rows: list[Sequence]
) -> None:
    model = build_model(architecture)
    changed = pack.tokens_T.copy()
    row, place = next((row, place) for row, place in places(pack) if row == 0)
    changed[place.stop - 1] = 262 - changed[place.stop - 1]
    with torch.no_grad():
        before = model.hidden(model.attention(pack))
        attention = model.attention(pack)
        attention.input_ids = torch.from_numpy(changed)[None]
        moved_T = (model.hidden(attention) - before).abs().amax(-1) > 1e-9
    assert moved_T[place].all()
    assert int(moved_T.sum()) == len(rows[row].tokens_T)


def test_the_first_position_is_the_one_behind_the_padding(build_model: BuildModel, rows: list[Sequence]) -> None:
    for architecture, expected, context in (("bert", 0, 64), ("roberta", 6, 64), ("xlm-roberta", 1, 64)):
        model = build_model(architecture)
        attention = model.attention(build_pack([rows[0]]))
        assert attention.position_ids[0].tolist() == list(range(expected, expected + len(rows[0].tokens_T)))
        assert model.context_tokens == context


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([None, 1, 2, 4]))
def test_the_masks_equal_the_rule_both_ways(lengths: list[int], window: int | None) -> None:
    texts = [Sequence(np.full(n, row + 6, np.int32), np.zeros(n, np.float32), row) for row, n in enumerate(lengths)]
    pack = build_pack(texts, min_shared=NOT_SHARED)
    expected_TT = np.zeros((sum(lengths),) * 2, dtype=bool)
    for _, place in places(pack):
        for i in range(place.start, place.stop):
            for j in range(place.start, place.stop):
                expected_TT[i, j] = window is None or abs(i - j) < window
    attention = PackAttention(pack, device=CPU, both_ways=True)
    index_T = torch.arange(sum(lengths))
    flex_TT = attention.mask_mod(window=window)(None, None, index_T[:, None], index_T[None])
    assert np.array_equal(flex_TT.numpy(), expected_TT)
    assert np.array_equal(attention.visible(window=window).numpy(), expected_TT)
    pieces_TT = np.zeros_like(expected_TT)
    for piece in attention.pieces:
        mask = attention.mask(piece, window=window, dtype=torch.float64)
        assert not piece.causal
        inside = np.ones((piece.q1 - piece.q0, piece.k1 - piece.k0), bool) if mask is None else (mask == 0).numpy()
        pieces_TT[piece.q0 : piece.q1, piece.k0 : piece.k1] = inside
    assert np.array_equal(pieces_TT, expected_TT)


def test_texts_that_begin_alike_are_not_shared(build_model: BuildModel, rows: list[Sequence]) -> None:
    assert build_model("bert").min_shared_tokens > 1 << 20
    assert build_model("llama").min_shared_tokens == 16
    both = [Sequence(np.array([7, 8, last], np.int32), np.ones(3, np.float32), last, np.zeros(1)) for last in (9, 10)]
    shared = build_pack(both, min_shared=2)
    with pytest.raises(AssertionError, match="share nothing"):
        PackAttention(shared, device=CPU, both_ways=True)


@encoders
def test_recomputed_activations_and_mixed_precision(architecture: str, build_model: BuildModel, pack: Pack) -> None:
    objective = Classification(labels=("a", "b", "c"), pooling="mean")
    model = build_model(architecture, dtype=torch.float32)
    attach_head(model, num_outputs=3)
    torch.nn.init.normal_(model.outputs.weight, generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr]
    model.causal.train()

    def measured() -> tuple[float, Tensor]:
        model.causal.zero_grad(set_to_none=True)
        loss = forward(model, pack, objective=objective).sum
        loss.backward()
        gradients = [p.grad for p in model.causal.parameters() if p.grad is not None]
        return float(loss.detach()), torch.cat([g.flatten() for g in gradients])

    loss, gradient = measured()
    assert measured()[0] == loss  # no dropout
    with torch.autocast("cpu", torch.bfloat16):
        narrow, narrow_gradient = measured()
    assert narrow == pytest.approx(loss, rel=0.05)
    assert float((narrow_gradient - gradient).norm()) <= 0.2 * float(gradient.norm())
    model.checkpoint_activations()
    again, again_gradient = measured()
    assert again == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(again_gradient, gradient, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- what is loaded


@encoders
def test_a_saved_encoder_comes_back_without_a_layer_that_nothing_reads(
    architecture: str, build_model: BuildModel, tmp_path: Path, pack: Pack
) -> None:
    model = build_model(architecture, dtype=torch.float32)
    model.save(tmp_path)
    again = load_model(str(tmp_path))
    before, after = model.causal.state_dict(), again.causal.state_dict()
    assert before.keys() == after.keys()
    assert not any("pooler" in name for name in after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        a, b = (m.hidden(m.attention(pack)) for m in (model, again))
    assert torch.equal(a, b)
    assert again.is_encoder
    assert again.context_tokens == 64
    assert again.head is None


@pytest.mark.parametrize("task", ["MaskedLM", "SequenceClassification", "TokenClassification"])
@encoders
def test_heads_of_what_it_was_trained_for_are_not_read(
    architecture: str, task: str, build_model: BuildModel, tmp_path: Path, pack: Pack
) -> None:
    import transformers

    model = build_model(architecture, dtype=torch.float32)
    model.save(tmp_path)
    theirs = getattr(transformers, f"AutoModelFor{task}").from_config(model.causal.config)
    missing, unexpected = theirs.base_model.load_state_dict(model.causal.state_dict(), strict=False)
    assert not unexpected
    assert all("pooler" in name for name in missing)
    theirs.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    with torch.no_grad():
        a, b = (m.hidden(m.attention(pack)) for m in (model, again))
    assert torch.equal(a, b)
    assert [name for name, _ in again.causal.named_parameters()] == [n for n, _ in model.causal.named_parameters()]


@encoders
def test_a_missing_or_odd_weight_of_the_encoder_itself_is_refused(
    architecture: str, build_model: BuildModel, tmp_path: Path
) -> None:
    build_model(architecture, dtype=torch.float32).save(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(str(path))
    for name in (min(weights), max(weights)):
        save_file({k: v for k, v in weights.items() if k != name}, str(path), metadata={"format": "pt"})
        with pytest.raises(ModelError, match="the weights lack") as error:
            load_model(str(tmp_path))
        assert name in error.value.message
    save_file(weights | {"encoder.layer.9.weight": torch.zeros(2)}, str(path), metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"hold the unknown .*layer\.9\.weight"):
        load_model(str(tmp_path))


def test_texts_stand_between_the_marks_that_the_tokenizer_names(encoder_tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(encoder_tokenizer_folder)
    assert (tokenizer.begin_ids, tokenizer.end_ids) == ([1], [2])
    (tmp_path / "tokenizer.json").write_bytes((encoder_tokenizer_folder / "tokenizer.json").read_bytes())
    for names in ({}, {"sep_token": "[SEP]"}, {"eos_token": "[OTHER]", "bos_token": "[UNK]"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(names), "utf-8")
        named = Tokenizer.from_folder(tmp_path)
        whole = named.backend.encode("ab", add_special_tokens=True).ids
        assert [*named.begin_ids, *named.encode_text(["ab"])[0], *named.end_ids] == whole


@pytest.mark.parametrize("objective", [Instruction(), Causal()])
def test_an_encoder_predicts_no_next_token(objective: Instruction | Causal) -> None:
    with pytest.raises(RecipeError, match=f"'{objective.kind}' predicts the next token") as error:
        objective.for_model(encoder=True)
    assert "classification" in error.value.hint
    assert objective.for_model(encoder=False) is objective
