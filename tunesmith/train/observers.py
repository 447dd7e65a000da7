"""Who is told how training goes: a file, a terminal, an experiment tracker (trackers.py). See `Observer` in train/loop.py.

    with terminal_progress() as progress, recording(folder, trackers=names, recipe=resolved, observer=progress) as all:
        Fit(..., observer=all).run()

The loop knows none of them. A file that cannot be written stops the run; a tracker that fails is given up with one
warning, because metrics.jsonl has every step.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

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
        self._session.validation_loss = record.get("validation_loss", self._session.validation_loss)
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
