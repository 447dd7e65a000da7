"""What holds forgetting back, what it costs and what it saves: each remedy on three real tasks.

    python benchmarks/forgetting.py --data FOLDER     # fills results/forgetting.json, and goes on where it was
    python benchmarks/forgetting.py --table           # prints the table of what is measured

The built-in model is tuned on each task (benchmarks/_tasks.py), every run in a process of its own with one thread. The
task's score is of its test rows (the first metric); forgetting is the difference of the bits a byte that base and tuned need
for held-out prose, with its 95 % interval, and the divergence KL(base || tuned) on it. Replayed rows are prose that the
held-out texts are not part of. Seconds are processor time of the tuning.
"""

import json
import lzma
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _tasks import measure, task

REPLAYED_BYTES, GENERAL_BYTES = 4_000_000, 400_000
FULL, LORA = {"kind": "full"}, {"kind": "lora", "rank": 16}
RATES = {"full": 5e-4, "lora": 3e-3}
BASE_TEACHES = {"kind": "distillation", "teacher": "base"}
REMEDIES: dict[str, dict[str, Any]] = {
    "full": {"method": FULL},
    "full, replay 0.1": {"method": FULL, "replay": 0.1},
    "full, replay 0.3": {"method": FULL, "replay": 0.3},
    "full, base teaches 0.3": {"method": FULL, "objective": BASE_TEACHES | {"share": 0.3}},
    "full, replay 0.1, base teaches 0.3": {
        "method": FULL,
        "replay": 0.1,
        "objective": BASE_TEACHES | {"share": 0.3},
    },
    "full, stop beyond 0.1": {"method": FULL, "limit": 0.1},
    "lora": {"method": LORA},
    "lora, rank 2": {"method": LORA | {"rank": 2}},
    "lora, replay 0.1": {"method": LORA, "replay": 0.1},
}


def text_of(path: Path, *, num_bytes: int) -> str:
    """The beginning of a text file, which may be compressed by xz, a document a line of JSON."""
    with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
        documents = file.read(num_bytes).decode("utf-8", errors="ignore").split("\n<|doc|>\n")
    return "".join(json.dumps({"text": document.strip()}) + "\n" for document in documents if document.strip())


def one_run(name: str, remedy: str, *, folder: Path, steps: int, rows: int) -> dict[str, Any]:
    """Tune and measure in this process."""
    import torch

    from tunesmith import api
    from tunesmith.recipe import parse_recipe
    from tunesmith.registry.workspace import Workspace

    torch.set_num_threads(1)
    given = REMEDIES[remedy]
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        (work / "general.jsonl").write_text(text_of(folder / "prose" / "heldout.txt.xz", num_bytes=GENERAL_BYTES))
        replayed = text_of(folder / "prose" / "literature-00.txt.xz", num_bytes=REPLAYED_BYTES // 2)
        replayed += text_of(folder / "prose" / "technical-00.txt.xz", num_bytes=REPLAYED_BYTES // 2)
        (work / "replayed.jsonl").write_text(replayed)
        recipe = task(name, folder=folder) | {"name": "forgetting", "base": "starter", "method": given["method"]}
        recipe["evaluate"] |= {"against": ["base"], "rows": rows, "general": str(work / "general.jsonl")}
        recipe["train"] = {
            "epochs": 50,
            "max_steps": steps,
            "learning_rate": RATES[given["method"]["kind"]],
            "batch_rows": 16,
            "validate_every": max(1, steps // 3),
        }
        recipe["objective"] = given.get("objective", "instruction")
        if "replay" in given:
            recipe["data"] |= {"replay": str(work / "replayed.jsonl"), "replay_share": given["replay"]}
        if "limit" in given:
            recipe["train"]["general_limit"] = given["limit"]
            recipe["evaluate"]["every"] = max(1, steps // 10)
        workspace, started = Workspace(work / "w"), time.process_time()
        run = api.tune(parse_recipe(json.dumps(recipe), file=Path(__file__)), workspace=workspace)
        seconds = time.process_time() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        document = api.evaluate(run, workspace=workspace).as_dict()
        general, primary = document["general"], document["primary"]
        return {
            "steps": run.summary["steps"],
            "best_step": run.summary["best_step"],
            "processor_seconds": round(seconds, 1),
            "peak_memory_bytes": peak,
            "metric": primary,
            "score": document["metrics"][primary]["systems"]["tuned"],
            "base": document["metrics"][primary]["systems"]["base"],
            "forgetting_bits_per_byte": {k: general["difference"][k] for k in ("value", "low", "high")},
            "divergence_nats": general["divergence"],
        }


def table(report: dict[str, Any]) -> str:
    """What is measured, as Markdown."""
    lines = [
        "| task | remedy | score | forgetting, bits a byte | KL(base to tuned), nats | seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, runs in report["runs"].items():
        for remedy, run in runs.items():
            score, lost = run["score"], run["forgetting_bits_per_byte"]
            places = 1 if score["value"] > 1 else 3
            lines.append(
                f"| {name}, {run['metric']} | {remedy} "
                f"| {score['value']:.{places}f} ({score['low']:.{places}f} to {score['high']:.{places}f}) "
                f"| {lost['value']:+.3f} ({lost['low']:+.3f} to {lost['high']:+.3f}) "
                f"| {run['divergence_nats']:.3f} | {run['processor_seconds']:.0f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(measure(__file__, doc=__doc__, sorts=REMEDIES, steps=100, rows=150, one_run=one_run, table=table))
