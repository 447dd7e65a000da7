"""A run with a head as transformers' `...ForSequenceClassification` or `...ForTokenClassification`, or PEFT's adapter of it.

Both read a linear layer off hidden states as our heads do: the one at the last token of a text, the other at every token.
Where a class has a layer of its own before that (encoders' for sequences, ModernBERT's for tokens), which no head here was
trained with, nothing is written.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from tunesmith.data.contract import PROBES
from tunesmith.data.pack import build_pack
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example, Origin, Sequence
from tunesmith.errors import RecipeError
from tunesmith.export import compare_logits, write_checked
from tunesmith.methods import Method
from tunesmith.methods.p_tuning import PTuning
from tunesmith.methods.peft_head import add_head, without_head
from tunesmith.methods.prompt import Prompt
from tunesmith.models.heads import (
    DOCUMENT,
    HeadPlace,
    attach_head,
    classifier_logits,
    head_place,
    read_head_document,
    save_classifier,
    set_head,
)
from tunesmith.models.load import Model, load_model
from tunesmith.objectives.classification import Classification
from tunesmith.objectives.headed import Headed, inputs
from tunesmith.objectives.token_classification import TokenClassification
from tunesmith.storage import new_folder

ASK_THE_RUN = "use the run itself: tunesmith generate RUN TEXT, or load(run).predict in Python"


def _place(objective: Headed, *, model: Model) -> HeadPlace:
    """Where transformers' class keeps the head; RecipeError where there is none that reads it as it was trained."""
    tokens = isinstance(objective, TokenClassification)
    if model.is_encoder and not tokens:
        raise RecipeError(
            "transformers reads a sequence of this encoder through another layer, which the head was not trained with",
            hint=ASK_THE_RUN,
        )
    if not tokens and objective.pooling != "last":
        raise RecipeError(
            f"transformers reads a sequence at its last token, and this head reads the {objective.pooling}",
            hint="train with objective.pooling: last",
        )
    place = head_place(model, tokens=tokens)
    if place is None:
        raise RecipeError(
            f"transformers has no class that reads a head of '{model.name}' for {objective.kind_name} as it was trained",
            hint=ASK_THE_RUN,
        )
    return place


def export_head(
    model: Model, *, objective: Headed, method: Method, template: ChatTemplate, contract: dict[str, Any],
    source: Path, out: Path,
) -> None:  # fmt: skip
    """The merged model with its head; `source` is the run's model folder. The head's document goes beside it.

    RecipeError where transformers has no class that reads the head as it was trained.
    """
    place = _place(objective, model=model)
    rows = _rows(template)
    expected = _outputs(model, rows, everywhere=place.tokens)
    assert model.outputs is not None
    weight_KD = model.outputs.weight.detach().clone()
    method.merge(model)
    pad = template.tokenizer.token_id("pad_token")
    with new_folder(out) as new:
        save_classifier(
            model,
            folder=new,
            weight_KD=weight_KD,
            place=place,
            pad_id=pad if pad not in template.tokenizer.end_ids else None,
            **_labels(objective),
        )
        _write_extras(model, objective=objective, template=template, contract=contract, source=source, folder=new)
        compare_logits(expected, classifier_logits(new, place=place, rows=rows), out=out)


def export_peft_head(
    model: Model, *, objective: Headed, method: Method, template: ChatTemplate, contract: dict[str, Any],
    source: Path, out: Path,
) -> None:  # fmt: skip
    """The adapter with its head, for PEFT around the class that `export_head` writes; what it takes and refuses as there."""
    place = _place(objective, model=model)
    if not place.tokens and model.causal.config.pad_token_id in template.tokenizer.end_ids:
        raise RecipeError(
            "the base's config.json pads with what ends a text, and transformers would read the token before that",
            hint="use --format merged",
        )
    if place.tokens and isinstance(method, Prompt | PTuning):
        raise RecipeError(
            f"PEFT reads a tag off the virtual tokens of method '{method.kind}' too, before those of the text",
            hint="train with method: prefix or lora",
        )
    rows = _rows(template)
    expected = _outputs(model, rows, everywhere=place.tokens)
    assert model.outputs is not None
    with new_folder(out) as new, tempfile.TemporaryDirectory() as plain:
        method.save(model, folder=new)
        add_head(new, place=place, weight_KD=model.outputs.weight)
        _write_extras(model, objective=objective, template=template, contract=contract, source=source, folder=new)
        again = load_model(model.name)
        weight_KD = without_head(new, place=place, out=Path(plain))
        method.load(again, folder=Path(plain))
        attach_head(again, num_outputs=len(weight_KD))
        set_head(again, weight_KD=weight_KD)
        compare_logits(expected, _outputs(again, rows, everywhere=place.tokens), out=out)


def _write_extras(
    model: Model, *, objective: Headed, template: ChatTemplate, contract: dict[str, Any], source: Path, folder: Path
) -> None:
    """The tokenizer, the token contract, and what the head's outputs mean."""
    model.save_tokenizer(folder)
    write_checked(folder, model=model, objective=objective, template=template, contract=contract)
    (folder / DOCUMENT).write_text(json.dumps(read_head_document(source), indent=1, ensure_ascii=False), "utf-8")


def _labels(objective: Headed) -> dict[str, Any]:
    """What the configuration says of the outputs."""
    if not isinstance(objective, Classification | TokenClassification):
        return {"num_labels": objective.num_outputs, "problem_type": "regression"}
    names = dict(enumerate(objective.labels or ()))
    several = isinstance(objective, Classification) and objective.several
    problem = {"problem_type": "multi_label_classification" if several else "single_label_classification"}
    return {"id2label": names, "label2id": {name: k for k, name in names.items()}} | problem


def _rows(template: ChatTemplate) -> list[list[int]]:
    """Token ids of the contract's texts as a head reads them; a base without conversations has these too."""
    texts = dict.fromkeys(message.content for messages in PROBES for message in messages)
    examples = [Example(Origin("probe", number), "text", text=text) for number, text in enumerate(texts, start=1)]
    return [ids_T.tolist() for ids_T in inputs(examples, template=template)]


def _outputs(model: Model, rows: list[list[int]], *, everywhere: bool) -> list[torch.Tensor]:
    """What the head gives for every row: at all tokens, or at the last."""
    import numpy as np

    found = []
    with torch.no_grad():
        for ids in rows:
            weight_T = np.zeros(len(ids), np.float32)
            weight_T[slice(None) if everywhere else -1] = 1
            pack = build_pack([Sequence(np.array(ids, np.int32), weight_T, values=np.zeros(0, np.float32))])
            output_NK = model.outputs_at(pack)
            found.append(output_NK if everywhere else output_NK[0])
    return found
