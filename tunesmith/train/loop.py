"""The one training loop, for every method and objective.

    for each step: rows of the step -> packs; total = sum of counts; each pack: (loss.sum / total).backward(); update

The divisor is known before the first forward pass of the step, and this is the only place that divides. The data
position is (seed, epoch, cursor) and every random draw is seeded by (seed, step, pack), so a resumed run is the same run
to the bit.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.pack import Pack
from tunesmith.data.tokens import TokenStore
from tunesmith.errors import Interrupted, NumericalError, OutOfMemoryError
from tunesmith.methods.base import Method, num_trainable, trainable
from tunesmith.models.blocks import num_frozen_blocks
from tunesmith.models.load import Model
from tunesmith.objectives.base import Objective
from tunesmith.train import checkpoint
from tunesmith.train.features import FrozenFeatures, open_features
from tunesmith.train.memory import is_out_of_memory, peak_memory_bytes, release_all, release_free_memory
from tunesmith.train.optimiser import Optimiser, learning_rate
from tunesmith.train.parallel import ALONE, Processes, clip_gradients, gradient_norm, part_like
from tunesmith.train.passes import autocast, evaluate_loss, forward, packed
from tunesmith.train.settings import TrainSettings

Watch = Callable[[Callable[[], bool]], float | None]  # asks whether to stop; what it measured, None where it was to

FEWEST_TOKENS = 32  # at a time: fewer than a row, so that halving them helps no more


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
    tokens_at_a_time: int | None = None  # where memory did not hold what the settings say
    recent: list[float] = field(default_factory=list)  # training losses since the last validation
    last_recent: float | None = None
    rising: int = 0
    general_step: int = -1  # when the general rows were last read
    general_first: float | None = None  # bits a byte, before the first step
    general: float | None = None


@dataclass(frozen=True)
class FitResult:
    """What a finished or stopped run amounts to."""

    progress: Progress
    stopped: str  # finished, early
    num_trainable: int
    peak_memory_bytes: int


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
        processes: Processes = ALONE,
        cache: Path | None = None,
        watch: Watch | None = None,
        watch_every: int = 1,
    ):
        self.model, self.method, self.objective, self.settings = model, method, objective, settings
        self.processes = processes
        self.train, self.validation, self.teacher = train, validation, teacher
        self.watch, self.watch_every = watch, watch_every
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
        self.features, self.validation_features = self._frozen_features(cache)

    def _frozen_features(self, cache: Path | None) -> tuple[FrozenFeatures | None, FrozenFeatures | None]:
        """What frozen blocks give for the training and validation rows, where either is seen more than once."""
        settings = self.settings
        if cache is None or settings.reuse_frozen == "off" or settings.compile or self.processes.count > 1:
            return None, None
        num_blocks = num_frozen_blocks(self.model, moving=set(self.parameters.values()))
        again = self.num_steps * settings.batch_rows > len(self.train)
        validations = self.num_steps // self.validate_every
        stores = (self.train if again else None, self.validation if validations > 1 else None)
        with autocast(self.model, settings):
            train, validation = (
                open_features(
                    store,
                    model=self.model,
                    num_blocks=num_blocks,
                    kept_in=cache / "features",
                    stored_in=self.method.stored_in,
                    settings=settings,
                    say=self.observer.message,
                )
                for store in stores
            )
        return train, validation

    def run(self) -> FitResult:
        """Train until the steps are done or validation stops improving.

        Raises Interrupted after saving when a signal came, NumericalError naming the rows when a loss is not finite.
        """
        self.observer.start(num_steps=self.num_steps, step=self.progress.step)
        self.model.causal.train()
        self._compute_features()
        while not self._stop_early():
            if self._due(self.checkpoint_every):
                self.save()
            if self.progress.step >= self.num_steps:
                break
            self._next_step()
        self.save()
        stopped = "finished" if self.progress.step >= self.num_steps else "early"
        return FitResult(self.progress, stopped, num_trainable(self.model), peak_memory_bytes(self.model.device))

    def _compute_features(self) -> None:
        """What frozen blocks give, as far as it is not there yet."""
        started = time.perf_counter()
        for features in (self.features, self.validation_features):
            if features is not None:
                with autocast(self.model, self.settings):
                    whole = features.compute(self.model, say=self.observer.message, interrupted=self._signalled)
                if not whole:
                    self._interrupted()
        self.progress.seconds += time.perf_counter() - started

    def _next_step(self) -> None:
        started = time.perf_counter()
        units, position = self._next_units()
        before = self.progress.tokens
        while (record := self._step(units)) is None:
            self._use_less_memory()
        progress = self.progress
        progress.epoch, progress.cursor = position
        progress.step += 1
        progress.rows += len(units)
        seconds = time.perf_counter() - started
        progress.seconds += seconds
        speed = (progress.tokens - before) / seconds
        record |= {"tokens": progress.tokens, "tokens_per_second": speed, "epoch": self._epochs_done()}
        self.observer.step({"step": progress.step, "time": time.time()} | record)

    def _stop_early(self) -> bool:
        """Validate where it is due and was not done yet; whether too much was forgotten or the patience is at an end."""
        progress, patience = self.progress, self.settings.patience
        if self.watch is not None and self._forgets(self.watch):
            return True
        if self.validation is not None and self._due(self.validate_every) and progress.validated_step < progress.step:
            self._validate()
        if not patience or progress.validations_since_best < patience:
            return False
        self.observer.message(f"stopped early: no better validation loss in {patience} validations")
        return True

    def _forgets(self, watch: Watch) -> bool:
        """Read the general rows where it is due and was not done yet; whether they became worse than the limit allows.

        Before each validation too where there is a limit, so that no step beyond it is chosen as the best one.
        """
        progress, limit = self.progress, self.settings.general_limit
        chooses = limit is not None and self.validation is not None and self._due(self.validate_every)
        if progress.step not in (0, progress.general_step) and not (self._due(self.watch_every) or chooses):
            return False
        if progress.general_step != progress.step:
            with autocast(self.model, self.settings):
                value = watch(self._signalled)
            if value is None:
                self._interrupted()
            progress.general_step, progress.general = progress.step, value
            progress.general_first = value if progress.general_first is None else progress.general_first
            self.observer.validation({"step": progress.step, "general_bits_per_byte": value})
        if limit is None:
            return False
        rise = (progress.general or 0.0) - (progress.general_first or 0.0)
        if rise > limit:
            self.observer.message(
                f"stopped early: general rows cost {rise:.3f} bits a byte more, and {limit:g} are allowed"
            )
        elif progress.best_step is None:
            self._write("best", tensors=self._weights(), state={"step": progress.step, "loss": None})
        return rise > limit

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

    def _step(self, units: list[int]) -> dict[str, float] | None:
        """One optimiser step on these units, of which each process takes its share; None where memory did not hold it.

        A signal before the update saves and raises: nothing has changed then.
        """
        own = self.processes.share(units)
        packs = self._packs(own or units[:1])  # who has none keeps step with the others
        real = packs if own else []
        counted = [
            sum(self.objective.count(pack) for pack in real),
            sum(pack.num_row_tokens for pack in real),
            sum(pack.num_computed_tokens for pack in real),
            sum(len(pack.target_N) for pack in real),
        ]
        total, tokens, computed, targets = self.processes.sums(counted)
        rate = learning_rate(self.progress.step, peak=self.peak, num_steps=self.num_steps, settings=self.settings)
        self.method.at_step(self.model, share=self.progress.step / self.num_steps)
        self.optimiser.zero_grad()
        loss_sum = self._accumulate(packs, num_real=len(real), total=total)
        if loss_sum is None:
            return None
        norm = clip_gradients(self.parameters, limit=self.settings.clip)
        if not (math.isfinite(loss_sum) and math.isfinite(norm)):
            self._not_finite(units, loss_sum=loss_sum, norm=norm)
        self.optimiser.step(learning_rate=rate)
        release_free_memory()
        progress = self.progress
        progress.tokens += int(tokens)
        progress.computed_tokens += int(computed)
        progress.target_tokens += int(targets)
        progress.train_loss = loss_sum / total
        progress.recent.append(progress.train_loss)
        return {"loss": progress.train_loss, "learning_rate": rate, "grad_norm": norm}

    def _accumulate(self, packs: list[Pack], *, num_real: int, total: float) -> float | None:
        """The gradient of the loss over all processes, which is returned; None where one of them was out of memory.

        All go round equally often: where the blocks are divided a pack needs everyone, and one with nothing left to do
        computes with no weight.
        """
        loss_sum, short = 0.0, False
        for index in range(self.processes.most([len(packs)])[0]):
            if self._signalled():
                self._interrupted()
            if short or (index >= num_real and not self.processes.divides):
                continue
            pack = packs[min(index, len(packs) - 1)]
            seed = seed_for(
                seed=self.settings.seed,
                step=self.progress.step,
                pack=index * self.processes.count + self.processes.rank,
            )
            torch.manual_seed(seed)
            try:
                with autocast(self.model, self.settings):
                    loss = forward(
                        self.model, pack, objective=self.objective, features=self.features, teacher=self.teacher
                    )
                (loss.sum / total if index < num_real else 0 * loss.sum).backward()
                loss_sum += float(loss.sum.detach()) if index < num_real else 0.0
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.processes.divides:
                    raise
                short = True
        if self.processes.most([int(short)])[0]:
            return None
        self.processes.sum_gradients(self.parameters)
        return self.processes.sums([loss_sum])[0]

    def _use_less_memory(self) -> None:
        """Half as many tokens at a time from here on; OutOfMemoryError where that is no help any more."""
        self.optimiser.zero_grad()
        release_all()
        before = self.settings.tokens_at_a_time(self.model.device.type)
        if before <= FEWEST_TOKENS:
            raise OutOfMemoryError(
                f"not even one row at a time fits into memory at step {self.progress.step + 1}",
                hint="use train.gradient_checkpointing: true, method: qlora, a smaller data.max_tokens or a smaller base",
            )
        self._put_through(before // 2)
        self.observer.message(
            f"out of memory at step {self.progress.step + 1}: {before // 2:,} tokens at a time from here on, "
            f"and not {before:,}; the step is done again with the same rows, so the loss stays the same"
        )

    def _put_through(self, num_tokens: int) -> None:
        self.progress.tokens_at_a_time = num_tokens
        self.settings = self.settings.model_copy(update={"micro_batch_tokens": num_tokens})

    def _signalled(self) -> bool:
        """Whether a signal came to any process."""
        number = self.processes.most([self.signal_number or 0])[0]
        if number:
            self.signal_number = number
        return bool(number)

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
            if not (math.isfinite(total) and math.isfinite(float(gradient_norm(list(self.parameters.values()))))):
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
        totals = evaluate_loss(
            self.model,
            self.validation if self.validation_features is None else self.validation_features,
            objective=self.objective,
            settings=self.settings,
            teacher=self.teacher,
            processes=self.processes,
            interrupted=self._signalled,
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
            self._write("best", tensors=self._weights(), state={"step": progress.step, "loss": loss})
        else:
            progress.validations_since_best += 1

    def _weights(self) -> dict[str, Tensor]:
        return {f"model/{name}": p for name, p in self.parameters.items()}

    def save(self) -> None:
        """Write a checkpoint of everything the run needs to go on."""
        name = f"step-{self.progress.step:08d}"
        if self.processes.first((self.folder / name).exists):
            return
        self._write(
            name,
            tensors=self._weights() | {f"optimiser/{k}": v for k, v in self.optimiser.state().items()},
            state={"progress": asdict(self.progress)},
        )
        if self.processes.is_first:
            checkpoint.remove_old(self.folder)

    def _write(self, name: str, *, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Tensors are put together where they are divided; the first process writes."""
        whole = {key: self.processes.whole(tensor) for key, tensor in tensors.items()}
        if self.processes.is_first:
            checkpoint.save(self.folder, name=name, tensors=whole, state=state)

    def resume(self) -> bool:
        """Take up the newest good checkpoint; False when there is none."""
        path = self.processes.first(lambda: checkpoint.latest(self.folder, warn=self.observer.message))
        if path is None:
            return False
        tensors, state = checkpoint.load(path)
        set_weights(self.parameters, tensors)
        self.optimiser.load_state({k[10:]: v for k, v in tensors.items() if k.startswith("optimiser/")})
        self.progress = Progress(**state["progress"])
        if self.progress.tokens_at_a_time is not None:
            self._put_through(self.progress.tokens_at_a_time)
        return True

    def restore_best(self, model: Model | None = None) -> None:
        """Give the model, or a whole one like it, the weights of the best validation loss, or else the last ones."""
        best = self.folder / "best"
        path = best if self.progress.best_step is not None or best.is_dir() else None
        if path is None and model is not None:
            path = checkpoint.latest(self.folder, warn=self.observer.message)
        if path is not None:
            set_weights(trainable(model or self.model), checkpoint.load(path)[0])


def set_weights(parameters: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Copy a checkpoint's weights into parameters, or into the parts of them that are here."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(part_like(parameter, tensors[f"model/{name}"]))
