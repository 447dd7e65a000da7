"""Turn the instructed model into the starter that ships: 16-bit weights, tokenizer, and a model card with its numbers.

    python publish.py --instructed build/instructed --pretrained build/lengthened [--numbers numbers.json]

The weights that ship are a weighted mean of the two models' (Wortsman et al. 2022, robust fine-tuning, eq. 1),
which keeps what the instruction stage alone forgets. `numbers.json` is what measure.py printed. The weights are stored in
float16, which loses less than bfloat16 here.
"""

import argparse
import json
from pathlib import Path

import torch

from tunesmith.models.base import STARTER
from tunesmith.models.load import load_model
from tunesmith.storage import new_folder

MAX_BYTES = 16 * 2**20


def main() -> None:
    """Write tunesmith/starter/model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instructed", required=True)
    parser.add_argument("--pretrained", required=True)
    parser.add_argument("--share", type=float, default=0.8, help="of the instructed model in the mean")
    parser.add_argument("--numbers", type=Path)
    parser.add_argument("--card", type=Path, default=Path(__file__).parent / "CARD.md")
    arguments = parser.parse_args()
    model, pretrained = load_model(arguments.instructed), load_model(arguments.pretrained)
    with torch.no_grad():
        for own, other in zip(model.causal.parameters(), pretrained.causal.parameters(), strict=True):
            own.mul_(arguments.share).add_(other, alpha=1 - arguments.share)
        largest = max(float(p.abs().max()) for p in model.causal.parameters())
    assert largest < torch.finfo(torch.float16).max, "the weights do not fit into float16"
    model.causal.to(torch.float16)
    with new_folder(STARTER) as new:
        model.save(new)
        weights = new / "model.safetensors"
        weights.chmod(0o644)
        assert weights.stat().st_size <= MAX_BYTES, f"{weights.stat().st_size:,} bytes are too many"
        card = arguments.card.read_text("utf-8")
        if arguments.numbers is not None:
            card = card.replace("<!-- numbers -->", _table(json.loads(arguments.numbers.read_text("utf-8"))))
        (new / "README.md").write_text(card, "utf-8")


def _table(numbers: dict[str, dict]) -> str:
    """The models side by side."""
    lines = ["| model | parameters | bits per byte, prose/heldout | BLiMP, 20 paradigms |", "|---|---:|---:|---:|"]
    for name, found in numbers.items():
        shown = Path(name).name
        lines.append(f"| {shown} | {found['parameters']:,} | {found['bits_per_byte']:.3f} | {found['blimp']:.1%} |")
    names = [Path(name).name for name in numbers]
    lines += ["", "| paradigm | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for paradigm in next(iter(numbers.values()))["blimp_paradigms"]:
        cells = " | ".join(f"{found['blimp_paradigms'][paradigm]:.3f}" for found in numbers.values())
        lines.append(f"| {paradigm} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
