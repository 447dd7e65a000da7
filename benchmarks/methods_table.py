"""Every tuning method on one task: score, forgetting, share that moves, seconds, peak memory; three seeds, intervals.

    python benchmarks/methods_table.py --general TEXT.txt.xz   # fills results/methods.json, and goes on where it was
    python benchmarks/methods_table.py --table                 # prints the table of what is measured

The task is the built-in model's sample tickets (as in `tunesmith quickstart`), each run in a process of its own with one
thread. A method's learning rate is raised from its default by FACTOR until the validation loss with seed 0 falls no more
(and lowered, where the first rise does not help); the other seeds use the best, and `qlora` that of `lora`. Scores are of
the 144 test rows; forgetting is how many more bits a byte general text takes than with the base. Seconds are processor time
of the tuning, validation included; memory is the process's peak. Intervals are 95 % by Student's t over the seeds.
"""

import argparse
import json
import lzma
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _machine import code, command, machine

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "tunesmith" / "starter" / "sample"
FACTOR = 4
MOST_RISES = 5
METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "layers, last 2": {"kind": "layers", "last": 2},
    "layers, norms": {"kind": "layers", "only": "norms"},
    "lora": {"kind": "lora", "rank": 16},
    "lora, dora": {"kind": "lora", "rank": 16, "dora": True},
    "lora, pissa": {"kind": "lora", "rank": 16, "init": "pissa"},
    "lora, B 16 times": {"kind": "lora", "rank": 16, "b_rate_factor": 16},
    "qlora": {"kind": "qlora", "rank": 16},
    "vera": {"kind": "vera"},
    "ia3": {"kind": "ia3"},
    "adapters, pfeiffer": {"kind": "adapters"},
    "adapters, houlsby": {"kind": "adapters", "placement": "houlsby"},
    "prefix": {"kind": "prefix"},
    "prompt": {"kind": "prompt"},
    "p_tuning": {"kind": "p_tuning"},
}
SAME_FACTOR = {"qlora": "lora"}  # the same change of the weights, many times slower on a CPU
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantile by number of seeds


def general_text(path: Path, *, num_bytes: int) -> str:
    """The beginning of a text file, which may be compressed by xz."""
    with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
        data = file.read(num_bytes)
    return data.decode("utf-8", errors="ignore")


def bits_per_byte(model: Any, text: str) -> float:
    """Bits that a model needs for each byte of a text, in windows of 512 tokens."""
    import torch

    from tunesmith.data.pack import build_packs
    from tunesmith.data.template import ChatTemplate
    from tunesmith.data.types import Example, Origin
    from tunesmith.objectives.causal import Causal
    from tunesmith.train.passes import forward

    objective, example = Causal(), Example(Origin("general", 1), "text", text=text)
    windows = objective.sequences([example], template=ChatTemplate(model.tokenizer), max_tokens=512)[0]
    with torch.no_grad():
        packs = build_packs(windows, max_tokens=2048)
        nats = sum(float(forward(model, pack, objective=objective).sum) for pack in packs)
    return nats / math.log(2) / len(text.encode())


def one_run(name: str, *, seed: int, factor: float, steps: int, scored: bool, general: str) -> dict[str, Any]:
    """Tune and measure in this process; evaluate where the run is `scored`."""
    import torch

    from tunesmith import api
    from tunesmith.errors import NumericalError
    from tunesmith.methods import METHODS as KINDS
    from tunesmith.models.load import load_model
    from tunesmith.recipe import parse_recipe
    from tunesmith.registry.workspace import Workspace

    torch.set_num_threads(1)
    method = METHODS[name]
    rate = KINDS[method["kind"]].learning_rate * factor
    recipe = {
        "name": "table",
        "base": "starter",
        "data": {"train": str(SAMPLE / "train.jsonl"), "validation": 0.1, "test": str(SAMPLE / "test.jsonl")},
        "objective": "instruction",
        "method": method,
        "train": {"epochs": 50, "max_steps": steps, "learning_rate": rate, "batch_rows": 16, "seed": seed},
        "evaluate": {"metrics": ["json_fields", "exact_match"], "against": ["base"], "max_tokens": 48},
    }
    with tempfile.TemporaryDirectory() as folder:
        workspace, started = Workspace(Path(folder)), time.process_time()
        try:
            run = api.tune(parse_recipe(json.dumps(recipe), file=Path(__file__)), workspace=workspace)
        except NumericalError as error:
            return {"learning_rate": rate, "validation_loss": None, "diverged": error.message}
        seconds = time.process_time() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        summary = run.summary
        found = {
            "learning_rate": rate,
            "validation_loss": summary["validation_loss"],
            "trainable_share": summary["trainable_parameters"] / summary["parameters"],
            "processor_seconds": seconds,
            "peak_memory_bytes": peak,
        }
        if scored:
            metrics = api.evaluate(run, workspace=workspace).as_dict()["metrics"]
            before, after = bits_per_byte(load_model("starter"), general), bits_per_byte(api.load(run).model, general)
            found |= {name: metrics[name]["systems"]["tuned"]["value"] for name in ("json_fields", "exact_match")}
            found |= {"forgetting_bits_per_byte": after - before}
    return found


def cell(arguments: argparse.Namespace, **role: Any) -> dict[str, Any]:
    """One run in a process of its own."""
    line = [
        sys.executable,
        __file__,
        "--general",
        str(arguments.general),
        "--steps",
        str(arguments.steps),
        "--role",
        json.dumps(role),
    ]
    done = subprocess.run(
        line, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def fill(arguments: argparse.Namespace, report: dict[str, Any], *, save: Any) -> None:
    """Every run that is missing."""
    for name in METHODS:
        runs = report["runs"].setdefault(name, {})

        def measured(
            seed: int, factor: float, *, scored: bool, runs: dict[str, Any] = runs, name: str = name
        ) -> dict[str, Any]:
            key = f"seed {seed}, {factor:g} times" + (", scored" if scored else "")
            if key not in runs:
                runs[key] = cell(arguments, name=name, seed=seed, factor=factor, scored=scored)
                print(f"{name}, {key}: {runs[key]}", file=sys.stderr)
                save()
            found: dict[str, Any] = runs[key]
            return found

        best = report["best_factor"].get(SAME_FACTOR.get(name, name)) or best_factor(
            lambda factor, measured=measured: measured(0, factor, scored=False)["validation_loss"]
        )
        report["best_factor"][name] = best
        for seed in range(arguments.seeds):
            measured(seed, best, scored=True)
    save()


def best_factor(loss_at: Callable[[float], float | None]) -> float:
    """Where the loss is least: from 1 upwards by FACTOR, downwards where that does not help. None: it diverged."""

    def loss(factor: float) -> float:
        found = loss_at(factor)
        return math.inf if found is None else found

    best, tried = 1.0, [FACTOR**n for n in range(1, MOST_RISES + 1)]
    for direction in (tried, [1 / factor for factor in tried]):
        for factor in direction:
            if loss(factor) >= loss(best):
                break
            best = factor
        if best != 1:
            break
    return best


def table(report: dict[str, Any]) -> str:
    """What is measured, as Markdown."""

    def shown(values: list[float], digits: int) -> str:
        mean = statistics.mean(values)
        if len(values) < 2:
            return f"{mean:.{digits}f}"
        half = STUDENT_T[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
        return f"{mean:.{digits}f} ± {half:.{digits}f}"

    lines = [
        "| method | learning rate | times its default | fields right | answers right "
        "| forgetting, bits a byte | moves | seconds | peak MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, best in report["best_factor"].items():
        runs = [run for key, run in report["runs"][name].items() if key.endswith(f", {best:g} times, scored")]
        columns = {key: [run[key] for run in runs] for key in runs[0]}
        lines.append(
            f"| {name} | {columns['learning_rate'][0]:.0e} | {best:g} | {shown(columns['json_fields'], 3)} "
            f"| {shown(columns['exact_match'], 2)} | {shown(columns['forgetting_bits_per_byte'], 3)} "
            f"| {100 * columns['trainable_share'][0]:.2f} % | {statistics.median(columns['processor_seconds']):.0f} "
            f"| {statistics.median(columns['peak_memory_bytes']) / 2**20:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Fill the file, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--general", type=Path, default=ROOT.parent / "shared" / "data" / "prose" / "heldout.txt.xz")
    parser.add_argument("--steps", type=int, default=75)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "methods.json")
    parser.add_argument("--table", action="store_true", help="print the table of what was measured")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        general = general_text(arguments.general, num_bytes=60_000)
        print(json.dumps(one_run(**json.loads(arguments.role), steps=arguments.steps, general=general)))
        return 0
    report: dict[str, Any] = {"best_factor": {}, "runs": {}}
    if arguments.out.is_file():
        report = json.loads(arguments.out.read_text("utf-8"))
    if arguments.table:
        print(table(report))
        return 0
    made = {"command": command(), "date": time.strftime("%Y-%m-%d"), "code": code(), "machine": machine()}
    report = made | {"steps": arguments.steps} | {key: report[key] for key in ("best_factor", "runs")}
    fill(arguments, report, save=lambda: arguments.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8"))
    print(table(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
