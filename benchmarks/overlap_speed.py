"""Time and memory of the checks that compare rows: with each other, with a benchmark, with protected texts.

    python benchmarks/overlap_speed.py --rows 100000

Rows are made up, 150 words (about 200 tokens) each, 2 % of which repeat an earlier one with a word changed, 1 % hold an
item of the benchmark (10,000 items of 45 words) and 1 % a passage of the protected texts (5 million words). Each check
runs in a process of its own; making the rows is not timed. Seconds are processor seconds of one thread, memory is the
peak of the process. A million rows are extrapolated: seconds and what is kept of the rows in proportion.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from _machine import code, command, machine
from planted.words import some_words

from tunesmith.data.curate.contamination import Contamination
from tunesmith.data.curate.duplicates import Repeats
from tunesmith.data.curate.protected import Protected
from tunesmith.data.settings import DataSettings
from tunesmith.data.types import Example, Message, Origin

RESULTS = Path(__file__).resolve().parent / "results"
CHECKS = ("duplicates", "contamination", "protected")
ROW_WORDS, ITEM_WORDS, NUM_ITEMS, BOOK_WORDS = 150, 45, 10_000, 5_000_000
BATCH_ROWS = 1_000
MILLION = 1_000_000


def peak_bytes() -> int:
    """Peak resident bytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def examples(num_rows: int, *, items: list[list[str]], book: list[str]) -> Iterator[list[Example]]:
    """Conversations of two turns, in batches."""
    random, batch = np.random.default_rng(1), []
    words = some_words(random, ROW_WORDS)
    for row in range(num_rows):
        if row % 50 != 1:
            words = some_words(random, ROW_WORDS)
        else:  # the row before once more
            words[int(random.integers(ROW_WORDS))] = "changed"
        piece: list[str] = items[row % NUM_ITEMS] if row % 100 == 10 else []
        if row % 100 == 20:
            start = int(random.integers(len(book) - 50))
            piece = book[start : start + 50]
        prompt, answer = " ".join(words[:50]), " ".join([*words[50:100], *piece, *words[100:]])
        turns = (Message("user", prompt), Message("assistant", answer))
        batch.append(Example(Origin("rows.jsonl", row + 1), "chat", turns))
        if len(batch) == BATCH_ROWS:
            yield batch
            batch = []
    yield batch


def measure(check: str, num_rows: int) -> dict[str, Any]:
    """One check over all rows."""
    random = np.random.default_rng(0)
    items = [some_words(random, ITEM_WORDS) for _ in range(NUM_ITEMS)]
    book = some_words(random, BOOK_WORDS if check == "protected" else 100)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.jsonl"
        texts = (
            items
            if check == "contamination"
            else [book[start : start + 10_000] for start in range(0, len(book), 10_000)]
        )
        path.write_text("".join(json.dumps({"text": " ".join(text)}) + "\n" for text in texts), "utf-8")
        before, started, found = peak_bytes(), time.process_time(), 0
        if check == "duplicates":
            repeats = Repeats()
            index_seconds = 0.0
        else:
            settings = DataSettings(train="rows.jsonl")
            looking = Contamination([str(path)], settings) if check == "contamination" else Protected(folder)
            index_seconds = time.process_time() - started
    indexed, seconds = peak_bytes(), 0.0
    for batch in examples(num_rows, items=items, book=book):
        started = time.process_time()
        for example in batch:
            if check == "duplicates":
                repeats.add(example)
            else:
                found += sum(1 for _ in looking.look(example))
        seconds += time.process_time() - started
    started = time.process_time()
    if check == "duplicates":
        found = sum(1 for _ in repeats.repeats()) + sum(1 for _ in repeats.contradictions()) + len(repeats.candidates())
    else:
        found += sum(1 for _ in looking.finish())
    seconds += time.process_time() - started
    grown = peak_bytes() - indexed
    times = max(1.0, MILLION / num_rows) if check == "duplicates" else 1.0  # the others keep nothing of a row
    return {
        "rows": num_rows,
        "found": found,
        "index_seconds": index_seconds,
        "seconds": seconds,
        "rows_per_second": num_rows / seconds,
        "memory_before_bytes": before,
        "peak_memory_bytes": indexed + grown,
        "million_rows_seconds": index_seconds + seconds * MILLION / num_rows,
        "million_rows_peak_bytes": indexed + grown * times,
    }


def main() -> int:
    """Measure each check in a process of its own, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=RESULTS / "overlap_speed.json")
    parser.add_argument("--role", choices=CHECKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        print(json.dumps(measure(arguments.role, arguments.rows)))
        return 0
    report: dict[str, Any] = {"command": command(), "date": time.strftime("%Y-%m-%d"), "code": code()}
    report |= {"machine": machine(), "checks": {}}
    for check in CHECKS:
        line = [sys.executable, __file__, "--role", check, "--rows", str(arguments.rows)]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
        report["checks"][check] = json.loads(done.stdout)
        print(f"{check}: {report['checks'][check]}", file=sys.stderr)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
