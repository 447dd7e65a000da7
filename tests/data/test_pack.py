"""Packs against a reference that knows nothing of trees: every row's own tokens, one after the other."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tunesmith.data.pack import MIN_SHARED_TOKENS, Pack, build_pack, build_packs, build_unit_packs, shared_length
from tunesmith.data.types import Sequence


def row(tokens: list[int], *, weights: list[float] | None = None, number: int = 0) -> Sequence:
    """A row trained wherever it can be, or as `weights` say."""
    tokens_T = np.array(tokens, dtype=np.int32)
    weight_T = np.ones(len(tokens), dtype=np.float32) if weights is None else np.array(weights, dtype=np.float32)
    weight_T[:1] = 0
    return Sequence(tokens_T, weight_T, number)


@st.composite
def row_lists(draw: st.DrawFn) -> list[Sequence]:
    """Rows that begin alike: each goes on from a random point of an earlier one, or starts afresh."""
    tails = draw(st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=9))
    rows: list[list[int]] = []
    for tail in tails:
        base = draw(st.sampled_from([[], *rows]))
        tokens = base[: draw(st.integers(0, len(base)))] + tail
        rows.append(tokens or [0])
    weights = [draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=len(r), max_size=len(r))) for r in rows]
    return [row(r, weights=w, number=i) for i, (r, w) in enumerate(zip(rows, weights, strict=True))]


def seen_by(pack: Pack, token: int) -> list[int]:
    """The rule, literally: j <= i < end[j]."""
    return [j for j in range(token + 1) if token < pack.end_T[j]]


def path_of(pack: Pack, tokens: list[int]) -> list[int]:
    """The packed places of a row: those that its last token sees, where they spell the row."""
    for last in range(len(pack.tokens_T)):
        seen = seen_by(pack, last)
        if len(seen) == len(tokens) and pack.tokens_T[seen].tolist() == tokens:
            return seen
    raise AssertionError(f"no token of the pack sees exactly {tokens}")


@settings(max_examples=50, deadline=None)
@given(row_lists(), st.sampled_from([1, 2, 4, 1 << 30]))
def test_every_token_sees_its_own_row_and_nothing_else(rows: list[Sequence], min_shared: int) -> None:
    pack = build_pack(rows, min_shared=min_shared)
    prefixes = {tuple(r.tokens_T[: k + 1].tolist()) for r in rows for k in range(len(r.tokens_T))}
    for token in range(len(pack.tokens_T)):
        seen = seen_by(pack, token)
        assert seen[-1] == token
        assert pack.position_T[seen].tolist() == list(range(len(seen)))
        assert tuple(pack.tokens_T[seen].tolist()) in prefixes


@settings(max_examples=50, deadline=None)
@given(row_lists(), st.sampled_from([1, 2, 4, 1 << 30]))
def test_every_row_is_there_and_its_targets_are_right(rows: list[Sequence], min_shared: int) -> None:
    pack = build_pack(rows, min_shared=min_shared)
    assert sorted(pack.rows_S.tolist()) == list(range(len(rows)))
    assert pack.num_row_tokens == sum(len(r.tokens_T) for r in rows)
    for index, number in enumerate(pack.rows_S.tolist()):
        tokens, weights = rows[number].tokens_T.tolist(), rows[number].weight_T
        path_of(pack, tokens)
        mine = np.flatnonzero(pack.sequence_N == index)
        trained = np.flatnonzero(weights).tolist()
        assert pack.target_N[mine].tolist() == [tokens[k] for k in trained]
        assert pack.weight_N[mine].tolist() == [float(weights[k]) for k in trained]
        for target, k in zip(mine, trained, strict=True):
            context = seen_by(pack, int(pack.source_N[target]))
            assert pack.tokens_T[context].tolist() == tokens[:k]


@settings(max_examples=50, deadline=None)
@given(row_lists())
def test_with_a_threshold_of_one_each_distinct_beginning_is_stored_once(rows: list[Sequence]) -> None:
    pack = build_pack(rows, min_shared=1)
    beginnings = {tuple(r.tokens_T[: k + 1].tolist()) for r in rows for k in range(len(r.tokens_T))}
    assert len(pack.tokens_T) == len(beginnings)


@settings(max_examples=50, deadline=None)
@given(row_lists(), st.integers(2, 6))
def test_rows_store_together_what_they_share_but_for_less_than_the_threshold(
    rows: list[Sequence], min_shared: int
) -> None:
    pack = build_pack(rows, min_shared=min_shared)
    ordered = sorted(rows, key=lambda r: r.tokens_T.tolist())
    stored = sum(len(r.tokens_T) for r in rows)
    least_saved = 0
    for a, b in itertools.pairwise(ordered):
        shared = shared_length(a.tokens_T, b.tokens_T)
        least_saved += shared - min_shared + 1 if shared >= min_shared else 0
        stored -= shared
    assert stored <= len(pack.tokens_T) <= pack.num_row_tokens - least_saved


@pytest.mark.parametrize("prefix_tokens", [MIN_SHARED_TOKENS, MIN_SHARED_TOKENS + 1, 100])
def test_a_prefix_at_the_threshold_is_stored_once(prefix_tokens: int) -> None:
    prefix = list(range(100, 100 + prefix_tokens))
    pack = build_pack([row([*prefix, last, last]) for last in (1, 2, 3)])
    assert len(pack.tokens_T) == prefix_tokens + 3 * 2
    assert next((n.start, n.stop, n.end) for n in pack.nodes) == (0, prefix_tokens, len(pack.tokens_T))


def test_a_prefix_below_the_threshold_is_not_shared() -> None:
    prefix = list(range(MIN_SHARED_TOKENS - 1))
    pack = build_pack([row([*prefix, 100]), row([*prefix, 101])])
    assert len(pack.tokens_T) == pack.num_row_tokens
    assert pack.nodes == [(0, 16, 16), (16, 32, 32)]


def test_duplicates_are_stored_once_and_trained_each() -> None:
    tokens = list(range(20))
    pack = build_pack([row(tokens, number=0), row(tokens, number=1)])
    assert pack.tokens_T.tolist() == tokens
    assert len(pack.target_N) == 2 * 19
    assert pack.num_row_tokens == 40


def test_a_row_that_begins_another_costs_nothing() -> None:
    tokens = list(range(30))
    pack = build_pack([row(tokens), row(tokens[:18])])
    assert pack.tokens_T.tolist() == tokens
    assert pack.position_T.tolist() == tokens
    assert pack.nodes == [(0, 30, 30)]
    assert sorted(pack.target_N.tolist()) == sorted([*range(1, 30), *range(1, 18)])


def test_no_rows_give_an_empty_pack_and_no_packs() -> None:
    pack = build_pack([])
    assert len(pack.tokens_T) == len(pack.target_N) == len(pack.rows_S) == pack.num_row_tokens == 0
    assert pack.nodes == []
    assert list(build_packs([], max_tokens=10)) == []


@settings(max_examples=50, deadline=None)
@given(row_lists())
def test_nodes_cover_the_pack_once_and_nest(rows: list[Sequence]) -> None:
    pack = build_pack(rows, min_shared=1)
    assert [n.start for n in pack.nodes] == [0, *(n.stop for n in pack.nodes)][: len(pack.nodes)]
    for node in pack.nodes:
        assert node.start < node.stop <= node.end <= len(pack.tokens_T)
        assert set(pack.end_T[node.start : node.stop].tolist()) == {node.end}
        inside = [n for n in pack.nodes if node.start < n.start < node.end]
        assert all(n.end <= node.end for n in inside)


def test_a_root_trained_at_its_first_token_is_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="nothing stands before"):
        build_pack([Sequence(np.array([1, 2], np.int32), np.ones(2, np.float32))])


@settings(max_examples=80, deadline=None)
@given(row_lists(), st.integers(1, 40), st.sampled_from([1, 2, 4]))
@example(  # two rows share 5, the third shares 6 with the second: the sixth is not stored together
    [row([1, 1, 1, 1, 1, 1, 1]), row([1, 1, 1, 1, 1, 2, 2]), row([1, 1, 1, 1, 1, 2, 3])], 10, 2
)
def test_build_packs_keeps_within_its_bound(rows: list[Sequence], max_tokens: int, min_shared: int) -> None:
    packs = list(build_packs(rows, max_tokens=max_tokens, min_shared=min_shared))
    assert sorted(n for p in packs for n in p.rows_S.tolist()) == sorted(r.row for r in rows)
    for pack in packs:
        below_a_branch = pack.end_T < len(pack.tokens_T)
        num_root_tokens = int(below_a_branch.argmax()) if below_a_branch.any() else len(pack.tokens_T)
        assert len(pack.tokens_T) - num_root_tokens <= max_tokens
    assert sum(p.num_row_tokens for p in packs) == sum(len(r.tokens_T) for r in rows)
    assert sum(float(p.weight_N.sum()) for p in packs) == sum(float(r.weight_T.sum()) for r in rows)


@settings(max_examples=80, deadline=None)
@given(st.lists(row_lists().filter(bool), max_size=4), st.integers(1, 40), st.sampled_from([1, 2, 4]), st.booleans())
def test_units_stay_whole_and_packs_within_their_bound_but_for_a_unit_alone(
    units: list[list[Sequence]], max_tokens: int, min_shared: int, merge_same: bool
) -> None:
    numbered = [[row(s.tokens_T.tolist(), number=n) for s in unit] for n, unit in enumerate(units)]
    packs = list(build_unit_packs(numbered, max_tokens=max_tokens, min_shared=min_shared, merge_same=merge_same))
    where = [(n, len(p.rows_S[p.rows_S == n])) for p in packs for n in set(p.rows_S.tolist())]
    assert sorted(where) == [(n, len(unit)) for n, unit in enumerate(units)]
    for pack in packs:
        alone = len(set(pack.rows_S.tolist())) == 1
        assert alone or pack.num_computed_tokens - pack.num_root_tokens <= max_tokens
    assert sum(p.num_row_tokens for p in packs) == sum(len(s.tokens_T) for unit in units for s in unit)


def test_units_with_a_prompt_of_their_own_fill_a_pack_by_what_is_computed() -> None:
    """Each costs 41 tokens and 3 times one: six fit into 300, where whole sequences would be 126 each."""
    units = [[row([*range(50 * k, 50 * k + 40), 7, last], number=k) for last in (1, 2, 3)] for k in range(12)]
    packs = list(build_unit_packs(units, max_tokens=300))
    assert [(len(set(p.rows_S.tolist())), len(p.tokens_T)) for p in packs] == [(6, 6 * 44), (6, 6 * 44)]
    assert [p.num_row_tokens for p in packs] == [6 * 3 * 42] * 2


def test_rows_under_one_prefix_meet_in_one_pack_wherever_they_stood() -> None:
    system = list(range(1000, 1040))
    rows = [row([*system, k, k + 1]) for k in range(0, 60, 3)]
    others = [row(list(range(2000 + 50 * k, 2040 + 50 * k))) for k in range(20)]
    mixed = [r for pair in zip(rows, others, strict=True) for r in pair]
    packs = list(build_packs(mixed, max_tokens=200))
    together = [p for p in packs if 1000 in p.tokens_T]
    assert len(together) == 1
    assert np.count_nonzero(together[0].tokens_T == 1000) == 1


def test_a_long_prompt_does_not_count_against_the_bound() -> None:
    system = list(range(1000, 1700))
    rows = [row([*system, *range(50 * k, 50 * k + 40)]) for k in range(12)]
    packs = list(build_packs(rows, max_tokens=300))
    assert [len(p.tokens_T) for p in packs] == [700 + 7 * 40, 700 + 5 * 40]
    assert [p.num_root_tokens for p in packs] == [700, 700]
    apart = [row(list(range(50 * k, 50 * k + 40))) for k in range(12)]
    assert [len(p.tokens_T) for p in build_packs(apart, max_tokens=300)] == [7 * 40, 5 * 40]


def test_a_long_chain_of_rows_that_each_begin_the_next_needs_no_deep_recursion() -> None:
    tokens = list(range(1300))  # as many branches as 20,800 tokens have under the default threshold
    rows = [row(tokens[:n], weights=[0.0] * (n - 1) + [1.0], number=n) for n in range(2, len(tokens) + 1)]
    pack = build_pack(rows, min_shared=1)
    assert pack.tokens_T.tolist() == tokens
    assert sorted(pack.target_N.tolist()) == tokens[1:]


@settings(max_examples=30, deadline=None)
@given(row_lists(), st.randoms(use_true_random=False))
def test_the_layout_does_not_depend_on_the_order_of_rows(rows: list[Sequence], random: object) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    a, b = build_pack(rows, min_shared=2), build_pack(shuffled, min_shared=2)
    for name in ("tokens_T", "position_T", "end_T"):
        assert np.array_equal(getattr(a, name), getattr(b, name))


@given(st.lists(st.integers(0, 2), max_size=8), st.lists(st.integers(0, 2), max_size=8))
def test_shared_length_counts_equal_beginnings(a: list[int], b: list[int]) -> None:
    expected = 0
    while expected < min(len(a), len(b)) and a[expected] == b[expected]:
        expected += 1
    assert shared_length(np.array(a, np.int32), np.array(b, np.int32)) == expected


def test_a_padded_pack_has_the_same_forest_and_tokens_that_nothing_sees() -> None:
    random = np.random.default_rng(0)
    root = random.integers(1, 90, 20)
    rows = []
    for row, more in enumerate((3, 9, 14)):
        tokens_T = np.concatenate([root, random.integers(1, 90, more)]).astype(np.int32)
        rows.append(Sequence(tokens_T, (np.arange(20 + more) > 5).astype(np.float32), row))
    pack = build_pack(rows)
    padded = pack.padded(64)
    length = len(pack.tokens_T)
    assert len(padded.tokens_T) == 64
    assert pack.padded(length) is pack
    assert np.array_equal(padded.tokens_T[:length], pack.tokens_T)
    assert not padded.tokens_T[length:].any()
    assert padded.nodes == [*pack.nodes, (length, 64, 64)]
    assert np.array_equal(padded.source_N, pack.source_N)
    assert padded.num_row_tokens == pack.num_row_tokens
