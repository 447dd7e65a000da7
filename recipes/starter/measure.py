"""Bits per byte on held-out prose and accuracy on BLiMP, for any model folder. Prints one JSON document.

python recipes/starter/measure.py --heldout data/heldout.jsonl --blimp BLIMP/test.jsonl MODEL [MODEL ...]
"""

import argparse
import json
import math
from pathlib import Path

import torch

from tunesmith.data.pack import build_packs
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example, Origin
from tunesmith.models.load import load_model
from tunesmith.objectives.causal import Causal
from tunesmith.tasks.likelihood import at_most, read_items, score
from tunesmith.train.passes import forward


def bits_per_byte(model, texts: list[str]) -> float:
    """Negative log-likelihood of whole documents, in windows of the model's own context, for each byte of text."""
    objective, template = Causal(), ChatTemplate(model.tokenizer)
    total = 0.0
    for text in texts:
        example = Example(Origin("heldout", 1), "text", text=text)
        sequences = objective.sequences([example], template=template, max_tokens=min(2048, model.context_tokens))[0]
        with torch.no_grad():
            for pack in build_packs(sequences, max_tokens=4096):
                total += float(forward(model, pack, objective=objective).sum)
    return total / math.log(2) / sum(len(text.encode()) for text in texts)


def main() -> None:
    """Measure every model named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--blimp", type=Path, required=True)
    parser.add_argument("--pairs", type=int, help="only the first pairs of each paradigm")
    arguments = parser.parse_args()
    texts = [json.loads(line)["text"] for line in arguments.heldout.open(encoding="utf-8")]
    items = read_items(arguments.blimp)
    if arguments.pairs:
        items = at_most(items, rows=arguments.pairs * len({item.group for item in items}))
    found = {}
    for name in arguments.models:
        model = load_model(name)
        model.causal.eval()
        right_B = score(model, items=items).right_B
        groups = sorted({item.group for item in items})
        paradigms = {g: float(right_B[[item.group == g for item in items]].mean()) for g in groups}
        found[name] = {
            "parameters": model.num_parameters(),
            "bits_per_byte": round(bits_per_byte(model, texts), 4),
            "blimp": round(sum(paradigms.values()) / len(paradigms), 4),
            "blimp_paradigms": {k: round(v, 3) for k, v in paradigms.items()},
        }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
