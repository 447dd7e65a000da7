"""How much faster later epochs are when what frozen blocks compute is read back: the top two of thirty blocks are tuned.

    python benchmarks/frozen_blocks.py --repeats 3

The same run with `reuse_frozen: off` and `auto`, in turn, in one process: seconds of an epoch after the first, the losses of
both (which must agree), and the size of the file. A random Llama of SmolLM2-135M's width and depth with the built-in model's
vocabulary of 4,096 (speed does not depend on the weights' values; a larger vocabulary adds to both sides alike).
"""

import argparse
import itertools
import json
import statistics
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
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip
LOSS_TOLERANCE = 1e-4


def run(
    folder: Path, *, method: str, reuse: str, rows: list[dict[str, Any]], epochs: int, batch_rows: int
) -> dict[str, Any]:
    """Train once; seconds of each epoch and the losses."""
    from tunesmith.data.template import ChatTemplate
    from tunesmith.data.tokens import TokenStore, TokenWriter
    from tunesmith.data.types import Example, Message, Origin
    from tunesmith.methods.layers import Layers
    from tunesmith.methods.lora import Lora
    from tunesmith.models.load import NewBase, load_model
    from tunesmith.objectives.instruction import Instruction
    from tunesmith.train.loop import Fit
    from tunesmith.train.settings import TrainSettings

    (folder / "config.json").write_text(json.dumps(SHAPE), "utf-8")
    model = load_model(NewBase(config=str(folder / "config.json"), tokenizer=str(TOKENIZER), seed=0))
    names = [f"layers.{n}.{part}" for n in (28, 29) for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
        "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]  # fmt: skip
    chosen = Layers(last=2) if method == "layers" else Lora(rank=16, targets=tuple(names))
    chosen.apply(model, seed=0)
    objective, store = Instruction(), folder / f"tokens-{method}-{reuse}"
    writer = TokenWriter(store)
    examples = [
        Example(Origin("rows.jsonl", n), "chat", tuple(Message(m["role"], m["content"]) for m in row["messages"]))
        for n, row in enumerate(rows, start=1)
    ]
    sequences = objective.sequences(examples, template=ChatTemplate(model.tokenizer), max_tokens=1024)
    for example, sequence in zip(examples, sequences, strict=True):
        writer.add(sequence, origin=example.origin)
    writer.close()
    ends, losses, num_bytes = [time.perf_counter()], [], 0
    steps_an_epoch = -(-len(rows) // batch_rows)

    class Watch:
        def start(self, *, num_steps: int, step: int) -> None:
            ends[0] = time.perf_counter()

        def step(self, record: dict[str, Any]) -> None:
            losses.append(record["loss"])
            if record["step"] % steps_an_epoch == 0:
                ends.append(time.perf_counter())

        def validation(self, record: dict[str, Any]) -> None:
            """There is none."""

        def message(self, text: str) -> None:
            print(text, file=sys.stderr)

    with tempfile.TemporaryDirectory(dir=folder) as inside:
        fit = Fit(
            model,
            method=chosen,
            objective=objective,
            train=TokenStore(store),
            validation=None,
            settings=TrainSettings(
                epochs=epochs, batch_rows=batch_rows, reuse_frozen=reuse, checkpoint_every=10_000, learning_rate=1e-4
            ),
            folder=Path(inside),
            observer=Watch(),
            cache=Path(inside),
        )
        num_bytes = 0 if fit.features is None else fit.features.num_bytes
        fit.run()
    seconds = [b - a for a, b in itertools.pairwise(ends)]
    return {"epoch_seconds": seconds, "losses": losses, "file_bytes": num_bytes}


def main() -> int:
    """Run in turn, print the report and write it. Exit code 3 where the losses differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--batch-rows", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", default="layers,lora")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "frozen_blocks.json"))
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    before, rows = machine(), make_rows("varied", num_rows=arguments.rows)
    found: dict[str, Any] = {}
    agree = True
    for method in arguments.methods.split(","):
        runs: dict[str, list[dict[str, Any]]] = {"off": [], "auto": []}
        for repeat in range(arguments.repeats):
            for reuse, done in runs.items():
                with tempfile.TemporaryDirectory() as folder:
                    sizes = {"epochs": arguments.epochs, "batch_rows": arguments.batch_rows}
                    done.append(run(Path(folder), method=method, reuse=reuse, rows=rows, **sizes))
                print(f"{repeat + 1} {method} {reuse}: {done[-1]['epoch_seconds']}", file=sys.stderr)
        later = {k: statistics.median(s for r in done for s in r["epoch_seconds"][1:]) for k, done in runs.items()}
        gaps = [abs(a - b) / b for a, b in zip(runs["auto"][0]["losses"], runs["off"][0]["losses"], strict=True)]
        agree = agree and max(gaps) <= LOSS_TOLERANCE
        found[method] = {
            "later_epoch_seconds": later,
            "times_faster": round(later["off"] / later["auto"], 2),
            "largest_loss_gap": max(gaps),
            "file_bytes": runs["auto"][0]["file_bytes"],
            "runs": runs,
        }
    report = {
        "command": command(),
        "date": time.strftime("%Y-%m-%d"),
        "code": code(),
        "machine": before,
        "model": SHAPE,
        **found,
    }
    Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(json.dumps({name: {k: v for k, v in r.items() if k != "runs"} for name, r in found.items()}, indent=1))
    return 0 if agree else 3


if __name__ == "__main__":
    raise SystemExit(main())
