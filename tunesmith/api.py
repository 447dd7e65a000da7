"""The verbs as Python functions; the command line, the service and the studio call these.

run = tunesmith.tune("recipe.yaml")
print(tunesmith.evaluate(run).sentence)
print(tunesmith.load(run).generate("Where is my parcel?"))
"""

import contextlib
import json
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunesmith.data.contract import FILE as CONTRACT
from tunesmith.data.formats import to_example
from tunesmith.data.ledger import Problem
from tunesmith.data.prepare import Prepared
from tunesmith.data.sources import read_rows
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example
from tunesmith.errors import DataError, Interrupted, NotFoundError, RecipeError, StorageError
from tunesmith.evaluate.report import write_report
from tunesmith.evaluate.result import Evaluation
from tunesmith.evaluate.run import System
from tunesmith.evaluate.settings import EvaluateSettings
from tunesmith.generate.sampling import Sampling
from tunesmith.methods.several import Several
from tunesmith.models.heads import save_head
from tunesmith.models.load import Model, load_model
from tunesmith.models.quantised import check_installed
from tunesmith.objectives.headed import Headed
from tunesmith.planning import Plan, check_before, make_plan
from tunesmith.proving import prove_head, prove_text
from tunesmith.recipe import Recipe, load_recipe
from tunesmith.registry.index import Index
from tunesmith.registry.workspace import Workspace, find_workspace
from tunesmith.runs import (
    Run,
    check_suits,
    check_unchanged,
    device_of,
    find_run,
    find_unfinished,
    index_of,
    make_trainable,
    own_rows,
    prepare_data,
    record_start,
    resolved_of,
    teacher_of,
    template_of,
    template_of_run,
    with_objective,
    write_start,
    write_summary,
)
from tunesmith.storage import new_folder
from tunesmith.train.loop import Fit, Observer
from tunesmith.train.observers import Silent
from tunesmith.train.readings import finish_head
from tunesmith.train.trackers import recording
from tunesmith.tuned import Tuned, load
from tunesmith.vocabulary import grow_tokenizer, record_tokenizer


def tune(
    recipe: Recipe | Path | str,
    *,
    workspace: Workspace | None = None,
    overrides: list[str] | None = None,
    resume: bool = False,
    observer: Observer | None = None,
) -> Run:
    """Train a run. `recipe` is a Recipe or the path of one.

    With `resume`, the newest unfinished run of the same recipe goes on where it was. Raises any TunesmithError;
    `Interrupted` after a signal, when everything up to the last step is saved.
    A run that will take long is measured first, and refused where memory does not suffice for it (planning.py).
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(Path(recipe), overrides=overrides)
    workspace = workspace or find_workspace()
    observer = observer or Silent()
    with _Signals() as signals:
        check_installed(recipe.method.stored_in)
        check_suits(recipe)
        if not resume:
            check_before(recipe, workspace=workspace, say=observer.message)
        model = load_model(recipe.base, device=device_of(recipe.train))
        teacher = teacher_of(recipe, model=model)
        before = find_unfinished(workspace, recipe) if resume else None
        template = template_of(model, recipe, run=before)
        growth = grow_tokenizer(
            recipe, model=model, workspace=workspace, template=template, on_message=observer.message
        )
        if growth is not None:
            template = template_of(model, recipe, run=before)
        prepared = prepare_data(recipe, model=model, workspace=workspace, template=template)
        recipe = with_objective(recipe, prepared.objective)
        resolved = resolved_of(recipe, model=model, prepared=prepared, template=template)
        if before is not None:
            check_unchanged(before, resolved)
        parameters = model.num_parameters()
        if growth is not None:
            growth.extend(model, whole=recipe.method.saves_model)
        make_trainable(model, recipe)  # what does not suit the base is refused here, before there is a folder
        folder = before or workspace.new_run(recipe.name)
        write_start(folder, recipe, resolved, prepared=prepared, template=template)
        if growth is not None:
            growth.write(folder)
        index = index_of(workspace)
        record_start(index, folder, recipe, model=model, parameters=parameters, prepared=prepared)
        with recording(
            folder, trackers=recipe.train.trackers, recipe=resolved["recipe"], observer=observer
        ) as recorder:
            fit = Fit(
                model,
                method=recipe.method,
                objective=recipe.objective,
                train=prepared.train,
                validation=prepared.validation,
                settings=recipe.train,
                folder=folder,
                observer=recorder,
                teacher=teacher,
            )
            signals.fit = fit
            stopped = _run(fit, folder=folder, index=index, resume=resume)
        fit.restore_best()
        _save_model(model, recipe, prepared=prepared, folder=folder / "model")
        record_tokenizer(folder)
        write_summary(folder, fit, stopped=stopped, state="finished")
        index.finish_run(folder.name, state="finished")
    return Run(folder)


def plan(
    recipe: Recipe | Path | str,
    *,
    workspace: Workspace | None = None,
    overrides: list[str] | None = None,
    measure: bool = False,
    price_per_hour: float | None = None,
    on_message: Callable[[str], None] = lambda text: None,
) -> Plan:
    """What a run will need, before anything runs; raises what `tune` raises for a recipe that cannot run.

    With `measure`, the steps with the largest packs are computed in a process of their own, and correct it.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(Path(recipe), overrides=overrides)
    if price_per_hour is not None:
        recipe = recipe.model_copy(update={"plan": recipe.plan.model_copy(update={"price_per_hour": price_per_hour})})
    return make_plan(recipe, workspace=workspace or find_workspace(), measure=measure, on_message=on_message)


def _save_model(model: Model, recipe: Recipe, *, prepared: Prepared, folder: Path) -> None:
    """What was tuned, with its tokenizer, and its head where it has one."""
    with new_folder(folder) as new:
        recipe.method.save(model, folder=new)
        if not recipe.method.saves_model:
            model.save_tokenizer(new)
        if isinstance(recipe.objective, Headed):
            calibration = finish_head(
                model,
                recipe.objective,
                train=prepared.train,
                validation=prepared.validation_rows,
                settings=recipe.train,
            )
            conversations = any(example.messages for example in islice(prepared.examples("train"), 1))
            document = {"objective": prepared.objective, "calibration": calibration, "conversations": conversations}
            save_head(model, folder=new, document=document)


def _run(fit: Fit, *, folder: Path, index: Index, resume: bool) -> str:
    """Train, and write down how it ended: `finished` or `early`, or whatever was raised."""
    try:
        if resume:
            fit.resume()
        return fit.run().stopped
    except Interrupted:
        write_summary(folder, fit, stopped="signal", state="stopped")
        index.finish_run(folder.name, state="stopped")
        raise
    except BaseException:
        index.finish_run(folder.name, state="failed")
        raise


class _Signals:
    """SIGINT and SIGTERM ask the loop to save and stop; before the loop runs they stop at once. A second one kills."""

    def __init__(self) -> None:
        self.fit: Fit | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        with contextlib.suppress(ValueError):  # only the main thread may handle signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *details: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.fit is None:
            raise Interrupted("stopped before anything was trained", hint="run it again", signal_number=number)
        if self.fit.signal_number is not None:
            hint = "the same command with --resume goes on from the last checkpoint"
            raise Interrupted("stopped at once, without saving", hint=hint, signal_number=number)
        self.fit.signal_number = number


def evaluate(
    run: Run | Path | str,
    *,
    data: Path | str | None = None,
    settings: EvaluateSettings | None = None,
    workspace: Workspace | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Run tuned and base (and base with examples in the prompt) on the same held-out rows; write the result and report.

    `data` is a file of other rows, read as the recipe says; by default the run's own test rows, else its validation
    rows. Raises DataError where there are none.
    """
    workspace = workspace or find_workspace()
    run = find_run(run, workspace=workspace)
    settings = settings or run.recipe.evaluate
    tuned = load(run, workspace=workspace)
    recipe = run.recipe
    in_place = recipe.method.keeps_base and recipe.method.stored_in is None  # what counts is the base as it came
    in_place = in_place and not recipe.objective.num_new_tokens  # and as it reads
    base = tuned.model if in_place else load_model(recipe.base, device=str(tuned.model.device))
    switched = (lambda: tuned.method.disabled(tuned.model)) if base is tuned.model else contextlib.nullcontext
    prepared = None
    if data is None or settings.against is None or set(settings.against) - {"base"}:
        prepared = prepare_data(recipe, model=tuned.model, workspace=workspace, template=tuned.template)
    if data is None:
        assert prepared is not None
        name, examples = own_rows(run, prepared)
    else:
        name, examples = str(data), _other_rows(recipe, data)
    own = template_of(base, recipe, run=run.path) if recipe.objective.num_new_tokens else None
    prove = prove_head if isinstance(recipe.objective, Headed) else prove_text
    evaluation = prove(
        tuned,
        System("base", base, switched, template=own),
        settings=settings,
        train=(lambda: iter(())) if prepared is None else partial(prepared.examples, "train"),
        examples=examples,
        data=name,
        on_progress=on_progress,
    )
    evaluation.write(run.path)
    with contextlib.suppress(NotFoundError):
        index_of(workspace).record_evaluation(run.name)
    write_report(run.path)
    return evaluation


def evaluation_settings(run: Run, *, against: list[str] | None = None, rows: int | None = None) -> EvaluateSettings:
    """The run's own evaluation settings with some replaced; RecipeError for an unknown system."""
    update: dict[str, Any] = {} if rows is None else {"rows": rows}
    if against is not None:
        update["against"] = tuple(against)
    values = run.recipe.evaluate.model_dump(exclude_unset=True) | update
    if "few_shot" not in (values.get("against") or ("few_shot",)):
        values.pop("few_shot", None)
    try:
        return EvaluateSettings.model_validate(values)
    except ValidationError as error:
        raise RecipeError(
            f"--against or --rows: {error.errors()[0]['msg']}",
            hint="--against takes base, few_shot, majority, mean and median",
        ) from None


def _other_rows(recipe: Recipe, data: Path | str) -> list[Example]:
    """The rows of another file, read as the recipe says."""
    problems: list[Problem] = []
    examples = [to_example(row, settings=recipe.data) for row in read_rows(str(data), on_bad=problems.append)]
    errors = [p for p in problems if p.severity == "error"]
    if errors:
        raise errors[0].as_error()
    if not examples:
        raise DataError("there are no rows in it", file=data, hint="give a file with rows")
    return examples


def export(
    run: Run | Path | str,
    *,
    form: str,
    out: Path,
    workspace: Workspace | None = None,
    on_message: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write a run's model for use elsewhere: `peft` (the adapter) or `merged` (a plain transformers model).

    Before it is done the written model is loaded again and its logits are compared with the run's. `on_message` hears
    what storing a merged model in few bits again would cost.
    """
    from tunesmith.export import export_merged, export_peft, requantised_cost
    from tunesmith.export_head import check_exportable, export_head

    writers = {"peft": export_peft, "merged": export_merged}
    if form not in writers:
        raise RecipeError(f"there is no format '{form}'; there are {', '.join(writers)}", hint="use --format merged")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        what = "the folder is not empty" if out.is_dir() else "this is a file"
        raise StorageError(what, file=out, hint="give a new folder with --out")
    run = find_run(run, workspace=workspace)
    method, objective = run.recipe.method, run.recipe.objective
    if form == "peft" and objective.num_outputs:
        raise RecipeError(
            f"the run has a head for {objective.kind_name}, which goes with merged weights", hint="use --format merged"
        )
    if form == "peft" and method.peft_type is None:
        raise RecipeError(f"PEFT has no adapters of the kind '{method.kind}'", hint="use --format merged")
    if form == "peft" and run.recipe.objective.num_new_tokens and not method.peft_new_rows:
        raise RecipeError(
            f"PEFT has no rows of new tokens beside an adapter of the kind '{method.kind}'",
            hint="use --format merged" if method.merges else "train with method: lora to export new tokens",
        )
    if form == "merged" and not method.merges:
        raise RecipeError(
            f"method '{method.kind}' cannot be merged into the weights",
            hint="use --format peft, and serve it with PEFT",
        )
    tuned = load(run, workspace=workspace, device="cpu")
    contract = json.loads((tuned.run.path / CONTRACT).read_text("utf-8"))
    if isinstance(objective, Headed):
        check_exportable(objective, encoder=tuned.model.is_encoder)
        export_head(
            tuned.model,
            objective=objective,
            method=tuned.method,
            template=tuned.template,
            contract=contract,
            source=run.path / "model",
            out=out,
        )
        return out
    writers[form](tuned.model, method=tuned.method, template=tuned.template, contract=contract, out=out)
    if form == "merged" and (bits := method.stored_in) is not None:
        nats = requantised_cost(tuned.model, kind=bits, contract=contract)
        on_message(
            f"stored in {bits} again, the merged model's next token would differ by {nats:.3f} nats (KL divergence)"
        )
    return out


@dataclass(frozen=True)
class TunedSeveral:
    """Several runs' adapters on one base, ready for use; `runs` and `templates` by the adapters' names."""

    several: Several
    runs: dict[str, Run]
    templates: dict[str, ChatTemplate]

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[Tuned]:
        """Inside the block, the adapter `name` as `load` gives it. NotFoundError for an unknown name."""
        with self.several.using(name) as model:
            yield Tuned(self.runs[name], model, self.templates[name], self.several.adapters[name].method)

    def generate(self, prompt: Any, *, adapter: str, sampling: Sampling | None = None) -> str:
        """The answer of one adapter to a prompt or to a conversation that ends with a user turn."""
        return self.generate_many([prompt], adapter=adapter, sampling=sampling)[0]

    def generate_many(self, prompts: list[Any], *, adapter: str, sampling: Sampling | None = None) -> list[str]:
        """The answers of one adapter to several prompts, together."""
        with self.using(adapter) as tuned:
            return tuned.generate_many(prompts, sampling=sampling)


def load_several(
    runs: "Mapping[str, Run | Path | str] | Sequence[Run | Path | str]",
    *,
    workspace: Workspace | None = None,
    device: str = "auto",
) -> TunedSeveral:
    """Load the adapters of several runs onto one base, which is in memory once.

    Their names are the mapping's keys, or the runs' full names. Raises RecipeError where a run is of another base, keeps
    none or stores it in few bits, and what `load` raises.
    """
    from tunesmith.combining import load_adapters

    if not runs:
        raise RecipeError("no run is given", hint="name the runs to load")
    given = list(runs.values()) if isinstance(runs, Mapping) else list(runs)
    found = [find_run(run, workspace=workspace) for run in given]
    named = dict(zip(runs if isinstance(runs, Mapping) else [run.name for run in found], found, strict=True))
    several = load_adapters(found, names=list(named), device=device)
    return TunedSeveral(several, named, {n: template_of_run(r, model=several.model) for n, r in named.items()})


def combine(
    runs: "Sequence[Run | Path | str]",
    *,
    how: str,
    weights: Sequence[float] | None = None,
    density: float | None = None,
    rank: int | None = None,
    seed: int | None = None,
    name: str = "combined",
    rows: int | None = None,
    workspace: Workspace | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Run:
    """Make one run of several LoRA runs of one base, and measure what that costs on each run's own held-out rows.

    `how` is linear, ties, dare_linear or dare_ties (methods/combine.py). `weights` are an average by default, `density` (the
    share kept by ties and dare) 0.5, `seed` (of dare) 0, `rank` the sum of the ranks for linear and the largest of them
    otherwise. The table is in `combination.json` of the run; `rows` bounds the rows of each task. Raises RecipeError before
    any model is loaded where runs or settings do not fit together.
    """
    from tunesmith.combining import combine_runs, plan_combination

    workspace = workspace or find_workspace()
    found = [find_run(run, workspace=workspace) for run in runs]
    plan = plan_combination(found, how=how, weights=weights, density=density, rank=rank, seed=seed)
    return combine_runs(plan, name=name, rows=rows, workspace=workspace, on_progress=on_progress)
