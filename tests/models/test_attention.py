"""Packed with shared prefixes = packed without = one row at a time, in loss and in every gradient."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tunesmith.data.pack import Pack, build_pack
from tunesmith.data.types import Sequence
from tunesmith.models.attention import PackAttention
from tunesmith.models.load import Model
from tunesmith.models.readout import target_logprobs
from tunesmith.objectives.instruction import Instruction
from tunesmith.train.passes import forward

BuildModel = Callable[..., Model]
CPU = torch.device("cpu")


def loss_and_gradients(model: Model, packs: list[Pack]) -> tuple[float, dict[str, Tensor]]:
    """The sum of the packs' losses, and its gradient for every parameter."""
    model.causal.zero_grad(set_to_none=True)
    total = 0.0
    for pack in packs:
        loss = forward(model, pack, objective=Instruction())
        loss.sum.backward()
        total += float(loss.sum.detach())
    gradients = {n: p.grad.clone() for n, p in model.causal.named_parameters() if p.grad is not None}
    assert gradients.keys() == dict(model.causal.named_parameters()).keys()
    return total, gradients


def assert_same_gradients(a: dict[str, Tensor], b: dict[str, Tensor], *, tolerance: float) -> None:
    worst = {name: float((a[name] - b[name]).abs().max() / a[name].abs().max().clamp(min=1.0)) for name in a}
    assert max(worst.values()) <= tolerance, max(worst, key=worst.__getitem__)


@pytest.mark.usefixtures("exact")
def test_sharing_changes_neither_the_loss_nor_any_gradient(
    architecture: str, build_model: BuildModel, tree_pack: Pack, flat_pack: Pack, tree_rows: list[Sequence]
) -> None:
    model = build_model(architecture)
    shared, shared_gradients = loss_and_gradients(model, [tree_pack])
    flat, flat_gradients = loss_and_gradients(model, [flat_pack])
    alone, alone_gradients = loss_and_gradients(model, [build_pack([row]) for row in tree_rows])
    assert shared == pytest.approx(flat, rel=1e-12)
    assert shared == pytest.approx(alone, rel=1e-12)
    assert_same_gradients(shared_gradients, flat_gradients, tolerance=1e-9)
    assert_same_gradients(shared_gradients, alone_gradients, tolerance=1e-9)


@pytest.mark.usefixtures("exact")
def test_log_probabilities_and_gradients_are_those_of_transformers(
    architecture: str,
    build_model: BuildModel,
    eager_twin: Callable[[Model], Any],
    tree_pack: Pack,
    tree_rows: list[Sequence],
) -> None:
    model = build_model(architecture)
    loss, gradients = loss_and_gradients(model, [tree_pack])
    twin = eager_twin(model)
    expected = torch.zeros((), dtype=torch.float64)
    for row in tree_rows:
        tokens_T = torch.from_numpy(row.tokens_T).long()
        logprob_TV = twin(input_ids=tokens_T[None], use_cache=False).logits[0].log_softmax(-1)
        picked = logprob_TV[:-1].gather(1, tokens_T[1:, None])[:, 0]
        expected = expected - (picked * torch.from_numpy(row.weight_T[1:])).sum()
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-11)
    assert_same_gradients(gradients, {n: p.grad for n, p in twin.named_parameters()}, tolerance=1e-9)


def test_hidden_states_of_each_row_are_those_of_transformers(
    architecture: str,
    build_model: BuildModel,
    eager_twin: Callable[[Model], Any],
    tree_pack: Pack,
    tree_rows: list[Sequence],
) -> None:
    model = build_model(architecture)
    twin = eager_twin(model)
    with torch.no_grad():
        hidden_TD = model.hidden(model.attention(tree_pack))
        for row in tree_rows:
            path = path_of(tree_pack, row)
            expected = twin.base_model(input_ids=torch.from_numpy(row.tokens_T).long()[None], use_cache=False)
            assert float((hidden_TD[path] - expected.last_hidden_state[0]).abs().max()) < 1e-5


def path_of(pack: Pack, row: Sequence) -> list[int]:
    """Where the row's tokens stand: the tokens seen by the one that sees exactly this row."""
    for last in np.flatnonzero(pack.position_T == len(row.tokens_T) - 1):
        seen = np.flatnonzero((np.arange(len(pack.end_T)) <= last) & (last < pack.end_T))
        if np.array_equal(pack.tokens_T[seen], row.tokens_T):
            return seen.tolist()
    raise AssertionError("the row is not in the pack")


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
def test_bfloat16_stays_close(architecture: str, build_model: BuildModel, tree_pack: Pack, flat_pack: Pack) -> None:
    model, exact = build_model(architecture, dtype=torch.bfloat16), build_model(architecture, dtype=torch.float64)
    exact.causal.load_state_dict(model.causal.state_dict())
    expected, expected_gradients = loss_and_gradients(exact, [tree_pack])
    for pack in (tree_pack, flat_pack):
        loss, gradients = loss_and_gradients(model, [pack])
        assert loss == pytest.approx(expected, rel=0.02)
        for name, gradient in gradients.items():
            reference = expected_gradients[name]
            assert float((gradient.double() - reference).norm()) <= 0.1 * float(reference.norm()), name


def test_one_row_sees_nothing_of_another(build_model: BuildModel) -> None:
    model = build_model("llama")
    random = np.random.default_rng(0)
    rows = [random.integers(6, 262, 9) for _ in range(3)]

    def hidden(tokens: list[np.ndarray]) -> Tensor:
        pack = build_pack([Sequence(t.astype(np.int32), np.zeros(9, np.float32), i) for i, t in enumerate(tokens)])
        with torch.no_grad():
            hidden_TD = model.hidden(model.attention(pack))
        return torch.stack([hidden_TD[path_of(pack, Sequence(t, np.zeros(9)))] for t in tokens])

    before = hidden(rows)
    changed = [rows[0], random.integers(6, 262, 9), rows[2]]
    after = hidden(changed)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert not torch.equal(before[1], after[1])


@st.composite
def trees(draw: st.DrawFn) -> list[Sequence]:
    """Rows that go on from random points of each other."""
    rows: list[list[int]] = []
    for tail in draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=6)):
        base = draw(st.sampled_from([[], *rows]))
        rows.append(base[: draw(st.integers(0, len(base)))] + tail)
    return [Sequence(np.array(r, np.int32), np.zeros(len(r), np.float32), i) for i, r in enumerate(rows)]


def visible_by_rows(pack: Pack, rows: list[Sequence], *, window: int | None) -> np.ndarray:
    """The rule without trees: in each row, a token sees those before it and within the window."""
    seen_TT = np.zeros((len(pack.tokens_T),) * 2, dtype=bool)
    for row in rows:
        path = path_of(pack, row)
        for i, query in enumerate(path):
            for j, key in enumerate(path[: i + 1]):
                seen_TT[query, key] |= window is None or i - j < window
    return seen_TT


@settings(max_examples=40, deadline=None)
@given(trees(), st.sampled_from([None, 1, 2, 4]), st.sampled_from([1, 3]))
def test_the_masks_equal_the_rule_row_by_row(rows: list[Sequence], window: int | None, min_shared: int) -> None:
    distinct = list({tuple(r.tokens_T): r for r in rows}.values())
    pack = build_pack(distinct, min_shared=min_shared)
    expected_TT = visible_by_rows(pack, distinct, window=window)
    attention = PackAttention(pack, device=CPU)
    index_T = torch.arange(len(pack.tokens_T))
    flex_TT = attention.mask_mod(window=window)(None, None, index_T[:, None], index_T[None])
    assert np.array_equal(flex_TT.numpy(), expected_TT)
    assert np.array_equal(attention.visible(window=window).numpy(), expected_TT)
    pieces_TT = np.zeros_like(expected_TT)
    for piece in attention.pieces:
        mask = attention.mask(piece, window=window, dtype=torch.float64)
        inside = torch.ones(piece.q1 - piece.q0, piece.k1 - piece.k0, dtype=torch.bool)
        inside = inside.tril() if piece.causal else inside
        inside = inside if mask is None else inside & (mask == 0)
        assert not pieces_TT[piece.q0 : piece.q1, piece.k0 : piece.k1].any()
        pieces_TT[piece.q0 : piece.q1, piece.k0 : piece.k1] = inside.numpy()
    assert np.array_equal(pieces_TT, expected_TT)


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, *, seen_TT: Tensor, scaling: float, softcap: float | None
) -> Tensor:
    """Softmax attention as the textbooks have it. [1, H, T, D] -> [1, T, H, D]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~seen_TT, float("-inf")).softmax(-1) @ value).transpose(1, 2)


@settings(max_examples=40, deadline=None)
@given(
    trees(),
    st.sampled_from([None, 1, 2, 3, 100]),
    st.sampled_from([None, 1.5]),
    st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    st.integers(0, 2**31),
)
def test_attention_and_its_gradients_equal_the_textbook(
    rows: list[Sequence], window: int | None, softcap: float | None, heads: tuple[int, int], seed: int
) -> None:
    pack = build_pack(rows, min_shared=1)
    attention = PackAttention(pack, device=CPU)
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, heads[0], len(pack.tokens_T), 4), *[(1, heads[1], len(pack.tokens_T), 4)] * 2]
    inputs = [torch.randn(s, dtype=torch.float64, generator=generator, requires_grad=True) for s in shapes]
    arguments = {"scaling": 0.7, "softcap": softcap}
    ours = attention.attend(torch.nn.Identity(), *inputs, sliding_window=window, **arguments)  # type: ignore[arg-type]
    theirs = plain_attention(*inputs, seen_TT=attention.visible(window=window), **arguments)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    weights = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((theirs * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def varlen_reference(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, same: Tensor, longest: int, again: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """What torch.nn.attention.varlen.varlen_attn promises, text by text: [T, H, D], [T, K, D], window (left, right)."""
    assert starts is same
    assert longest == again == int(starts.diff().max())
    assert starts.dtype == torch.int32
    assert enable_gqa == (query.shape[1] != key.shape[1])
    out = []
    for first, last in pairwise(starts.tolist()):
        q, k, v = (t[first:last].transpose(0, 1)[None] for t in (query, key, value))
        distance = torch.arange(last - first)[:, None] - torch.arange(last - first)[None]
        left, right = window_size
        seen = (distance <= left if left >= 0 else True) & (distance >= -right if right >= 0 else distance > -10_000)
        out.append(plain_attention(q, k, v, seen_TT=seen, scaling=scale, softcap=None)[0])
    return torch.cat(out)


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_texts_that_share_nothing_go_to_the_kernel_for_texts_of_different_lengths(
    both_ways: bool, window: int | None, heads: tuple[int, int]
) -> None:
    random = np.random.default_rng(0)
    rows = [
        Sequence(np.r_[n, random.integers(9, 99, n)].astype(np.int32), np.zeros(n + 1, np.float32), n)
        for n in (1, 6, 4)
    ]
    attention = PackAttention(build_pack(rows).padded(8), device=CPU, both_ways=both_ways)
    assert not attention.shares
    assert PackAttention(build_pack([rows[0], rows[0]], min_shared=1, merge_same=True), device=CPU).shares is False
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads[0], 16, 4), *[(1, heads[1], 16, 4)] * 2]
    inputs = [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]
    ours = attention._varlen(varlen_reference, *inputs, scaling=0.7, window=window)
    expected = attention.attend(torch.nn.Identity(), *inputs, scaling=0.7, sliding_window=window, softcap=None)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_scores_far_apart_between_the_pieces_lose_nothing() -> None:
    """The pieces are merged by their log-sum-exp, which must hold where one piece outweighs the other by e^1000."""
    pack = build_pack(
        [Sequence(np.array([1, 2, *tail], np.int32), np.zeros(4, np.float32)) for tail in ([3, 4], [5, 6])],
        min_shared=1,
    )
    attention = PackAttention(pack, device=CPU)
    generator = torch.Generator().manual_seed(0)
    for sign in (1.0, -1.0):
        query = torch.randn(1, 1, 6, 4, dtype=torch.float64, generator=generator)
        key = query.mean(2, keepdim=True) * torch.tensor([sign, sign, 1, 1, 1, 1]).double()[:, None] * 1e3
        inputs = [
            t.requires_grad_() for t in (query, key, torch.randn(1, 1, 6, 4, dtype=torch.float64, generator=generator))
        ]
        ours = attention.attend(torch.nn.Identity(), *inputs, scaling=1.0, sliding_window=None, softcap=None)
        theirs = plain_attention(*inputs, seen_TT=attention.visible(window=None), scaling=1.0, softcap=None)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        for a, b in zip(
            torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(theirs.sum(), inputs), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "phi3"])
def test_recomputed_activations_give_the_same_gradients(
    architecture: str, build_model: BuildModel, tree_pack: Pack
) -> None:
    model = build_model(architecture)
    model.causal.train()
    loss, gradients = loss_and_gradients(model, [tree_pack])
    model.causal.gradient_checkpointing_enable({"use_reentrant": False})
    again, again_gradients = loss_and_gradients(model, [tree_pack])
    assert again == pytest.approx(loss, rel=1e-12)
    assert_same_gradients(gradients, again_gradients, tolerance=1e-11)


def test_mixed_precision_stays_close(architecture: str, build_model: BuildModel, tree_pack: Pack) -> None:
    model = build_model(architecture, dtype=torch.float32)
    expected, expected_gradients = loss_and_gradients(model, [tree_pack])
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(model, [tree_pack])
    assert loss == pytest.approx(expected, rel=0.02)
    whole, expected_whole = (torch.cat([g.flatten() for g in gs.values()]) for gs in (gradients, expected_gradients))
    assert whole.dtype == torch.float32
    assert float((whole - expected_whole).norm()) <= 0.2 * float(expected_whole.norm())


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_with_and_without_gradients_the_loss_is_the_same(
    architecture: str, build_model: BuildModel, tree_pack: Pack
) -> None:
    model = build_model(architecture)
    with torch.no_grad():
        without = forward(model, tree_pack, objective=Instruction()).sum
    assert torch.equal(without, forward(model, tree_pack, objective=Instruction()).sum.detach())


def test_targets_of_a_long_pack_are_read_where_they_stand(build_model: BuildModel, tree_pack: Pack) -> None:
    model = build_model("qwen3")
    hidden_TD = model.hidden(model.attention(tree_pack))
    source_N, target_N = torch.from_numpy(tree_pack.source_N), torch.from_numpy(tree_pack.target_N)
    ours = target_logprobs(hidden_TD, head=model.head, source_N=source_N, target_N=target_N)
    expected = model.head(hidden_TD).log_softmax(-1)[source_N, target_N]
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gemma2", "gpt2"])
def test_the_gpu_kernel_equals_the_cpu_kernel(architecture: str, build_model: BuildModel, tree_pack: Pack) -> None:
    model = build_model(architecture, dtype=torch.float32)
    expected, expected_gradients = loss_and_gradients(model, [tree_pack])
    model.causal.to("cuda")
    loss, gradients = loss_and_gradients(model, [tree_pack])
    assert loss == pytest.approx(expected, rel=1e-4)
    assert_same_gradients({n: g.cpu() for n, g in gradients.items()}, expected_gradients, tolerance=1e-3)


def test_nodes_of_the_fixture_reach_below_the_window(tree_pack: Pack, flat_pack: Pack) -> None:
    """The cases above mean something: branches three deep, and rows longer than the sliding window."""
    starts = [n for n in tree_pack.nodes if n.end > n.stop]
    assert any(a.start < b.start and b.end <= a.end for a, b in pairwise(starts))
    assert int(flat_pack.position_T.max()) + 1 > 3 * 6
