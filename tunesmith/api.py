"""The verbs as Python functions; the command line, the service and the studio call these.

run = tunesmith.tune("recipe.yaml")
print(tunesmith.evaluate(run).sentence)
print(tunesmith.load(run).generate("Where is my parcel?"))
"""

import contextlib
import datetime
import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from tunesmith.data.contract import FILE as CONTRACT
from tunesmith.data.contract import check_contract
from tunesmith.data.formats import to_example
from tunesmith.data.ledger import Problem
from tunesmith.data.prepare import Prepared
from tunesmith.data.sources import read_rows
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example, Message
from tunesmith.errors import DataError, Interrupted, NotFoundError, RecipeError, StorageError
from tunesmith.evaluate.report import write_report
from tunesmith.evaluate.run import Evaluation, System, choose_shots, evaluate_systems
from tunesmith.evaluate.settings import EvaluateSettings
from tunesmith.generate.runner import Generator
from tunesmith.generate.sampling import Sampling
from tunesmith.methods import Method
from tunesmith.methods.base import set_trainable_dtype
from tunesmith.models.load import Model, load_model
from tunesmith.models.quantised import check_installed
from tunesmith.recipe import Recipe, load_recipe
from tunesmith.registry.index import Index
from tunesmith.registry.workspace import Workspace, find_workspace
from tunesmith.runs import (
    Run,
    check_unchanged,
    device_of,
    find_run,
    find_unfinished,
    index_of,
    prepare_data,
    record_start,
    resolved_of,
    template_of,
    write_start,
    write_summary,
)
from tunesmith.storage import new_folder, read_json
from tunesmith.train.loop import Fit, Observer
from tunesmith.train.observers import Silent
from tunesmith.train.settings import TrainSettings
from tunesmith.train.trackers import recording


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
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(Path(recipe), overrides=overrides)
    workspace = workspace or find_workspace()
    observer = observer or Silent()
    with _Signals() as signals:
        check_installed(recipe.method.stored_in)
        model = load_model(recipe.base, device=device_of(recipe.train))
        before = find_unfinished(workspace, recipe) if resume else None
        template = template_of(model, recipe, run=before)
        prepared = prepare_data(recipe, model=model, workspace=workspace, template=template)
        resolved = resolved_of(recipe, model=model, prepared=prepared, template=template)
        if before is not None:
            check_unchanged(before, resolved)
        folder = before or workspace.new_run(recipe.name)
        write_start(folder, recipe, resolved, prepared=prepared, template=template)
        index = index_of(workspace)
        record_start(index, folder, recipe, model=model, prepared=prepared)
        recipe.method.apply(model, seed=recipe.train.seed)
        if recipe.train.precision == "bf16":
            set_trainable_dtype(model, frozen=torch.bfloat16)
        _speed_options(model, recipe.train)
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
            )
            signals.fit = fit
            stopped = _run(fit, folder=folder, index=index, resume=resume)
        fit.restore_best()
        with new_folder(folder / "model") as new:
            recipe.method.save(model, folder=new)
            if not recipe.method.saves_model:
                model.save_tokenizer(new)
        write_summary(folder, fit, stopped=stopped, state="finished")
        index.finish_run(folder.name, state="finished")
    return Run(folder)


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


def _speed_options(model: Model, settings: TrainSettings) -> None:
    if settings.gradient_checkpointing:
        model.checkpoint_activations()
    if settings.compile:
        for layer in model.layers:
            layer.compile(dynamic=True)


@dataclass(frozen=True)
class Tuned:
    """A tuned model ready for use."""

    run: Run
    model: Model
    template: ChatTemplate
    method: Method

    def generate(
        self, prompt: "str | list[Message] | list[dict[str, Any]]", *, sampling: Sampling | None = None
    ) -> str:
        """The answer to a prompt or to a conversation that ends with a user turn."""
        return self.generate_many([prompt], sampling=sampling)[0]

    def generate_many(self, prompts: "list[Any]", *, sampling: Sampling | None = None) -> list[str]:
        """The answers to several prompts, together."""
        ids = [self.template.prompt(self._messages(p)).ids for p in prompts]
        return [c.text for c in self._generator().generate(ids, sampling=sampling or Sampling())]

    def stream(
        self, prompt: "str | list[Message] | list[dict[str, Any]]", *, sampling: Sampling | None = None
    ) -> Iterator[str]:
        """The answer, piece by piece."""
        ids = self.template.prompt(self._messages(prompt)).ids
        return self._generator().stream(ids, sampling=sampling or Sampling())

    def _generator(self) -> Generator:
        return Generator(self.model, stop_ids=self.template.stop_ids())

    def _messages(self, prompt: Any) -> list[Message]:
        if isinstance(prompt, str):
            system = self.run.recipe.data.system
            return [*([Message("system", system)] if system else []), Message("user", prompt)]
        return [m if isinstance(m, Message) else Message(m["role"], m["content"]) for m in prompt]


def load(run: Run | Path | str, *, workspace: Workspace | None = None, device: str = "auto") -> Tuned:
    """Load a run's tuned model and check its token contract.

    Raises NotFoundError where the run has no model yet, TemplateError where the contract is broken.
    """
    run = find_run(run, workspace=workspace)
    folder = run.path / "model"
    if not run.finished:
        state = run.summary.get("state")
        raise NotFoundError(
            f"the run {run.name} is {state} and has no model yet", hint="finish it: tunesmith train RECIPE --resume"
        )
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    method = run.recipe.method
    if method.saves_model:
        model = load_model(str(folder), device=where)
    else:
        model = load_model(run.recipe.base, device=where)
        _check_base(run, model)
        method.load(model, folder=folder)
        model.causal.to(where)
        template_path = folder / "chat_template.jinja"
        if template_path.is_file():
            model.tokenizer.chat_template = template_path.read_text("utf-8")
    model.causal.eval()
    contract = run.path / CONTRACT
    document = read_json(contract)
    template = ChatTemplate(model.tokenizer, today=datetime.date.fromisoformat(document["today"]))
    check_contract(document, template=template, file=contract)
    return Tuned(run, model, template, method)


def _check_base(run: Run, model: Model) -> None:
    if model.digest != run.resolved["hashes"]["base"]:
        raise StorageError(
            f"the base '{model.name}' is no longer the one that {run.name} was tuned from",
            file=model.folder,
            hint="restore the base's files: the adapter fits no other",
        )


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
    base = tuned.model if in_place else load_model(recipe.base, device=str(tuned.model.device))
    prepared = None
    if data is None or "few_shot" in settings.against:
        prepared = prepare_data(recipe, model=tuned.model, workspace=workspace, template=tuned.template)
    name, examples = _own_rows(run, prepared) if data is None else (str(data), _other_rows(recipe, data))
    shots: tuple[Example, ...] = ()
    if prepared is not None and "few_shot" in settings.against:
        shots = choose_shots(
            prepared.examples("train"),
            count=settings.few_shot,
            seed=settings.seed,
            template=tuned.template,
            examples=examples,
            room=tuned.model.room_tokens - settings.max_tokens,
        )
    switched = (lambda: tuned.method.disabled(tuned.model)) if base is tuned.model else contextlib.nullcontext
    systems = [System("tuned", tuned.model)]
    if "base" in settings.against:
        systems.append(System("base", base, switched))
    if shots:
        systems.append(System("few_shot", base, switched, shots))
    evaluation = evaluate_systems(
        systems,
        examples=examples,
        template=tuned.template,
        objective=recipe.objective,
        settings=settings,
        run=run.name,
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
    if "few_shot" not in values.get("against", ("few_shot",)):
        values.pop("few_shot", None)
    try:
        return EvaluateSettings.model_validate(values)
    except ValidationError as error:
        raise RecipeError(
            f"--against or --rows: {error.errors()[0]['msg']}", hint="--against takes base and few_shot"
        ) from None


def _own_rows(run: Run, prepared: Prepared | None) -> tuple[str, list[Example]]:
    """The rows that the run itself held out, and which they are."""
    assert prepared is not None
    if prepared.files != run.resolved["hashes"]["files"]:
        raise DataError(
            f"the data files changed since {run.name} was trained, so its held-out rows may no longer be held out",
            hint="put the files back, or give rows to evaluate on: --data FILE",
        )
    name, examples = prepared.held_out()
    if not examples:
        raise DataError("the run holds no rows back", hint="give rows to evaluate on: --data FILE")
    return name, examples


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

    writers = {"peft": export_peft, "merged": export_merged}
    if form not in writers:
        raise RecipeError(f"there is no format '{form}'; there are {', '.join(writers)}", hint="use --format merged")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        what = "the folder is not empty" if out.is_dir() else "this is a file"
        raise StorageError(what, file=out, hint="give a new folder with --out")
    run = find_run(run, workspace=workspace)
    method = run.recipe.method
    if form == "peft" and method.peft_type is None:
        raise RecipeError(f"PEFT has no adapters of the kind '{method.kind}'", hint="use --format merged")
    if form == "merged" and not method.merges:
        raise RecipeError(
            f"method '{method.kind}' cannot be merged into the weights",
            hint="use --format peft, and serve it with PEFT",
        )
    tuned = load(run, workspace=workspace, device="cpu")
    contract = json.loads((tuned.run.path / CONTRACT).read_text("utf-8"))
    writers[form](tuned.model, method=tuned.method, template=tuned.template, contract=contract, out=out)
    if form == "merged" and (bits := method.stored_in) is not None:
        nats = requantised_cost(tuned.model, kind=bits, contract=contract)
        on_message(
            f"stored in {bits} again, the merged model's next token would differ by {nats:.3f} nats (KL divergence)"
        )
    return out
