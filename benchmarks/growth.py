"""What a row costs as their number grows: packing an epoch, its memory, and preparing rows against the tokenizer alone.

    python benchmarks/growth.py                     # 1,000 to 1,000,000 rows; about 2 GB of disk while it runs
    python benchmarks/growth.py --rows 1000 10000

Packing reads the units of each step in the order of an epoch, as training does, and lays them out; rows are log-normal in
length, from 20 to 1,000 tokens. Preparing turns chat rows into token stores with all checks, and is compared with the
tokenizers library encoding the same rendered rows in one process. Times are processor seconds of one thread; memory is the
peak of a process of its own.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from _machine import code, command, machine

ROOT = Path(__file__).resolve().parent.parent
BATCH_ROWS, MAX_TOKENS = 16, 8192


def peak_bytes() -> int:
    """Peak resident bytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def anonymous_bytes() -> int | None:
    """Memory of this process besides mapped files, whose pages the system takes back when it wants; None where unknown."""
    try:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), None)


def write_rows(folder: Path, *, num_rows: int) -> None:
    """A token store of random rows."""
    from tunesmith.data.tokens import TokenWriter
    from tunesmith.data.types import Origin, Sequence

    random, writer = np.random.default_rng(0), TokenWriter(folder)
    for line in range(1, num_rows + 1):
        length = int(np.clip(random.lognormal(5.0, 0.7), 20, 1000))
        weight_T = np.ones(length, np.float32)
        weight_T[: length // 2] = 0
        tokens_T = random.integers(6, 4000, length).astype(np.int32)
        writer.add([Sequence(tokens_T, weight_T, 0)], origin=Origin("rows", line))
    writer.close()


def packing(num_rows: int) -> dict[str, Any]:
    """Pack one epoch."""
    from tunesmith.data.pack import build_packs
    from tunesmith.data.tokens import TokenStore

    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "store", num_rows=num_rows)
        store = TokenStore(Path(folder) / "store")
        order, tokens, packs, started = np.random.default_rng(0).permutation(num_rows), 0, 0, time.process_time()
        for first in range(0, num_rows, BATCH_ROWS):
            rows = [sequence for unit in order[first : first + BATCH_ROWS].tolist() for sequence in store.unit(unit)]
            for pack in build_packs(rows, max_tokens=MAX_TOKENS):
                packs, tokens = packs + 1, tokens + pack.num_computed_tokens
        seconds, anonymous = time.process_time() - started, anonymous_bytes()
    return {
        "packs": packs,
        "tokens": tokens,
        "seconds": seconds,
        "microseconds_a_row": 1e6 * seconds / num_rows,
        "peak_memory_bytes": peak_bytes(),
        "anonymous_memory_bytes": anonymous,
    }


def preparing(num_rows: int) -> dict[str, Any]:
    """Prepare chat rows, then encode the same rendered rows with the tokenizers library alone."""
    from tunesmith.data.prepare import prepare
    from tunesmith.data.settings import DataSettings
    from tunesmith.data.sources import read_rows
    from tunesmith.data.template import ChatTemplate
    from tunesmith.data.tokenizer import Tokenizer
    from tunesmith.models.base import STARTER
    from tunesmith.objectives.instruction import Instruction

    words = (ROOT / "docs" / "tuning.md").read_text("utf-8").split()
    random = np.random.default_rng(1)
    template = ChatTemplate(Tokenizer.from_folder(STARTER))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
            for row in range(num_rows):
                lengths = random.integers(5, 60, 2)
                asked, answered = (" ".join(random.choice(words, length).tolist()) for length in lengths)
                turns = [{"role": "user", "content": f"{row} {asked}"}, {"role": "assistant", "content": answered}]
                file.write(json.dumps({"messages": turns}) + "\n")
        started = time.process_time()
        prepared = prepare(
            DataSettings(train=str(folder / "rows.jsonl"), validation=None),
            objective=Instruction(),
            template=template,
            max_tokens=2048,
            cache=folder / "cache",
        )
        seconds, tokens = time.process_time() - started, prepared.train.num_tokens
        rows = read_rows(str(folder / "rows.jsonl"), on_bad=print)
        rendered = [template.render(row.value["messages"], generation_prompt=False) for row in rows]
        started = time.process_time()
        encoded = template.tokenizer.backend.encode_batch_fast(rendered, add_special_tokens=False)
        alone = time.process_time() - started
    return {
        "tokens": tokens,
        "seconds": seconds,
        "microseconds_a_row": 1e6 * seconds / num_rows,
        "tokenizer_alone_seconds": alone,
        "tokenizer_alone_tokens": sum(len(found.ids) for found in encoded),
        "times_the_tokenizer": seconds / alone,
        "peak_memory_bytes": peak_bytes(),
    }


def main() -> int:
    """Measure each size in a process of its own, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--most-prepared", type=int, default=100_000, help="rows to prepare at most")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "growth.json")
    parser.add_argument("--role", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        what, rows = arguments.role
        print(json.dumps({"packing": packing, "preparing": preparing}[what](int(rows))))
        return 0
    report: dict[str, Any] = {"command": command(), "date": time.strftime("%Y-%m-%d"), "code": code()}
    report |= {"machine": machine(), "packing": {}, "preparing": {}}
    alone = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    for what in ("packing", "preparing"):
        for rows in arguments.rows:
            if what == "preparing" and rows > arguments.most_prepared:
                continue
            line = [sys.executable, __file__, "--role", what, str(rows)]
            done = subprocess.run(line, env=alone, stdout=subprocess.PIPE, text=True, check=True)
            report[what][rows] = json.loads(done.stdout.splitlines()[-1])
            print(f"{what} {rows:,}: {report[what][rows]}", file=sys.stderr)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
