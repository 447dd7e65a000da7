"""The one training loop, for every method and objective.

    for each step: rows of the step -> packs; total = sum of counts; each pack: (loss.sum / total).backward(); update

The divisor is known before the first forward pass of the step, and this is the only place that divides. The data
position is (seed, epoch, cursor) and every random draw is seeded by (seed, step, pack), so a resumed run is the same run
to the bit.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.pack import Pack, build_packs, build_unit_packs
from tunesmith.data.tokens import TokenStore
from tunesmith.data.types import Sequence
from tunesmith.errors import Interrupted, NumericalError
from tunesmith.methods.base import Method, num_trainable, trainable
from tunesmith.models.blocks import num_frozen_blocks
from tunesmith.models.load import Model
from tunesmith.models.readout import target_divergences
from tunesmith.objectives.base import Loss, Objective, Readout, Totals
from tunesmith.train import checkpoint
from tunesmith.train.features import FrozenFeatures, open_features
from tunesmith.train.memory import peak_memory_bytes, release_free_memory
from tunesmith.train.optimiser import Optimiser, learning_rate
from tunesmith.train.settings import TrainSettings


class Observer(Protocol):
    """Is told what happens; shows, writes or sends it."""

    def start(self, *, num_steps: int, step: int) -> None:
        """Training begins at `step`."""

    def step(self, record: dict[str, Any]) -> None:
        """After an optimiser step: a line of metrics.jsonl."""

    def validation(self, record: dict[str, Any]) -> None:
        """After a validation: a line of metrics.jsonl."""

    def message(self, text: str) -> None:
        """A sentence for people."""


@dataclass
class Progress:
    """Where a run stands: all that is saved besides tensors."""

    step: int = 0
    epoch: int = 0
    cursor: int = 0  # units of this epoch that are done
    tokens: int = 0
    computed_tokens: int = 0
    target_tokens: int = 0
    rows: int = 0
    seconds: float = 0.0
    train_loss: float | None = None
    validation_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    validated_step: int = 0
    validations_since_best: int = 0
    recent: list[float] = field(default_factory=list)  # training losses since the last validation
    last_recent: float | None = None
    rising: int = 0


@dataclass(frozen=True)
class FitResult:
    """What a finished or stopped run amounts to."""

    progress: Progress
    stopped: str  # finished, early
    num_trainable: int
    peak_memory_bytes: int


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
    read = {"outputs": model.outputs_at, "hidden": model.hidden_at}.get(objective.reads, model.target_logprobs)
    value = read(pack, hidden_TD=hidden_TD)
    divergence_N = None
    if objective.reads == "divergences":
        assert teacher is not None, "an objective that reads divergences has a teacher"
        divergence_N = divergences(model, pack, hidden_TD=hidden_TD, objective=objective, teacher=teacher)
    return objective.loss(Readout.of(value, pack, divergence_N=divergence_N), pack)


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


def epoch_order(num_units: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of units in an epoch: a function of (seed, epoch) alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_units)


def num_steps(num_units: int, *, settings: TrainSettings) -> int:
    """Optimiser steps of the whole run."""
    per_epoch = math.ceil(num_units / settings.batch_rows)
    steps = max(1, round(settings.epochs * per_epoch))
    return min(steps, settings.max_steps) if settings.max_steps else steps


def seed_for(*, seed: int, step: int, pack: int) -> int:
    """One seed for each forward pass."""
    return int(np.random.SeedSequence([seed, step, pack]).generate_state(1, np.uint64)[0] >> 1)


class Fit:
    """One run of the loop. `run` trains to the end; `stop` may be set by a signal handler at any moment."""

    def __init__(
        self,
        model: Model,
        *,
        method: Method,
        objective: Objective,
        train: TokenStore,
        validation: TokenStore | None,
        settings: TrainSettings,
        folder: Path,
        observer: Observer,
        teacher: Model | None = None,
    ):
        self.model, self.method, self.objective, self.settings = model, method, objective, settings
        self.train, self.validation, self.teacher = train, validation, teacher
        self.folder, self.observer = folder / "checkpoints", observer
        self.peak = settings.learning_rate or method.learning_rate
        self.parameters = trainable(model)
        self.optimiser = Optimiser(
            self.parameters,
            settings=settings,
            not_matrices=model.vocabulary_weights(),
            rate_factors=method.rate_factors(model) | objective.rate_factors(),
        )
        self.num_steps = num_steps(len(train), settings=settings)
        tenth = max(1, self.num_steps // 10)
        self.validate_every = settings.validate_every or tenth
        self.checkpoint_every = settings.checkpoint_every or tenth
        self.progress = Progress()
        self.signal_number: int | None = None
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))
        self.features, self.validation_features = self._frozen_features(folder / "features")

    def _frozen_features(self, folder: Path) -> tuple[FrozenFeatures | None, FrozenFeatures | None]:
        """What frozen blocks give for the training and validation rows, where either is seen more than once."""
        settings = self.settings
        if settings.reuse_frozen == "off" or settings.compile:
            return None, None
        num_blocks = num_frozen_blocks(self.model, moving=set(self.parameters.values()))
        again = self.num_steps * settings.batch_rows > len(self.train)
        validations = self.num_steps // self.validate_every
        stores = (self.train if again else None, self.validation if validations > 1 else None)
        with autocast(self.model, settings):
            found = [
                open_features(
                    store, model=self.model, num_blocks=num_blocks, folder=folder / name, say=self.observer.message
                )
                for name, store in zip(("train", "validation"), stores, strict=True)
            ]
        return found[0], found[1]

    def run(self) -> FitResult:
        """Train until the steps are done or validation stops improving.

        Raises Interrupted after saving when a signal came, NumericalError naming the rows when a loss is not finite.
        """
        self.observer.start(num_steps=self.num_steps, step=self.progress.step)
        self.model.causal.train()
        while not self._stop_early():
            if self._due(self.checkpoint_every):
                self.save()
            if self.progress.step >= self.num_steps:
                break
            self._next_step()
        self.save()
        for features in (self.features, self.validation_features):
            if features is not None:
                features.remove()
        stopped = "finished" if self.progress.step >= self.num_steps else "early"
        return FitResult(self.progress, stopped, num_trainable(self.model), peak_memory_bytes(self.model.device))

    def _next_step(self) -> None:
        started = time.perf_counter()
        units, position = self._next_units()
        packs = self._packs(units)
        record = self._step(packs, units)
        progress = self.progress
        progress.epoch, progress.cursor = position
        progress.step += 1
        progress.rows += len(units)
        seconds = time.perf_counter() - started
        progress.seconds += seconds
        tokens = sum(p.num_row_tokens for p in packs)
        record |= {"tokens": progress.tokens, "tokens_per_second": tokens / seconds, "epoch": self._epochs_done()}
        self.observer.step({"step": progress.step, "time": time.time()} | record)

    def _stop_early(self) -> bool:
        """Validate where it is due and was not done yet; whether the patience is at an end."""
        progress, patience = self.progress, self.settings.patience
        if self.validation is not None and self._due(self.validate_every) and progress.validated_step < progress.step:
            self._validate()
        if not patience or progress.validations_since_best < patience:
            return False
        self.observer.message(f"stopped early: no better validation loss in {patience} validations")
        return True

    def _due(self, every: int) -> bool:
        step = self.progress.step
        return step > 0 and (step % every == 0 or step == self.num_steps)

    def _epochs_done(self) -> float:
        return round(self.progress.epoch + self.progress.cursor / len(self.train), 4)

    def _next_units(self) -> tuple[list[int], tuple[int, int]]:
        """The units of the next step, and the data position after it."""
        epoch, cursor = self.progress.epoch, self.progress.cursor
        if cursor >= len(self.train):
            epoch, cursor = epoch + 1, 0
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self.train), seed=self.settings.seed, epoch=epoch))
        units = self._order[1][cursor : cursor + self.settings.batch_rows].tolist()
        return units, (epoch, cursor + len(units))

    def _packs(self, units: list[int]) -> list[Pack]:
        rows = self.train if self.features is None else self.features
        found = [rows.unit(unit) for unit in units]
        return list(packed(found, model=self.model, settings=self.settings, whole=self.objective.whole_units))

    def _step(self, packs: list[Pack], units: list[int]) -> dict[str, float]:
        """One optimiser step. A signal before the update saves and raises: nothing has changed then."""
        total = sum(self.objective.count(pack) for pack in packs)
        rate = learning_rate(self.progress.step, peak=self.peak, num_steps=self.num_steps, settings=self.settings)
        if self.features is not None:
            self.features.step = self.progress.step
        self.method.at_step(self.model, share=self.progress.step / self.num_steps)
        self.optimiser.zero_grad()
        loss_sum = 0.0
        for index, pack in enumerate(packs):
            if self.signal_number is not None:
                self._interrupted()
            torch.manual_seed(seed_for(seed=self.settings.seed, step=self.progress.step, pack=index))
            with autocast(self.model, self.settings):
                loss = forward(self.model, pack, objective=self.objective, features=self.features, teacher=self.teacher)
            (loss.sum / total).backward()
            loss_sum += float(loss.sum.detach())
        norm = self._clip()
        if not (math.isfinite(loss_sum) and math.isfinite(norm)):
            self._not_finite(units, loss_sum=loss_sum, norm=norm)
        self.optimiser.step(learning_rate=rate)
        release_free_memory()
        progress = self.progress
        progress.tokens += sum(p.num_row_tokens for p in packs)
        progress.computed_tokens += sum(p.num_computed_tokens for p in packs)
        progress.target_tokens += sum(len(p.target_N) for p in packs)
        progress.train_loss = loss_sum / total
        progress.recent.append(progress.train_loss)
        return {"loss": progress.train_loss, "learning_rate": rate, "grad_norm": norm}

    def _clip(self) -> float:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.settings.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(list(self.parameters.values()), self.settings.clip, norm)
        return float(norm)

    def _not_finite(self, units: list[int], *, loss_sum: float, norm: float) -> NoReturn:
        """Find the rows at fault one by one and raise; the weights are those before the step."""
        self.optimiser.zero_grad()
        found = []
        for unit in units:
            self.optimiser.zero_grad()
            total = 0.0
            for pack in self._packs([unit]):
                with autocast(self.model, self.settings):
                    loss = forward(self.model, pack, objective=self.objective, teacher=self.teacher)
                loss.sum.backward()
                total += float(loss.sum.detach())
            gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
            if not (math.isfinite(total) and math.isfinite(float(torch.nn.utils.get_total_norm(gradients)))):
                found.append(str(self.train.origin(unit)))
        self.optimiser.zero_grad()
        rows = ", ".join(found[:5]) if found else "no single row; it comes from their sum"
        raise NumericalError(
            f"the loss ({loss_sum}) or the gradient's norm ({norm}) is not finite at step {self.progress.step + 1}: {rows}",
            hint="look at these rows; lower train.learning_rate, or use train.precision: fp32",
        )

    def _interrupted(self) -> NoReturn:
        self.optimiser.zero_grad()
        self.save()
        assert self.signal_number is not None
        raise Interrupted(
            f"stopped after step {self.progress.step} of {self.num_steps}; everything up to there is saved",
            hint="go on with the same command and --resume",
            signal_number=self.signal_number,
        )

    def _validate(self) -> None:
        assert self.validation is not None
        if self.validation_features is not None:
            self.validation_features.step = self.progress.step
        totals = evaluate_loss(
            self.model,
            self.validation if self.validation_features is None else self.validation_features,
            objective=self.objective,
            settings=self.settings,
            teacher=self.teacher,
            interrupted=lambda: self.signal_number is not None,
        )
        if totals is None:
            self._interrupted()
        loss = totals.mean("loss")
        if not math.isfinite(loss):
            raise NumericalError(
                f"the validation loss is {loss} after step {self.progress.step}: the training has diverged",
                hint="lower train.learning_rate",
            )
        progress = self.progress
        recent = sum(progress.recent) / len(progress.recent)
        falling = progress.last_recent is not None and recent < progress.last_recent
        worse = progress.validation_loss is not None and loss > progress.validation_loss
        progress.rising = progress.rising + 1 if falling and worse else 0
        progress.last_recent, progress.recent, progress.validation_loss = recent, [], loss
        progress.validated_step = progress.step
        metrics = {f"validation_{name}": totals.mean(name) for name in totals.sums if name != "loss"}
        self.observer.validation({"step": progress.step, "validation_loss": loss} | metrics)
        if progress.rising == 2:
            self.observer.message(
                "training loss falls while validation loss rises: the model is learning the rows by heart. "
                "Fewer epochs, a lower learning rate, or train.patience would stop here"
            )
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.validations_since_best = loss, progress.step, 0
            checkpoint.save(
                self.folder, name="best", tensors=self._weights(), state={"step": progress.step, "loss": loss}
            )
        else:
            progress.validations_since_best += 1

    def _weights(self) -> dict[str, Tensor]:
        return {f"model/{name}": p for name, p in self.parameters.items()}

    def save(self) -> None:
        """Write a checkpoint of everything the run needs to go on."""
        name = f"step-{self.progress.step:08d}"
        if (self.folder / name).exists():
            return
        for features in (self.features, self.validation_features):
            if features is not None:
                features.flush()
        tensors = self._weights() | {f"optimiser/{k}": v for k, v in self.optimiser.state().items()}
        checkpoint.save(self.folder, name=name, tensors=tensors, state={"progress": asdict(self.progress)})
        checkpoint.remove_old(self.folder)

    def resume(self) -> bool:
        """Take up the newest good checkpoint; False when there is none."""
        path = checkpoint.latest(self.folder, warn=self.observer.message)
        if path is None:
            self._forget_after(0, validated=-1)
            return False
        tensors, state = checkpoint.load(path)
        self._set_weights(tensors)
        self.optimiser.load_state({k[10:]: v for k, v in tensors.items() if k.startswith("optimiser/")})
        self.progress = Progress(**state["progress"])
        self._forget_after(self.progress.step, validated=self.progress.validated_step)
        return True

    def _forget_after(self, step: int, *, validated: int) -> None:
        """Of what frozen blocks gave, keep what this state of the run had."""
        if self.features is not None:
            self.features.forget_after(step)
        if self.validation_features is not None:
            self.validation_features.forget_after(validated + 1)

    def restore_best(self) -> None:
        """Go back to the weights of the best validation loss, where one was measured."""
        if self.progress.best_step is not None or (self.folder / "best").is_dir():
            self._set_weights(checkpoint.load(self.folder / "best")[0])

    def _set_weights(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"model/{name}"])


def packed(
    units: list[list[Sequence]], *, model: Model, settings: TrainSettings, whole: bool = False
) -> Iterator[Pack]:
    """Packs of as many tokens as the settings put through the model at a time; `whole`: a unit stays in one."""
    limits = {"max_tokens": settings.tokens_at_a_time(model.device.type), "min_shared": model.min_shared_tokens}
    if whole:
        return build_unit_packs(units, **limits)
    return build_packs([sequence for unit in units for sequence in unit], **limits)


def batches(
    store: TokenStore | FrozenFeatures,
    *,
    model: Model,
    settings: TrainSettings,
    whole: bool = False,
    units_at_a_time: int = 256,
) -> Iterator[Pack]:
    """All units of a store as packs, in order, a bounded number held at a time."""
    for start in range(0, len(store), units_at_a_time):
        units = [store.unit(unit) for unit in range(start, min(start + units_at_a_time, len(store)))]
        yield from packed(units, model=model, settings=settings, whole=whole)


def evaluate_loss(
    model: Model,
    store: TokenStore | FrozenFeatures,
    *,
    objective: Objective,
    settings: TrainSettings,
    teacher: Model | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Totals | None:
    """Mean loss over a store; None when interrupted. Dropout is off."""
    totals = Totals()
    features = store if isinstance(store, FrozenFeatures) else None
    was_training = model.causal.training
    model.causal.eval()
    with torch.no_grad():
        for pack in batches(store, model=model, settings=settings, whole=objective.whole_units):
            if interrupted():
                return None
            with autocast(model, settings):
                loss = forward(model, pack, objective=objective, features=features, teacher=teacher)
            totals.add("loss", sum=float(loss.sum), count=loss.count)
            for name, (value, count) in loss.metrics.items():
                totals.add(name, sum=value, count=count)
    model.causal.train(was_training)
    return totals
