"""Ways to run causal attention over packed rows on a CPU: one flash call a row, one batched call, plain products.

    python benchmarks/attention_cpu.py [--heads 6] [--dimension 32] [--threads 1]

Prints one JSON document: milliseconds (best of 5) of the forward and the backward pass for 4,096 tokens in rows of
64, 256 and 512, in float32 and bf16.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _machine import code, command, machine

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
TOKENS = 4096


def milliseconds(work: Callable[[], object]) -> float:
    """The best of five, after one that does not count."""
    work()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return round(best * 1e3, 2)


def measure(length: int, dtype: torch.dtype, *, heads: int, dimension: int) -> dict[str, float]:
    """All ways for rows of one length."""
    rows = TOKENS // length
    query, key, value, grad = (torch.randn(rows, heads, length, dimension, dtype=dtype) for _ in range(4))
    scale = dimension**-0.5
    out, lse = flash(query, key, value, 0.0, True)
    hidden = ~torch.ones(length, length, dtype=torch.bool).tril()

    def each(work: Callable[[slice], object]) -> Callable[[], None]:
        return lambda: [work(slice(i, i + 1)) for i in range(rows)] and None

    def plain_forward() -> torch.Tensor:
        scores = (query @ key.transpose(-1, -2)).mul_(scale).masked_fill_(hidden, float("-inf"))
        return scores.softmax(-1) @ value

    def plain_backward() -> tuple[torch.Tensor, ...]:
        weights = (query @ key.transpose(-1, -2)).mul_(scale).masked_fill_(hidden, float("-inf")).softmax(-1)
        grad_scores = (grad @ value.transpose(-1, -2)).sub_((grad * out).sum(-1, keepdim=True)).mul_(weights)
        return grad_scores @ key, grad_scores.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ grad

    return {
        "flash_forward": milliseconds(each(lambda s: flash(query[s], key[s], value[s], 0.0, True))),
        "flash_backward": milliseconds(
            each(lambda s: flash_backward(grad[s], query[s], key[s], value[s], out[s], lse[s], 0.0, True))
        ),
        "batched_forward": milliseconds(lambda: flash(query, key, value, 0.0, True)),
        "batched_backward": milliseconds(lambda: flash_backward(grad, query, key, value, out, lse, 0.0, True)),
        "plain_forward": milliseconds(plain_forward),
        "plain_backward": milliseconds(plain_backward),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--dimension", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = {
        f"{length} {str(dtype).removeprefix('torch.')}": measure(
            length, dtype, heads=arguments.heads, dimension=arguments.dimension
        )
        for length in (64, 256, 512)
        for dtype in (torch.float32, torch.bfloat16)
    }
    print(json.dumps({"command": command(), "code": code(), "machine": machine(), "milliseconds": found}, indent=1))


if __name__ == "__main__":
    main()
