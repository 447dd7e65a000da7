"""Batches: every prompt once, true shared prefixes, bounds kept, least cost."""

import subprocess
import sys
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.generate.scheduler import STEP_TOKENS, Batch, common_length, plan_batches

SYSTEM_A, SYSTEM_B = [1] * 400, [2] * 400
prompts_of_few_tokens = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=20)


def naive_common_length(prompts: list[list[int]]) -> int:
    return next(
        (n for n, column in enumerate(zip(*prompts, strict=False)) if len(set(column)) > 1), min(map(len, prompts))
    )


@given(st.lists(st.integers(0, 1), max_size=9), st.lists(st.integers(0, 1), max_size=9))
def test_common_length(a: list[int], b: list[int]) -> None:
    assert common_length(a, b) == naive_common_length([a, b])


@given(
    prompts_of_few_tokens,
    st.integers(1, 5),
    st.integers(1, 80),
    st.integers(1, 6),
)
@settings(max_examples=200, deadline=None)
def test_every_prompt_is_in_one_batch_within_the_bounds(
    prompts: list[list[int]], new_tokens: int, batch_tokens: int, batch_rows: int
) -> None:
    batches = plan_batches(prompts, new_tokens=new_tokens, batch_tokens=batch_tokens, batch_rows=batch_rows)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(prompts)))
    for batch in batches:
        members = [prompts[row] for row in batch.rows]
        assert batch.prefix_tokens <= naive_common_length(members)
        assert all(len(prompt) > batch.prefix_tokens for prompt in members)
        assert len(members) <= batch_rows
        own = max(map(len, members)) - batch.prefix_tokens
        if len(members) > 1:
            assert batch.prefix_tokens + len(members) * (own + new_tokens) <= batch_tokens


def cost(members: list[list[int]], *, new_tokens: int) -> int:
    """The formula of the module's docstring."""
    prefix, total = min(naive_common_length(members), min(map(len, members)) - 1), sum(map(len, members))
    own = sum(len(prompt) - prefix for prompt in members)
    return min(total, prefix + own + STEP_TOKENS) + STEP_TOKENS * new_tokens


def least_cost(ordered: list[list[int]], *, new_tokens: int) -> int:
    """Of all ways to cut `ordered` into runs."""
    if not ordered:
        return 0
    return min(
        cost(ordered[:n], new_tokens=new_tokens) + least_cost(ordered[n:], new_tokens=new_tokens)
        for n in range(1, len(ordered) + 1)
    )


@given(
    st.lists(
        st.tuples(st.sampled_from([0, 1, 2]), st.integers(1, 3)).map(lambda x: [x[0]] * (80 * x[0]) + [x[1]] * x[1]),
        max_size=7,
    ),
    st.integers(1, 2),
)
@settings(max_examples=50, deadline=None)
def test_no_cut_costs_less(prompts: list[list[int]], new_tokens: int) -> None:
    batches = plan_batches(prompts, new_tokens=new_tokens, batch_tokens=10**6, batch_rows=100)
    planned = sum(cost([prompts[row] for row in batch.rows], new_tokens=new_tokens) for batch in batches)
    assert planned == least_cost(sorted(prompts), new_tokens=new_tokens)


def test_a_long_common_prefix_keeps_strangers_out() -> None:
    prompts = [[*system, 9, i] for i in range(10) for system in (SYSTEM_A, SYSTEM_B)]
    batches = plan_batches(prompts, new_tokens=8, batch_tokens=10**6, batch_rows=100)
    assert batches == [Batch(tuple(range(0, 20, 2)), 401), Batch(tuple(range(1, 20, 2)), 401)]


def test_a_short_common_prefix_does_not() -> None:
    prompts = [[system, i, i + 1] for i in range(10) for system in (1, 2)]
    (batch,) = plan_batches(prompts, new_tokens=8, batch_tokens=10**6, batch_rows=100)
    assert batch.prefix_tokens == 0
    assert len(batch.rows) == 20


def test_the_same_prompt_keeps_a_token_of_its_own() -> None:
    assert plan_batches([SYSTEM_A] * 3, new_tokens=1, batch_tokens=10**6, batch_rows=9) == [Batch((0, 1, 2), 399)]


def test_a_prompt_larger_than_a_batch_stands_alone() -> None:
    batches = plan_batches([SYSTEM_A, [5], [6]], new_tokens=4, batch_tokens=100, batch_rows=9)
    assert sorted(batch.rows for batch in batches) == [(0,), (1, 2)]


def test_batches_follow_the_sorted_order() -> None:
    prompts = [[i % 7, i] for i in range(40)]
    batches = plan_batches(prompts, new_tokens=1, batch_tokens=40, batch_rows=4)
    planned = [prompts[row] for batch in batches for row in batch.rows]
    assert all(a <= b for a, b in pairwise(planned))


def test_it_needs_no_torch() -> None:
    code = "import sys, tunesmith.generate.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
