"""Encoder-decoders: a pack of many rows computes what transformers computes row by row."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith.data.pack import Pack, build_pack, build_packs
from tunesmith.data.types import Sequence
from tunesmith.models import encoder_decoder
from tunesmith.models.load import Model, load_model
from tunesmith.models.readout import head_logits
from tunesmith.objectives.seq2seq import Seq2seq
from tunesmith.train.passes import autocast, forward
from tunesmith.train.settings import TrainSettings

BuildModel = Callable[..., Model]
Twin = Callable[[Model], Any]
KINDS = ["t5", "t5_gated", "mt5"]


def ids(tokens_T: np.ndarray | None) -> Tensor:
    assert tokens_T is not None
    return torch.from_numpy(tokens_T).long()[None]


def reference(twin: Any, rows: list[Sequence]) -> Tensor:
    """transformers' own mean loss of each row, times its targets and their weight."""
    losses = []
    for row in rows:
        found = twin(input_ids=ids(row.encoder_T), labels=ids(row.tokens_T[1:])).loss
        losses.append(found * (len(row.tokens_T) - 1) * float(row.weight_T[-1]))
    return torch.stack(losses).sum()


def measured(model: Model, packs: list[Pack]) -> tuple[Tensor, dict[str, Tensor]]:
    model.causal.zero_grad(set_to_none=True)
    loss = torch.stack([forward(model, pack, objective=Seq2seq()).sum for pack in packs]).sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.causal.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_every_gradient_are_those_of_transformers_row_by_row(
    build_model: BuildModel, pair_twin: Twin, pair_rows: list[Sequence], kind: str
) -> None:
    model = build_model(kind)
    twin = pair_twin(model)
    expected = reference(twin, pair_rows)
    expected.backward()
    slopes = dict(twin.named_parameters())
    layouts = [
        [build_pack(pair_rows)],
        list(build_packs(pair_rows[::-1], max_tokens=45)),
        [build_pack([row]) for row in pair_rows],
    ]
    assert len(layouts[1]) > 2
    for packs in layouts:
        loss, gradients = measured(model, packs)
        assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-12)
        assert gradients.keys() == slopes.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, slopes[name].grad, rtol=1e-8, atol=1e-9)
    biases = [name for name in slopes if "relative_attention_bias" in name]
    assert len(biases) == 2
    assert all(bool(gradients[name].abs().sum() > 0) for name in biases)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(
    build_model: BuildModel, pair_twin: Twin, pair_rows: list[Sequence], kind: str
) -> None:
    model = build_model(kind)
    twin = pair_twin(model)
    for row in pair_rows:
        with torch.no_grad():
            hidden_TD = model.hidden(model.attention(build_pack([row])))
            theirs = twin(input_ids=ids(row.encoder_T), decoder_input_ids=ids(row.tokens_T)).logits[0]
        torch.testing.assert_close(head_logits(hidden_TD, head=model.head), theirs, rtol=0, atol=1e-10)


def test_a_text_that_several_rows_have_is_read_once(build_model: BuildModel, pair_rows: list[Sequence]) -> None:
    pack = build_pack(pair_rows)
    assert pack.encoder_E is not None
    assert pack.num_row_tokens == sum(row.num_tokens for row in pair_rows)
    assert pack.num_computed_tokens == pack.num_row_tokens - 40
    model = build_model("t5", dtype=torch.float32)
    seen: list[int] = []
    handle = model.causal.encoder.block[0].register_forward_hook(lambda m, i, out: seen.append(out[0].shape[1]))
    model.target_logprobs(pack)
    handle.remove()
    assert seen == [len(pack.encoder_E)]


def test_the_bias_is_never_laid_out_for_the_whole_pack(build_model: BuildModel, pair_rows: list[Sequence]) -> None:
    model = build_model("t5")
    attention = model.attention(build_pack(pair_rows))
    biases = encoder_decoder.piece_biases(model.causal.encoder, lengths=attention.text_lengths, both_ways=True)
    assert {n: tuple(bias.shape) for n, bias in biases.items()} == {n: (1, 4, n, n) for n in (1, 5, 17, 23, 40)}
    whole = model.causal.encoder.block[0].layer[0].SelfAttention.compute_bias(40, 40)
    for n, bias in biases.items():
        assert torch.equal(bias, whole[:, :, :n, :n])


def test_pieces_of_one_size_are_computed_in_one_call() -> None:
    assert encoder_decoder.runs_of([(3, 3), (3, 3), (4, 4), (3, 3)]) == [(2, 3, 3), (1, 4, 4), (1, 3, 3)]


def test_recomputed_activations_give_the_same_gradients(build_model: BuildModel, pair_rows: list[Sequence]) -> None:
    pack = build_pack(pair_rows)
    expected = measured(build_model("t5_gated", dtype=torch.float32), [pack])
    model = build_model("t5_gated", dtype=torch.float32)
    model.checkpoint_activations()
    model.causal.train()
    found = measured(model, [pack])
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-5, atol=1e-6)


def test_bf16_is_near(build_model: BuildModel, pair_rows: list[Sequence]) -> None:
    pack = build_pack(pair_rows)
    model = build_model("t5", dtype=torch.float32)
    expected = float(measured(model, [pack])[0])
    with autocast(model, TrainSettings(precision="bf16")):
        found = float(measured(model, [pack])[0])
    assert found == pytest.approx(expected, rel=0.03)


def saved_untied(build_model: BuildModel, folder: Path) -> Tensor:
    """A folder as the hub has Flan-T5: a head of its own, and a bias of cross-attention that is never used."""
    model = build_model("t5_gated", dtype=torch.float32)
    model.save(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config = {k: v for k, v in config.items() if k != "scale_decoder_outputs"} | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    weights = load_file(str(folder / "model.safetensors"))
    head = torch.randn(weights["shared.weight"].shape, generator=torch.Generator().manual_seed(0))
    weights |= {
        "lm_head.weight": head,
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.zeros(8, 4),
    }
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return head


def test_a_head_of_its_own_stays_its_own_and_is_not_scaled(
    build_model: BuildModel, pair_rows: list[Sequence], tmp_path: Path
) -> None:
    from transformers import AutoModelForSeq2SeqLM

    head = saved_untied(build_model, tmp_path)
    (tmp_path / "again").mkdir()
    model = load_model(str(tmp_path))
    assert torch.equal(model.head.weight, head)
    assert not torch.equal(model.head.weight, model.causal.shared.weight)
    model.save(tmp_path / "again")
    for folder in (tmp_path, tmp_path / "again"):
        theirs = AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation="eager").eval()
        with torch.no_grad():
            expected = reference(theirs, pair_rows)
            found = forward(load_model(str(folder)), build_pack(pair_rows), objective=Seq2seq()).sum
        assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_dropout_is_off_where_the_configuration_does_not_name_it(build_model: BuildModel) -> None:
    model = build_model("t5")
    assert {m.p for m in model.causal.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


def test_blocks_are_the_encoder_s_and_then_the_decoder_s(build_model: BuildModel) -> None:
    model = build_model("t5_gated")
    assert [block.is_decoder for block in model.layers] == [False, False, True, True, True]
    assert (model.hidden_size, model.start_id, model.is_encoder, model.is_encoder_decoder) == (32, 0, False, True)
