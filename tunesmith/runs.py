"""A run on disk: its folder, what it was made from, and how it is recorded."""

import contextlib
import datetime
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith.data.contract import FILE as CONTRACT
from tunesmith.data.contract import check_contract, write_contract
from tunesmith.data.curate.checks import Models
from tunesmith.data.curate.difficulty import Scorer
from tunesmith.data.prepare import prepare
from tunesmith.data.prepared import Prepared
from tunesmith.data.retrieval import documents_in
from tunesmith.data.settings import DESCRIBING, DataSettings
from tunesmith.data.sources import resolve
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example
from tunesmith.errors import DataError, NotFoundError, RecipeError, StorageError
from tunesmith.evaluate.chosen import chosen
from tunesmith.evaluate.code import CODE_METRICS
from tunesmith.evaluate.difficulty import scorer
from tunesmith.evaluate.judge import check_judge
from tunesmith.evaluate.settings import RESOLVED
from tunesmith.evaluate.swaps import check_swaps
from tunesmith.evaluate.words import read_groups
from tunesmith.methods.base import num_trainable, set_trainable_dtype
from tunesmith.models.base import (
    ENCODER_DECODERS,
    ENCODERS,
    NewBase,
    listed_files,
    longest_unasked,
    model_type_of,
    resolve_base,
    template_for,
)
from tunesmith.models.extended import train_new_rows
from tunesmith.models.heads import attach_head
from tunesmith.models.load import Model, load_model
from tunesmith.models.names import load_names
from tunesmith.objectives.headed import Headed
from tunesmith.recipe import Recipe
from tunesmith.registry.index import Index
from tunesmith.registry.store import Store
from tunesmith.registry.workspace import LATEST, Workspace, find_workspace, recipe_name
from tunesmith.storage import code_digest, read_json, versions, write_json, write_text
from tunesmith.train.loop import Fit
from tunesmith.train.memory import peak_memory_bytes
from tunesmith.train.settings import TrainSettings

STORED_BYTES = 1 << 30  # a data file up to this size is kept in the store, so its exact bytes stay at hand
VOCABULARY = "vocabulary.json"  # what new tokens are and gain, in the folder of a run that has some


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


def teacher_of(recipe: Recipe, *, model: Model) -> Model | None:
    """The model that the objective learns from, frozen; RecipeError where its tokens are not the base's."""
    if recipe.objective.teacher_base is None:
        return None
    teacher = load_model(recipe.objective.teacher_base, device=str(model.device))
    if teacher.tokenizer.backend.get_vocab() != model.tokenizer.backend.get_vocab():
        raise RecipeError(
            "objective.teacher has other tokens than the base, so their probabilities cannot be compared",
            hint="choose a teacher and a base of one family, or tune on the teacher's answers: objective: instruction",
        )
    teacher.causal.requires_grad_(False)
    teacher.causal.eval()
    return teacher


def device_named(name: str) -> str:
    """`auto` is the GPU where torch can use one, else the CPU."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def template_of(model: Model, recipe: Recipe, *, run: Path | None = None) -> ChatTemplate:
    """The recipe's chat template, or the model's own; with the date of `run`, where a run goes on or is used."""
    today = None
    if run is not None and (run / CONTRACT).is_file():
        today = datetime.date.fromisoformat(read_json(run / CONTRACT)["today"])
    config = model.causal.config.to_dict()
    if recipe.data.template is None:
        return template_for(model.tokenizer, config=config, today=today)
    path = Path(recipe.data.template)
    try:
        source = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NotFoundError(
            f"the chat template cannot be read: {error}", file=path, hint="check data.template"
        ) from None
    model.tokenizer.chat_template = source
    return template_for(model.tokenizer, config=config, today=today)


def template_of_run(run: Run, *, model: Model) -> ChatTemplate:
    """The template that was saved with a run, its token contract checked."""
    saved = run.path / "model" / "chat_template.jinja"
    document = read_json(run.path / CONTRACT)
    source = saved.read_text("utf-8") if saved.is_file() else None
    today = datetime.date.fromisoformat(document["today"])
    template = template_for(model.tokenizer, config=model.causal.config.to_dict(), source=source, today=today)
    check_contract(document, template=template, objective=run.recipe.objective, file=run.path / CONTRACT)
    return template


def check_suits(recipe: Recipe) -> None:
    """RecipeError where objective or method cannot work on the base, told from its configuration before it is loaded."""
    model_type = model_type_of(recipe.base)
    encoder, encoder_decoder = model_type in ENCODERS, model_type in ENCODER_DECODERS
    recipe.objective.for_model(encoder=encoder)
    recipe.objective.check_base(encoder_decoder=encoder_decoder)
    if encoder_decoder and recipe.train.compile:
        raise RecipeError(
            "train.compile: an encoder-decoder's blocks would be compiled anew for every pack", hint="leave it out"
        )
    if encoder and recipe.method.num_virtual_tokens:
        raise RecipeError(
            f"method '{recipe.method.kind}' puts virtual tokens before every text, and this base is an encoder",
            hint="use method: lora, adapters, ia3 or full",
        )


def check_evaluation(recipe: Recipe) -> None:
    """NotFoundError or RecipeError where what the evaluation needs is missing or wrong, before anything is trained."""
    general, documents, embedder = recipe.evaluate.general, recipe.evaluate.documents, recipe.evaluate.embedder
    if general is not None:
        resolve(general)
    if documents is not None and not Path(documents).is_dir():
        raise NotFoundError("no such folder", file=documents, hint="evaluate.documents is a folder with text files")
    if embedder is not None and model_type_of(embedder) not in ENCODERS:
        raise RecipeError(
            f"evaluate.embedder: '{embedder}' is no encoder",
            hint="name an encoder, for example sentence-transformers/all-MiniLM-L6-v2",
        )
    tested = CODE_METRICS[:1] if "tests" in recipe.data.mapping else ()
    names = (*(recipe.evaluate.metrics or tested), *recipe.evaluate.added)
    chosen(names, settings=recipe.evaluate)
    if recipe.evaluate.judge is not None:
        if isinstance(recipe.objective, Headed):
            raise RecipeError(
                f"evaluate.judge compares answers, and a {recipe.objective.kind_name} gives none", hint="leave it out"
            )
        check_judge(recipe.evaluate.judge)
    if recipe.evaluate.groups is not None and recipe.evaluate.groups.words is not None:
        read_groups(recipe.evaluate.groups.words)
    if recipe.evaluate.swaps is not None:
        check_swaps(recipe.evaluate.swaps, objective=recipe.objective)


def data_settings(recipe: Recipe) -> DataSettings:
    """How rows are read: the recipe's section, with the columns that its evaluation asks for."""
    return recipe.data.keeping(recipe.evaluate.columns)


def prepare_data(
    recipe: Recipe,
    *,
    model: Model,
    workspace: Workspace,
    template: ChatTemplate | None = None,
    models: Models | None = None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Prepared:
    """Read, split, render and count the recipe's rows (from the cache where nothing changed).

    `models` are those of `models_of`, where the caller asks them too.
    """
    recipe = with_objective(recipe, recipe.objective.for_model(encoder=model.is_encoder).model_dump())
    limit = model.context_tokens - recipe.method.num_virtual_tokens
    if recipe.data.max_tokens is not None and recipe.data.max_tokens > limit:
        raise RecipeError(
            f"data.max_tokens is {recipe.data.max_tokens:,} and the base was made for {limit:,}",
            hint=f"set it to {limit:,} or less",
        )
    workspace.create()
    return prepare(
        data_settings(recipe),
        objective=recipe.objective,
        template=template or template_of(model, recipe),
        max_tokens=recipe.data.max_tokens or min(limit, longest_unasked(model.causal.config.to_dict())),
        cache=workspace.cache,
        models=models or models_of(recipe),
        on_rows=on_rows,
    )


def models_of(recipe: Recipe) -> Models:
    """The models that the data section asks; none is loaded before it is asked."""
    select = recipe.data.select
    return Models(
        names=None if recipe.data.names is None else load_names(recipe.data.names, device=device_named("auto")),
        scorer=_scorer(recipe) if select is not None and select.by == "difficulty" else None,
    )


def _scorer(recipe: Recipe) -> Scorer:
    """The base as it is, whatever model the rows are prepared for."""
    if not isinstance(recipe.base, str):
        raise RecipeError("a new base finds nothing hard or easy", hint="choose by quality or diversity in data.select")

    @cache
    def score() -> Callable[[list[Example]], np.ndarray]:
        base = load_model(recipe.base, device=device_named("auto"))
        return scorer(base, template=template_of(base, recipe))

    return Scorer(lambda rows: score()(rows), files=listed_files(recipe.base))


def make_trainable(model: Model, recipe: Recipe) -> None:
    """Insert and unfreeze what the method and the objective train, in the precision and with the speed that is asked for."""
    recipe.method.apply(model, seed=recipe.train.seed)
    train_new_rows(model)
    if recipe.objective.reads == "outputs":
        attach_head(model, num_outputs=recipe.objective.num_outputs)
    if recipe.train.precision == "bf16":
        set_trainable_dtype(model, frozen=torch.bfloat16)
    if recipe.train.gradient_checkpointing:
        model.checkpoint_activations()
    if recipe.train.compile:
        model.compile_blocks()


def with_objective(recipe: Recipe, objective: dict[str, Any]) -> Recipe:
    """The recipe with what the objective took from the base and the rows."""
    return recipe.model_copy(update={"objective": type(recipe.objective).model_validate(objective)})


def resolved_of(recipe: Recipe, *, model: Model, prepared: Prepared, template: ChatTemplate) -> dict[str, Any]:
    """What resolved.json holds: the recipe with every default, and what it was resolved against."""
    return {
        "recipe": recipe.model_dump(mode="json", exclude={"plan"}),  # a price decides nothing of a run
        "hashes": {
            "data": prepared.digest,
            "files": prepared.files,
            "base": model.digest,
            "tokenizer": template.tokenizer.digest,
            "code": code_digest("data", "data/curate", "objectives"),
        },
        "versions": versions(),
    }


def find_unfinished(workspace: Workspace, recipe: Recipe) -> Path:
    """The newest unfinished run of this recipe; one that was killed before anything was written down only if it is alone."""
    found = []
    for folder in workspace.run_folders():
        summary = read_json(folder / "run.json")
        if summary.get("name") == recipe.name and summary.get("state") != "finished":
            found.append(folder)
    if not found:
        raise NotFoundError(f"there is no unfinished run of '{recipe.name}' to resume", hint="leave --resume out")
    return next((folder for folder in found if is_begun(folder)), found[0])


def is_begun(folder: Path) -> bool:
    """Whether all that a run is made from was written down, so that something may have been trained."""
    return (folder / "resolved.json").is_file() and (folder / CONTRACT).is_file()


def check_unchanged(folder: Path, resolved: dict[str, Any]) -> None:
    """RecipeError where the unfinished run was made from another recipe, other data or another base."""
    before, resolved = (_deciding(found) for found in (read_json(folder / "resolved.json"), resolved))
    parts = [part for part in ("recipe", "hashes") if before[part] != resolved[part]]
    names = [f"{part}.{k}" for part in parts for k in resolved[part] if before[part].get(k) != resolved[part][k]]
    if names:
        raise RecipeError(
            f"the unfinished run {folder.name} was made from something else: {', '.join(names)} changed",
            hint="put it back as it was, or train a new run without --resume",
        )


def _deciding(resolved: dict[str, Any]) -> dict[str, Any]:
    """The same without what only describes the data: it may be written down while a run waits."""
    recipe = resolved["recipe"]
    data = {name: value for name, value in recipe["data"].items() if name not in DESCRIBING}
    return resolved | {"recipe": recipe | {"data": data}}


def write_start(
    folder: Path, recipe: Recipe, resolved: dict[str, Any], *, prepared: Prepared, template: ChatTemplate
) -> None:
    """Write down what the run is made from; the token contract last, see `is_begun`."""
    write_text(folder / "recipe.yaml", text=recipe.as_yaml())
    write_json(folder / "resolved.json", value=resolved)
    write_json(folder / "ledger.json", value=prepared.ledger)
    examples = [e for _, e in zip(range(4), prepared.examples("train"), strict=False)]
    write_contract(folder, template=template, objective=recipe.objective, examples=examples)


def record_start(
    index: Index, folder: Path, recipe: Recipe, *, model: Model, parameters: int, prepared: Prepared
) -> None:
    """Enter a run with its data and its base, which has so many `parameters`."""
    states = prepared.ledger["states"]
    replayed = prepared.ledger["reasons"].get("trained", {}).get("replayed", 0)
    counts = {
        "train": states["trained"] + states["truncated"] - replayed,
        "replay": replayed,
        "validation": states["held_out_validation"],
        "test": states["held_out_test"],
    }
    datasets = {}
    given = {"train": recipe.data.train_paths} | {
        role: getattr(recipe.data, role) for role in ("validation", "test", "replay")
    }
    for role, value in given.items():
        names = value if isinstance(value, list) else [value] if isinstance(value, str) else []
        paths = [path for name in names for _, path in resolve(name)]
        if paths:
            _keep(paths, store=index.store)
            datasets[role] = index.record_dataset(paths, rows=counts[role], form=recipe.data.form)
    look_up = recipe.data.look_up
    if look_up is not None and look_up.documents is not None:
        _keep(documents_in(Path(look_up.documents)), store=index.store)
    index.start_run(folder, datasets=datasets, base=_record_base(index, recipe, model=model, parameters=parameters))


def _keep(paths: list[Path], *, store: Store | None) -> None:
    """Put files into the store, but for very large ones."""
    for path in paths:
        if store is not None and path.stat().st_size <= STORED_BYTES:
            store.put_file(path)


def _record_base(index: Index, recipe: Recipe, *, model: Model, parameters: int) -> str:
    """Enter a recipe's base, which has so many `parameters`; its digest."""
    path = Path(recipe.base.config) if isinstance(recipe.base, NewBase) else resolve_base(recipe.base)
    kind = str(model.causal.config.model_type)
    return index.record_base(path, name=model.name, model_type=kind, parameters=parameters, known=model.files)


def command_line() -> str:
    """How this program was called; empty where it is used from another."""
    return " ".join(["tunesmith", *sys.argv[1:]]) if Path(sys.argv[0]).name == "tunesmith" else ""


def summary_of(folder: Path, fit: Fit, *, stopped: str, state: str) -> dict[str, Any]:
    """What run.json says of a run that ended."""
    progress = fit.progress
    summary = read_json(folder / "run.json") | {
        "path": str(folder),
        "state": state,
        "steps": progress.step,
        "rows": fit.train.num_units,
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
        "processes": fit.processes.count,
        "versions": versions(),
        "command": command_line(),
    }
    if (folder / VOCABULARY).is_file():
        summary["vocabulary"] = read_json(folder / VOCABULARY)
    return summary


def record_end(index: Index, folder: Path, *, summary: dict[str, Any]) -> None:
    """Enter how a run ended. run.json comes last: what was cut short before it is done again by --resume."""
    index.finish_run(folder.name, state=summary["state"], summary=summary)
    write_json(folder / "run.json", value=summary)


def find_run(run: Run | Path | str, *, workspace: Workspace | None = None, finished: bool = False) -> Run:
    """A run by name, unique beginning, recipe name, `latest`, or path.

    With `finished`, a recipe's name and `latest` mean the newest finished run where there is one; standard error hears of
    it where a newer one is not.
    """
    if isinstance(run, Run):
        return run
    space, name = workspace or find_workspace(), str(run)
    found = Run(space.find_run(name))
    if not finished or found.finished or name not in (LATEST, recipe_name(found.name)):
        return found
    for folder in space.run_folders():
        other = Run(folder)
        with contextlib.suppress(StorageError):  # of another run
            if name in (LATEST, recipe_name(other.name)) and other.finished:
                state = found.summary.get("state")
                print(f"{found.name} is {state}: taking {other.name}, the newest finished run", file=sys.stderr)
                return other
    return found


def check_finished(run: Run) -> None:
    """NotFoundError where the run has no model yet."""
    if not run.finished:
        state = run.summary.get("state")
        raise NotFoundError(
            f"the run {run.name} is {state} and has no model yet", hint="finish it: tunesmith train RECIPE --resume"
        )


def check_base(run: Run, model: Model) -> None:
    """StorageError where `model` is not the base that the run was tuned from."""
    if model.digest != run.resolved["hashes"]["base"]:
        raise StorageError(
            f"the base '{model.name}' is no longer the one that {run.name} was tuned from",
            file=model.folder,
            hint="restore the base's files: the adapter fits no other",
        )


def own_rows(run: Run, prepared: Prepared) -> tuple[str, list[Example]]:
    """The rows that the run itself held out, and which they are. DataError where they changed or there are none."""
    if prepared.files != run.resolved["hashes"]["files"]:
        raise DataError(
            f"the data files changed since {run.name} was trained, so its held-out rows may no longer be held out",
            hint="put the files back, or give rows to evaluate on: --data FILE",
        )
    name, examples = prepared.held_out()
    if not examples:
        raise DataError("the run holds no rows back", hint="give rows to evaluate on: --data FILE")
    return name, examples


def record_combined(index: Index, folder: Path, recipe: Recipe, *, model: Model, parent: str) -> None:
    """Enter a run that was made of other runs; the index follows the first of them, resolved.json names all."""
    digest = _record_base(index, recipe, model=model, parameters=model.num_parameters())
    known = {run.name for run in index.runs()}
    index.start_run(folder, datasets={}, base=digest, parent=parent if parent in known else None)
