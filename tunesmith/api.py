"""The verbs as Python functions; the command line, the service and the studio call these.

run = tunesmith.tune("recipe.yaml")
print(tunesmith.evaluate(run).sentence)
print(tunesmith.load(run).generate("Where is my parcel?"))
"""

import contextlib
import datetime
import json
import platform
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from tunesmith.data.contract import FILE as CONTRACT
from tunesmith.data.contract import check_contract, write_contract
from tunesmith.data.formats import to_example
from tunesmith.data.prepare import Prepared, code_digest, prepare
from tunesmith.data.sources import read_rows, resolve
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example, Message
from tunesmith.errors import DataError, Interrupted, NotFoundError, RecipeError, StorageError
from tunesmith.evaluate.report import write_report
from tunesmith.evaluate.run import Evaluation, System, choose_shots, evaluate_systems
from tunesmith.evaluate.settings import RESOLVED, EvaluateSettings
from tunesmith.generate.runner import Generator
from tunesmith.generate.sampling import Sampling
from tunesmith.methods import Method
from tunesmith.methods.base import num_trainable, set_trainable_dtype
from tunesmith.models.base import NewBase, resolve_base
from tunesmith.models.load import Model, load_model
from tunesmith.recipe import Recipe, load_recipe
from tunesmith.registry.index import Index
from tunesmith.registry.store import Store
from tunesmith.registry.workspace import Workspace, find_workspace, read_json
from tunesmith.storage import new_folder, write_json, write_text
from tunesmith.train.loop import Fit, Observer
from tunesmith.train.observers import Silent, recording
from tunesmith.train.settings import TrainSettings

STORED_BYTES = 1 << 30  # a data file up to this size is kept in the store, so its exact bytes stay at hand
PACKAGES = ("tunesmith", "torch", "transformers", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True)
class Run:
    """One execution of a recipe: a folder, and what it says."""

    path: Path

    @property
    def name(self) -> str:
        """The run's full name."""
        return self.path.name

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What `train --json` prints."""
        return read_json(self.path / "run.json")

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """The recipe with every default, the hashes and the versions."""
        return read_json(self.path / "resolved.json")

    @cached_property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return Recipe.model_validate(self.resolved["recipe"], context=RESOLVED)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end and its model can be used."""
        return self.summary.get("state") == "finished" and (self.path / "model").is_dir()

    def as_dict(self) -> dict[str, Any]:
        """The summary."""
        return self.summary


def index_of(workspace: Workspace) -> Index:
    """The workspace's index, with its store behind it."""
    return Index(workspace.index, store=Store(workspace.store))


def device_of(settings: TrainSettings) -> str:
    """The device that the settings mean here; RecipeError where it is not there."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("train.device is cuda and there is no GPU that torch can use", hint="use train.device: auto")
    return "cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu"


def template_of(model: Model, recipe: Recipe, *, run: Path | None = None) -> ChatTemplate:
    """The recipe's chat template, or the model's own; with the date of `run`, where a run goes on or is used."""
    today = None
    if run is not None and (run / CONTRACT).is_file():
        today = datetime.date.fromisoformat(read_json(run / CONTRACT)["today"])
    if recipe.data.template is None:
        return ChatTemplate(model.tokenizer, today=today)
    path = Path(recipe.data.template)
    try:
        source = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NotFoundError(
            f"the chat template cannot be read: {error}", file=path, hint="check data.template"
        ) from None
    model.tokenizer.chat_template = source
    return ChatTemplate(model.tokenizer, today=today)


def prepare_data(
    recipe: Recipe,
    *,
    model: Model,
    workspace: Workspace,
    template: ChatTemplate | None = None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Prepared:
    """Read, split, render and count the recipe's rows (from the cache where nothing changed)."""
    limit = model.context_tokens
    if recipe.data.max_tokens is not None and recipe.data.max_tokens > limit:
        raise RecipeError(
            f"data.max_tokens is {recipe.data.max_tokens:,} and the base was made for {limit:,}",
            hint=f"set it to {limit:,} or less",
        )
    workspace.create()
    return prepare(
        recipe.data,
        objective=recipe.objective,
        template=template or template_of(model, recipe),
        max_tokens=recipe.data.max_tokens or limit,
        cache=workspace.cache,
        on_rows=on_rows,
    )


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


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
        model = load_model(recipe.base, device=device_of(recipe.train))
        before = _find_unfinished(workspace, recipe) if resume else None
        template = template_of(model, recipe, run=before)
        prepared = prepare_data(recipe, model=model, workspace=workspace, template=template)
        resolved = _resolved(recipe, model=model, prepared=prepared, template=template)
        if before is not None:
            _check_unchanged(before, resolved)
        folder = before or workspace.new_run(recipe.name)
        _write_start(folder, recipe, resolved, prepared=prepared, template=template)
        index = index_of(workspace)
        _record_start(index, folder, recipe, model=model, prepared=prepared)
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
            if recipe.method.kind != "full":
                model.save_tokenizer(new)
        _write_summary(folder, fit, stopped=stopped, state="finished")
        index.finish_run(folder.name, state="finished")
    return Run(folder)


def _run(fit: Fit, *, folder: Path, index: Index, resume: bool) -> str:
    """Train, and write down how it ended: `finished` or `early`, or whatever was raised."""
    try:
        if resume:
            fit.resume()
        return fit.run().stopped
    except Interrupted:
        _write_summary(folder, fit, stopped="signal", state="stopped")
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


def _resolved(recipe: Recipe, *, model: Model, prepared: Prepared, template: ChatTemplate) -> dict[str, Any]:
    return {
        "recipe": recipe.model_dump(mode="json"),
        "hashes": {
            "data": prepared.digest,
            "files": prepared.files,
            "base": model.digest,
            "tokenizer": template.tokenizer.digest,
            "code": code_digest(),
        },
        "versions": versions(),
    }


def _find_unfinished(workspace: Workspace, recipe: Recipe) -> Path:
    """The newest unfinished run of this recipe."""
    for folder in workspace.run_folders():
        summary = read_json(folder / "run.json")
        started = (folder / "resolved.json").is_file() and (folder / CONTRACT).is_file()
        if summary.get("name") == recipe.name and summary.get("state") != "finished" and started:
            return folder
    raise NotFoundError(f"there is no unfinished run of '{recipe.name}' to resume", hint="leave --resume out")


def _check_unchanged(folder: Path, resolved: dict[str, Any]) -> None:
    """RecipeError where the unfinished run was made from another recipe, other data or another base."""
    before = read_json(folder / "resolved.json")
    parts = [part for part in ("recipe", "hashes") if before[part] != resolved[part]]
    names = [f"{part}.{k}" for part in parts for k in resolved[part] if before[part].get(k) != resolved[part][k]]
    if names:
        raise RecipeError(
            f"the unfinished run {folder.name} was made from something else: {', '.join(names)} changed",
            hint="put it back as it was, or train a new run without --resume",
        )


def _write_start(
    folder: Path, recipe: Recipe, resolved: dict[str, Any], *, prepared: Prepared, template: ChatTemplate
) -> None:
    write_text(folder / "recipe.yaml", text=recipe.as_yaml())
    write_json(folder / "resolved.json", value=resolved)
    write_json(folder / "ledger.json", value=prepared.ledger)
    examples = [e for _, e in zip(range(4), prepared.examples("train"), strict=False)]
    write_contract(folder, template=template, examples=examples)


def _record_start(index: Index, folder: Path, recipe: Recipe, *, model: Model, prepared: Prepared) -> None:
    states = prepared.ledger["states"]
    counts = {
        "train": states["trained"] + states["truncated"],
        "validation": states["held_out_validation"],
        "test": states["held_out_test"],
    }
    datasets = {}
    given = {"train": recipe.data.train_paths, "validation": recipe.data.validation, "test": recipe.data.test}
    for role, value in given.items():
        names = value if isinstance(value, list) else [value] if isinstance(value, str) else []
        paths = [path for name in names for _, path in resolve(name)]
        if paths:
            for path in paths:
                if index.store is not None and path.stat().st_size <= STORED_BYTES:
                    index.store.put_file(path)
            datasets[role] = index.record_dataset(paths, rows=counts[role], form=recipe.data.form)
    path = Path(recipe.base.config) if isinstance(recipe.base, NewBase) else resolve_base(recipe.base)
    kind = str(model.causal.config.model_type)
    base = index.record_base(path, name=model.name, model_type=kind, parameters=model.num_parameters())
    index.start_run(folder, datasets=datasets, base=base)


def _write_summary(folder: Path, fit: Fit, *, stopped: str, state: str) -> None:
    from tunesmith.train.memory import peak_memory_bytes

    progress = fit.progress
    summary = read_json(folder / "run.json") | {
        "path": str(folder),
        "state": state,
        "steps": progress.step,
        "rows": len(fit.train),
        "tokens": progress.tokens,
        "computed_tokens": progress.computed_tokens,
        "target_tokens": progress.target_tokens,
        "seconds": round(progress.seconds, 3),
        "tokens_per_second": round(progress.tokens / progress.seconds, 1) if progress.seconds else 0.0,
        "peak_memory_bytes": peak_memory_bytes(fit.model.device),
        "trainable_parameters": num_trainable(fit.model),
        "parameters": fit.model.num_parameters(),
        "train_loss": progress.train_loss,
        "validation_loss": progress.best_loss if progress.best_loss is not None else progress.validation_loss,
        "best_step": progress.best_step,
        "stopped": stopped,
        "versions": versions(),
        "command": " ".join(["tunesmith", *sys.argv[1:]]) if Path(sys.argv[0]).name == "tunesmith" else "",
    }
    write_json(folder / "run.json", value=summary)


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


def find_run(run: Run | Path | str, *, workspace: Workspace | None = None) -> Run:
    """A run by name, unique beginning, recipe name, `latest`, or path."""
    if isinstance(run, Run):
        return run
    return Run((workspace or find_workspace()).find_run(str(run)))


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
    if method.kind == "full":
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
    base = load_model(recipe.base, device=str(tuned.model.device)) if recipe.method.kind == "full" else tuned.model
    prepared = prepare_data(recipe, model=tuned.model, workspace=workspace, template=tuned.template)
    if data is None and prepared.files != run.resolved["hashes"]["files"]:
        raise DataError(
            f"the data files changed since {run.name} was trained, so its held-out rows may no longer be held out",
            hint="put the files back, or give rows to evaluate on: --data FILE",
        )
    name, examples = _held_out(prepared, recipe, data)
    shots: tuple[Example, ...] = ()
    if "few_shot" in settings.against:
        shots = choose_shots(
            prepared.examples("train"),
            count=settings.few_shot,
            seed=settings.seed,
            template=tuned.template,
            examples=examples,
            room=tuned.model.context_tokens - settings.max_tokens,
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


def _held_out(prepared: Prepared, recipe: Recipe, data: Path | str | None) -> tuple[str, list[Example]]:
    if data is None:
        name, examples = prepared.held_out()
        if not examples:
            raise DataError("the run holds no rows back", hint="give rows to evaluate on: --data FILE")
        return name, examples
    problems: list[Any] = []
    examples = [to_example(row, settings=recipe.data) for row in read_rows(str(data), on_bad=problems.append)]
    errors = [p for p in problems if p.severity == "error"]
    if errors:
        raise errors[0].as_error()
    if not examples:
        raise DataError("there are no rows in it", file=data, hint="give a file with rows")
    return str(data), examples


def export(run: Run | Path | str, *, form: str, out: Path, workspace: Workspace | None = None) -> Path:
    """Write a run's model for use elsewhere: `peft` (the adapter) or `merged` (a plain transformers model).

    Before it is done the written model is loaded again and its logits are compared with the run's.
    """
    from tunesmith.export import export_merged, export_peft

    writers = {"peft": export_peft, "merged": export_merged}
    if form not in writers:
        raise RecipeError(f"there is no format '{form}'; there are {', '.join(writers)}", hint="use --format merged")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        what = "the folder is not empty" if out.is_dir() else "this is a file"
        raise StorageError(what, file=out, hint="give a new folder with --out")
    run = find_run(run, workspace=workspace)
    if form == "peft" and run.recipe.method.kind == "full":
        raise RecipeError("a fully tuned model has no adapter to export", hint="use --format merged")
    tuned = load(run, workspace=workspace, device="cpu")
    contract = json.loads((tuned.run.path / CONTRACT).read_text("utf-8"))
    writers[form](tuned.model, method=tuned.method, template=tuned.template, contract=contract, out=out)
    return out
