"""Experiment trackers: they are told what metrics.jsonl is told. A tracker that fails is given up with one warning."""

import contextlib
import importlib
import json
import os
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from tunesmith.errors import MissingExtraError, RecipeError
from tunesmith.train.observers import FILE, MetricsFile, Several, Silent

if TYPE_CHECKING:  # the loop imports torch, which sending numbers does not need
    from tunesmith.train.loop import Observer

SEND_SECONDS = 5.0
Outcome = Literal["finished", "stopped", "failed"]


class Tracker(Silent, ABC):
    """Sends the numbers of metrics.jsonl and the resolved recipe to an experiment tracker.

    `folder` is the run's folder, whose name is the run's name there too; a resumed run goes on in the same place.
    `recipe` is the resolved recipe. `warn` gets the one sentence that says that the tracker failed.
    Raises MissingExtraError if the tracker's package cannot be imported; `start` raises RecipeError if the tracker
    cannot be reached, before a step is spent. A tracker that fails later is given up and training goes on.
    """

    name: ClassVar[str]
    module: ClassVar[str]
    setup: ClassVar[str]

    def __init__(self, folder: Path, *, recipe: dict[str, Any], warn: Callable[[str], None]):
        self.folder, self.recipe, self._warn = folder.absolute(), recipe, warn
        self.library = self.load()
        self._open = False
        self._at_step, self._at_seconds = 0, 0.0

    @classmethod
    def load(cls) -> Any:
        """The tracker's package; MissingExtraError if it cannot be imported."""
        try:
            library = importlib.import_module(cls.module)
            if library.__spec__ is not None and library.__spec__.origin is None:
                # These packages write folders of their own name, and Python imports any folder as an empty package.
                raise ImportError(f"{cls.module} is only a folder here, not the package")
        except ImportError as error:
            raise MissingExtraError(
                f"train.trackers names {cls.name}, which cannot be imported: {error}",
                hint=f"pip install 'tunesmith[tracking]', or take {cls.name} out of train.trackers",
            ) from error
        return library

    @abstractmethod
    def begin(self, *, step: int) -> None:
        """Open the run and log the recipe; steps after `step` that an earlier session sent are trained again."""

    @abstractmethod
    def send(self, metrics: dict[str, float], *, step: int, time_seconds: float) -> None:
        """Log the numbers of a step."""

    @abstractmethod
    def end(self, outcome: Outcome) -> None:
        """Send what is left and close the run."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt)
        self._unless_given_up(lambda: self.end("finished" if kind is None else "stopped" if stopped else "failed"))
        self._open = False

    def start(self, *, num_steps: int, step: int) -> None:
        self._at_step, self._at_seconds = step, time.time()
        error = _error_of(lambda: self.begin(step=step))
        if error is not None:
            raise RecipeError(
                f"train.trackers names {self.name}, which cannot be started: {_described(error)}",
                hint=f"{self.setup}, or take {self.name} out of train.trackers",
            ) from error
        self._open = True

    def step(self, record: dict[str, Any]) -> None:
        self._record(record)

    def validation(self, record: dict[str, Any]) -> None:
        self._record(record)

    def _record(self, record: dict[str, Any]) -> None:
        self._at_step, self._at_seconds = record["step"], record.get("time", self._at_seconds)
        metrics = {k: v for k, v in record.items() if k not in ("step", "time") and isinstance(v, int | float)}
        self._unless_given_up(lambda: self.send(metrics, step=self._at_step, time_seconds=self._at_seconds))

    def _unless_given_up(self, call: Callable[[], None]) -> None:
        error = _error_of(call) if self._open else None
        if error is not None:
            self._open = False
            self._warn(
                f"{self.name} failed at step {self._at_step} and gets nothing more of this run: {_described(error)}. "
                "Training goes on; metrics.jsonl has every step"
            )


def _error_of(call: Callable[[], None]) -> Exception | None:
    """What a call into a tracker's library raised.

    The one place that catches every Exception: W&B's service errors share no base class with each other or with
    OSError, and hours of training must not end because a dashboard did. What a library prints (MLflow, the address of
    the run) goes to standard error: standard output belongs to results.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            call()
    except Exception as error:
        return error
    return None


def _described(error: Exception) -> str:
    """An error on one line, without the advice that some libraries append."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class TensorBoard(Tracker):
    """Event files in the run's folder, `tensorboard/`; the recipe is under the tab "text"."""

    name, module = "tensorboard", "torch.utils.tensorboard"
    setup = "check that the run's folder can be written"

    def begin(self, *, step: int) -> None:
        # purge_step hides what an earlier session wrote from that step on.
        folder = str(self.folder / "tensorboard")
        self._writer = self.library.SummaryWriter(folder, purge_step=step + 1, flush_secs=10)
        lines = [f"    {key}: {json.dumps(value)}" for key, value in flatten(self.recipe).items()]
        self._writer.add_text("recipe", "\n".join(lines), step)  # four spaces: Markdown shows it as it is

    def send(self, metrics: dict[str, float], *, step: int, time_seconds: float) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step, walltime=time_seconds)

    def end(self, outcome: Outcome) -> None:
        self._writer.close()


class MLflow(Tracker):
    """A run in the experiment MLFLOW_EXPERIMENT_NAME (`tunesmith`) of the server MLFLOW_TRACKING_URI.

    The run is found again by its tag; steps that a resumed run repeats are there twice, with the same values. Each
    request waits for the server, so numbers are sent together every five seconds of training.
    """

    name, module = "mlflow", "mlflow"
    setup = "check MLFLOW_TRACKING_URI"
    TAG = "tunesmith.run"
    STATUS: ClassVar[dict[Outcome, str]] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
    METRICS, PARAMETERS = 1000, 100  # the most that one request may hold

    def begin(self, *, step: int) -> None:
        self._client = self.library.MlflowClient()
        self._waiting: list[Any] = []
        self._sent_at = 0.0
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "tunesmith")
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        found = self._client.search_runs(
            [experiment_id], filter_string=f"tags.`{self.TAG}` = '{self.folder.name}'", max_results=1
        )
        if found:  # its parameters are there, and MLflow lets nobody change one
            self._run_id = found[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            return
        run = self._client.create_run(experiment_id, run_name=self.folder.name, tags={self.TAG: self.folder.name})
        self._run_id = run.info.run_id
        parameters = [
            self.library.entities.Param(re.sub(r"[^\w. -]", "_", key)[:250], str(value)[:6000])
            for key, value in flatten(self.recipe).items()
        ]
        for first in range(0, len(parameters), self.PARAMETERS):
            self._client.log_batch(self._run_id, params=parameters[first : first + self.PARAMETERS])

    def send(self, metrics: dict[str, float], *, step: int, time_seconds: float) -> None:
        milliseconds = int(time_seconds * 1000)
        self._waiting += [self.library.entities.Metric(k, v, milliseconds, step) for k, v in metrics.items()]
        if time_seconds - self._sent_at >= SEND_SECONDS:
            self._sent_at = time_seconds
            self._send_waiting()

    def end(self, outcome: Outcome) -> None:
        self._send_waiting()
        self._client.set_terminated(self._run_id, status=self.STATUS[outcome])

    def _send_waiting(self) -> None:
        for first in range(0, len(self._waiting), self.METRICS):
            self._client.log_batch(self._run_id, metrics=self._waiting[first : first + self.METRICS])
        self._waiting = []


class WeightsAndBiases(Tracker):
    """A run of the project WANDB_PROJECT (`tunesmith`); W&B flattens the recipe itself, with dots.

    W&B keeps what it has of a step; a resumed run repeats those steps exactly, so they are not sent again.
    """

    name, module = "wandb", "wandb"
    setup = "log in with `wandb login` or set WANDB_MODE=offline"
    EXIT_CODE: ClassVar[dict[Outcome, int]] = {"finished": 0, "stopped": 255, "failed": 1}  # 255: W&B shows "killed"

    def begin(self, *, step: int) -> None:
        self._run = self.library.init(
            project=os.environ.get("WANDB_PROJECT", "tunesmith"),
            id=self.folder.name,
            name=self.folder.name,
            resume="allow",
            dir=str(self.folder),
            config=self.recipe,
            settings=self.library.Settings(console="off"),  # else every frame of the bar is captured and sent
        )
        self._first_step = self._run.step

    def send(self, metrics: dict[str, float], *, step: int, time_seconds: float) -> None:
        if step >= self._first_step:
            self._run.log(metrics, step=step)

    def end(self, outcome: Outcome) -> None:
        self._run.finish(exit_code=self.EXIT_CODE[outcome])


def flatten(recipe: dict[str, Any]) -> dict[str, Any]:
    """Nested sections as `train.batch_rows`; a list, or a section with nothing in it, as JSON text."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, dict) and value:
            flat |= {f"{key}.{inner}": v for inner, v in flatten(value).items()}
        else:
            flat[key] = json.dumps(value) if isinstance(value, dict | list | tuple) else value
    return flat


TRACKERS: dict[str, type[Tracker]] = {kind.name: kind for kind in (TensorBoard, MLflow, WeightsAndBiases)}


@contextlib.contextmanager
def recording(
    folder: Path, *, trackers: Iterable[str], recipe: dict[str, Any], observer: "Observer"
) -> Iterator[Several]:
    """All who are told about the run in `folder`: its metrics.jsonl, `observer`, and the trackers named.

    Trackers warn through `observer`, are closed at the end of the block and learn how it ended. `observer` stays open:
    it belongs to the caller. Raises MissingExtraError.
    """
    with contextlib.ExitStack() as stack:
        opened = [
            stack.enter_context(TRACKERS[name](folder, recipe=recipe, warn=observer.message)) for name in trackers
        ]
        # Trackers before the observer: one that cannot start says so before a bar is drawn.
        yield Several([MetricsFile(folder / FILE), *opened, observer])
