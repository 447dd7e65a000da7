"""Prompt, look up, tune, or both: every way on the same rows of three real tasks, with what an answer costs.

    python benchmarks/alternatives.py --data FOLDER     # fills results/alternatives.json, and goes on where it was
    python benchmarks/alternatives.py --table           # prints the table of what is measured

The built-in model is tuned on each task (benchmarks/_tasks.py) in full, on the questions alone and with rows looked up
before them (`data.look_up`). `tunesmith advise` compares: the base alone, with the examples that do best on validation rows,
with the training rows most like each question, tuned, and tuned with these. One thread, a process a run.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _tasks import measure, task

TUNED: dict[str, dict[str, Any]] = {
    "on questions": {},
    "on questions with rows": {"look_up": {"passages": 4, "share": 0.8}},
}


def one_run(name: str, how: str, *, folder: Path, steps: int, rows: int) -> dict[str, Any]:
    """Tune and compare in this process."""
    import torch

    from tunesmith import api
    from tunesmith.advice import advise
    from tunesmith.recipe import parse_recipe
    from tunesmith.registry.workspace import Workspace

    torch.set_num_threads(1)
    recipe = task(name, folder=folder) | {"name": name, "base": "starter", "method": "full", "objective": "instruction"}
    recipe["data"] |= TUNED[how]
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
        "| task | tuned | way | score | tokens a prompt | tokens an answer | seconds a row | shown worse than the best |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, how, found in ((name, *run) for name, runs in report["runs"].items() for run in runs.items()):
        places = 1 if max(score["high"] for score in found["systems"].values()) > 1 else 3  # of 100, or a share
        for way, worse in found["shown_worse"].items():
            score, costs = found["systems"][way], found["costs"][way]
            value, low, high = (f"{score[key]:.{places}f}" for key in ("value", "low", "high"))
            shown = f"**{way}** (advised)" if way == found["advised"] else way
            lines.append(
                f"| {name}, {found['metric']} | {how} | {shown} | {value} ({low} to {high}) "
                f"| {costs['tokens_per_prompt']:.0f} | {costs['tokens_per_answer']:.0f} "
                f"| {costs['seconds'] / found['rows']:.2f} | {'yes' if worse else ''} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(measure(__file__, doc=__doc__, sorts=TUNED, steps=150, rows=150, one_run=one_run, table=table))
