"""Time and memory of every check of `data check`.

    python benchmarks/check_speed.py --rows 100000 --embedder ENCODER
    python benchmarks/check_speed.py --table

Rows are made up, 150 words (about 200 tokens) each, 2 % of which repeat an earlier one with a word changed, 1 % hold an
item of the benchmark (10,000 items of 45 words) and 1 % a passage of the protected texts (5 million words). For the checks
of labels they are texts of 50 words of 20 classes. `drift` compares two halves of the rows. Each check runs in a process of
its own; making and reading the rows is not timed, but where the check reads them a second time. Seconds are processor
seconds of one thread, the loading of libraries among them; memory is the peak of the process, of which `check_memory_bytes`
are the check's, what it reads besides the rows among them; `kept_bytes_a_row` is what the process grew by from the first
thousand rows to the last (Linux; null elsewhere). A million rows are extrapolated for the checks whose time is linear.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from _machine import code, command, machine, versions
from planted.words import some_words

from tunesmith.data.curate.checks import NAMES, Models, choose
from tunesmith.data.curate.drift import MAX_ROWS as MAX_DRIFT_ROWS
from tunesmith.data.curate.drift import drift_of
from tunesmith.data.formats import examine
from tunesmith.data.settings import DataSettings
from tunesmith.data.sources import read_rows
from tunesmith.data.types import Example

RESULT = Path(__file__).resolve().parent / "results" / "check_speed.json"
FILES = "files"  # the role of the process that makes them
LABELLED = ("labels", "label_errors", "drift")
MOST_ROWS = {"label_errors": 20_000, "language": 20_000, "semantic": 200, "drift": 2 * MAX_DRIFT_ROWS}
NOT_LINEAR = ("semantic", "label_errors", "drift")  # squares, or a part of the rows alone
ROW_WORDS, ITEM_WORDS, NUM_ITEMS, BOOK_WORDS, NUM_CLASSES = 150, 45, 10_000, 5_000_000, 20
BATCH_ROWS = 1_000
MILLION = 1_000_000


def peak_bytes() -> int:
    """Peak resident bytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_bytes() -> int:
    """Resident bytes of this process now; 0 where that cannot be told."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * resource.getpagesize() if path.is_file() else 0


def conversations(num_rows: int, *, items: list[list[str]], book: list[str]) -> Iterator[dict[str, Any]]:
    """Conversations of two turns."""
    random = np.random.default_rng(1)
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
        yield {"prompt": " ".join(words[:50]), "completion": " ".join([*words[50:100], *piece, *words[100:]])}


def labelled(num_rows: int) -> Iterator[dict[str, Any]]:
    """Texts of 50 words, three of them of ten that their class prefers; of one label in fifty another class."""
    random = np.random.default_rng(1)
    own = [some_words(random, 10) for _ in range(NUM_CLASSES)]
    for row in range(num_rows):
        text = [*some_words(random, 47), *random.choice(own[row % NUM_CLASSES], 3).tolist()]
        yield {"text": " ".join(text), "label": f"class {(row + (row % 50 == 7)) % NUM_CLASSES}"}


def write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Rows as JSON Lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def make_files(folder: Path, num_rows: int) -> None:
    """All that the checks read."""
    random = np.random.default_rng(0)
    items = [some_words(random, ITEM_WORDS) for _ in range(NUM_ITEMS)]
    book = some_words(random, BOOK_WORDS)
    write(folder / "rows.jsonl", conversations(num_rows, items=items, book=book))
    write(folder / "labelled.jsonl", labelled(num_rows))
    half = min(num_rows, MOST_ROWS["drift"]) // 2
    for name, start in (("train", 0), ("production", half)):
        write(folder / f"{name}.jsonl", islice(labelled(2 * half), start, start + half))
    write(folder / "benchmark.jsonl", ({"text": " ".join(item)} for item in items))
    (folder / "protected").mkdir()
    texts = ({"text": " ".join(book[start : start + 10_000])} for start in range(0, BOOK_WORDS, 10_000))
    write(folder / "protected" / "books.jsonl", texts)


def read(path: Path, *, settings: DataSettings, num_rows: int) -> Iterator[Example]:
    """The first rows of a file."""
    for row in islice(read_rows(path, on_bad=print), num_rows):
        found = examine(row, settings=settings)
        assert isinstance(found, Example), found
        yield found


def measure(check: str, num_rows: int, *, folder: Path, embedder: str | None) -> dict[str, Any]:
    """One check over all rows."""
    num_rows = min(num_rows, MOST_ROWS.get(check, num_rows))
    if check == "drift":
        before, started = peak_bytes(), time.process_time()
        found = drift_of(str(folder / "train.jsonl"), str(folder / "production.jsonl"))
        return _shown(found.train_rows + found.production_rows, int(found.apart.found), 0.0, started, before=before)
    path = folder / ("labelled.jsonl" if check in LABELLED else "rows.jsonl")
    given: dict[str, Any] = {"benchmarks": [str(folder / "benchmark.jsonl")]} if check == "contamination" else {}
    given |= {"protected": str(folder / "protected")} if check == "protected" else {}
    given |= {"mapping": {"text": "text", "label": "label"}} if check in LABELLED else {}
    settings = DataSettings(train=str(path), **given)
    embed = None
    if check == "semantic":
        from tunesmith.models.embed import load_embedder

        assert embedder is not None
        embed = load_embedder(embedder)

    def again() -> Iterator[Example]:
        return read(path, settings=settings, num_rows=num_rows)

    for _ in islice(again(), BATCH_ROWS):  # what reading takes is not the check's
        pass
    before, started, num_found, seconds = peak_bytes(), time.process_time(), 0, 0.0
    first_bytes = 0  # resident after the first batch
    looking = choose(settings, again=again, only=(check,), models=Models(embed=embed)).checks[check]
    ready_seconds, rows = time.process_time() - started, again()
    while batch := list(islice(rows, BATCH_ROWS)):
        started = time.process_time()
        for example in batch:
            num_found += sum(1 for _ in looking.look(example))
        seconds += time.process_time() - started
        first_bytes = first_bytes or resident_bytes()
    kept_bytes = resident_bytes() - first_bytes
    started = time.process_time()
    num_found += sum(1 for _ in looking.finish())
    measured = _shown(num_rows, num_found, ready_seconds, started - seconds, before=before)
    measured["kept_bytes_a_row"] = (
        round(kept_bytes / (num_rows - BATCH_ROWS)) if num_rows > BATCH_ROWS and first_bytes else None
    )
    if check not in NOT_LINEAR:
        measured["million_rows_seconds"] = ready_seconds + measured["seconds"] * MILLION / num_rows
    return measured


def _shown(num_rows: int, num_found: int, ready_seconds: float, started: float, *, before: int) -> dict[str, Any]:
    seconds, peak = time.process_time() - started, peak_bytes()
    return {
        "rows": num_rows,
        "found": num_found,
        "ready_seconds": ready_seconds,
        "seconds": seconds,
        "rows_per_second": num_rows / seconds,
        "peak_memory_bytes": peak,
        "check_memory_bytes": peak - before,
    }


def table(report: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    lines = [
        "| check | rows | rows a second | before the first | peak memory, of the check | kept of a row | a million rows |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for check, found in report["checks"].items():
        million = f"{found['million_rows_seconds']:,.0f} s" if "million_rows_seconds" in found else "-"
        kept = "-" if found.get("kept_bytes_a_row") is None else f"{found['kept_bytes_a_row']:,} bytes"
        memory = f"{found['peak_memory_bytes'] / 1e6:,.0f} MB, {found['check_memory_bytes'] / 1e6:,.0f} MB"
        lines.append(
            f"| `{check}` | {found['rows']:,} | {found['rows_per_second']:,.0f} | {found['ready_seconds']:.1f} s"
            f" | {memory} | {kept} | {million} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure each check in a process of its own, and write the report."""
    names = (*(name for name in NAMES if name != "difficulty"), "drift")  # which costs what the base costs
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--embedder", help="an encoder, for rows that say the same in other words")
    parser.add_argument("--table", action="store_true", help="print the results that are there")
    parser.add_argument("--role", choices=(FILES, *names), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(RESULT.read_text("utf-8"))))
        return 0
    if options.role == FILES:
        make_files(options.folder, options.rows)
        return 0
    if options.role:
        found = measure(options.role, options.rows, folder=options.folder, embedder=options.embedder)
        print(json.dumps(found))
        return 0
    typed = command().replace(options.embedder, "ENCODER") if options.embedder else command()
    report: dict[str, Any] = {"command": typed, "date": time.strftime("%Y-%m-%d"), "code": code()}
    report |= {"machine": machine(), "checks": {}}
    report["machine"]["versions"] |= versions(("scikit-learn", "py3langid"))
    with tempfile.TemporaryDirectory() as folder:
        for check in (FILES, *names):
            if check == "semantic" and options.embedder is None:
                continue
            # A process begins with the peak of the one that starts it, so this one makes no files and loads nothing large.
            line = [sys.executable, __file__, "--role", check, "--rows", str(options.rows), "--folder", folder]
            line += ["--embedder", options.embedder] if options.embedder else []
            done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
            if check != FILES:
                report["checks"][check] = json.loads(done.stdout)
                print(f"{check}: {report['checks'][check]}", file=sys.stderr)
    RESULT.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(table(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
