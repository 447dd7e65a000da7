"""One training step on a CPU, without the loop around it: what packs of few lengths, compiled blocks and bf16 give.

    python benchmarks/step_cpu.py --precision bf16
    python benchmarks/step_cpu.py --precision bf16 --lengths any     # packs as they come
    python benchmarks/step_cpu.py --precision bf16 --compile
    python benchmarks/step_cpu.py --profile                          # where the time goes

LoRA of rank 16 on a random Llama of 33 million parameters, rows of 50 to 500 tokens, packs of 1,536, forward and backward,
one thread. Printed are microseconds a token of the first and the second half of the steps, and the peak memory.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from against_trl import TOKENIZER
from plan_table import SHAPE

from tunesmith.data.pack import Pack, build_packs
from tunesmith.data.types import Sequence
from tunesmith.methods.base import set_trainable_dtype, trainable
from tunesmith.methods.lora import Lora
from tunesmith.models.load import Model, NewBase, load_model
from tunesmith.objectives.instruction import Instruction
from tunesmith.train.passes import autocast, forward
from tunesmith.train.settings import TrainSettings

ROWS_A_STEP, MAX_TOKENS = 8, 1536


def make_packs(random: np.random.Generator) -> list[Pack]:
    """A step's packs of random rows, the second half of each row trained."""
    rows = []
    for row in range(ROWS_A_STEP):
        length = int(random.integers(50, 500))
        tokens_T = random.integers(6, SHAPE["vocab_size"] - 400, length).astype(np.int32)
        rows.append(Sequence(tokens_T, (np.arange(length) >= length // 2).astype(np.float32), row))
    return list(build_packs(rows, max_tokens=MAX_TOKENS))


def step(model: Model, packs: list[Pack], *, settings: TrainSettings) -> float:
    """Forward and backward of a step; seconds a token."""
    started = time.perf_counter()
    for pack in packs:
        with autocast(model, settings):
            loss = forward(model, pack, objective=Instruction())
        loss.sum.backward()
    for parameter in trainable(model).values():
        parameter.grad = None
    return (time.perf_counter() - started) / sum(len(pack.tokens_T) for pack in packs)


def main() -> int:
    """Make the model, compute the steps, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--lengths", choices=("few", "any"), default="few", help="packs filled up, or as they come")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE), "utf-8")
        model = load_model(NewBase(config=f"{folder}/config.json", tokenizer=str(TOKENIZER), seed=0))
    Lora(rank=16).apply(model, seed=0)
    settings = TrainSettings(precision=arguments.precision)
    if arguments.precision == "bf16":
        set_trainable_dtype(model, frozen=torch.bfloat16)
    if arguments.compile:
        model.compile_blocks()
    random = np.random.default_rng(0)
    steps = [make_packs(random) for _ in range(arguments.steps)]
    if arguments.lengths == "few":
        steps = [[pack.padded() for pack in packs] for packs in steps]
    if arguments.profile:
        step(model, steps[0], settings=settings)
        with torch.profiler.profile() as profile:
            for packs in steps[1:4]:
                step(model, packs, settings=settings)
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))
        return 0
    seconds = [step(model, packs, settings=settings) for packs in steps]
    half = len(seconds) // 2
    halves = " and ".join(f"{1e6 * np.mean(part):.0f}" for part in (seconds[:half], seconds[half:]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{halves} microseconds a token in the two halves, {peak:,.0f} MiB at most")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
