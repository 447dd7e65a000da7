"""Several runs' adapters on one base, and one run made of several, with what that costs on each of their tasks.

Whether the runs fit together is told from their folders, before any model is loaded. The base is then loaded: it and every
run, the combination too, answer every run's own held-out rows, adapters by being switched in and out, whole models one after
the other. So each number stands beside that of the run that was tuned for the task, on the same rows, with the interval of
the difference.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

from tunesmith.combination import Plan, check_plain, check_same_base
from tunesmith.data.contract import FILE as CONTRACT
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example
from tunesmith.errors import DataError, NotFoundError, RecipeError
from tunesmith.evaluate.run import System, evaluate_systems
from tunesmith.evaluate.statistics import verdict
from tunesmith.methods.base import Method, load_adapter, save_tensors
from tunesmith.methods.combine import DENSITY, Combined, Factors, combine_adapters, updates_of
from tunesmith.methods.combine_weights import (
    Change,
    LowRank,
    Moved,
    OwnWeights,
    Tensors,
    combine_weights,
    transposed_layers,
)
from tunesmith.methods.full import Full
from tunesmith.methods.lora import Lora
from tunesmith.methods.several import Several, check_switchable
from tunesmith.models.load import Model, load_model
from tunesmith.registry.workspace import Workspace, check_recipe_name
from tunesmith.runs import (
    Run,
    check_base,
    command_line,
    device_named,
    index_of,
    own_rows,
    prepare_data,
    record_combined,
    record_end,
    template_of_run,
)
from tunesmith.storage import new_folder, read_json, versions, write_bytes, write_json, write_text
from tunesmith.tuned import load

FILE = "combination.json"
COMBINATION = "combination"  # what the table calls it


@dataclass(frozen=True)
class Task:
    """The held-out rows of one of the runs, and how that run reads them."""

    run: Run
    template: ChatTemplate
    data: str
    examples: list[Example]


def load_adapters(runs: Sequence[Run], *, names: Sequence[str], device: str) -> Several:
    """The base of the runs, loaded once, with each run's adapter under its name. RecipeError by name before that."""
    check_same_base(runs)
    for run in runs:
        check_switchable(run.recipe.method, run=run.name)
        check_plain(run)
    several = Several(load_model(runs[0].recipe.base, device=device_named(device)))
    for run, name in zip(runs, names, strict=True):
        check_base(run, several.model)
        several.load(run.recipe.method, name=name, folder=run.path / "model")
    return several


# ---------------------------------------------------------------------------------- what a combination results in


class Systems(Protocol):
    """The base, the runs and the combination by name, of which one at a time is the `model`."""

    @property
    def model(self) -> Model:
        """The base, outside of `using`."""

    def using(self, name: str | None) -> contextlib.AbstractContextManager[Model]:
        """Inside the block, `model` is the run `name`, or the base."""


@dataclass
class InTurn:
    """Models by name of which one is in memory at a time, because what was tuned leaves no base beside it."""

    model: Model
    runs: dict[str, Run]
    active: str | None = None

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[Model]:
        """Inside the block the model is the run's, or the base; it stays until another one is asked for."""
        if name != self.active:
            self.model.causal = None  # gone before the next one comes
            self.model.causal = self._loaded(name).causal
            self.active = name
        yield self.model

    def _loaded(self, name: str | None) -> Model:
        if name is not None:
            return load(self.runs[name]).model
        return load_model(next(iter(self.runs.values())).recipe.base, device=device_named("auto"))


class Result(Protocol):
    """What a combination becomes."""

    @property
    def method(self) -> Method:
        """The new run's."""

    @property
    def systems(self) -> Systems:
        """What answers; the combination once it was written."""

    @property
    def facts(self) -> dict[str, Any]:
        """What combination.json says of it, once it was written."""

    def write(self, run: Run) -> dict[str, int]:
        """Write the run's model; returns what its summary says of parameters."""


@dataclass(frozen=True)
class OneAdapter:
    """Adapters of method lora, as one of them."""

    combined: Combined
    systems: Several

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """The adapters' files read and combined, and then the base loaded with each of them."""
        methods = {run.name: run.recipe.method for run in plan.runs if isinstance(run.recipe.method, Lora)}
        combined = combine_adapters(
            {run.name: _updates(run, methods[run.name]) for run in plan.runs},
            how=plan.how,
            weights=plan.weights,
            density=DENSITY if plan.density is None else plan.density,
            rank=plan.rank,
            seed=plan.seed or 0,
        )
        targets = {method.targets for method in methods.values()}
        if len(targets) == 1:
            method = combined.method.model_copy(update={"targets": targets.pop()})
            combined = Combined(method, combined.tensors, combined.lost)
        return cls(combined, load_adapters(plan.runs, names=[run.name for run in plan.runs], device="auto"))

    @property
    def method(self) -> Lora:
        """The LoRA that holds the change."""
        return self.combined.method

    @property
    def facts(self) -> dict[str, Any]:
        """Its layers, their ranks, and what these cut off."""
        tensors = self.combined.tensors
        ranks = sorted({len(tensor) for name, tensor in tensors.items() if "lora_A" in name})
        return {"layers": len(tensors) // 2, "ranks": ranks, "lost_norm": self.combined.lost}

    def write(self, run: Run) -> dict[str, int]:
        """The adapter and the tokenizer, read back to stand among the systems."""
        with new_folder(run.path / "model") as new:
            save_tensors(self.combined.tensors, path=new / "adapter_model.safetensors")
            self.systems.load(self.method, name=COMBINATION, folder=new)
            with self.systems.using(COMBINATION) as model:
                self.method.save(model, folder=new)
                model.save_tokenizer(new)
                trained = sum(tensor.numel() for tensor in self.combined.tensors.values())
                return {"trainable_parameters": trained, "parameters": model.num_parameters()}


@dataclass
class WholeModel:
    """Runs that moved the base's own weights, and LoRA runs beside them, as one whole model."""

    plan: Plan
    systems: InTurn
    changes: dict[str, Change]
    moved: Moved = field(default=Moved(0, 0))

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """The runs' files opened, and the base loaded. ModelError where a file is damaged, StorageError for another base."""
        low = {run.name: _updates(run, m) for run in plan.runs if isinstance(m := run.recipe.method, Lora)}
        changes: dict[str, Change] = {
            run.name: OwnWeights(Tensors(run.path / "model"), whole=run.recipe.method.saves_model)
            for run in plan.runs
            if run.name not in low
        }
        model = load_model(plan.runs[0].recipe.base, device=device_named("auto"))
        for run in plan.runs:
            check_base(run, model)
        changes |= {name: LowRank(updates, transposed_layers(model)) for name, updates in low.items()}
        ordered = {run.name: changes[run.name] for run in plan.runs}
        return cls(plan, InTurn(model, {run.name: run for run in plan.runs}), ordered)

    @property
    def method(self) -> Full:
        """A whole model is what full tuning leaves."""
        return Full()

    @property
    def facts(self) -> dict[str, Any]:
        """As of an adapter, with how many tensors moved; there is no rank to lose anything to."""
        return {"layers": self.moved.tensors, "ranks": [], "lost_norm": 0.0}

    def write(self, run: Run) -> dict[str, int]:
        """The base's files, and then the combined change added to them."""
        plan, model = self.plan, self.systems.model
        with new_folder(run.path / "model") as new:
            model.save(new)
            self.moved = combine_weights(
                new,
                self.changes,
                how=plan.how,
                weights=plan.weights,
                density=DENSITY if plan.density is None else plan.density,
                seed=plan.seed or 0,
            )
        self.systems.runs[COMBINATION] = run
        return {"trainable_parameters": self.moved.numbers, "parameters": model.num_parameters()}


def _updates(run: Run, method: Lora) -> dict[str, Factors]:
    return updates_of(load_adapter(run.path / "model"), method=method, run=run.name)


# ----------------------------------------------------------------------------------------------------- combining


def combine_runs(
    plan: Plan, *, name: str, rows: int | None, workspace: Workspace, on_progress: Callable[[str], None]
) -> Run:
    """Write the run that `plan` says, and what it costs. See `api.combine`."""
    check_recipe_name(name)
    if rows is not None and rows < 2:
        raise RecipeError(f"rows is {rows}, and fewer than two rows say nothing about luck", hint="give 50 or more")
    started = time.perf_counter()
    result = WholeModel.of(plan) if plan.whole else OneAdapter.of(plan)
    tasks, left_out = _tasks(plan, result.systems.model, workspace=workspace)
    folder = _write_run(plan, result, name=name, workspace=workspace, started=started)
    on_progress(f"{folder.name}: {plan.as_text()}")
    measured = []
    for task in tasks:
        try:
            measured.append(_measured(task, plan, result.systems, rows=rows, on_progress=on_progress))
        except DataError as error:
            left_out.append({"task": task.run.name, "why": str(error)})
    document = {
        "run": folder.name,
        **plan.as_dict(),
        **result.facts,
        "systems": ["base", *(run.name for run in plan.runs), COMBINATION],
        "tasks": measured,
        "left_out": left_out,
    }
    document["sentence"] = _sentence(measured)
    write_json(folder / FILE, value=document)
    return Run(folder)


def _tasks(plan: Plan, model: Model, *, workspace: Workspace) -> tuple[list[Task], list[dict[str, str]]]:
    """Every run's held-out rows, and for which runs there are none and why."""
    tasks, left_out = [], []
    for run in plan.runs:
        template = template_of_run(run, model=model)
        try:
            prepared = prepare_data(run.recipe, model=model, workspace=workspace, template=template)
            data, examples = own_rows(run, prepared)
        except (DataError, NotFoundError) as error:
            left_out.append({"task": run.name, "why": str(error)})
        else:
            tasks.append(Task(run, template, data, examples))
    return tasks, left_out


def _write_run(plan: Plan, result: Result, *, name: str, workspace: Workspace, started: float) -> Path:
    """A finished run's folder, whose model stands among the systems as it was read back from there."""
    first, model = plan.runs[0], result.systems.model
    template = first.path / "model" / "chat_template.jinja"
    if template.is_file():
        model.tokenizer.chat_template = template.read_text("utf-8")
    folder = workspace.new_run(name)
    recipe = first.recipe.model_copy(update={"name": name, "method": result.method})
    resolved = first.resolved | {
        "recipe": recipe.model_dump(mode="json"),
        "versions": versions(),
        "combined": plan.as_dict(),
    }
    write_text(folder / "recipe.yaml", text=recipe.as_yaml())
    write_json(folder / "resolved.json", value=resolved)
    write_bytes(folder / CONTRACT, data=(first.path / CONTRACT).read_bytes())
    index = index_of(workspace)
    record_combined(index, folder, recipe, model=model, parent=first.name)
    try:
        counts = result.write(Run(folder))
    except BaseException:
        index.finish_run(folder.name, state="failed")
        raise
    summary = read_json(folder / "run.json") | {
        "path": str(folder),
        "state": "finished",
        "seconds": round(time.perf_counter() - started, 3),
        **counts,
        "combined": plan.as_text(),
        "versions": versions(),
        "command": command_line(),
    }
    record_end(index, folder, summary=summary)
    return folder


def _measured(
    task: Task, plan: Plan, models: Systems, *, rows: int | None, on_progress: Callable[[str], None]
) -> dict[str, Any]:
    """All systems on one task's rows, and the combination against the task's own run."""
    recipe, own = task.run.recipe, task.run.name
    settings = recipe.evaluate if rows is None else recipe.evaluate.model_copy(update={"rows": rows})
    others: dict[str, str | None] = {"base": None, **{run.name: run.name for run in plan.runs}}
    systems = [
        System(system, models.model, partial(models.using, name))
        for system, name in {COMBINATION: COMBINATION, **others}.items()
    ]
    document = evaluate_systems(
        systems,
        examples=task.examples,
        template=task.template,
        objective=recipe.objective,
        settings=settings,
        run=own,
        data=task.data,
        on_progress=lambda text: on_progress(f"{own}, {text}"),
    ).document
    word, sentence = verdict(
        document["metrics"], primary=document["primary"], rows=document["rows"], systems=(COMBINATION, own)
    )
    kept = ("data", "rows", "left_out_rows", "rows_sha256", "primary", "metrics")
    return {"task": own, **{name: document[name] for name in kept}, "verdict": word, "sentence": sentence}


def _sentence(tasks: list[dict[str, Any]]) -> str:
    """How the combination stands against each task's own run, counted."""
    if not tasks:
        return "no run holds rows back, so nothing says what the combination costs"
    words = {"worse": "worse on", "better": "better on", "undecided": "not told apart from it on"}
    counts = {word: sum(task["verdict"] == word for task in tasks) for word in words}
    said = ", ".join(f"{words[word]} {count}" for word, count in counts.items() if count)
    return f"against each task's own run, the combination is {said} of {len(tasks)} task{'s'[: len(tasks) > 1]}"


def read_combination(run: Run) -> dict[str, Any]:
    """What `combine --json` prints. NotFoundError for a run that was not made by combining."""
    return read_json(run.path / FILE)
