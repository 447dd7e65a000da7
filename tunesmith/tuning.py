"""A run from its recipe to its model: made ready, trained, stopped or finished, and written down."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from tunesmith.data.prepared import Prepared
from tunesmith.data.template import ChatTemplate
from tunesmith.errors import Interrupted, RecipeError, StorageError
from tunesmith.evaluate.general import Watched
from tunesmith.models.heads import save_head
from tunesmith.models.load import Model, load_model
from tunesmith.models.quantised import check_installed
from tunesmith.objectives.headed import Headed
from tunesmith.planning import check_before, may_be_long
from tunesmith.recipe import Recipe, load_recipe
from tunesmith.registry.index import Index
from tunesmith.registry.workspace import Workspace, find_workspace
from tunesmith.runs import (
    Run,
    check_evaluation,
    check_suits,
    check_unchanged,
    device_of,
    find_unfinished,
    index_of,
    is_begun,
    make_trainable,
    prepare_data,
    record_end,
    record_start,
    resolved_of,
    summary_of,
    teacher_of,
    template_of,
    with_objective,
    write_start,
)
from tunesmith.storage import new_folder
from tunesmith.train.loop import Fit, Observer
from tunesmith.train.observers import Silent
from tunesmith.train.parallel import Processes, launched
from tunesmith.train.readings import finish_head
from tunesmith.train.trackers import recording
from tunesmith.vocabulary import Growth, grow_tokenizer, record_tokenizer


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
    with launched(recipe.train) as processes, _Signals(processes) as signals:
        observer = observer if observer is not None and processes.is_first else Silent()
        start = _start(
            recipe, workspace=workspace, processes=processes, resume=resume, say=observer.message, signals=signals
        )
        recipe, folder, index = start.recipe, start.folder, index_of(workspace)
        processes.divide(start.model)
        with contextlib.ExitStack() as stack:
            if processes.is_first:
                told = {"trackers": recipe.train.trackers, "recipe": start.resolved["recipe"], "observer": observer}
                observer = stack.enter_context(recording(folder, **told))
            fit = Fit(
                start.model,
                method=recipe.method,
                objective=recipe.objective,
                train=start.prepared.train,
                validation=start.prepared.validation,
                settings=recipe.train,
                folder=folder,
                observer=observer,
                teacher=start.teacher,
                processes=processes,
                cache=workspace.cache,
                watch=start.watched,
                watch_every=recipe.evaluate.every or 1,
            )
            with _end_recorded(fit, folder=folder, index=index, signals=signals):
                signals.train(fit)
                if resume:
                    fit.resume()
                stopped = fit.run().stopped
        with _end_recorded(fit, folder=folder, index=index, signals=signals):
            signals.finish()
            processes.first(partial(_finish, fit, start, index=index, stopped=stopped, signals=signals))
    return Run(folder)


@dataclass(frozen=True)
class _Start:
    """What a run begins with; `recipe` has in it what the objective took from the base and the rows."""

    recipe: Recipe
    resolved: dict[str, Any]
    model: Model
    teacher: Model | None
    prepared: Prepared
    growth: Growth | None
    watched: Watched | None
    folder: Path


def _start(
    recipe: Recipe,
    *,
    workspace: Workspace,
    processes: Processes,
    resume: bool,
    say: Callable[[str], None],
    signals: "_Signals",
) -> _Start:
    """Load the base, prepare the rows, make trainable what is trained, and open the run's folder."""
    check_installed(recipe.method.stored_in)
    check_suits(recipe)
    check_evaluation(recipe)
    model = load_model(recipe.base, device=device_of(recipe.train))
    teacher = teacher_of(recipe, model=model)
    before = processes.first(partial(find_unfinished, workspace, recipe)) if resume else None
    template = template_of(model, recipe, run=before)
    shared: dict[str, Any] = {"model": model, "workspace": workspace, "template": template}
    growth = processes.first_before_others(partial(grow_tokenizer, recipe, on_message=say, **shared))
    if growth is not None:
        shared["template"] = template = template_of(model, recipe, run=before)
    prepared = processes.first_before_others(partial(prepare_data, recipe, **shared))
    recipe = with_objective(recipe, prepared.objective)
    if before is None and processes.count == 1 and may_be_long(recipe, model=model, rows=prepared.train):
        check_before(recipe, workspace=workspace, say=say)
    resolved = resolved_of(recipe, model=model, prepared=prepared, template=template)
    if before is not None and is_begun(before):
        check_unchanged(before, resolved)
    parameters = model.num_parameters()
    watched = _watched(recipe, model=model, template=template)
    _apply(model, recipe, growth=growth)  # what does not suit the base is refused before there is a folder

    def opened() -> Path:
        folder = before or workspace.new_run(recipe.name)
        signals.has_folder = True
        write_start(folder, recipe, resolved, prepared=prepared, template=template)
        if growth is not None:
            growth.write(folder)
        record_start(index_of(workspace), folder, recipe, model=model, parameters=parameters, prepared=prepared)
        return folder

    return _Start(recipe, resolved, model, teacher, prepared, growth, watched, processes.first(opened))


def _watched(recipe: Recipe, *, model: Model, template: ChatTemplate) -> Watched | None:
    """The general rows that are read while training, where the recipe asks for it."""
    if recipe.evaluate.every is None:
        return None
    if model.is_encoder or model.is_encoder_decoder:
        raise RecipeError("evaluate.every: this base does not go on with a text", hint="leave it out")
    return Watched(model, settings=recipe.evaluate, template=template)


def _apply(model: Model, recipe: Recipe, *, growth: Growth | None) -> None:
    """Extend the model by the run's new tokens, where it has some, and make trainable what is trained."""
    if growth is not None:
        growth.extend(model, whole=recipe.method.saves_model)
    make_trainable(model, recipe)


def _save_model(model: Model, recipe: Recipe, *, prepared: Prepared, folder: Path) -> None:
    """What was tuned, with its tokenizer, its head where it has one, and what its answers mean."""
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


@contextlib.contextmanager
def _end_recorded(fit: Fit, *, folder: Path, index: Index, signals: "_Signals") -> Iterator[None]:
    """Write down how a run ended where something was raised in the block; what the disk refuses then does not hide it."""
    try:
        yield
    except Interrupted:
        signals.end()
        if not fit.processes.is_first:
            raise
        with contextlib.suppress(StorageError):
            record_end(index, folder, summary=summary_of(folder, fit, stopped="signal", state="stopped"))
        raise
    except BaseException as error:
        signals.end()
        if isinstance(error, StorageError):
            error.hint += "; with --resume it goes on from the last checkpoint"
        if fit.processes.is_first and not Run(folder).finished:  # only its last line may not have reached the disk
            with contextlib.suppress(StorageError):
                index.finish_run(folder.name, state="failed")
        raise


def _finish(fit: Fit, start: _Start, *, index: Index, stopped: str, signals: "_Signals") -> None:
    """Save the model with the weights of the best validation loss, put together again where it was divided."""
    whole = None
    if fit.processes.divides:
        whole = load_model(start.recipe.base, device=device_of(start.recipe.train))
        _apply(whole, start.recipe, growth=start.growth)
    fit.restore_best(whole)
    _save_model(whole or fit.model, start.recipe, prepared=start.prepared, folder=start.folder / "model")
    record_tokenizer(start.folder)
    signals.end()
    record_end(index, start.folder, summary=summary_of(start.folder, fit, stopped=stopped, state="finished"))


class _Signals:
    """SIGINT and SIGTERM stop a run: at once before the loop and after it, and once the loop has saved while it runs.

    A second one does not wait for the loop; of several processes it does nothing, since a terminal and torchrun both pass
    on the same Ctrl-C. While it is written down how a run ended, they change nothing.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.has_folder = False
        self._fit: Fit | None = None
        self._phase: Literal["preparing", "training", "finishing", "ending"] = "preparing"
        self._number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        with contextlib.suppress(ValueError):  # only the main thread may handle signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *details: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def train(self, fit: Fit) -> None:
        """From here on the loop is asked; also about a signal whose exception a library kept for itself."""
        self._fit, self._phase = fit, "training"
        fit.signal_number = self._number

    def finish(self) -> None:
        """The loop is over and all it did is saved."""
        self._phase = "finishing"
        if self._number is not None:
            raise self._stopped(self._number)

    def end(self) -> None:
        """How the run ended is being written down."""
        self._phase = "ending"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self._number = self._number is None, number
        if self._phase == "training" and (first or self.processes.count > 1):
            assert self._fit is not None
            self._fit.signal_number = number
        elif self._phase != "ending":
            raise self._stopped(number)

    def _stopped(self, number: int) -> Interrupted:
        again = "go on with the same command and --resume" if self.has_folder else "run the same command again"
        if self._fit is None:
            return Interrupted("stopped before anything was trained", hint=again, signal_number=number)
        where = f"after step {self._fit.progress.step} of {self._fit.num_steps}"
        saved = "what was saved is kept" if self._phase == "training" else "everything up to there is saved"
        return Interrupted(f"stopped at once {where}; {saved}", hint=again, signal_number=number)
