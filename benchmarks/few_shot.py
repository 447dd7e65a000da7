"""Classes from a few rows each: a head trained by cross-entropy against pairs and a fitted head, on CLINC150.

    python benchmarks/few_shot.py --base FOLDER     # fills results/few_shot.json, and goes on where it was
    python benchmarks/few_shot.py --table           # prints the table of what is measured

For each number of rows a class and each seed, rows are drawn from the training file, tuned on without validation rows, and
scored on the same 1,000 test rows. The intervals in the table are over the seeds; seconds are the median.
"""

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _machine import code, command, machine
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
TRAIN: dict[str, dict[str, Any]] = {
    "classification": {"epochs": 12, "batch_rows": 16, "learning_rate": 1e-3},
    "contrastive": {"epochs": 12, "max_steps": 200, "batch_rows": 64, "learning_rate": 5e-4},
}


def drawn(path: Path, *, rows_a_class: int, seed: int) -> list[str]:
    """Lines of a JSONL file: so many of each label, by the seed."""
    by_label = defaultdict(list)
    for line in path.read_text("utf-8").split("\n"):
        if line:
            by_label[json.loads(line)["label"]].append(line)
    generator = random.Random(seed)
    return [line for label in sorted(by_label) for line in generator.sample(by_label[label], rows_a_class)]


def measured(data: Path, *, base: str, objective: str, rows_a_class: int, seed: int) -> dict[str, Any]:
    """Tune and evaluate."""
    from tunesmith import api
    from tunesmith.recipe import parse_recipe
    from tunesmith.registry.workspace import Workspace

    with tempfile.TemporaryDirectory() as folder:
        few = Path(folder) / "few.jsonl"
        few.write_text("\n".join(drawn(data / "train.jsonl", rows_a_class=rows_a_class, seed=seed)) + "\n", "utf-8")
        recipe = {
            "name": "few-shot",
            "base": base,
            "data": {"train": str(few), "validation": None, "test": str(data / "test.jsonl")},
            "objective": objective,
            "method": {"kind": "lora", "rank": 16},
            "train": TRAIN[objective] | {"seed": seed},
            "evaluate": {"metrics": ["accuracy", "log_loss"], "against": ["majority"], "rows": 1000},
        }
        workspace = Workspace(Path(folder) / "w")
        run = api.tune(parse_recipe(json.dumps(recipe), file=Path(__file__)), workspace=workspace)
        metrics = api.evaluate(run, workspace=workspace).as_dict()["metrics"]
        summary = run.summary
    return {name: scores["systems"]["tuned"] for name, scores in metrics.items()} | {
        "rows": summary["rows"],
        "steps": summary["steps"],
        "seconds": summary["seconds"],
    }


def _with_interval(values: list[float], *, places: int) -> str:
    """Mean and half the width of its 95 % interval by Student's t, over the draws of the rows."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.{places}f}"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.{places}f} ± {half:.{places}f}"


def table(report: dict[str, Any]) -> str:
    """What is measured, as Markdown."""
    lines = ["| rows a class | objective | accuracy | log loss | seconds |", "| ---: | --- | ---: | ---: | ---: |"]
    for key, by_seed in report["runs"].items():
        rows, objective = key.split(" ")
        runs = list(by_seed.values())
        accuracy, loss = (
            _with_interval([run[metric]["value"] for run in runs], places=places)
            for metric, places in (("accuracy", 3), ("log_loss", 2))
        )
        seconds = statistics.median(run["seconds"] for run in runs)
        lines.append(f"| {rows} | {objective} | {accuracy} | {loss} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> int:
    """Fill the file, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="starter")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "clinc150")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "few_shot.json")
    parser.add_argument("--table", action="store_true", help="print the table of what was measured")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"runs": {}}
    if arguments.out.is_file():
        report = json.loads(arguments.out.read_text("utf-8"))
    if arguments.table:
        print(table(report))
        return 0
    made = {"command": command(), "date": time.strftime("%Y-%m-%d"), "code": code(), "machine": machine()}
    report = made | {"runs": report["runs"]}
    for seed in range(arguments.seeds):
        for rows in arguments.rows:
            for objective in TRAIN:
                runs = report["runs"].setdefault(f"{rows} {objective}", {})
                if str(seed) not in runs:
                    runs[str(seed)] = measured(
                        arguments.data, base=arguments.base, objective=objective, rows_a_class=rows, seed=seed
                    )
                    print(rows, objective, seed, runs[str(seed)], file=sys.stderr)
                    arguments.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(table(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
