"""What a model's head, or its words, give for many rows, and what held-out rows say about how to read it."""

from dataclasses import replace

import numpy as np
import torch

from tunesmith.data.answers import Answer, Floats, Tags
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokens import TokenStore
from tunesmith.data.types import Example, Sequence
from tunesmith.models.heads import attach_head, set_head
from tunesmith.models.load import Model
from tunesmith.objectives.base import Readout
from tunesmith.objectives.contrastive import Contrastive
from tunesmith.objectives.headed import Calibration, Headed
from tunesmith.train.passes import autocast, packed, reader
from tunesmith.train.settings import TrainSettings

UNITS_AT_A_TIME = 1024


def read_sequences(
    model: Model, objective: Headed, units: list[list[Sequence]], *, settings: TrainSettings, states: bool = False
) -> tuple[Floats, np.ndarray]:
    """Outputs [M, K] of rows, those of one after those of another, and how many each has, [B].

    `units` are the sequences of each row. `states`: the hidden states [M, D] in their place.
    """
    numbered = [[replace(s, row=row) for s in unit] for row, unit in enumerate(units)]
    found: list[np.ndarray] = [np.zeros((0, 0))] * len(units)
    read = reader(model, reads="hidden" if states else "outputs" if objective.num_outputs else "logprobs")
    with model.evaluating(), torch.no_grad(), autocast(model, settings):
        for pack in packed(numbered, model=model, settings=settings, whole=objective.whole_units):
            output_MK, row_M = objective.by_row(Readout.of(read(pack), pack), pack)
            outputs = output_MK.double().cpu().numpy()
            for row in set(pack.rows_S.tolist()):
                found[row] = outputs[row_M == row]
    return np.concatenate(found), np.array([len(part) for part in found])


def read_store(
    model: Model, objective: Headed, store: TokenStore, *, settings: TrainSettings, states: bool = False
) -> tuple[Floats, list[np.ndarray]]:
    """As `read_sequences`, of all rows of a store; and their values."""
    rows, outputs, values = store.rows(), [], []
    for start in range(0, len(rows), UNITS_AT_A_TIME):
        some = [rows.unit(unit) for unit in range(start, min(start + UNITS_AT_A_TIME, len(rows)))]
        outputs.append(read_sequences(model, objective, some, settings=settings, states=states)[0])
        values += [first.values for first, *_ in some if first.values is not None]
    return np.concatenate(outputs), values


def predict(
    model: Model,
    objective: Headed,
    examples: list[Example],
    *,
    template: ChatTemplate,
    settings: TrainSettings,
    calibration: Calibration,
) -> Answer:
    """What the model says of rows, which need no label; what is longer than the context is cut."""
    found = []
    for start in range(0, len(examples), UNITS_AT_A_TIME):
        units = objective.read(examples[start : start + UNITS_AT_A_TIME], template=template)
        short = [objective.cut(unit, num_tokens=model.room_tokens) for unit in units]
        found.append(read_sequences(model, objective, short, settings=settings))
    output_MK, counts = (np.concatenate(parts) for parts in zip(*found, strict=True))
    answer = objective.predictions(output_MK, calibration=calibration, counts=counts)
    return answer.filled([len(e.words) for e in examples]) if isinstance(answer, Tags) else answer


def finish_head(
    model: Model, objective: Headed, *, train: TokenStore, validation: TokenStore | None, settings: TrainSettings
) -> Calibration:
    """Fit the head where the objective does so once training is over, and read off the validation rows what it means."""
    if isinstance(objective, Contrastive):
        state_BD, values = read_store(model, objective, train, settings=settings, states=True)
        attach_head(model, num_outputs=objective.num_outputs)
        set_head(model, weight_KD=torch.from_numpy(objective.fitted_head(state_BD, values)))
    if validation is None or not validation.num_units:
        return {}
    outputs, values = read_store(model, objective, validation, settings=settings)
    return objective.calibrated(outputs, values)
