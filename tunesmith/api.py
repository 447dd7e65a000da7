"""The verbs as Python functions; the command line, the service and the studio call these.

run = tunesmith.tune("recipe.yaml")
print(tunesmith.evaluate(run).sentence)
print(tunesmith.load(run).generate("Where is my parcel?"))
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunesmith.data.contract import FILE as CONTRACT
from tunesmith.data.formats import read_examples
from tunesmith.data.general import read_general
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example
from tunesmith.errors import DataError, NotFoundError, RecipeError, StorageError
from tunesmith.evaluate.answered import Answered
from tunesmith.evaluate.gate import judged
from tunesmith.evaluate.general import prove_general
from tunesmith.evaluate.report import write_report
from tunesmith.evaluate.result import Evaluation
from tunesmith.evaluate.run import System
from tunesmith.evaluate.seeds import seeds_of
from tunesmith.evaluate.settings import RESOLVED, EvaluateSettings
from tunesmith.generate.sampling import Sampling
from tunesmith.methods.several import Several
from tunesmith.models.load import Model, load_model
from tunesmith.objectives.headed import Headed
from tunesmith.planning import Plan, make_plan
from tunesmith.proving import prove_head, prove_text
from tunesmith.recipe import Recipe, load_recipe
from tunesmith.registry.workspace import Workspace, find_workspace
from tunesmith.runs import (
    Run,
    data_settings,
    find_run,
    index_of,
    own_rows,
    prepare_data,
    template_of,
    template_of_run,
)
from tunesmith.tuned import Tuned, calibration_of, load
from tunesmith.tuning import tune as tune


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
    run = find_run(run, workspace=workspace, finished=True)
    settings = settings or run.recipe.evaluate
    tuned, before = tuned_and_base(run, workspace=workspace)
    recipe = run.recipe.model_copy(update={"evaluate": settings})
    prepared = None
    others = settings.against is None or set(settings.against) - {"base"} or settings.memorised is not None
    if data is None or others:
        prepared = prepare_data(recipe, model=tuned.model, workspace=workspace, template=tuned.template)
    if data is None:
        assert prepared is not None
        name, examples = own_rows(run, prepared)
    else:
        name, examples = str(data), _other_rows(recipe, data)
    general = None if settings.general is None else _general_rows(settings.general, model=tuned.model)
    prove = prove_head if isinstance(recipe.objective, Headed) else prove_text
    evaluation = prove(
        tuned,
        before,
        settings=settings,
        train=(lambda: iter(())) if prepared is None else partial(prepared.examples, "train"),
        validation=(lambda: iter(())) if prepared is None else partial(prepared.examples, "validation"),
        examples=examples,
        data=name,
        on_progress=on_progress,
    )
    if general is not None:
        evaluation.document["general"] = prove_general(
            System("tuned", tuned.model),
            before,
            general,
            settings=settings,
            template=tuned.template,
            run=run.name,
            on_progress=on_progress,
        )
    if settings.gate is not None:
        evaluation.document["gate"] = judged(evaluation.document, settings.gate)
    if (seeds := seeds_of(run.path, evaluation=evaluation.document)) is not None:
        evaluation.document["seeds"] = seeds
    evaluation.write(run.path)
    with contextlib.suppress(NotFoundError):
        index_of(workspace).record_evaluation(run.name)
    write_report(run.path)
    return evaluation


def tuned_and_base(run: Run, *, workspace: Workspace) -> tuple[Tuned, System]:
    """A run's model, and the base to compare it with: the same model without what was tuned, where that can be had."""
    tuned, recipe = load(run, workspace=workspace), run.recipe
    in_place = recipe.method.keeps_base and recipe.method.stored_in is None  # what counts is the base as it came
    in_place = in_place and not recipe.objective.num_new_tokens  # and as it reads
    base = tuned.model if in_place else load_model(recipe.base, device=str(tuned.model.device))
    switched = (lambda: tuned.method.disabled(tuned.model)) if base is tuned.model else contextlib.nullcontext
    own = template_of(base, recipe, run=run.path) if recipe.objective.num_new_tokens else None
    return tuned, System("base", base, switched, template=own, answered=Answered(workspace.cache / "answers", base))


def _general_rows(path: str, *, model: Model) -> list[Example]:
    if model.is_encoder or model.is_encoder_decoder:
        raise RecipeError("evaluate.general: this base does not go on with a text", hint="leave it out")
    return read_general(path)


def evaluation_settings(run: Run, *, against: list[str] | None = None, rows: int | None = None) -> EvaluateSettings:
    """The run's own evaluation settings with some replaced; RecipeError for an unknown system."""
    update: dict[str, Any] = {} if rows is None else {"rows": rows}
    if against is not None:
        update["against"] = tuple(against)
    values = run.recipe.evaluate.model_dump() | update
    try:
        return EvaluateSettings.model_validate(values, context=RESOLVED)
    except ValidationError as error:
        raise RecipeError(
            f"--against or --rows: {error.errors()[0]['msg']}",
            hint="--against takes base, few_shot, retrieval, tuned_retrieval, majority, mean and median",
        ) from None


def _other_rows(recipe: Recipe, data: Path | str) -> list[Example]:
    """The rows of another file, read as the recipe says."""
    examples = read_examples(str(data), settings=data_settings(recipe))
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
    from tunesmith.export_head import export_head, export_peft_head

    writers = {"peft": export_peft, "merged": export_merged}
    if form not in writers:
        raise RecipeError(f"there is no format '{form}'; there are {', '.join(writers)}", hint="use --format merged")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        what = "the folder is not empty" if out.is_dir() else "this is a file"
        raise StorageError(what, file=out, hint="give a new folder with --out")
    run = find_run(run, workspace=workspace, finished=True)
    method, objective = run.recipe.method, run.recipe.objective
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
    if isinstance(objective, Headed) and objective.num_outputs:
        write_head = export_peft_head if form == "peft" else export_head
        write_head(
            tuned.model,
            objective=objective,
            method=tuned.method,
            template=tuned.template,
            contract=contract,
            source=run.path / "model",
            out=out,
        )
        return out
    writers[form](
        tuned.model,
        method=tuned.method,
        objective=objective,
        template=tuned.template,
        contract=contract,
        head=tuned.head,
        out=out,
    )
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
            run = self.runs[name]
            yield Tuned(run, model, self.templates[name], self.several.adapters[name].method, head=calibration_of(run))

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
    found = [find_run(run, workspace=workspace, finished=True) for run in given]
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
    """Make one run of several of one base, and measure what that costs on each run's own held-out rows.

    LoRA runs give a LoRA run; with a run of `full`, `layers` or `bitfit` among them it is one of `full`. `how` is linear,
    ties, dare_linear or dare_ties (methods/combine.py). `weights` are an average by default, `density` (the share kept by
    ties and dare) 0.5, `seed` (of dare) 0, `rank` (of LoRA) the sum of the ranks for linear and the largest of them
    otherwise. The table is in `combination.json` of the run; `rows` bounds the rows of each task. Raises RecipeError before
    any model is loaded where runs or settings do not fit together.
    """
    from tunesmith.combination import plan_combination
    from tunesmith.combining import combine_runs

    workspace = workspace or find_workspace()
    found = [find_run(run, workspace=workspace, finished=True) for run in runs]
    plan = plan_combination(found, how=how, weights=weights, density=density, rank=rank, seed=seed)
    return combine_runs(plan, name=name, rows=rows, workspace=workspace, on_progress=on_progress)
