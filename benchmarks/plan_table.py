"""How near `tunesmith plan` comes: predicted, measured and real peak memory and seconds, over a grid of twelve recipes.

    python benchmarks/plan_table.py

Each recipe is planned, planned with --measure and trained for one short epoch, each in a process of its own and one after
the other. The bases are the built-in model and a random Llama of 32 million parameters; the rows are the sample tickets
(short and alike) and chats of 20 to 1000 tokens. Every recipe is written down as soon as it is done, and is not run again;
--table prints the table of what is there.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _machine import code, command, machine
from against_trl import TOKENIZER, make_rows

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {
    "model_type": "llama", "vocab_size": 16384, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA, VARIED, LABELLED = "base=llama", "data.train=varied.jsonl", "data.train=labelled.jsonl"
RECIPES: dict[str, list[str]] = {
    "starter, tickets, lora": [],
    "starter, tickets, full": ["method=full"],
    "starter, tickets, lora, bf16": ["train.precision=bf16"],
    "starter, lora, checkpointing": [VARIED, "train.gradient_checkpointing=true"],
    "starter, lora, 4,096 tokens at a time": [VARIED, "train.micro_batch_tokens=4096"],
    "llama, lora": [LLAMA, VARIED],
    "llama, full": [LLAMA, VARIED, "method=full"],
    "llama, lora, bf16, 512 tokens at a time": [
        LLAMA, VARIED, "train.precision=bf16", "train.micro_batch_tokens=512",
    ],
    "llama, last 2 layers, 2 epochs": [LLAMA, VARIED, "method.kind=layers", "method.last=2", "train.epochs=2"],
    "llama, qlora": [LLAMA, VARIED, "method=qlora"],
    "llama, prefix": [LLAMA, VARIED, "method=prefix"],
    "llama, classification, lora": [LLAMA, LABELLED, "objective=classification"],
}  # fmt: skip


def write_inputs(folder: Path) -> None:
    """The random base, the rows and the recipe that all others change."""
    from tunesmith.models.load import NewBase, load_model

    (folder / "config.json").write_text(json.dumps(SHAPE), "utf-8")
    (folder / "llama").mkdir()
    load_model(NewBase(config=str(folder / "config.json"), tokenizer=str(TOKENIZER), seed=0)).save(folder / "llama")
    rows = make_rows("varied", num_rows=24)
    (folder / "varied.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    texts = [{"text": r["messages"][1]["content"], "label": "abc"[n % 3]} for n, r in enumerate(rows)]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts), "utf-8")

    tickets = (ROOT / "tunesmith" / "starter" / "sample" / "train.jsonl").read_text("utf-8").splitlines(keepends=True)
    (folder / "tickets.jsonl").write_text("".join(tickets[:96]), "utf-8")
    recipe = "base: starter\ndata: {train: tickets.jsonl, validation: null}\ntrain: {epochs: 1, batch_rows: 6}\n"
    (folder / "recipe.yaml").write_text(recipe, "utf-8")


def call(folder: Path, *arguments: str, overrides: list[str]) -> dict[str, Any]:
    """One command in a process of its own; its JSON document."""
    sets = [part for override in overrides for part in ("--set", override)]
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", *arguments, *sets, "--json", "--workspace", str(folder / "work")],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def run(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Plan, measure and train one recipe."""
    found = {
        "predicted": call(folder, "plan", "recipe.yaml", overrides=overrides),
        "measured": call(folder, "plan", "recipe.yaml", "--measure", overrides=overrides),
        "real": call(folder, "train", "recipe.yaml", overrides=overrides),
    }
    keys = ("memory", "peak_memory_bytes", "seconds", "steps", "tokens", "computed_tokens", "target_tokens", "measured")
    return {
        "overrides": overrides,
        **{name: {k: value[k] for k in keys if k in value} for name, value in found.items()},
    }


def table(recipes: dict[str, dict[str, Any]]) -> str:
    """Peaks in MiB and how far each plan is from the run, in per cent."""
    lines = [
        "| recipe | predicted MiB | measured MiB | real MiB | error of the prediction | of the measurement | "
        "seconds: predicted | measured | real |",
        "|---|" + "---:|" * 8,
    ]
    for name, found in recipes.items():
        peaks = [found[kind]["peak_memory_bytes"] for kind in ("predicted", "measured", "real")]
        errors = [f"{100 * (peak / peaks[2] - 1):+.0f} %" for peak in peaks[:2]]
        seconds = [f"{found[kind]['seconds']:.0f}" for kind in ("predicted", "measured", "real")]
        lines.append("| " + " | ".join([name, *(f"{p / 2**20:,.0f}" for p in peaks), *errors, *seconds]) + " |")
    return "\n".join(lines)


def main() -> int:
    """Run what is not there yet, write it down and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table only")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "plan.json")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"recipes": {}}
    if arguments.out.is_file():
        report = json.loads(arguments.out.read_text("utf-8"))
    if not arguments.table:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_inputs(folder)
            for recipe, overrides in RECIPES.items():
                if recipe not in report["recipes"]:
                    print(recipe, file=sys.stderr, flush=True)
                    report["recipes"][recipe] = run(folder, overrides)
                    about = {"command": command(), "date": time.strftime("%Y-%m-%d"), "code": code()}
                    report = about | {"machine": machine(), "model": SHAPE, "recipes": report["recipes"]}
                    arguments.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(table(report["recipes"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
