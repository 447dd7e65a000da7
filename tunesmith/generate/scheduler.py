"""Which prompts are decoded together, and what beginning they share.

Prompts in sorted order stand beside those they have most in common with, so a batch is a run of them and its shared
prefix is what its first and last have in common. The runs are chosen by dynamic programming over their cost in tokens,

    cost(run) = min(sum of lengths,  prefix + sum of own parts + STEP_TOKENS)  +  STEP_TOKENS * new_tokens

where the last term is what the decoding steps cost however few rows they serve: a long common prefix keeps strangers
out of a batch, a short one does not. SGLang (Zheng et al. 2024) orders requests by a radix tree to the same end.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

STEP_TOKENS = 64  # one more call of the model costs about as much as this many more tokens in a call


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts `rows` (indices into the caller's list) and how many first tokens they share; each has more than that."""

    rows: tuple[int, ...]
    prefix_tokens: int


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two prompts begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # by halves, so that the comparing is done by slices and not token by token
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def plan_batches(
    prompts: Sequence[Sequence[int]], *, new_tokens: int, batch_tokens: int, batch_rows: int
) -> list[Batch]:
    """Split prompts into batches of least cost; every prompt is in exactly one.

    A batch holds at most `batch_rows` prompts and room for `batch_tokens` tokens: the prefix once and, for each row,
    the longest own part and `new_tokens`. A prompt that is larger by itself gets a batch of its own.
    """
    order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
    ordered = [tuple(prompts[i]) for i in order]
    common = [0] + [common_length(a, b) for a, b in itertools.pairwise(ordered)]
    best_cost: list[float] = [0.0]  # of the first n prompts
    best_cut: list[tuple[int, int]] = [(0, 0)]  # where their last batch begins, and its prefix
    for last in range(1, len(ordered) + 1):
        cost, cut = float("inf"), (last - 1, 0)
        shortest = shared = len(ordered[last - 1])
        longest = total = 0
        for first in range(last - 1, max(-1, last - 1 - batch_rows), -1):
            rows, length = last - first, len(ordered[first])
            shortest, longest, total = min(shortest, length), max(longest, length), total + length
            prefix = max(0, min(shared, shortest - 1))
            shared_cost = total - (rows - 1) * prefix + STEP_TOKENS
            if shared_cost < total or rows * (longest + new_tokens) > batch_tokens:
                tokens = shared_cost
            else:
                prefix, tokens = 0, total
            if rows > 1 and prefix + rows * (longest - prefix + new_tokens) > batch_tokens:
                break
            if best_cost[first] + tokens < cost:
                cost, cut = best_cost[first] + tokens, (first, prefix)
            shared = min(shared, common[first])
        best_cost.append(cost + STEP_TOKENS * new_tokens)
        best_cut.append(cut)
    batches, last = [], len(ordered)
    while last > 0:
        first, prefix = best_cut[last]
        batches.append(Batch(rows=tuple(order[first:last]), prefix_tokens=prefix))
        last = first
    return batches[::-1]


def plan_by_length(
    prompts: Sequence[Sequence[int]], *, new_tokens: int, batch_tokens: int, batch_rows: int
) -> list[Batch]:
    """Split prompts that share nothing into batches of like lengths, longest first; limits as in `plan_batches`."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches: list[Batch] = []
    while order:
        rows = min(batch_rows, max(1, batch_tokens // (len(prompts[order[0]]) + new_tokens)))
        batches.append(Batch(rows=tuple(order[:rows]), prefix_tokens=0))
        order = order[rows:]
    return batches
