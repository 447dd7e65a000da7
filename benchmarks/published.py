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
from transformers import AutoModelForCausalLM

from tunesmith.data.types import Sequence
from tunesmith.models.load import Model, load_model

RESULT = Path(__file__).resolve().parent / "results" / "published.json"
PUBLISHED = {"stories260k": 1.2968, "babyllama-tok105": 0.7366}
PACK_TOKENS, BATCH_WINDOWS, COMPARED_WINDOWS = 4096, 64, 100


def losses(folder: Path, *, texts: list[str]) -> dict[str, Any]:
    """The mean loss of a model over all windows, and over the first ones here and with transformers' own model."""
    model = load_model(str(folder))
    begin = model.tokenizer.begin_ids
    ids = np.concatenate([[*begin, *found] for found in model.tokenizer.encode_text(texts)]).astype(np.int32)
    size = model.context_tokens
    windows = [ids[start : start + size + 1] for start in range(0, len(ids) - size, size)]
    first = windows[:COMPARED_WINDOWS]
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        parts = torch.from_numpy(np.stack(first)).long()
        logits = torch.cat([twin(input_ids=part[:, :-1]).logits for part in parts.split(10)])
        theirs = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), parts[:, 1:].flatten()))
    return {
        "windows": len(windows),
        "window_tokens": size,
        "loss": round(_loss(model, windows), 4),
        "first_windows": {
            "windows": len(first),
            "loss": round(_loss(model, first), 6),
            "transformers": round(theirs, 6),
        },
    }


def _loss(model: Model, windows: list[np.ndarray]) -> float:
    weight_T = np.ones(len(windows[0]), np.float32)
    weight_T[0] = 0  # and the last token is predicted, and not read
    total = 0.0
    for start in range(0, len(windows), BATCH_WINDOWS):
        batch = [Sequence(part, weight_T) for part in windows[start : start + BATCH_WINDOWS]]
        total -= float(model.row_logprobs(batch, num_rows=1, max_tokens=PACK_TOKENS)[0])
    return total / (len(windows) * (len(weight_T) - 1))


def main() -> int:
    """Measure every model that is there, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help=f"folder with {', '.join(PUBLISHED)}")
    parser.add_argument("--text", type=Path, required=True, help="texts between <|endoftext|>")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    texts = [text for part in arguments.text.read_text("utf-8").split("<|endoftext|>") if (text := part.strip())]
    report: dict[str, Any] = {"command": command(), "date": time.strftime("%Y-%m-%d"), "code": code()}
    report |= {"machine": machine(), "models": {}}
    for name, published in PUBLISHED.items():
        found = losses(arguments.models / name, texts=texts)
        report["models"][name] = found | {"published": published}
        print(f"{name}: {report['models'][name]}", file=sys.stderr)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
