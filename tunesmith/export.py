"""Taking a tuned model away. Nothing is called done before the written files were loaded and gave the same logits."""

import copy
import json
from pathlib import Path
from typing import Any

import torch

from tunesmith.data.contract import FILE as CONTRACT
from tunesmith.data.contract import check_contract, known_sequences
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import RecipeError, StorageError
from tunesmith.methods import Method
from tunesmith.models.base import template_for
from tunesmith.models.extended import SAVED_BIASES, extend_alike, fold_tables, new_rows
from tunesmith.models.heads import DOCUMENT
from tunesmith.models.load import Model, load_model
from tunesmith.models.quantised import Quantisation, quantise
from tunesmith.objectives.base import Objective
from tunesmith.storage import new_folder

TOLERANCE = 1e-4  # of float32 logits, relative to their largest
POSITIONS = 64  # of a probe, at its end, whose logits are compared


def _logits(model: Model, contract: dict[str, Any]) -> list[torch.Tensor]:
    """Next-token logits at the last positions of every probe."""
    import numpy as np

    from tunesmith.data.pack import build_pack
    from tunesmith.data.types import Sequence
    from tunesmith.models.readout import head_logits

    found = []
    with torch.no_grad():
        for known in known_sequences(contract):
            ids, read = np.array(known["ids"], np.int32), known.get("encoder_ids")
            encoder_T = None if read is None else np.array(read, np.int32)
            pack = build_pack([Sequence(ids, np.zeros(len(ids), np.float32), encoder_T=encoder_T)])
            hidden_TD = model.hidden(model.attention(pack))
            found.append(head_logits(hidden_TD[-POSITIONS:], head=model.head, softcap=model.softcap))
    return found


def _gaps(expected: list[torch.Tensor], found: list[torch.Tensor]) -> list[float]:
    """The largest difference of each probe's logits, relative to the largest of them."""
    return [float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, found, strict=True)]


def requantised_cost(merged: Model, *, kind: Quantisation, contract: dict[str, Any]) -> float:
    """KL(merged || stored in few bits) of the next token, nats, mean over the probes; it is in few bits afterwards."""
    before = _logits(merged, contract)
    quantise(merged, kind)
    after = _logits(merged, contract)
    merged_PV, stored_PV = (torch.cat(found).float().log_softmax(-1) for found in (before, after))
    return float((merged_PV.exp() * (merged_PV - stored_PV)).sum(-1).mean())


def compare_logits(expected: list[torch.Tensor], found: list[torch.Tensor], *, out: Path) -> None:
    """StorageError where the written model's logits are not the run's."""
    for number, worst in enumerate(_gaps(expected, found), start=1):
        if not worst <= TOLERANCE:
            raise StorageError(
                f"the exported model is not the tuned one: probe {number}'s logits differ by {worst:.1e} of their size",
                file=out,
                hint="keep the run; report this as a bug",
            )


def export_merged(
    model: Model,
    *,
    method: Method,
    objective: Objective,
    template: ChatTemplate,
    contract: dict[str, Any],
    head: dict[str, Any],
    out: Path,
) -> None:
    """A plain transformers model: the adapter folded into the weights it was trained against; `head` as _write_extras."""
    expected = _logits(model, contract)
    method.merge(model)
    fold_tables(model)
    with new_folder(out) as new:
        model.save(new)
        _write_extras(new, model=model, objective=objective, template=template, contract=contract, head=head)
        compare_logits(expected, _logits(load_model(str(new)), contract), out=out)


def export_peft(
    model: Model,
    *,
    method: Method,
    objective: Objective,
    template: ChatTemplate,
    contract: dict[str, Any],
    head: dict[str, Any],
    out: Path,
) -> None:
    """The adapter in PEFT's format, with the tokenizer and chat template it was trained with."""
    if any(name.endswith(SAVED_BIASES) for name in new_rows(model)):
        raise RecipeError("the head has biases, and PEFT keeps none of new tokens", hint="use --format merged")
    expected = _logits(model, contract)
    with new_folder(out) as new:
        method.save(model, folder=new)
        model.save_tokenizer(new)
        _write_extras(new, model=model, objective=objective, template=template, contract=contract, head=head)
        again = load_model(model.name)
        extend_alike(again, like=model)
        copy.deepcopy(method).load(again, folder=new)
        compare_logits(expected, _logits(again, contract), out=out)


def _write_extras(
    folder: Path,
    *,
    model: Model,
    objective: Objective,
    template: ChatTemplate,
    contract: dict[str, Any],
    head: dict[str, Any],
) -> None:
    """The stop tokens as generation_config.json has them, the token contract, and in `head` what classes' names mean."""
    path = folder / "generation_config.json"
    config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    config["eos_token_id"] = template.stop_ids()
    path.write_text(json.dumps(config, indent=1), "utf-8")
    write_checked(folder, model=model, objective=objective, template=template, contract=contract)
    if head:
        (folder / DOCUMENT).write_text(json.dumps(head, indent=1, ensure_ascii=False), "utf-8")


def write_checked(
    folder: Path, *, model: Model, objective: Objective, template: ChatTemplate, contract: dict[str, Any]
) -> None:
    """The token contract. TemplateError where tokenizer and template, as they were written to `folder`, break it."""
    config = model.causal.config.to_dict()
    written = template_for(Tokenizer.from_folder(folder), config=config, today=template.today)
    check_contract(contract, template=written, objective=objective, file=folder / CONTRACT)
    (folder / CONTRACT).write_text(json.dumps(contract, indent=1, ensure_ascii=False), "utf-8")
