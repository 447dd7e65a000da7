"""Real tasks that measurements share: recipes without their base, and the command line that measures runs on each."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from _machine import code, command, machine

ROOT = Path(__file__).resolve().parent.parent

TASKS: dict[str, dict[str, Any]] = {
    "rnnlg_laptop": {
        "data": {
            "train": "rnnlg_laptop/train.jsonl",
            "validation": 0.03,
            "test": "rnnlg_laptop/test.jsonl",
            "mapping": {"prompt": "mr", "completion": "text"},
            "duplicates": "drop",
        },
        "evaluate": {"metrics": ["chrf", "bleu", "perplexity"], "max_tokens": 64},
    },
    "geoquery": {
        "data": {
            "train": "text2sql/geoquery/train.jsonl",
            "validation": "text2sql/geoquery/validation.jsonl",
            "test": "text2sql/geoquery/test.jsonl",
            "mapping": {"prompt": "question", "completion": "sql"},
        },
        "evaluate": {"metrics": ["token_f1", "exact_match", "perplexity"], "max_tokens": 96},
    },
    "trec": {
        "data": {
            "train": "trec/train.jsonl",
            "validation": 0.05,
            "test": "trec/test.jsonl",
            "mapping": {"prompt": "text", "completion": "coarse"},
            "duplicates": "drop",
        },
        "evaluate": {"metrics": ["exact_match", "perplexity"], "max_tokens": 8},
    },
}
FILES = ("train", "validation", "test")


def task(name: str, *, folder: Path) -> dict[str, Any]:
    """A recipe's `data` and `evaluate` sections, with the files below `folder`."""
    found = TASKS[name]
    data = {k: str(folder / v) if k in FILES and isinstance(v, str) else v for k, v in found["data"].items()}
    return {"data": data, "evaluate": dict(found["evaluate"])}


def in_its_own_process(script: str, *options: str, role: Any) -> dict[str, Any]:
    """What a measurement prints as its last line when it is called for one `role`, with one thread."""
    line = [sys.executable, script, *options, "--role", json.dumps(role)]
    done = subprocess.run(
        line, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(
    script: str,
    *,
    doc: str | None,
    sorts: Iterable[str],
    steps: int,
    rows: int,
    one_run: Callable[..., dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> int:
    """The command line of `script`: `one_run(task, sort, folder=, steps=, rows=)` of every sort on every task.

    Each runs in a process of its own; what is measured is kept in results/ under the script's name, and not measured again.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with the data sets")
    parser.add_argument("--tasks", default=",".join(TASKS), help="separated by commas")
    parser.add_argument("--sorts", default=";".join(sorts), help="separated by semicolons")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--rows", type=int, default=rows, help="test rows that are answered")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / f"{Path(script).stem}.json")
    parser.add_argument("--table", action="store_true", help="print the table of what was measured")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        name, sort = json.loads(arguments.role)
        print(json.dumps(one_run(name, sort, folder=arguments.data, steps=arguments.steps, rows=arguments.rows)))
        return 0
    before = json.loads(arguments.out.read_text("utf-8")) if arguments.out.is_file() else {}
    if arguments.table:
        print(table(before))
        return 0
    made = {"command": command(), "date": time.strftime("%Y-%m-%d"), "code": code(), "machine": machine()}
    report = made | {"steps": arguments.steps, "rows": arguments.rows, "runs": before.get("runs", {})}
    options = ["--data", str(arguments.data), "--steps", str(arguments.steps), "--rows", str(arguments.rows)]
    for sort in arguments.sorts.split(";"):  # sort by sort, so that a part of the table compares all tasks
        for name in arguments.tasks.split(","):
            runs = report["runs"].setdefault(name, {})
            if sort in runs:
                continue
            runs[sort] = in_its_own_process(script, *options, role=[name, sort])
            print(f"{name}, {sort}: {runs[sort]}", file=sys.stderr)
            arguments.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(table(report))
    return 0
