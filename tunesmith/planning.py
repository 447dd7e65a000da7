"""`tunesmith plan`: what a run will need, before anything runs.

    memory = process + weights + gradients + optimiser state + (activations + readout) (1 + holes) + kernels
    seconds = operations / (rate of matrix products, measured here x the share of it that a training reaches)

Rows are prepared as `train` prepares them, and the packs of its steps are laid out, so steps and tokens are counts. Tensors
are tallied by running the two steps with the largest packs on shapes alone (models/outline.py). `measure` runs these steps
in a process of its own, and puts what it finds in the place of what was predicted. The shares below are measured
(docs/performance.md).
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith.data.pack import Pack
from tunesmith.data.prepared import Prepared
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokens import TokenStore
from tunesmith.errors import ModelError, RecipeError, TunesmithError
from tunesmith.evaluate.settings import RESOLVED
from tunesmith.methods.base import num_trainable, trainable
from tunesmith.methods.lora import Lora, Qlora
from tunesmith.models.blocks import num_frozen_blocks
from tunesmith.models.load import Model, load_model
from tunesmith.models.outline import Tally, after_blocks, operations, outlined, stored_bytes
from tunesmith.models.quantised import check_installed
from tunesmith.recipe import Recipe
from tunesmith.registry.workspace import Workspace
from tunesmith.runs import check_suits, device_of, make_trainable, prepare_data, teacher_of, template_of, with_objective
from tunesmith.train.memory import available_memory_bytes, bytes_text, peak_memory_bytes, resident_bytes
from tunesmith.train.rehearsal import Course, course, rehearse, step_packs, steps_of
from tunesmith.vocabulary import grow_tokenizer

LONG_SECONDS = 600  # a run predicted to be longer is measured before it trains
HOLES, HOLES_ONE_PACK = (
    0.5,
    0.3,
)  # of activations: freed memory that no later tensor fits, with many packs a step or one
CHURN = (
    3.0  # times as many where tensors are converted or recomputed all the time: bf16 on a CPU, recomputed activations
)
HOLES_FEW_BITS = 0.4  # more, where weights are restored for each product
FIRST_USE_BYTES = 15 << 20  # of libraries, when they first compute
KERNEL_BYTES = 140 << 10  # that oneDNN keeps for each shape of a product in bf16 on a CPU
SHARE = 0.6  # of the rate of matrix products that a training reaches
RATE_SECONDS = 0.3
SLOW_RATE = {"cpu": 2e10, "cuda": 1e13}  # operations a second
OPERATIONS_A_PARAMETER = 8  # for a token, at most: forward twice, and both gradients
NUM_FURTHER_STEPS = 3  # that are measured besides those with the largest packs: memory grows over the first few


@dataclass(frozen=True)
class Memory:
    """Bytes when most are used: what the process has before, then its tensors by what they are for."""

    process: int
    weights: int
    gradients: int
    optimiser: int
    activations: int
    readout: int
    holes: int
    kernels: int
    frozen_blocks: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Measured:
    """What the steps with the largest packs took: bytes at most, seconds a computed token, how many lengths packs had."""

    peak_memory_bytes: int
    seconds_per_token: float
    num_lengths: int


@dataclass(frozen=True)
class Plan:
    """What a run will need. `seconds` and `peak_memory_bytes` are corrected by `measured` where that is there."""

    name: str
    device: str
    parameters: int
    trainable_parameters: int
    course: Course
    memory: Memory
    loading_bytes: int
    seconds: float
    peak_memory_bytes: int
    available_memory_bytes: int | None
    price_per_hour: float | None
    currency: str
    measured: Measured | None = None
    out_of_memory: bool = False  # while measuring

    @property
    def fits(self) -> bool:
        """Whether there is as much memory."""
        return self.available_memory_bytes is None or self.peak_memory_bytes <= self.available_memory_bytes

    @property
    def cost(self) -> float | None:
        """What the run costs, None without a price."""
        return None if self.price_per_hour is None else self.price_per_hour * self.seconds / 3600

    def as_dict(self) -> dict[str, Any]:
        """The JSON document."""
        run = self.course
        return {
            "name": self.name,
            "device": self.device,
            "parameters": self.parameters,
            "trainable_parameters": self.trainable_parameters,
            "steps": run.steps,
            "rows": run.rows,
            "tokens": run.tokens,
            "computed_tokens": run.computed_tokens,
            "target_tokens": run.target_tokens,
            "exact": run.exact,
            "largest_pack": {"computed_tokens": run.largest_pack_tokens, "target_tokens": run.largest_pack_targets},
            "memory": asdict(self.memory),
            "loading_memory_bytes": self.loading_bytes,
            "predicted_peak_memory_bytes": max(self.memory.total, self.loading_bytes),
            "peak_memory_bytes": self.peak_memory_bytes,
            "available_memory_bytes": self.available_memory_bytes,
            "fits": self.fits,
            "seconds": round(self.seconds, 1),
            "cost": None if self.cost is None else round(self.cost, 4),
            "currency": None if self.cost is None else self.currency,
            "measured": None if self.measured is None else asdict(self.measured),
        }

    def as_text(self) -> str:
        """For a terminal."""
        run = self.course
        share = self.trainable_parameters / self.parameters
        about = "" if run.exact else "about "
        predicted = max(self.memory.total, self.loading_bytes)
        sizes = asdict(self.memory).items()
        parts = [f"  {name.replace('_', ' '):16} {bytes_text(size):>10}" for name, size in sizes if size]
        how = "measured" if self.measured else "predicted"
        was = f" ({bytes_text(predicted)} predicted)" if self.measured else ""
        there = "" if self.available_memory_bytes is None else f", {bytes_text(self.available_memory_bytes)} available"
        peak = f"more than {bytes_text(predicted)}" if self.out_of_memory else bytes_text(self.peak_memory_bytes)
        lines = [
            f"{self.name} on {self.device}: {self.trainable_parameters:,} of {self.parameters:,} parameters trained "
            f"({share:.2%})",
            f"  {about}{run.steps:,} steps, {run.rows:,} rows, {run.tokens:,} tokens of rows, "
            f"{run.computed_tokens:,} computed, {run.target_tokens:,} trained",
            f"  largest packs: {run.largest_pack_tokens:,} computed tokens, {run.largest_pack_targets:,} targets",
            "memory, predicted:",
            *parts,
            f"{how}: {peak} at most{was}{there}; {_duration(self.seconds)}",
        ]
        if self.cost is not None:
            lines.append(f"cost: {self.cost:,.2f} {self.currency} at {self.price_per_hour:g} an hour")
        return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 7200:
        return f"{seconds:,.0f} s" if seconds < 120 else f"{seconds / 60:,.0f} min"
    return f"{seconds / 3600:,.1f} h"


@dataclass(frozen=True)
class Stage:
    """All that a step needs, up to the method: model, teacher, rows, and the recipe with what it took from them."""

    model: Model
    teacher: Model | None
    prepared: Prepared
    recipe: Recipe

    def packs(self, units: list[int]) -> list[Pack]:
        """The packs of a step."""
        recipe = self.recipe
        return step_packs(
            self.prepared.train, units=units, model=self.model, objective=recipe.objective, settings=recipe.train
        )


def set_up(
    recipe: Recipe, *, workspace: Workspace, device: str, on_message: Callable[[str], None] = lambda text: None
) -> Stage:
    """As `train` begins: rows from the cache or into it. On the device `meta` no weight is read."""
    check_installed(recipe.method.stored_in)
    check_suits(recipe)
    model = load_model(recipe.base, device=device)
    model.stands_for = device_of(recipe.train) if device == "meta" else None
    teacher = teacher_of(recipe, model=model)
    template: ChatTemplate = template_of(model, recipe)
    growth = grow_tokenizer(recipe, model=model, workspace=workspace, template=template, on_message=on_message)
    if growth is not None:
        template = template_of(model, recipe)
    prepared = prepare_data(recipe, model=model, workspace=workspace, template=template)
    if growth is not None:
        growth.extend(model, whole=recipe.method.saves_model)
    return Stage(model, teacher, prepared, with_objective(recipe, prepared.objective))


def make_plan(
    recipe: Recipe,
    *,
    workspace: Workspace,
    measure: bool = False,
    on_message: Callable[[str], None] = lambda text: None,
) -> Plan:
    """What the recipe's run will need; with `measure`, corrected by some of its steps. Raises what `train` does."""
    device = device_of(recipe.train)
    stage = set_up(recipe, workspace=workspace, device="meta", on_message=on_message)
    plan = _predicted(stage, device=device)
    return _by_measuring(plan, stage, workspace=workspace, on_message=on_message) if measure else plan


def _by_measuring(plan: Plan, stage: Stage, *, workspace: Workspace, on_message: Callable[[str], None]) -> Plan:
    on_message("measuring the steps with the largest packs in a process of its own")
    return _corrected(plan, _measured(stage, workspace=workspace, plan=plan))


def _apply(stage: Stage) -> int:
    """Apply the method to shapes alone, the base as it came; bytes that storing it in few bits saves."""
    recipe, saved = stage.recipe, 0
    if recipe.method.stored_in is not None:
        saved = stored_bytes(stage.model, kind=recipe.method.stored_in)[0]
        recipe = recipe.model_copy(update={"method": recipe.method.model_copy(update={"quantise": None})})
    make_trainable(stage.model, recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": False})}))
    return saved


def _predicted(stage: Stage, *, device: str) -> Plan:
    recipe, model = stage.recipe, stage.model
    matrix_rate(device, precision=recipe.train.precision)  # before the process is looked at: it loads what computes
    process = resident_bytes() + FIRST_USE_BYTES if device == "cpu" else 0
    loaded = sum(p.numel() * p.element_size() for _, p in model.named_parameters())
    saved = _apply(stage)
    found = course(
        stage.prepared.train,
        validation=stage.prepared.validation,
        model=model,
        objective=recipe.objective,
        settings=recipe.train,
    )
    seconds = _seconds(stage, found, device=device)  # counts weights, so before they are shapes of another kind
    memory = _memory(stage, found, process=process, saved=saved, device=device)
    loading = process + loaded + (memory.weights if recipe.train.precision == "bf16" or saved else 0)
    return Plan(
        name=recipe.name,
        device=device,
        parameters=model.num_parameters(),
        trainable_parameters=num_trainable(model),
        course=found,
        memory=memory,
        loading_bytes=loading,
        seconds=seconds,
        peak_memory_bytes=max(memory.total, loading),
        available_memory_bytes=available_memory_bytes(torch.device(device)),
        price_per_hour=recipe.plan.price_per_hour,
        currency=recipe.plan.currency,
    )


def _memory(stage: Stage, found: Course, *, process: int, saved: int, device: str) -> Memory:
    """Tally the largest packs, and add what the allocator and the libraries keep besides."""
    recipe, model = stage.recipe, stage.model
    stored = recipe.method.stored_in
    restored = 0 if stored is None else stored_bytes(model, kind=stored)[1]
    frozen_blocks = _kept_on_disk(stage, found)
    per_step = max(1.0, found.num_packs / found.steps_laid_out)
    tally, num_packs = _tallied(stage, found, accumulates=per_step > 1)
    moving = trainable(model).values()
    gradients = sum(p.numel() * p.element_size() for p in moving)
    weights, optimiser, readout = (tally.peak[part] for part in ("weights", "optimiser", "readout"))
    activations = max(0, sum(tally.peak.values()) - weights - gradients - optimiser - readout) + restored
    on_cpu = device == "cpu"
    train = recipe.train
    churn = CHURN if train.precision == "bf16" or train.gradient_checkpointing else 1.0
    holes = churn * (HOLES - (HOLES - HOLES_ONE_PACK) / per_step) + (HOLES_FEW_BITS if stored else 0.0)
    products = len(tally.products) // num_packs * len(found.lengths) if on_cpu else 0
    return Memory(
        process=process,
        weights=weights - saved,
        gradients=gradients,
        optimiser=optimiser,
        activations=activations,
        readout=readout,
        holes=int(holes * (activations + readout)) if on_cpu else 0,
        kernels=products * KERNEL_BYTES,
        frozen_blocks=frozen_blocks if on_cpu else 0,
    )


def _tallied(stage: Stage, found: Course, *, accumulates: bool) -> tuple[Tally, int]:
    """What is alive when most is, in the packs with the most tokens and the most targets; how many packs that are."""
    recipe, model = stage.recipe, stage.model
    tokens = max(stage.packs(found.most_tokens), key=lambda pack: pack.num_computed_tokens)
    targets = max(stage.packs(found.most_targets), key=lambda pack: len(pack.target_N))
    packs = [tokens] if np.array_equal(tokens.tokens_T, targets.tokens_T) else [targets, tokens]
    try:
        with outlined([m for m in (model, stage.teacher) if m is not None]) as tally:
            handle = after_blocks(model, tell=tally.blocks_done)
            rehearse(
                model,
                [[pack] for pack in packs],
                method=recipe.method,
                objective=recipe.objective,
                settings=recipe.train,
                teacher=stage.teacher,
                accumulates=accumulates,
                enter=tally.enter,
            )
            handle.remove()
    except (NotImplementedError, RuntimeError) as error:
        raise ModelError(
            f"the memory of this base cannot be told from shapes alone: {str(error).splitlines()[0]}",
            hint="train a few steps with --set train.max_steps=4; train prints the peak",
        ) from error
    return tally, len(packs)


def _reuses(stage: Stage, found: Course) -> int:
    """How many of the lowest blocks are frozen and read back in later epochs."""
    settings = stage.recipe.train
    again = found.rows > len(stage.prepared.train) and settings.reuse_frozen == "auto" and not settings.compile
    return num_frozen_blocks(stage.model, moving=set(trainable(stage.model).values())) if again else 0


def _kept_on_disk(stage: Stage, found: Course) -> int:
    """Bytes of what frozen blocks give, which are mapped into memory; an upper bound where rows begin alike."""
    if not _reuses(stage, found):
        return 0
    width = 2 if stage.recipe.train.precision == "bf16" else 4
    return found.first_epoch_tokens * stage.model.hidden_size * width


def _seconds(stage: Stage, found: Course, *, device: str) -> float:
    """Operations over the rate of products in this precision, and the share of it that a training reaches."""
    settings, model = stage.recipe.train, stage.model
    training, forward, target = operations(model, recomputed=settings.gradient_checkpointing)
    later = found.computed_tokens - found.first_epoch_tokens
    spared = sum(2 * p.numel() for b in model.layers[: _reuses(stage, found)] for p in b.parameters() if p.ndim >= 2)
    done = training * found.computed_tokens - spared * later + target * found.target_tokens
    done += forward * found.validation_tokens * found.num_validations
    return done / (matrix_rate(device, precision=settings.precision) * SHARE)


@cache
def matrix_rate(device: str, *, precision: str) -> float:
    """Floating-point operations a second of a product of two square matrices, here and now."""
    side = 4096 if device == "cuda" else 1024
    a = torch.ones(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    out = torch.mm(a, a)
    started, times = time.perf_counter(), 0
    while time.perf_counter() - started < RATE_SECONDS:
        torch.mm(a, a, out=out)
        float(out[0, 0])  # waits for a GPU
        times += 1
    return 2 * side**3 * times / (time.perf_counter() - started)


# ------------------------------------------------------------------------------------------ in a process of its own


def _measured(stage: Stage, *, workspace: Workspace, plan: Plan) -> Measured | None:
    """Run the steps with the largest packs, and the first few, in a new process; None where memory did not suffice."""
    recipe = stage.recipe.model_dump(mode="json")
    further = islice(steps_of(len(stage.prepared.train), settings=stage.recipe.train), NUM_FURTHER_STEPS)
    steps = [plan.course.most_tokens, plan.course.most_targets, *(units for _, units in further)]
    request = {"recipe": recipe, "workspace": str(workspace.path), "device": plan.device, "steps": steps}
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith.planning"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if done.returncode == -signal.SIGKILL or "allocate" in done.stderr or "out of memory" in done.stderr:
        return None
    if done.returncode:
        raise ModelError(
            f"the steps with the largest packs failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}",
            hint="plan without --measure",
        )
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def _corrected(plan: Plan, measured: Measured | None) -> Plan:
    """The plan with what was measured; where memory did not suffice for that, it says more than there is."""
    if measured is None:
        more = (plan.available_memory_bytes or 0) + 1
        return replace(plan, peak_memory_bytes=max(plan.peak_memory_bytes, more), out_of_memory=True)
    unseen = 1 - min(1.0, measured.num_lengths / max(1, len(plan.course.lengths)))
    peak = measured.peak_memory_bytes + round(unseen * plan.memory.kernels) + plan.memory.frozen_blocks
    predicted = plan.seconds / max(1, plan.course.computed_tokens)
    seconds = plan.seconds * measured.seconds_per_token / predicted
    return replace(plan, measured=measured, peak_memory_bytes=peak, seconds=seconds)


def _measure(request: dict[str, Any]) -> Measured:
    """What the new process does."""
    recipe = Recipe.model_validate(request["recipe"], context=RESOLVED)
    stage = set_up(recipe, workspace=Workspace(Path(request["workspace"])), device=request["device"])
    make_trainable(stage.model, stage.recipe)
    steps = [stage.packs(units) for units in request["steps"]]
    seconds = rehearse(
        stage.model,
        steps,
        method=recipe.method,
        objective=stage.recipe.objective,
        settings=recipe.train,
        teacher=stage.teacher,
    )
    tokens = sum(pack.num_computed_tokens for packs in steps for pack in packs)
    lengths = {pack.num_computed_tokens for packs in steps for pack in packs}
    return Measured(peak_memory_bytes(stage.model.device), sum(seconds) / tokens, len(lengths))


# ------------------------------------------------------------------------------------------------- before a long run


def may_be_long(recipe: Recipe, *, model: Model, rows: TokenStore) -> bool:
    """Whether the run could be long on a slow machine: told from its rows and parameters alone, at once."""
    train = recipe.train
    epochs = (
        train.epochs if train.max_steps is None else min(train.epochs, train.max_steps * train.batch_rows / len(rows))
    )
    most = OPERATIONS_A_PARAMETER * model.num_parameters() * rows.num_tokens * epochs
    return most / SLOW_RATE[model.device.type] > LONG_SECONDS


def check_before(recipe: Recipe, *, workspace: Workspace, say: Callable[[str], None]) -> None:
    """Measure a run that will be long before it trains, and say its plan; RecipeError where memory does not suffice."""
    stage = set_up(recipe, workspace=workspace, device="meta")
    plan = _predicted(stage, device=device_of(recipe.train))
    if plan.seconds <= LONG_SECONDS:
        return
    plan = _by_measuring(plan, stage, workspace=workspace, on_message=say)
    say(plan.as_text())
    if not plan.fits:
        raise _too_large(plan, recipe=recipe, workspace=workspace)


def _too_large(plan: Plan, *, recipe: Recipe, workspace: Workspace) -> RecipeError:
    """What is needed, what there is, and which change of the recipe would fit."""
    assert plan.available_memory_bytes is not None
    fitting = [name for name, smaller in _smaller(recipe) if _fits(smaller, workspace=workspace)]
    need = "more" if plan.out_of_memory else bytes_text(plan.peak_memory_bytes)
    return RecipeError(
        f"the run needs {need} of memory and there are {bytes_text(plan.available_memory_bytes)}",
        hint=f"this would fit: --set {' or --set '.join(fitting)}"
        if fitting
        else "use a smaller base or a larger machine",
    )


def _smaller(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Changes of a recipe that need less memory, the mildest first."""
    train = recipe.train
    now = train.tokens_at_a_time(device_of(train))
    changes: list[tuple[str, dict[str, Any]]] = [
        (f"train.micro_batch_tokens={now // 4}", {"train": train.model_copy(update={"micro_batch_tokens": now // 4})}),
        ("train.gradient_checkpointing=true", {"train": train.model_copy(update={"gradient_checkpointing": True})}),
        ("method=lora", {"method": Lora()}),
        ("method=qlora", {"method": Qlora()}),
    ]
    for name, update in changes:
        smaller = recipe.model_copy(update=update)
        if smaller != recipe:
            yield name, smaller


def _fits(recipe: Recipe, *, workspace: Workspace) -> bool:
    try:
        return make_plan(recipe, workspace=workspace).fits
    except TunesmithError:  # a method that does not suit the base
        return False


def main() -> None:
    """What `_measured` starts: the request on standard input, what was found on standard output."""
    print(json.dumps(asdict(_measure(json.load(sys.stdin)))))


if __name__ == "__main__":
    main()
