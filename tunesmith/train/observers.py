"""Who is told how training goes: a file, a terminal, an experiment tracker. See `Observer` in train/loop.py.

    with terminal_progress() as progress, recording(folder, trackers=names, recipe=resolved, observer=progress) as all:
        Fit(..., observer=all).run()

The loop knows none of them. A file that cannot be written stops the run; a tracker that fails is given up with one
warning, because metrics.jsonl has every step.
"""

import contextlib
import importlib
import json
import math
import os
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from tunesmith.errors import MissingExtraError, RecipeError
from tunesmith.storage import storage_errors, write_bytes

if TYPE_CHECKING:  # the loop imports torch, which showing progress does not need
    from tunesmith.train.loop import Observer

FILE = "metrics.jsonl"
SMOOTHING = 0.9  # share of the past in a smoothed number: an average over about ten steps
PLAIN_LINE_SECONDS = 10.0
SEND_SECONDS = 5.0
Outcome = Literal["finished", "stopped", "failed"]


class Silent:
    """Does nothing, and is what the others are built on."""

    def start(self, *, num_steps: int, step: int) -> None: ...

    def step(self, record: dict[str, Any]) -> None: ...

    def validation(self, record: dict[str, Any]) -> None: ...

    def message(self, text: str) -> None: ...


class Several:
    """Tells each of `observers` everything, in their order."""

    def __init__(self, observers: "Iterable[Observer]"):
        self._observers = list(observers)

    def start(self, *, num_steps: int, step: int) -> None:
        for observer in self._observers:
            observer.start(num_steps=num_steps, step=step)

    def step(self, record: dict[str, Any]) -> None:
        for observer in self._observers:
            observer.step(record)

    def validation(self, record: dict[str, Any]) -> None:
        for observer in self._observers:
            observer.validation(record)

    def message(self, text: str) -> None:
        for observer in self._observers:
            observer.message(text)


class MetricsFile(Silent):
    """metrics.jsonl: one JSON object a line, handed to the operating system before the next step begins.

    On a resumed run the lines of steps beyond the resumed step, which will be trained again, are dropped, and so is a
    line that a crash cut off. A number that is not finite is written as null: JSON has no NaN.
    Raises StorageError if the file cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path

    def start(self, *, num_steps: int, step: int) -> None:
        if not self.path.exists():
            return
        with storage_errors(self.path):
            before = self.path.read_bytes()
        after = b"".join(line + b"\n" for line in before.split(b"\n") if _step_of(line) <= step)
        if after != before:
            write_bytes(self.path, data=after)

    def step(self, record: dict[str, Any]) -> None:
        self._append(record)

    def validation(self, record: dict[str, Any]) -> None:
        self._append(record)

    def _append(self, record: dict[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with storage_errors(self.path), self.path.open("ab") as file:
            file.write(json.dumps(finite, allow_nan=False).encode() + b"\n")


def _step_of(line: bytes) -> float:
    """The step of a line of metrics.jsonl; infinity for what is not such a line."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf


class Smoothed:
    """Exponential moving average whose first values are not pulled towards zero (the correction of Adam)."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, value: float) -> None:
        """Count one more value in."""
        self._sum = SMOOTHING * self._sum + (1 - SMOOTHING) * value
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)

    @property
    def value(self) -> float | None:
        """The average; None before the first value."""
        return self._sum / self._weight if self._weight else None


@dataclass
class _Session:
    """What the display knows of the training between one start and the end. Times in seconds of one clock."""

    num_steps: int
    step: int
    started: float
    first: tuple[int, float] | None = None  # number and end of the first step trained here
    step_ended: float = 0.0
    loss: Smoothed = field(default_factory=Smoothed)
    speed: Smoothed = field(default_factory=Smoothed)
    validation_loss: float | None = None

    def add(self, record: dict[str, Any], *, now: float) -> None:
        self.step, self.step_ended = record["step"], now
        self.first = self.first or (self.step, now)
        self.loss.add(record["loss"])
        self.speed.add(record["tokens_per_second"])

    def seconds_left(self, now: float) -> float | None:
        """From the mean time between steps, validations and checkpoints included; the first step warms up."""
        if self.first is None or not self.first[0] < self.step < self.num_steps:
            return None
        per_step = (self.step_ended - self.first[1]) / (self.step - self.first[0])
        return max(0.0, per_step * (self.num_steps - self.step) - (now - self.step_ended))

    def steps(self) -> Text:
        total = f"{self.num_steps:,}"
        return Text.assemble(("step ", "dim"), f"{self.step:>{len(total)},}/{total}")

    def numbers(self) -> Text:
        parts = []
        if self.loss.value is not None:
            parts.append(Text.assemble(("loss ", "dim"), (f"{self.loss.value:.4f}", "bold")))
        if self.validation_loss is not None:
            parts.append(Text.assemble(("validation loss ", "dim"), (f"{self.validation_loss:.4f}", "bold")))
        if self.speed.value is not None:
            parts.append(Text.assemble(f"{self.speed.value:,.0f}", (" tokens/s", "dim")))
        return Text("   ").join(parts)

    def times(self, now: float, *, final: bool = False) -> Text:
        parts = [Text.assemble(duration(now - self.started), (" elapsed", "dim"))]
        left = None if final else self.seconds_left(now)
        if left is not None:
            parts.append(Text.assemble(duration(left), (" left", "dim")))
        return Text("   ").join(parts)


def duration(seconds: float) -> str:
    """`0:07`, `5:40`, `26:03:04`."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class RichProgress:
    """Progress for people: steps, smoothed loss, validation loss, speed, time.

    Inside a `with` block on a terminal it is a bar that moves, with messages above it; leaving the block, also by
    Ctrl-C, takes the bar away, shows the cursor and leaves one last line. Everywhere else it is that plain line: at the
    first step, then at most every ten seconds, at each validation and at the end.

    `clock` returns seconds and never goes back.
    """

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic):
        self._console, self._clock = console, clock
        self._live: Live | None = None
        self._session: _Session | None = None
        self._printed_at = -math.inf
        self._unprinted = False

    def __enter__(self) -> Self:
        if self._console.is_interactive and self._on_terminal():
            # What is printed must not tear the bar, and what goes to a pipe must stay there.
            redirect = sys.stdout.isatty()
            self._live = Live(self, console=self._console, transient=True, redirect_stdout=redirect)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._unprinted:
            self._print_line(final=True)

    def start(self, *, num_steps: int, step: int) -> None:
        self._session = _Session(num_steps, step, self._clock())
        self._printed_at, self._unprinted = -math.inf, True
        if self._live is not None:
            self._live.start(refresh=True)

    def step(self, record: dict[str, Any]) -> None:
        assert self._session is not None
        now = self._clock()
        self._session.add(record, now=now)
        self._unprinted = True
        if self._live is None and now - self._printed_at >= PLAIN_LINE_SECONDS:
            self._print_line()

    def validation(self, record: dict[str, Any]) -> None:
        assert self._session is not None
        self._session.validation_loss = record["validation_loss"]
        self._unprinted = True
        if self._live is None:
            self._print_line()

    def message(self, text: str) -> None:
        self._print(Text(text, style="yellow"))

    def _on_terminal(self) -> bool:
        # Not console.is_terminal: FORCE_COLOR makes rich take a log file for one.
        return self._console.file.isatty()

    def _print(self, text: Text) -> None:
        # A terminal wraps between words; a log keeps the sentence on one line.
        self._console.print(text, soft_wrap=not self._on_terminal())

    def __rich__(self) -> Group | Text:
        """The bar as it is at this moment: rich asks whenever it draws."""
        session = self._session
        if session is None:
            return Text()
        columns = Column(no_wrap=True), Column(ratio=1), Column(no_wrap=True)
        first = Table.grid(*columns, expand=True, padding=(0, 2, 0, 0), pad_edge=False)
        bar = ProgressBar(total=session.num_steps, completed=session.step, complete_style="cyan")
        first.add_row(session.steps(), bar, session.times(self._clock()))
        second = session.numbers()
        second.no_wrap, second.overflow = True, "ellipsis"
        return Group(first, second)

    def _print_line(self, *, final: bool = False) -> None:
        session = self._session
        assert session is not None
        now = self._clock()
        parts = [session.steps(), session.numbers(), session.times(now, final=final)]
        self._print(Text("   ").join(part for part in parts if part))
        self._printed_at, self._unprinted = now, False


def terminal_progress() -> RichProgress:
    """Progress on standard error; standard output belongs to results."""
    return RichProgress(Console(stderr=True))


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
