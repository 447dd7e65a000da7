"""Prompt, look up, tune, or both: every way on the same rows of three real tasks, with what an answer costs.

    python benchmarks/alternatives.py --data FOLDER     # fills results/alternatives.json, and goes on where it was
    python benchmarks/alternatives.py --table           # prints the table of what is measured

The built-in model is tuned on each task (benchmarks/_tasks.py) in full. `tunesmith advise` compares: the base alone, with
the examples that do best on validation rows, with the training rows most like each question, tuned, and tuned with these.
One thread, a process a task.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _machine import code, command, machine
from _tasks import TASKS, in_its_own_process, task

ROOT = Path(__file__).resolve().parent.parent


def one_task(name: str, *, folder: Path, steps: int, rows: int) -> dict[str, Any]:
    """Tune and compare in this process."""
    import torch

    from tunesmith import api
    from tunesmith.advice import advise
    from tunesmith.recipe import parse_recipe
    from tunesmith.registry.workspace import Workspace

    torch.set_num_threads(1)
    recipe = task(name, folder=folder) | {"name": name, "base": "starter", "method": "full", "objective": "instruction"}
    recipe["train"] = {
        "epochs": 50,
        "max_steps": steps,
        "learning_rate": 5e-4,
        "batch_rows": 16,
        "validate_every": max(1, steps // 3),
    }
    with tempfile.TemporaryDirectory() as temporary:
        workspace, started = Workspace(Path(temporary) / "w"), time.process_time()
        run = api.tune(parse_recipe(json.dumps(recipe), file=Path(__file__)), workspace=workspace)
        seconds = time.process_time() - started
        advice = advise(run, workspace=workspace, rows=rows)
        evaluation = json.loads((run.path / "evaluation.json").read_text("utf-8"))
    metric = advice["metric"]
    return {
        "metric": metric,
        "rows": advice["rows"],
        "tuning_processor_seconds": round(seconds, 1),
        "systems": evaluation["metrics"][metric]["systems"],
        "costs": evaluation["costs"],
        "advised": advice["advised"],
        "because": advice["because"],
        "would_change": advice["would_change"],
        "shown_worse": {way["way"]: way["shown_worse"] for way in advice["ways"]},
    }


def table(report: dict[str, Any]) -> str:
    """What is measured, as Markdown."""
    lines = [
        "| task | way | score | tokens a prompt | tokens an answer | seconds a row | shown worse than the best |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, found in report["tasks"].items():
        places = 1 if max(score["high"] for score in found["systems"].values()) > 1 else 3  # of 100, or a share
        for way, worse in found["shown_worse"].items():
            score, costs = found["systems"][way], found["costs"][way]
            value, low, high = (f"{score[key]:.{places}f}" for key in ("value", "low", "high"))
            shown = f"**{way}** (advised)" if way == found["advised"] else way
            lines.append(
                f"| {name}, {found['metric']} | {shown} | {value} ({low} to {high}) | {costs['tokens_per_prompt']:.0f} "
                f"| {costs['tokens_per_answer']:.0f} | {costs['seconds'] / found['rows']:.2f} | {'yes' if worse else ''} |"
            )
    return "\n".join(lines)


def main() -> int:
    """Fill the file, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with the data sets")
    parser.add_argument("--tasks", default=",".join(TASKS), help="separated by commas")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rows", type=int, default=150, help="test rows that are answered")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "alternatives.json")
    parser.add_argument("--table", action="store_true", help="print the table of what was measured")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        print(
            json.dumps(
                one_task(json.loads(arguments.role), folder=arguments.data, steps=arguments.steps, rows=arguments.rows)
            )
        )
        return 0
    before = json.loads(arguments.out.read_text("utf-8")) if arguments.out.is_file() else {}
    if arguments.table:
        print(table(before))
        return 0
    made = {"command": command(), "date": time.strftime("%Y-%m-%d"), "code": code(), "machine": machine()}
    report = made | {"steps": arguments.steps, "tasks": before.get("tasks", {})}
    options = ["--data", str(arguments.data), "--steps", str(arguments.steps), "--rows", str(arguments.rows)]
    for name in arguments.tasks.split(","):
        if name in report["tasks"]:
            continue
        report["tasks"][name] = in_its_own_process(__file__, *options, role=name)
        print(f"{name}: {report['tasks'][name]}", file=sys.stderr)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(table(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
