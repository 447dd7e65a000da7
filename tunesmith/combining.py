"""Several runs' adapters on one base, and one run made of several, with what that costs on each of their tasks.

Whether the runs fit together is told from their folders, before any model is loaded. The base is then loaded once: it and
every adapter, the combination too, answer every run's own held-out rows by being switched in and out. So each number stands
beside that of the adapter that was tuned for the task, on the same rows, with the interval of the difference.
"""

import difflib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith.data.contract import FILE as CONTRACT
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example
from tunesmith.errors import DataError, NotFoundError, RecipeError
from tunesmith.evaluate.run import System, evaluate_systems
from tunesmith.evaluate.statistics import verdict
from tunesmith.methods.base import load_adapter, save_tensors
from tunesmith.methods.combine import (
    DENSITY,
    DRAWN,
    WAYS,
    Combined,
    Way,
    check_combinable,
    combine_adapters,
    updates_of,
)
from tunesmith.methods.several import Several, check_switchable
from tunesmith.models.load import Model, load_model
from tunesmith.registry.workspace import Workspace, check_recipe_name
from tunesmith.runs import (
    Run,
    check_base,
    check_finished,
    command_line,
    device_named,
    index_of,
    own_rows,
    prepare_data,
    record_combined,
    record_end,
    template_of_run,
    versions,
)
from tunesmith.storage import new_folder, read_json, write_bytes, write_json, write_text

FILE = "combination.json"
COMBINATION = "combination"  # what the table calls it


@dataclass(frozen=True)
class Plan:
    """Which runs are combined and how; checked, and every default filled in. `density` and `seed` where they count."""

    runs: tuple[Run, ...]
    how: Way
    weights: tuple[float, ...]
    density: float | None
    rank: int | None
    seed: int | None

    def as_dict(self) -> dict[str, Any]:
        """As combination.json and resolved.json have it."""
        return {
            "how": self.how,
            "runs": [
                {"run": run.name, "path": str(run.path), "weight": weight}
                for run, weight in zip(self.runs, self.weights, strict=True)
            ],
            "density": self.density,
            "rank": self.rank,
            "seed": self.seed,
        }

    def as_text(self) -> str:
        """In a line."""
        of = ", ".join(f"{run.name} ({weight:g})" for run, weight in zip(self.runs, self.weights, strict=True))
        settings = {"density": self.density, "rank": self.rank, "seed": self.seed}
        return f"{self.how} of {of}" + "".join(f"; {k} {v:g}" for k, v in settings.items() if v is not None)


@dataclass(frozen=True)
class Task:
    """The held-out rows of one of the runs, and how that run reads them."""

    run: Run
    template: ChatTemplate
    data: str
    examples: list[Example]


# ------------------------------------------------------------------------------------------------ before any model


def check_same_base(runs: Sequence[Run]) -> None:
    """Every run has a model, stands here once, and was tuned from the first one's base. RecipeError, NotFoundError."""
    seen: set[Path] = set()
    for run in runs:
        check_finished(run)
        if run.path.resolve() in seen:
            raise RecipeError(f"{run.name} is named twice", hint="name each run once, and give it a larger weight")
        seen.add(run.path.resolve())
    first, digest = runs[0], runs[0].resolved["hashes"]["base"]
    for run in runs[1:]:
        if (other := run.resolved["hashes"]["base"]) != digest:
            raise RecipeError(
                f"{run.name} was tuned from the base '{run.recipe.base}' ({other[:12]}) and {first.name} from "
                f"'{first.recipe.base}' ({digest[:12]}): an adapter fits the weights it was made for alone",
                hint="use runs of one base",
            )


def parse_weights(text: str | None) -> list[float] | None:
    """Numbers between commas; RecipeError for anything else."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--weights {text!r} are no numbers between commas", hint="such as 0.5,0.5") from None


def plan_combination(
    runs: Sequence[Run],
    *,
    how: str,
    weights: Sequence[float] | None,
    density: float | None,
    rank: int | None,
    seed: int | None,
) -> Plan:
    """Check what is asked for against what the run folders say. RecipeError names what does not fit."""
    if how not in WAYS:
        near = difflib.get_close_matches(how, WAYS, n=1)
        raise RecipeError(
            f"there is no way to combine called '{how}'; there are {', '.join(WAYS)}",
            hint=f"did you mean '{near[0]}'?" if near else "linear is a weighted sum",
        )
    if len(runs) < 2:
        raise RecipeError(f"{len(runs)} run is given, and combining takes two or more", hint="name another run")
    check_same_base(runs)
    for run in runs:
        check_combinable(run.recipe.method, run=run.name)
        _check_plain(run)
    _check_contracts(runs)
    if density is not None and how == "linear":
        raise RecipeError("density has no effect on linear, which drops nothing", hint="leave it out, or --how ties")
    if density is not None and not 0 < density <= 1:
        raise RecipeError(f"density is {density:g}, the share that is kept: above 0 and at most 1", hint="such as 0.5")
    if seed is not None and how not in DRAWN:
        raise RecipeError(f"seed has no effect on {how}, which draws nothing", hint=f"leave it out, or {DRAWN[0]}")
    return Plan(
        runs=tuple(runs),
        how=how,
        weights=_checked_weights(weights, runs=runs),
        density=None if how == "linear" else DENSITY if density is None else density,
        rank=rank,
        seed=(seed or 0) if how in DRAWN else None,
    )


def _checked_weights(weights: Sequence[float] | None, *, runs: Sequence[Run]) -> tuple[float, ...]:
    """One for each run; an average by default."""
    if weights is None:
        return (1 / len(runs),) * len(runs)
    if len(weights) != len(runs):
        raise RecipeError(
            f"{len(weights)} weights are given for {len(runs)} runs", hint="give one for each run, in their order"
        )
    for run, weight in zip(runs, weights, strict=True):
        if not math.isfinite(weight) or weight == 0:
            raise RecipeError(
                f"the weight of {run.name} is {weight:g}; a weight is a number other than 0",
                hint="leave that run out",
            )
    return tuple(weights)


def _check_contracts(runs: Sequence[Run]) -> None:
    """The same tokenizer and chat template, since the combination has one of each."""
    contracts = [read_json(run.path / CONTRACT) for run in runs]
    for key, what in (("template_sha256", "chat template"), ("tokenizer", "tokenizer")):
        for run, contract in zip(runs, contracts, strict=True):
            if contract[key] != contracts[0][key]:
                raise RecipeError(
                    f"{run.name} was tuned with another {what} than {runs[0].name}",
                    file=run.path / CONTRACT,
                    hint="combine runs that read conversations alike, or switch between them: api.load_several",
                )


# ------------------------------------------------------------------------------------------ several on one base


def _check_plain(run: Run) -> None:
    """RecipeError where the run has a head or tokens of its own, which no other run's adapter fits."""
    if run.recipe.objective.num_new_tokens:
        raise RecipeError(f"{run.name} has tokens of its own (new_tokens)", hint="load it alone: api.load")
    if run.recipe.objective.num_outputs:
        raise RecipeError(
            f"{run.name} was tuned for {run.recipe.objective.kind_name} and has a head of its own",
            hint="load it alone: api.load",
        )


def load_adapters(runs: Sequence[Run], *, names: Sequence[str], device: str) -> Several:
    """The base of the runs, loaded once, with each run's adapter under its name. RecipeError by name before that."""
    check_same_base(runs)
    for run in runs:
        check_switchable(run.recipe.method, run=run.name)
        _check_plain(run)
    several = Several(load_model(runs[0].recipe.base, device=device_named(device)))
    for run, name in zip(runs, names, strict=True):
        check_base(run, several.model)
        several.load(run.recipe.method, name=name, folder=run.path / "model")
    return several


# ----------------------------------------------------------------------------------------------------- combining


def combine_runs(
    plan: Plan, *, name: str, rows: int | None, workspace: Workspace, on_progress: Callable[[str], None]
) -> Run:
    """Write the run that `plan` says, and what it costs. See `api.combine`."""
    check_recipe_name(name)
    if rows is not None and rows < 2:
        raise RecipeError(f"rows is {rows}, and fewer than two rows say nothing about luck", hint="give 50 or more")
    started = time.perf_counter()
    combined = _combined(plan)
    several = load_adapters(plan.runs, names=[run.name for run in plan.runs], device="auto")
    tasks, left_out = _tasks(plan, several.model, workspace=workspace)
    folder = _write_run(plan, combined, several, name=name, workspace=workspace, started=started)
    on_progress(f"{folder.name}: {plan.as_text()}")
    measured = []
    for task in tasks:
        try:
            measured.append(_measured(task, plan, several, rows=rows, on_progress=on_progress))
        except DataError as error:
            left_out.append({"task": task.run.name, "why": str(error)})
    document = {
        "run": folder.name,
        **plan.as_dict(),
        "layers": len(combined.tensors) // 2,
        "ranks": sorted({len(t) for n, t in combined.tensors.items() if "lora_A" in n}),
        "lost_norm": combined.lost,
        "systems": ["base", *(run.name for run in plan.runs), COMBINATION],
        "tasks": measured,
        "left_out": left_out,
    }
    document["sentence"] = _sentence(measured)
    write_json(folder / FILE, value=document)
    return Run(folder)


def _combined(plan: Plan) -> Combined:
    """The adapters' files read and combined; no model is needed for it."""
    methods = {run.name: check_combinable(run.recipe.method, run=run.name) for run in plan.runs}
    adapters = {
        run.name: updates_of(load_adapter(run.path / "model"), method=methods[run.name], run=run.name)
        for run in plan.runs
    }
    combined = combine_adapters(
        adapters,
        how=plan.how,
        weights=plan.weights,
        density=DENSITY if plan.density is None else plan.density,
        rank=plan.rank,
        seed=plan.seed or 0,
    )
    targets = {method.targets for method in methods.values()}
    if len(targets) > 1:
        return combined
    return Combined(combined.method.model_copy(update={"targets": targets.pop()}), combined.tensors, combined.lost)


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


def _write_run(
    plan: Plan, combined: Combined, several: Several, *, name: str, workspace: Workspace, started: float
) -> Path:
    """A finished run's folder; the combination stands among the `several` as it was read back from there."""
    first, model = plan.runs[0], several.model
    template = first.path / "model" / "chat_template.jinja"
    if template.is_file():
        model.tokenizer.chat_template = template.read_text("utf-8")
    folder = workspace.new_run(name)
    recipe = first.recipe.model_copy(update={"name": name, "method": combined.method})
    resolved = first.resolved | {
        "recipe": recipe.model_dump(mode="json"),
        "versions": versions(),
        "combined": plan.as_dict(),
    }
    write_text(folder / "recipe.yaml", text=recipe.as_yaml())
    write_json(folder / "resolved.json", value=resolved)
    index = index_of(workspace)
    record_combined(index, folder, model=model, parent=first.name)
    try:
        num_parameters = _write_model(folder / "model", combined, several)
    except BaseException:
        index.finish_run(folder.name, state="failed")
        raise
    write_bytes(folder / CONTRACT, data=(first.path / CONTRACT).read_bytes())
    summary = read_json(folder / "run.json") | {
        "path": str(folder),
        "state": "finished",
        "seconds": round(time.perf_counter() - started, 3),
        "trainable_parameters": sum(tensor.numel() for tensor in combined.tensors.values()),
        "parameters": num_parameters,
        "combined": plan.as_text(),
        "versions": versions(),
        "command": command_line(),
    }
    record_end(index, folder, summary=summary)
    return folder


def _write_model(folder: Path, combined: Combined, several: Several) -> int:
    """The adapter and the tokenizer, read back to stand among the `several`; returns the model's parameters with it."""
    with new_folder(folder) as new:
        save_tensors(combined.tensors, path=new / "adapter_model.safetensors")
        several.load(combined.method, name=COMBINATION, folder=new)
        with several.using(COMBINATION) as model:
            combined.method.save(model, folder=new)
            model.save_tokenizer(new)
            return model.num_parameters()


def _measured(
    task: Task, plan: Plan, several: Several, *, rows: int | None, on_progress: Callable[[str], None]
) -> dict[str, Any]:
    """All systems on one task's rows, and the combination against the task's own adapter."""
    recipe, own = task.run.recipe, task.run.name
    settings = recipe.evaluate if rows is None else recipe.evaluate.model_copy(update={"rows": rows})
    others: dict[str, str | None] = {"base": None, **{run.name: run.name for run in plan.runs}}
    systems = [
        System(system, several.model, partial(several.using, adapter))
        for system, adapter in {COMBINATION: COMBINATION, **others}.items()
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
    """How the combination stands against each task's own adapter, counted."""
    if not tasks:
        return "no run holds rows back, so nothing says what the combination costs"
    words = {"worse": "worse on", "better": "better on", "undecided": "not told apart from it on"}
    counts = {word: sum(task["verdict"] == word for task in tasks) for word in words}
    said = ", ".join(f"{words[word]} {count}" for word, count in counts.items() if count)
    return f"against each task's own adapter, the combination is {said} of {len(tasks)} task{'s'[: len(tasks) > 1]}"


def read_combination(run: Run) -> dict[str, Any]:
    """What `combine --json` prints. NotFoundError for a run that was not made by combining."""
    return read_json(run.path / FILE)
