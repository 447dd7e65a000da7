"""The head of an objective that has one: a linear layer without bias on hidden states, kept beside the model's weights.

It starts at zero, so that before the first step every class is as likely as any other and every number is the mean.
"""

import copy
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tunesmith.errors import ModelError
from tunesmith.models.load import Model, quiet

WEIGHTS = "head.safetensors"
DOCUMENT = "head.json"


def attach_head(model: Model, *, num_outputs: int) -> None:
    """Put a trainable head of zeros on the model."""
    model.outputs = torch.nn.Linear(model.hidden_size, num_outputs, bias=False, device=model.device)
    torch.nn.init.zeros_(model.outputs.weight)


def set_head(model: Model, *, weight_KD: torch.Tensor) -> None:
    """Give the head its weights for good."""
    assert model.outputs is not None
    with torch.no_grad():
        model.outputs.weight.copy_(weight_KD)
    model.outputs.requires_grad_(False)


def save_head(model: Model, *, folder: Path, document: dict[str, Any]) -> None:
    """Write the head, where there is one, and what its outputs or the model's words mean."""
    if model.outputs is not None:
        save_file({"weight": model.outputs.weight.detach().cpu().contiguous()}, str(folder / WEIGHTS))
    (folder / DOCUMENT).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")


def read_head_document(folder: Path) -> dict[str, Any]:
    """What the outputs or the words mean; ModelError where it cannot be read."""
    try:
        document: dict[str, Any] = json.loads((folder / DOCUMENT).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"the head cannot be read: {error}", file=folder, hint="restore its files") from error
    return document


def load_head(model: Model, *, folder: Path) -> dict[str, Any]:
    """Put the head that `save_head` wrote on the model; returns the document. ModelError where it cannot be read."""
    try:
        weight_KD = load_file(str(folder / WEIGHTS))["weight"]
    except (OSError, KeyError, SafetensorError) as error:
        raise ModelError(f"the head cannot be read: {error}", file=folder, hint="restore its files") from error
    if weight_KD.shape[1] != model.hidden_size:
        raise ModelError("the head does not fit this base", file=folder, hint="use the base it was made for")
    attach_head(model, num_outputs=len(weight_KD))
    set_head(model, weight_KD=weight_KD)
    return read_head_document(folder)


class HeadPlace(NamedTuple):
    """Transformers' class that reads a head like ours, for sequences or `tokens`, and where it keeps what.

    `inside` stands before the names that the base's weights have here (`bert.` of an encoder), `layer` is the head's name.
    """

    tokens: bool
    inside: str
    layer: str
    biased: bool


def head_place(model: Model, *, tokens: bool) -> HeadPlace | None:
    """None where there is no class for this base, or it has a layer of its own before the head."""
    try:
        with quiet(), torch.device("meta"):
            made = _class(tokens=tokens).from_config(copy.deepcopy(model.causal.config), attn_implementation="sdpa")
    except ValueError:  # there is no class
        return None
    prefix = f"{made.base_model_prefix}."
    names = [name for name, _ in made.named_parameters() if not name.startswith(prefix)]
    for layer in ("score", "classifier"):
        if names in ([f"{layer}.weight"], [f"{layer}.weight", f"{layer}.bias"]):
            return HeadPlace(tokens, prefix if model.is_encoder else "", layer, len(names) == 2)
    return None


def _class(*, tokens: bool) -> Any:
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    return AutoModelForTokenClassification if tokens else AutoModelForSequenceClassification


def save_classifier(
    model: Model, *, folder: Path, weight_KD: torch.Tensor, place: HeadPlace, pad_id: int | None, **config: Any
) -> None:
    """Write a plain model with a head as transformers' class; `config` is added to its configuration."""
    with tempfile.TemporaryDirectory() as plain, quiet():
        model.causal.save_pretrained(plain)
        written = _class(tokens=place.tokens).from_pretrained(plain, attn_implementation="sdpa", **config)
    layer = written.get_submodule(place.layer)
    with torch.no_grad():
        layer.weight.copy_(weight_KD)
        if place.biased:
            layer.bias.zero_()
    written.config.pad_token_id = pad_id
    written.save_pretrained(folder)


def classifier_logits(folder: Path, *, place: HeadPlace, rows: list[list[int]]) -> list[torch.Tensor]:
    """What transformers reads off each row of ids with a model that `save_classifier` wrote."""
    with quiet():
        written = _class(tokens=place.tokens).from_pretrained(folder, attn_implementation="sdpa").eval()
    with torch.no_grad():
        return [written(torch.tensor([ids])).logits[0] for ids in rows]
