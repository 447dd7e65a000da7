"""An adapter with a head, as PEFT has it: an adapter of transformers' class with that head, which it keeps whole.

The adapter is the one that a method saves. An encoder stands inside that class, so the names of its layers grow by where;
the head's weights come along, and `modules_to_save` says so.

Shapes: K outputs, D hidden.
"""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.methods.base import PREFIX, load_adapter, save_tensors
from tunesmith.models.heads import HeadPlace

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
AROUND = "base_model."  # how PEFT names the class in an adapter of virtual tokens, which puts nothing into it


def add_head(folder: Path, *, place: HeadPlace, weight_KD: Tensor) -> None:
    """Make the adapter in `folder` one of transformers' class, with the head; its bias, where it has one, is zero."""
    tensors = {_moved(name, PREFIX, PREFIX + place.inside): t for name, t in load_adapter(folder).items()}
    head = f"{PREFIX if any(name.startswith(PREFIX) for name in tensors) else AROUND}{place.layer}"
    tensors[f"{head}.weight"] = weight_KD
    if place.biased:
        tensors[f"{head}.bias"] = torch.zeros(len(weight_KD))
    save_tensors(tensors, path=folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    config |= {"task_type": "TOKEN_CLS" if place.tokens else "SEQ_CLS", "modules_to_save": [place.layer]}
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", "utf-8")


def without_head(folder: Path, *, place: HeadPlace, out: Path) -> Tensor:
    """Write what a method saved before `add_head` to `out`, and give the head's weight [K, D]."""
    tensors = load_adapter(folder)
    (head,) = {name.rpartition(".")[0] for name in tensors if name.endswith(f".{place.layer}.weight")}
    weight_KD = tensors.pop(f"{head}.weight")
    tensors.pop(f"{head}.bias", None)
    own = {_moved(name, PREFIX + place.inside, PREFIX): tensor for name, tensor in tensors.items()}
    save_tensors(own, path=out / WEIGHTS)
    shutil.copy(folder / CONFIG, out / CONFIG)
    return weight_KD


def _moved(name: str, before: str, after: str) -> str:
    return after + name.removeprefix(before) if name.startswith(before) else name
