"""A run with a head as a plain transformers model: `...ForSequenceClassification` or `...ForTokenClassification`.

Both read a linear layer off hidden states as our heads do: the one at the last token of a text, the other at every token.
Encoders of the BERT kind read a sequence through a layer of their own before that, which no head here was trained with.
"""

import json
from pathlib import Path
from typing import Any

import torch

from tunesmith.data.contract import known_sequences
from tunesmith.data.pack import build_pack
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Sequence
from tunesmith.errors import RecipeError
from tunesmith.export import compare_logits, write_checked
from tunesmith.methods import Method
from tunesmith.models.heads import DOCUMENT, classifier_logits, read_head_document, save_classifier
from tunesmith.models.load import Model
from tunesmith.objectives.classification import Classification
from tunesmith.objectives.headed import Headed
from tunesmith.objectives.token_classification import TokenClassification
from tunesmith.storage import new_folder


def check_exportable(objective: Headed, *, encoder: bool) -> None:
    """RecipeError where transformers has no class that reads the head as it was trained."""
    if isinstance(objective, TokenClassification):
        return
    if encoder:
        raise RecipeError(
            "transformers reads a sequence of this encoder through another layer, which the head was not trained with",
            hint="use the run itself: tunesmith generate RUN TEXT, or load(run).predict in Python",
        )
    if objective.pooling != "last":
        raise RecipeError(
            f"transformers reads a sequence at its last token, and this head reads the {objective.pooling}",
            hint="train with objective.pooling: last",
        )


def export_head(
    model: Model, *, objective: Headed, method: Method, template: ChatTemplate, contract: dict[str, Any],
    source: Path, out: Path,
) -> None:  # fmt: skip
    """The merged model with its head; `source` is the run's model folder. The head's document goes beside it."""
    expected = _outputs(model, contract, everywhere=isinstance(objective, TokenClassification))
    assert model.outputs is not None
    weight_KD = model.outputs.weight.detach().clone()
    method.merge(model)
    tokens = isinstance(objective, TokenClassification)
    pad = template.tokenizer.token_id("pad_token")
    with new_folder(out) as new:
        save_classifier(
            model,
            folder=new,
            weight_KD=weight_KD,
            tokens=tokens,
            pad_id=pad if pad not in template.tokenizer.end_ids else None,
            **_labels(objective),
        )
        model.save_tokenizer(new)
        write_checked(new, model=model, objective=objective, template=template, contract=contract)
        (new / DOCUMENT).write_text(json.dumps(read_head_document(source), indent=1, ensure_ascii=False), "utf-8")
        rows = [known["ids"] for known in known_sequences(contract)]
        compare_logits(expected, classifier_logits(new, tokens=tokens, rows=rows), out=out)


def _labels(objective: Headed) -> dict[str, Any]:
    """What the configuration says of the outputs."""
    if not isinstance(objective, Classification | TokenClassification):
        return {"num_labels": objective.num_outputs, "problem_type": "regression"}
    names = dict(enumerate(objective.labels or ()))
    several = isinstance(objective, Classification) and objective.several
    problem = {"problem_type": "multi_label_classification" if several else "single_label_classification"}
    return {"id2label": names, "label2id": {name: k for k, name in names.items()}} | problem


def _outputs(model: Model, contract: dict[str, Any], *, everywhere: bool) -> list[torch.Tensor]:
    """What the head gives for every probe: at all tokens, or at the last."""
    import numpy as np

    found = []
    with torch.no_grad():
        for ids in (known["ids"] for known in known_sequences(contract)):
            weight_T = np.zeros(len(ids), np.float32)
            weight_T[slice(None) if everywhere else -1] = 1
            pack = build_pack([Sequence(np.array(ids, np.int32), weight_T, values=np.zeros(0, np.float32))])
            output_NK = model.outputs_at(pack)
            found.append(output_NK if everywhere else output_NK[0])
    return found
