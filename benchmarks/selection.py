"""Are rows that `data.select` chooses better than random ones? The same recipe on both, and on all rows.

    python benchmarks/selection.py --data ../shared/data/trec --label coarse --keep 500 --by quality+diversity --draws 5
    python benchmarks/selection.py --data ../shared/data/text2sql/geoquery --completion sql --prompt question --keep 100

The chosen rows are one set, trained with as many seeds as there are random draws; each draw is trained with one seed, and
all of them for as many steps. The interval of the difference of the means is Welch's, at 95 %: over the training seeds on
one side, over draws and seeds on the other. `verdict` says `better` or `worse` where it excludes zero.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _machine import code, command, machine
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent


def scored(arguments: argparse.Namespace, *, train: Path, seed: int, select: dict[str, Any] | None) -> dict[str, float]:
    """The score on the test rows of one run."""
    from tunesmith import api
    from tunesmith.recipe import parse_recipe
    from tunesmith.registry.workspace import Workspace

    mapping = {"text": "text", "label": arguments.label}
    if arguments.completion:
        mapping = {"prompt": arguments.prompt, "completion": arguments.completion}
    recipe = {
        "name": "select",
        "base": arguments.base,
        "data": {
            "train": str(train),
            "validation": None,
            "test": str(arguments.data / "test.jsonl"),
            "mapping": mapping,
            "select": select,
            "too_long": "drop",
        },
        "objective": "instruction" if arguments.completion else "classification",
        "method": {"kind": "lora", "rank": 16},
        "train": {
            "epochs": 1000,
            "max_steps": arguments.steps,
            "batch_rows": 16,
            "learning_rate": arguments.rate,
            "seed": seed,
        },
        "evaluate": {"metrics": [arguments.metric], "against": None, "rows": arguments.rows, "max_tokens": 64},
    }
    recipe["evaluate"]["against"] = ["base"] if arguments.completion else ["majority"]
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder))
        run = api.tune(parse_recipe(json.dumps(recipe), file=Path(__file__)), workspace=workspace)
        metrics = api.evaluate(run, workspace=workspace).as_dict()["metrics"]
        value = metrics[arguments.metric]["systems"]["tuned"]["value"]
        return {"seed": seed, "score": value, "rows": run.summary["rows"], "seconds": run.summary["seconds"]}


def measured(arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """All runs, by what they were trained on."""
    train = arguments.data / "train.jsonl"
    lines = [line for line in train.read_text("utf-8").split("\n") if line]
    runs: dict[str, list[dict[str, float]]] = {"chosen": [], "drawn": [], "all": []}
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / "drawn.jsonl"
        for seed in range(arguments.draws):
            select = {"keep": arguments.keep, "by": arguments.by}
            runs["chosen"].append(scored(arguments, train=train, seed=seed, select=select))
            rows = random.Random(seed).sample(lines, int(runs["chosen"][0]["rows"]))
            drawn.write_text("\n".join(rows) + "\n", "utf-8")
            runs["drawn"].append(scored(arguments, train=drawn, seed=seed, select=None))
            if seed < arguments.all_seeds:
                runs["all"].append(scored(arguments, train=train, seed=seed, select=None))
            print(seed, {name: of[-1]["score"] for name, of in runs.items() if of}, file=sys.stderr, flush=True)
    return runs


def compared(chosen: list[float], drawn: list[float], *, higher_is_better: bool) -> dict[str, Any]:
    """The difference of the means, its interval and what it says."""
    found = stats.ttest_ind(chosen, drawn, equal_var=False)
    low, high = found.confidence_interval(0.95)
    good, bad = (low > 0, high < 0) if higher_is_better else (high < 0, low > 0)
    return {
        "value": statistics.mean(chosen) - statistics.mean(drawn),
        "low": float(low),
        "high": float(high),
        "p": float(found.pvalue),
        "verdict": "better" if good else "worse" if bad else "undecided",
    }


def main() -> int:
    """Train, compare, write the report and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data" / "trec", help="train and test.jsonl"
    )
    parser.add_argument("--base", default="starter")
    parser.add_argument("--label", default="label", help="the column of the class")
    parser.add_argument("--prompt", default="prompt", help="with --completion: the column of the prompt")
    parser.add_argument("--completion", help="the column of the answer, for an instruction task")
    parser.add_argument("--metric", default="accuracy", help="of the test rows")
    parser.add_argument("--keep", type=float, default=500)
    parser.add_argument("--by", default="quality+diversity")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--all-seeds", type=int, default=2, help="runs on all rows")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--rows", type=int, default=500, help="test rows")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "selection.json")
    arguments = parser.parse_args()
    from tunesmith.evaluate.metrics import METRICS

    started, made = time.perf_counter(), {"date": time.strftime("%Y-%m-%d"), "code": code(), "machine": machine()}
    runs = measured(arguments)
    scores = {name: [run["score"] for run in of] for name, of in runs.items()}
    difference = compared(
        scores["chosen"], scores["drawn"], higher_is_better=METRICS[arguments.metric].higher_is_better
    )
    report = {"command": command(), **made, "runs": runs}
    report |= {"means": {name: statistics.mean(of) for name, of in scores.items() if of}}
    report |= {"chosen - drawn": difference, "seconds": time.perf_counter() - started}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(json.dumps({key: report[key] for key in ("means", "chosen - drawn", "seconds")}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
