"""Published losses of public models, computed here.

    python benchmarks/published.py --models FOLDER --text tinystories_sample.txt

Texts between `<|endoftext|>` are stripped, each begins with the begin-of-text token, and all are joined and cut into windows
of the model's context, as llama2.c does (its train.py, evaluation). The loss is the mean over all predicted tokens, in nats.
`published` are the authors' figures on validation texts of the same corpus (TinyStories) that are not the ones given here.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from _machine import code, command, machine

from tunesmith.data.types import Sequence
from tunesmith.models.load import load_model

RESULT = Path(__file__).resolve().parent / "results" / "published.json"
PUBLISHED = {"stories260k": 1.2968, "babyllama-tok105": 0.7366}
PACK_TOKENS, BATCH_WINDOWS = 4096, 64


def loss(folder: Path, *, texts: list[str], windows: int | None) -> dict[str, Any]:
    """The mean loss of a model over the windows, and what all of them are."""
    model = load_model(str(folder))
    begin = model.tokenizer.begin_ids
    ids = np.concatenate([[*begin, *found] for found in model.tokenizer.encode_text(texts)]).astype(np.int32)
    size = model.context_tokens
    cut = [ids[start : start + size + 1] for start in range(0, len(ids) - size, size)][:windows]
    weight_T = np.r_[0, np.ones(size)].astype(np.float32)  # the last token is predicted and not read
    total = tokens = 0.0
    for first in range(0, len(cut), BATCH_WINDOWS):
        batch = [Sequence(part, weight_T) for part in cut[first : first + BATCH_WINDOWS]]
        total -= float(model.row_logprobs(batch, num_rows=1, max_tokens=PACK_TOKENS)[0])
        tokens += sum(sequence.num_targets for sequence in batch)
    return {"windows": len(cut), "window_tokens": size, "tokens": int(tokens), "loss": round(total / tokens, 4)}


def main() -> int:
    """Measure every model that is there, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help=f"folder with {', '.join(PUBLISHED)}")
    parser.add_argument("--text", type=Path, required=True, help="texts between <|endoftext|>")
    parser.add_argument("--windows", type=int, help="the first so many; all by default")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    texts = [text for part in arguments.text.read_text("utf-8").split("<|endoftext|>") if (text := part.strip())]
    report: dict[str, Any] = {"command": command(), "date": time.strftime("%Y-%m-%d"), "code": code()}
    report |= {"machine": machine(), "models": {}}
    for name, published in PUBLISHED.items():
        found = loss(arguments.models / name, texts=texts, windows=arguments.windows)
        report["models"][name] = found | {"published": published}
        print(f"{name}: {report['models'][name]}", file=sys.stderr)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
