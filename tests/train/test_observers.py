"""The metrics file survives crashes, the display says what is true, and a tracker cannot hurt a run."""

import contextlib
import io
import json
import math
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tunesmith.errors import MissingExtraError, RecipeError, StorageError
from tunesmith.train.observers import MetricsFile, RichProgress, Several, Silent, Smoothed, duration
from tunesmith.train.settings import TrainSettings
from tunesmith.train.trackers import (
    TRACKERS,
    MLflow,
    TensorBoard,
    Tracker,
    WeightsAndBiases,
    flatten,
    recording,
)

ROOT = Path(__file__).resolve().parents[2]
RUN = "demo-0a1b2c3d"
RECIPE = {"name": "demo", "method": {"kind": "lora", "rank": 16}, "train": {"patience": None, "trackers": ["mlflow"]}}
FLAT = {
    "name": "demo",
    "method.kind": "lora",
    "method.rank": 16,
    "train.patience": None,
    "train.trackers": '["mlflow"]',
}


def step_record(step: int, *, loss: float = 1.5, tokens_per_second: float = 1000.0) -> dict[str, Any]:
    """A record as the loop makes it after step `step`."""
    return {
        "step": step,
        "time": 1_700_000_000.0 + step,
        "loss": loss,
        "learning_rate": 2e-4,
        "grad_norm": 0.5,
        "tokens": 100 * step,
        "tokens_per_second": tokens_per_second,
        "epoch": 0.1,
    }


def validation_record(step: int, *, loss: float = 1.25) -> dict[str, Any]:
    return {"step": step, "validation_loss": loss}


class Listener(Silent):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def start(self, *, num_steps: int, step: int) -> None:
        self.told.append(("start", (num_steps, step)))

    def step(self, record: dict[str, Any]) -> None:
        self.told.append(("step", record["step"]))

    def validation(self, record: dict[str, Any]) -> None:
        self.told.append(("validation", record["step"]))

    def message(self, text: str) -> None:
        self.told.append(("message", text))


def test_importing_the_observers_needs_neither_torch_nor_a_tracker():
    code = (
        "import sys, tunesmith.train.trackers;"
        "print({'torch', 'tensorboard', 'mlflow', 'wandb'} & {name.partition('.')[0] for name in sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_several_tells_everyone_everything_in_order():
    told: list[tuple[str, Any]] = []
    first, second = Listener(), Listener()
    first.told = second.told = told
    observer = Several([first, second])
    observer.start(num_steps=3, step=1)
    observer.step(step_record(2))
    observer.validation(validation_record(2))
    observer.message("hello")
    once = [("start", (3, 1)), ("step", 2), ("validation", 2), ("message", "hello")]
    assert told == [what for what in once for _ in range(2)]


class TestMetricsFile:
    def train(self, path: Path, *, after: int, until: int) -> None:
        """Steps after+1..until with a validation after every third."""
        file = MetricsFile(path)
        file.start(num_steps=20, step=after)
        for step in range(after + 1, until + 1):
            file.step(step_record(step))
            if step % 3 == 0:
                file.validation(validation_record(step))

    def test_lines_are_complete_objects_as_soon_as_they_are_written(self, tmp_path: Path):
        file = MetricsFile(tmp_path / "metrics.jsonl")
        file.start(num_steps=2, step=0)
        file.step(step_record(1))
        assert json.loads(file.path.read_text()) == step_record(1)
        file.validation(validation_record(1))
        lines = file.path.read_text().splitlines()
        assert [json.loads(line) for line in lines] == [step_record(1), validation_record(1)]

    def test_numbers_that_are_not_finite_are_null(self, tmp_path: Path):
        file = MetricsFile(tmp_path / "metrics.jsonl")
        file.validation({"step": 4, "validation_loss": math.nan, "perplexity": math.inf, "rows": 3})
        assert json.loads(file.path.read_text()) == {"step": 4, "validation_loss": None, "perplexity": None, "rows": 3}

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_a_run_cut_anywhere_and_resumed_leaves_the_file_of_an_uninterrupted_run(self, data, tmp_path_factory):
        folder = tmp_path_factory.mktemp("run")
        whole, cut = folder / "whole.jsonl", folder / "cut.jsonl"
        self.train(whole, after=0, until=12)
        reached = data.draw(st.integers(1, 12), label="last step before the crash")
        self.train(cut, after=0, until=reached)
        resumed = data.draw(st.integers(0, reached - 1), label="step of the checkpoint")
        content = cut.read_bytes()
        # The checkpoint was written after the lines of its steps, so a crash can only cut lines beyond it.
        kept = len(b"".join(line for line in content.splitlines(keepends=True) if json.loads(line)["step"] <= resumed))
        cut.write_bytes(content[: data.draw(st.integers(kept, len(content)), label="bytes on the disk")])
        self.train(cut, after=resumed, until=12)
        assert cut.read_bytes() == whole.read_bytes()

    @pytest.mark.parametrize(
        "damage", [b'{"step": 3, "lo', b"\0\0\0\0", b"[1]\n", b'{"loss": 1}\n', b'{"step": "2"}\n', b"\xff\n"]
    )
    def test_what_is_not_a_line_of_metrics_is_dropped_on_resume(self, tmp_path: Path, damage: bytes):
        path = tmp_path / "metrics.jsonl"
        self.train(path, after=0, until=2)
        good = path.read_bytes()
        path.write_bytes(good + damage)
        self.train(path, after=2, until=2)
        assert path.read_bytes() == good

    def test_a_last_line_that_lost_only_its_end_is_kept(self, tmp_path: Path):
        path = tmp_path / "metrics.jsonl"
        self.train(path, after=0, until=2)
        good = path.read_bytes()
        path.write_bytes(good[:-1])
        self.train(path, after=2, until=2)
        assert path.read_bytes() == good

    def test_a_file_with_nothing_to_drop_is_not_rewritten(self, tmp_path: Path):
        path = tmp_path / "metrics.jsonl"
        self.train(path, after=0, until=4)
        before = path.stat()
        MetricsFile(path).start(num_steps=20, step=4)
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    def test_a_file_that_cannot_be_written_is_an_error_that_names_it(self, tmp_path: Path):
        file = MetricsFile(tmp_path / "missing" / "metrics.jsonl")
        file.start(num_steps=1, step=0)
        with pytest.raises(StorageError, match=r"metrics\.jsonl"):
            file.step(step_record(1))


class TestNumbers:
    def test_smoothing_by_hand(self):
        smoothed = Smoothed()
        assert smoothed.value is None
        smoothed.add(2.0)
        assert smoothed.value == pytest.approx(2.0)
        smoothed.add(1.0)  # (0.9 * 0.1 * 2 + 0.1 * 1) / (0.9 * 0.1 + 0.1) = 0.28 / 0.19
        assert smoothed.value == pytest.approx(0.28 / 0.19)

    @settings(deadline=None)
    @given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
    def test_a_smoothed_number_lies_between_the_smallest_and_the_largest(self, values: list[float]):
        smoothed = Smoothed()
        for value in values:
            smoothed.add(value)
        slack = 1e-9 * max(1.0, *map(abs, values))
        assert smoothed.value is not None
        assert min(values) - slack <= smoothed.value <= max(values) + slack

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(0, "0:00"), (7.9, "0:07"), (59.999, "0:59"), (340, "5:40"), (3600, "1:00:00"), (93784, "26:03:04")],
    )
    def test_duration(self, seconds: float, text: str):
        assert duration(seconds) == text

    def test_flatten(self):
        assert flatten(RECIPE) == FLAT
        assert flatten({"a": {"b": {"c": 1}, "d": {}}, "e": []}) == {"a.b.c": 1, "a.d": "{}", "e": "[]"}


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestPlainProgress:
    def make(self) -> tuple[RichProgress, io.StringIO, Clock]:
        output, clock = io.StringIO(), Clock()
        return RichProgress(Console(file=output, width=40), clock=clock), output, clock

    def test_a_line_at_the_first_step_every_ten_seconds_at_validations_and_at_the_end(self):
        progress, output, clock = self.make()
        with progress:
            progress.start(num_steps=40, step=0)
            for step in range(1, 39):
                clock.seconds += 1.0
                progress.step(step_record(step))
                if step == 15:
                    progress.validation(validation_record(step))
        assert output.getvalue().splitlines() == [
            "step  1/40   loss 1.5000   1,000 tokens/s   0:01 elapsed",
            "step 11/40   loss 1.5000   1,000 tokens/s   0:11 elapsed   0:29 left",
            "step 15/40   loss 1.5000   validation loss 1.2500   1,000 tokens/s   0:15 elapsed   0:25 left",
            "step 25/40   loss 1.5000   validation loss 1.2500   1,000 tokens/s   0:25 elapsed   0:15 left",
            "step 35/40   loss 1.5000   validation loss 1.2500   1,000 tokens/s   0:35 elapsed   0:05 left",
            "step 38/40   loss 1.5000   validation loss 1.2500   1,000 tokens/s   0:38 elapsed",
        ]

    def test_the_last_line_is_not_said_twice(self):
        progress, output, _ = self.make()
        with progress:
            progress.start(num_steps=1, step=0)
            progress.step(step_record(1))
            progress.validation(validation_record(1))
        lines = output.getvalue().splitlines()
        assert [line.partition("   ")[0] for line in lines] == ["step 1/1", "step 1/1"]
        assert ["validation" in line for line in lines] == [False, True]

    def test_time_left_counts_the_steps_of_this_session_and_not_the_first(self):
        progress, output, clock = self.make()
        with progress:
            progress.start(num_steps=1000, step=500)
            clock.seconds += 300.0  # compilation
            progress.step(step_record(501))
            clock.seconds += 20.0
            progress.step(step_record(511))
            clock.seconds += 8.0
            progress.validation(validation_record(511))
        lines = output.getvalue().splitlines()
        assert lines[1].endswith("5:20 elapsed   16:18 left")  # 489 steps of 2 seconds
        assert lines[2].endswith("5:28 elapsed   16:10 left")

    def test_nothing_is_said_when_training_never_began(self):
        progress, output, _ = self.make()
        with progress:
            pass
        assert output.getvalue() == ""

    def test_a_message_is_one_line_and_brackets_stay(self):
        progress, output, _ = self.make()
        text = "rows.jsonl:3: [bold]not markup[/bold], and a sentence longer than the forty columns of this console"
        progress.message(text)
        assert output.getvalue() == text + "\n"

    def test_forced_colours_do_not_bring_a_moving_bar_into_a_log(self):
        output = io.StringIO()
        with RichProgress(Console(file=output, force_terminal=True), clock=Clock()) as progress:
            progress.start(num_steps=2, step=0)
            progress.step(step_record(1))
        assert set(re.findall(r"\x1b\[[?0-9;]*([a-zA-Z])", output.getvalue())) == {"m"}  # colours alone


class TestTerminalProgress:
    HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"

    def make(self) -> tuple[RichProgress, Terminal, Clock]:
        output, clock = Terminal(), Clock()
        console = Console(file=output, force_terminal=True, width=90, color_system=None, legacy_windows=False)
        return RichProgress(console, clock=clock), output, clock

    def frames(self, output: Terminal) -> list[str]:
        """Lines in the order they were drawn, without control sequences; each return of the cursor begins a line."""
        text = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", output.getvalue().replace("\r", "\n"))
        return [line.rstrip() for line in text.splitlines() if line.strip()]

    def test_the_bar_shows_every_number_and_leaves_one_line(self):
        progress, output, clock = self.make()
        with progress:
            progress.start(num_steps=40, step=0)
            for step in range(1, 21):
                clock.seconds += 1.0
                progress.step(step_record(step))
            progress.validation(validation_record(20))
            progress.message("a sentence [above] the bar")
        frames = self.frames(output)
        assert "a sentence [above] the bar" in frames
        after = frames[frames.index("a sentence [above] the bar") + 1 :]
        assert re.fullmatch(r"step 20/40  ━+ +0:20 elapsed   0:20 left", after[0])
        assert after[1] == "loss 1.5000   validation loss 1.2500   1,000 tokens/s"
        last = "step 20/40   loss 1.5000   validation loss 1.2500   1,000 tokens/s   0:20 elapsed"
        assert frames.count(last) == 1
        up_and_erase = "\x1b[1A\x1b[2K"
        assert output.getvalue().endswith(2 * up_and_erase + last + "\n"), "the two lines of the bar are taken away"

    def test_the_bar_grows_with_the_steps(self):
        progress, output, _ = self.make()
        filled = []
        with progress:
            progress.start(num_steps=4, step=0)
            for step in (1, 2, 3, 4):
                progress.step(step_record(step))
                progress.message(f"mark {step}")
                frames = self.frames(output)
                filled.append(frames[frames.index(f"mark {step}") + 1].count("━"))
        assert 0 < filled[0] < filled[1] < filled[2] < filled[3]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
    def test_the_terminal_is_as_before_after_an_exception(self, error: type[BaseException]):
        progress, output, _ = self.make()
        streams = sys.stdout, sys.stderr
        with contextlib.suppress(error), progress:
            progress.start(num_steps=9, step=0)
            progress.step(step_record(1))
            assert self.HIDE in output.getvalue()
            assert self.SHOW not in output.getvalue()
            raise error
        assert (sys.stdout, sys.stderr) == streams
        text = output.getvalue()
        assert text.rindex(self.SHOW) > text.rindex(self.HIDE)
        assert self.frames(output)[-1].startswith("step 1/9   loss 1.5000")

    def test_what_is_printed_to_standard_error_appears_above_the_bar(self):
        progress, output, _ = self.make()
        with progress:
            progress.start(num_steps=9, step=0)
            print("a library speaks", file=sys.stderr)
        assert "a library speaks" in self.frames(output)

    def test_what_is_printed_to_a_pipe_stays_in_the_pipe(self, capsys: pytest.CaptureFixture[str]):
        progress, output, _ = self.make()
        with progress:
            progress.start(num_steps=9, step=0)
            print('{"result": 1}')
        assert capsys.readouterr().out == '{"result": 1}\n'
        assert "result" not in output.getvalue()

    def test_messages_outside_training_are_printed(self):
        progress, output, _ = self.make()
        progress.message("before")
        with progress:
            progress.message("inside")
        progress.message("after")
        assert self.frames(output) == ["before", "inside", "after"]


class LibraryError(Exception):
    """As W&B's service errors: derived from Exception and nothing else."""


class FakeMlflow(types.ModuleType):
    """Keeps runs in memory, with the limits of the real server."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.experiments: dict[str, str] = {}
        self.runs: list[types.SimpleNamespace] = []
        self.requests = 0
        self.down = False
        self.entities = types.SimpleNamespace(
            Metric=lambda key, value, timestamp, step: (key, value, timestamp, step),
            Param=lambda key, value: (key, value),
        )
        self.MlflowClient = lambda: self

    def get_experiment_by_name(self, name: str) -> types.SimpleNamespace | None:
        return types.SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        return self.experiments.setdefault(name, str(len(self.experiments)))

    def search_runs(self, ids: list[str], *, filter_string: str, max_results: int) -> list[types.SimpleNamespace]:
        match = re.fullmatch(r"tags\.`(.+)` = '(.+)'", filter_string)
        assert match is not None
        return [run for run in self.runs if run.experiment in ids and run.tags.get(match[1]) == match[2]][:max_results]

    def create_run(self, experiment_id: str, *, run_name: str, tags: dict[str, str]) -> types.SimpleNamespace:
        info = types.SimpleNamespace(run_id=len(self.runs))
        run = types.SimpleNamespace(
            info=info, experiment=experiment_id, name=run_name, tags=tags, params={}, metrics=[], status="RUNNING"
        )
        self.runs.append(run)
        return run

    def update_run(self, run_id: int, *, status: str) -> None:
        self.runs[run_id].status = status

    def log_batch(self, run_id: int, *, metrics: Any = (), params: Any = ()) -> None:
        self.requests += 1
        if self.down:
            raise LibraryError("no route to host\nTraceback of the server")
        assert len(metrics) <= 1000
        assert len(params) <= 100
        for key, value in params:
            assert re.fullmatch(r"[\w. -]{1,250}", key)
            assert len(value) <= 6000
            assert self.runs[run_id].params.setdefault(key, value) == value, "a parameter may not change"
        self.runs[run_id].metrics += metrics

    def set_terminated(self, run_id: int, *, status: str) -> None:
        print("View run at: http://server/")
        self.runs[run_id].status = status


class FakeWandb(types.ModuleType):
    """Keeps what one run was told; `last` is the last step the server has of it."""

    def __init__(self, *, last: int = -1) -> None:
        super().__init__("wandb")
        self.step = last + 1
        self.options: dict[str, Any] = {}
        self.history: list[tuple[int, dict[str, float]]] = []
        self.exit_code: int | None = None
        self.broken = False
        self.Settings = lambda **options: options

    def init(self, **options: Any) -> "FakeWandb":
        if self.broken:
            raise LibraryError("No API key configured")
        self.options = options
        return self

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        if self.broken:
            raise LibraryError
        self.history.append((step, metrics))

    def finish(self, *, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / RUN).mkdir()
    return tmp_path / RUN


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return fake


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


def train(observer: Several | Tracker, *, after: int = 0, until: int) -> None:
    """Steps after+1..until, then a validation."""
    observer.start(num_steps=until, step=after)
    for step in range(after + 1, until + 1):
        observer.step(step_record(step))
    observer.validation(validation_record(until))


class TestTrackers:
    def test_they_are_those_that_a_recipe_may_name(self):
        allowed = get_args(get_args(TrainSettings.model_fields["trackers"].annotation)[0])
        assert set(TRACKERS) == set(allowed)

    @pytest.mark.parametrize("name", TRACKERS)
    def test_the_extra_of_the_hint_installs_the_package(self, name: str):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert any(re.match(rf"{name}(-skinny)?\b", requirement) for requirement in extras["tracking"])

    @pytest.mark.parametrize("tracker", TRACKERS.values())
    def test_a_missing_package_is_an_error_that_says_what_to_install(self, folder, monkeypatch, tracker: type[Tracker]):
        monkeypatch.setitem(sys.modules, tracker.module, None)
        with pytest.raises(MissingExtraError, match=tracker.name) as caught:
            tracker(folder, recipe=RECIPE, warn=print)
        assert "pip install 'tunesmith[tracking]'" in caught.value.hint

    def test_a_folder_of_the_packages_name_is_not_the_package(self, folder, tmp_path, monkeypatch):
        (tmp_path / "wandb").mkdir()
        monkeypatch.delitem(sys.modules, "wandb", raising=False)
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        with pytest.raises(MissingExtraError, match="only a folder"):
            WeightsAndBiases(folder, recipe=RECIPE, warn=print)
        monkeypatch.delitem(sys.modules, "wandb", raising=False)

    def test_one_that_cannot_start_stops_the_run_before_a_step(self, folder, wandb):
        wandb.broken = True
        tracker = WeightsAndBiases(folder, recipe=RECIPE, warn=print)
        with pytest.raises(RecipeError, match="wandb, which cannot be started: LibraryError: No API key") as caught:
            tracker.start(num_steps=1, step=0)
        assert "wandb login" in caught.value.hint

    def test_one_that_fails_later_warns_once_and_training_goes_on(self, folder, wandb):
        listener = Listener()
        with recording(folder, trackers=["wandb"], recipe=RECIPE, observer=listener) as observer:
            observer.start(num_steps=4, step=0)
            observer.step(step_record(1))
            wandb.broken = True
            for step in (2, 3, 4):
                observer.step(step_record(step))
        warnings = [text for kind, text in listener.told if kind == "message"]
        assert len(warnings) == 1
        assert warnings[0].startswith("wandb failed at step 2 and gets nothing more of this run: LibraryError.")
        assert [step for kind, step in listener.told if kind == "step"] == [1, 2, 3, 4]
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4
        assert wandb.exit_code is None

    def test_a_failure_while_closing_is_a_warning_too(self, folder, mlflow):
        listener = Listener()
        with recording(folder, trackers=["mlflow"], recipe=RECIPE, observer=listener) as observer:
            train(observer, until=2)
            mlflow.down = True
        warnings = [text for kind, text in listener.told if kind == "message"]
        assert len(warnings) == 1
        assert "LibraryError: no route to host. Training goes on" in warnings[0]

    @pytest.mark.parametrize(
        ("error", "status", "exit_code"),
        [(None, "FINISHED", 0), (KeyboardInterrupt, "KILLED", 255), (ValueError, "FAILED", 1)],
    )
    def test_they_learn_how_the_run_ended(self, folder, mlflow, wandb, error, status, exit_code):
        expected = contextlib.suppress(error) if error else contextlib.nullcontext()
        names = ["mlflow", "wandb"]
        with expected, recording(folder, trackers=names, recipe=RECIPE, observer=Silent()) as observer:
            train(observer, until=1)
            if error:
                raise error
        assert (mlflow.runs[0].status, wandb.exit_code) == (status, exit_code)

    def test_what_a_library_prints_does_not_reach_standard_output(self, folder, mlflow, capsys):
        with recording(folder, trackers=["mlflow"], recipe=RECIPE, observer=Silent()) as observer:
            train(observer, until=1)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "View run at" in captured.err


class TestMLflow:
    def run(self, folder: Path, *, after: int = 0, until: int, recipe: dict[str, Any] = RECIPE) -> None:
        with MLflow(folder, recipe=recipe, warn=pytest.fail) as tracker:
            train(tracker, after=after, until=until)

    def test_numbers_and_the_recipe_arrive(self, folder, mlflow):
        self.run(folder, until=12)
        (run,) = mlflow.runs
        assert (run.name, run.status, list(mlflow.experiments)) == (RUN, "FINISHED", ["tunesmith"])
        assert run.params == {key: str(value) for key, value in FLAT.items()}
        losses = [metric for metric in run.metrics if metric[0] == "loss"]
        assert losses == [("loss", 1.5, 1_700_000_000_000 + 1000 * step, step) for step in range(1, 13)]
        assert ("validation_loss", 1.25, 1_700_000_012_000, 12) in run.metrics
        keys = {"loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "epoch", "validation_loss"}
        assert {metric[0] for metric in run.metrics} == keys

    def test_a_request_holds_the_steps_of_five_seconds(self, folder, mlflow):
        self.run(folder, until=12)  # a step a second: the recipe, steps 1, 6 and 11, and the end
        assert mlflow.requests == 5

    def test_a_resumed_run_goes_on_in_the_same_place(self, folder, mlflow):
        self.run(folder, until=4)
        self.run(folder, after=3, until=6, recipe={"name": "something else"})
        assert len(mlflow.runs) == 1
        assert mlflow.runs[0].params["name"] == "demo"
        assert [m[3] for m in mlflow.runs[0].metrics if m[0] == "loss"] == [1, 2, 3, 4, 4, 5, 6]

    def test_another_run_is_another_run(self, folder, mlflow, monkeypatch):
        self.run(folder, until=1)
        self.run(folder.with_name("demo-ffffffff"), until=1)
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "team")
        self.run(folder, until=1)
        assert [(run.name, run.experiment) for run in mlflow.runs] == [(RUN, "0"), ("demo-ffffffff", "0"), (RUN, "1")]

    def test_large_recipes_keep_the_servers_limits(self, folder, mlflow):
        recipe = {f"{i} files at hf://{'folder/' * 40}": "x" * 7000 for i in range(230)}
        self.run(folder, until=1, recipe=recipe)
        assert len(mlflow.runs[0].params) == 230


class TestWeightsAndBiases:
    def test_numbers_and_the_recipe_arrive(self, folder, wandb):
        with WeightsAndBiases(folder, recipe=RECIPE, warn=pytest.fail) as tracker:
            train(tracker, until=2)
        assert (wandb.options["id"], wandb.options["name"], wandb.options["project"]) == (RUN, RUN, "tunesmith")
        assert (wandb.options["resume"], wandb.options["dir"]) == ("allow", str(folder))
        assert wandb.options["config"] == RECIPE
        assert [step for step, _ in wandb.history] == [1, 2, 2]
        assert wandb.history[0][1] == {k: v for k, v in step_record(1).items() if k not in ("step", "time")}
        assert wandb.history[2][1] == {"validation_loss": 1.25}
        assert wandb.exit_code == 0

    def test_steps_that_the_server_has_are_not_sent_again(self, folder, monkeypatch):
        fake = FakeWandb(last=5)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        with WeightsAndBiases(folder, recipe=RECIPE, warn=pytest.fail) as tracker:
            train(tracker, after=3, until=7)
        assert [step for step, _ in fake.history] == [6, 7, 7]


class TestTensorBoard:
    def run(self, folder: Path, *, after: int = 0, until: int) -> None:
        with TensorBoard(folder, recipe=RECIPE, warn=pytest.fail) as tracker:
            train(tracker, after=after, until=until)

    def read(self, folder: Path) -> Any:
        module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", exc_type=ImportError)
        events = module.EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        return events

    def test_numbers_and_the_recipe_arrive_and_a_resumed_run_shows_each_step_once(self, folder):
        pytest.importorskip("tensorboard")
        self.run(folder, until=5)
        events = self.read(folder)
        assert [(e.step, e.value, e.wall_time) for e in events.Scalars("loss")] == [
            (step, 1.5, 1_700_000_000.0 + step) for step in range(1, 6)
        ]
        assert [(e.step, e.value) for e in events.Scalars("validation_loss")] == [(5, 1.25)]
        assert {"learning_rate", "grad_norm", "tokens", "tokens_per_second"} <= set(events.Tags()["scalars"])
        text = events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
        assert text.splitlines() == [f"    {key}: {json.dumps(value)}" for key, value in FLAT.items()]

        self.run(folder, after=3, until=6)
        assert [e.step for e in self.read(folder).Scalars("loss")] == [1, 2, 3, 4, 5, 6]
