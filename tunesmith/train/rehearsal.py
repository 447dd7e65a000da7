"""What a run will do, known before it: its steps and packs from the rows alone, and one or two of its steps tried out.

`course` lays out the packs of every step, exactly as the loop will. `rehearse` computes some of those steps forward and
backward, with an optimiser step that moves nothing (its learning rate is zero).
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from tunesmith.data.pack import Pack
from tunesmith.data.tokens import TokenStore
from tunesmith.methods.base import Method, trainable
from tunesmith.models.load import Model
from tunesmith.objectives.base import Objective
from tunesmith.train.loop import epoch_order, num_steps
from tunesmith.train.memory import release_free_memory
from tunesmith.train.optimiser import Optimiser
from tunesmith.train.passes import autocast, batches, forward, packed
from tunesmith.train.settings import TrainSettings

MAX_ROWS = 50_000  # of a run: above it the first epoch stands for the later ones


@dataclass
class Course:
    """What a run puts through the model; `exact` where every epoch was laid out and not the first alone.

    `most_tokens` and `most_targets` are the units of the steps with the pack of the most computed tokens and of the most
    targets, `lengths` the different numbers of computed tokens that packs have.
    """

    steps: int
    rows: int = 0
    tokens: int = 0
    computed_tokens: int = 0
    target_tokens: int = 0
    steps_laid_out: int = 0
    num_packs: int = 0  # of the steps that were laid out
    largest_pack_tokens: int = 0
    largest_pack_targets: int = 0
    most_tokens: list[int] = field(default_factory=list)
    most_targets: list[int] = field(default_factory=list)
    lengths: set[int] = field(default_factory=set)
    first_epoch_tokens: int = 0  # computed
    validation_tokens: int = 0  # computed in one validation
    num_validations: int = 0
    exact: bool = True

    def add(self, packs: list[Pack], *, units: list[int], times: float) -> None:
        """A step, which stands for so many."""
        self.steps_laid_out += 1
        self.num_packs += len(packs)
        self.rows += round(times * len(units))
        self.tokens += round(times * sum(p.num_row_tokens for p in packs))
        self.computed_tokens += round(times * sum(p.num_computed_tokens for p in packs))
        self.target_tokens += round(times * sum(len(p.target_N) for p in packs))
        self.lengths |= {p.num_computed_tokens for p in packs}
        for pack in packs:
            if pack.num_computed_tokens > self.largest_pack_tokens:
                self.largest_pack_tokens, self.most_tokens = pack.num_computed_tokens, units
            if len(pack.target_N) > self.largest_pack_targets:
                self.largest_pack_targets, self.most_targets = len(pack.target_N), units


def steps_of(num_units: int, *, settings: TrainSettings) -> Iterator[tuple[int, list[int]]]:
    """For each optimiser step of a run, its epoch and units."""
    done, total = 0, num_steps(num_units, settings=settings)
    epoch = 0
    while done < total:
        order = epoch_order(num_units, seed=settings.seed, epoch=epoch)
        for cursor in range(0, num_units, settings.batch_rows):
            if done < total:
                yield epoch, order[cursor : cursor + settings.batch_rows].tolist()
            done += 1
        epoch += 1


def course(
    train: TokenStore, *, validation: TokenStore | None, model: Model, objective: Objective, settings: TrainSettings
) -> Course:
    """Lay out the packs of all steps; of a long run those of the first epoch."""
    total = num_steps(len(train), settings=settings)
    per_epoch = -(-len(train) // settings.batch_rows)
    found = Course(steps=total, exact=total <= per_epoch or total * settings.batch_rows <= MAX_ROWS)
    times = 1.0 if found.exact else total / per_epoch
    for epoch, units in steps_of(len(train), settings=settings):
        if epoch and not found.exact:
            break
        packs = step_packs(train, units=units, model=model, objective=objective, settings=settings)
        found.add(packs, units=units, times=times)
        found.first_epoch_tokens += sum(p.num_computed_tokens for p in packs) if epoch == 0 else 0
    if validation is not None and len(validation):
        found.num_validations = total // (settings.validate_every or max(1, total // 10))
        for pack in batches(validation, model=model, settings=settings, whole=objective.whole_units):
            found.validation_tokens += pack.num_computed_tokens
            found.lengths.add(pack.num_computed_tokens)
    return found


def step_packs(
    train: TokenStore, *, units: list[int], model: Model, objective: Objective, settings: TrainSettings
) -> list[Pack]:
    """The packs of a step."""
    rows = [train.unit(unit) for unit in units]
    return list(packed(rows, model=model, settings=settings, whole=objective.whole_units))


def rehearse(
    model: Model,
    steps: list[list[Pack]],
    *,
    method: Method,
    objective: Objective,
    settings: TrainSettings,
    teacher: Model | None = None,
    accumulates: bool = True,
    enter: Callable[[str], None] = lambda part: None,
) -> list[float]:
    """Try out steps, each forward and backward and with an update of size zero; seconds of each.

    The optimiser has its state from the beginning, as in all steps but the first; `accumulates` is whether gradients of
    other packs are there too. `enter` is told the part of the work that begins.
    """
    parameters = trainable(model)
    factors = method.rate_factors(model) | objective.rate_factors()
    optimiser = Optimiser(parameters, settings=settings, not_matrices=model.vocabulary_weights(), rate_factors=factors)
    model.causal.train()
    enter("gradients")
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    enter("optimiser")
    optimiser.step(learning_rate=0.0)
    seconds = []
    for packs in steps:
        started = time.perf_counter()
        if not accumulates:
            optimiser.zero_grad()
        for pack in packs:
            enter("activations")
            with autocast(model, settings):
                loss = forward(model, pack, objective=objective, teacher=teacher)
            enter("backward")
            loss.sum.backward()
            del loss
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
        if settings.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(list(parameters.values()), settings.clip, norm)
        enter("optimiser")
        optimiser.step(learning_rate=0.0)
        release_free_memory()
        seconds.append(time.perf_counter() - started)
    optimiser.zero_grad()
    return seconds
