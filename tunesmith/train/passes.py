"""A pack through the model and its objective, and what of rows is put through at once: everything but the update.

Training, validation, calibration and planning all go through here, so a row means the same to each of them.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tunesmith.data.pack import Pack, build_packs, build_unit_packs
from tunesmith.data.tokens import TokenStore
from tunesmith.data.types import Sequence
from tunesmith.models.load import Model
from tunesmith.models.readout import target_divergences
from tunesmith.objectives.base import Loss, Objective, Readout, Reads, Totals
from tunesmith.train.features import FrozenFeatures
from tunesmith.train.parallel import ALONE, Processes
from tunesmith.train.settings import TrainSettings


def forward(
    model: Model,
    pack: Pack,
    *,
    objective: Objective,
    features: FrozenFeatures | None = None,
    teacher: Model | None = None,
) -> Loss:
    """One pack through the model and the objective; `features` are what its frozen blocks gave before."""
    hidden_TD = model.hidden(model.attention(pack)) if features is None else features.hidden(model, pack)
    value = reader(model, reads=objective.reads)(pack, hidden_TD=hidden_TD)
    divergence_N = None
    if objective.reads == "divergences":
        assert teacher is not None, "an objective that reads divergences has a teacher"
        divergence_N = divergences(model, pack, hidden_TD=hidden_TD, objective=objective, teacher=teacher)
    return objective.loss(Readout.of(value, pack, divergence_N=divergence_N), pack)


def reader(model: Model, *, reads: Reads) -> Callable[..., Tensor]:
    """What gives an objective's readout of a pack."""
    return {"outputs": model.outputs_at, "hidden": model.hidden_at}.get(reads, model.target_logprobs)


def divergences(model: Model, pack: Pack, *, hidden_TD: Tensor, objective: Objective, teacher: Model) -> Tensor:
    """How far each target's distribution [N] is from the teacher's, who reads the same pack."""
    with torch.no_grad():
        teacher_TD = teacher.hidden(teacher.attention(pack))
    source_N = torch.from_numpy(pack.source_N).to(hidden_TD.device)
    return target_divergences(
        hidden_TD.index_select(0, source_N),
        head=model.head,
        softcap=model.softcap,
        teacher_ND=teacher_TD.index_select(0, source_N),
        teacher_head=teacher.head,
        teacher_softcap=teacher.softcap,
        **objective.divergence_options,
    )


def autocast(model: Model, settings: TrainSettings) -> contextlib.AbstractContextManager[Any]:
    """bf16 arithmetic where the settings ask for it."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=settings.precision == "bf16")


def packed(
    units: list[list[Sequence]], *, model: Model, settings: TrainSettings, whole: bool = False
) -> Iterator[Pack]:
    """Packs of as many tokens as the settings put through the model at a time; `whole`: a unit stays in one.

    In bf16 on a CPU they are filled up, since oneDNN makes and keeps a kernel for each shape of a product (docs/log.md).
    """
    max_tokens, min_shared = settings.tokens_at_a_time(model.runs_on), model.min_shared_tokens
    if whole:
        packs = build_unit_packs(units, max_tokens=max_tokens, min_shared=min_shared)
    else:
        packs = build_packs([s for unit in units for s in unit], max_tokens=max_tokens, min_shared=min_shared)
    filled_up = settings.precision == "bf16" and model.runs_on == "cpu"
    return (pack.padded() for pack in packs) if filled_up else packs


def batches(
    store: TokenStore | FrozenFeatures,
    *,
    model: Model,
    settings: TrainSettings,
    whole: bool = False,
    units: list[int] | None = None,
    units_at_a_time: int = 256,
) -> Iterator[Pack]:
    """All units of a store, or some, as packs, in order, a bounded number held at a time."""
    numbers = range(len(store)) if units is None else units
    for start in range(0, len(numbers), units_at_a_time):
        some = [store.unit(unit) for unit in numbers[start : start + units_at_a_time]]
        yield from packed(some, model=model, settings=settings, whole=whole)


def evaluate_loss(
    model: Model,
    store: TokenStore | FrozenFeatures,
    *,
    objective: Objective,
    settings: TrainSettings,
    teacher: Model | None = None,
    processes: Processes = ALONE,
    interrupted: Callable[[], bool] = lambda: False,
) -> Totals | None:
    """Mean loss over a store, of which each process takes its share; None when interrupted. Dropout is off."""
    totals = Totals()
    features = store if isinstance(store, FrozenFeatures) else None
    own = processes.share(range(len(store)))
    packs = batches(store, model=model, settings=settings, whole=objective.whole_units, units=own or [0])
    pack = next(packs)
    with model.evaluating(), torch.no_grad():
        left = bool(own)
        while processes.most([int(left)])[0]:
            if interrupted():
                return None
            if left or processes.divides:
                with autocast(model, settings):
                    loss = forward(model, pack, objective=objective, features=features, teacher=teacher)
            if left:
                totals.add("loss", sum=float(loss.sum), count=loss.count)
                for name, (value, count) in loss.metrics.items():
                    totals.add(name, sum=value, count=count)
                following = next(packs, None)
                pack, left = following or pack, following is not None
    return Totals.of(processes.gathered(totals))
