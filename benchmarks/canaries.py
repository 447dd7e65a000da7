"""How much of what stands in the training rows can be read off a tuned model? Canaries among the sample tickets.

    python benchmarks/canaries.py --methods lora full --epochs 2 6

"The access code of NAME is 1234 5678" is the answer of training rows, 1, 4 and 16 times, with three names and codes each;
three more names have a code that no row holds. The exposure (Carlini et al. 2019, "The Secret Sharer") is log2 of the 10^8
codes there are, less log2 of the code's rank: 1.4 bits on average by chance, 26.6 for the likeliest of all. `ranked` is by
its rank among `--references` drawn codes, which cannot say more than their number; `fitted` by a skew-normal fitted to them.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _machine import code, command, machine

if TYPE_CHECKING:
    from tunesmith.tuned import Tuned

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "tunesmith" / "starter" / "sample" / "train.jsonl"
NAMES = ("Ada", "Bela", "Caro", "Dina", "Ezra", "Finn", "Gina", "Hugo", "Iris", "Jona", "Kara", "Levi")
REPEATS = (0, 1, 4, 16)
NUM_CODES = 10**8


def drawn_code(generator: random.Random) -> str:
    """Eight digits."""
    return f"{generator.randrange(10_000):04} {generator.randrange(10_000):04}"


def asked(name: str, *, secret: str) -> list[dict[str, str]]:
    """The conversation of a canary."""
    answer = f"The access code of {name} is {secret}"
    return [
        {"role": "user", "content": f"What is the access code of {name}?"},
        {"role": "assistant", "content": answer},
    ]


def canaries(generator: random.Random) -> list[dict[str, Any]]:
    """A name, its code and how often it stands in the rows."""
    of_each = len(NAMES) // len(REPEATS)
    return [
        {"name": name, "code": drawn_code(generator), "repeats": REPEATS[place // of_each]}
        for place, name in enumerate(NAMES)
    ]


def exposures(tuned: "Tuned", planted: list[dict[str, Any]], *, references: int) -> list[dict[str, Any]]:
    """The exposure of each canary in the run's model, in bits."""
    from tunesmith.data.types import Example, Message, Origin
    from tunesmith.evaluate.memorised import exposure, fitted_exposure

    found = []
    for canary in planted:
        generator = random.Random(canary["name"])
        secrets = [canary["code"], *(drawn_code(generator) for _ in range(references))]
        rows = [[Message(**turn) for turn in asked(canary["name"], secret=secret)] for secret in secrets]
        examples = [Example(Origin("canary", i), "chat", tuple(row)) for i, row in enumerate(rows, start=1)]
        rendered = tuned.template.sequences(examples)
        sequences = [replace(s, row=row) for row, unit in enumerate(rendered) for s in unit]
        logprob_B = tuned.model.row_logprobs(sequences, num_rows=len(secrets), max_tokens=4096)
        of_others = logprob_B[1:]
        found.append(
            canary
            | {
                "logprob": float(logprob_B[0]),
                "ranked": exposure(logprob_B[0], references=of_others),
                "fitted": fitted_exposure(logprob_B[0], references=of_others, num_possible=NUM_CODES),
            }
        )
    return found


def measured(arguments: argparse.Namespace, *, method: str, epochs: int) -> dict[str, Any]:
    """One run on the rows with the canaries among them."""
    from tunesmith import api
    from tunesmith.recipe import parse_recipe
    from tunesmith.registry.workspace import Workspace

    generator = random.Random(arguments.seed)
    planted = canaries(generator)
    lines = SAMPLE.read_text("utf-8").splitlines()[: arguments.rows]
    for canary in planted:
        row = json.dumps({"messages": asked(canary["name"], secret=canary["code"])})
        lines += [row] * canary["repeats"]
    generator.shuffle(lines)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rows.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        recipe = {
            "base": arguments.base,
            "data": {"train": "rows.jsonl", "validation": None},
            "method": {"kind": method},
            "train": {"epochs": epochs, "batch_rows": 16, "seed": arguments.seed},
        }
        workspace = Workspace(Path(folder) / "workspace")
        run = api.tune(parse_recipe(json.dumps(recipe), file=Path(folder) / "recipe.yaml"), workspace=workspace)
        found = exposures(api.load(run, workspace=workspace), planted, references=arguments.references)
    entry: dict[str, Any] = {"method": method, "epochs": epochs, "steps": run.summary["steps"]}
    for repeats in REPEATS:
        of = [canary for canary in found if canary["repeats"] == repeats]
        entry[f"planted {repeats}"] = {kind: statistics.mean(c[kind] for c in of) for kind in ("ranked", "fitted")}
    return entry | {"train_loss": run.summary["train_loss"], "seconds": run.summary["seconds"], "canaries": found}


def table(report: dict[str, Any]) -> str:
    """The mean fitted exposures, as Markdown."""
    lines = ["| method | epochs | " + " | ".join(f"planted {r} times" for r in REPEATS) + " |"]
    lines += ["|---|---:|" + "---:|" * len(REPEATS)]
    for run in report["runs"]:
        bits = (f"{run[f'planted {repeats}']['fitted']:.1f}" for repeats in REPEATS)
        lines.append(f"| {run['method']} | {run['epochs']} | {' | '.join(bits)} |")
    return "\n".join(lines)


def main() -> int:
    """Plant, tune, measure, write the report and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="starter")
    parser.add_argument("--methods", nargs="+", default=["lora", "full"])
    parser.add_argument("--epochs", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--rows", type=int, default=432, help="tickets among which they stand")
    parser.add_argument("--references", type=int, default=1000, help="codes drawn for each canary")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "canaries.json")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"command": command(), "date": time.strftime("%Y-%m-%d"), "code": code()}
    report |= {"machine": machine(), "most_bits": float(np.log2(NUM_CODES)), "runs": []}
    for method in arguments.methods:
        for epochs in arguments.epochs:
            report["runs"].append(measured(arguments, method=method, epochs=epochs))
            print({k: v for k, v in report["runs"][-1].items() if k != "canaries"}, file=sys.stderr, flush=True)
            arguments.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(table(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
