"""A run that is killed, stopped or refused by the disk goes on to the same bytes. benchmarks/kill_test.py tries every place.

Each trial is the program itself in a process of its own (tests/faults/), and ends in a comparison of the model's files, the
checkpoints, the metrics and the summary with those of the uninterrupted run.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from faults.project import (
    WORKSPACE,
    Left,
    clear,
    counted,
    fault_at,
    go_on,
    left,
    make_project,
    runs,
    survived,
    train,
)
from faults.server import Server

from tunesmith.train import checkpoint

LIMIT_SECONDS = 10.0
TERM, INT, KILL = 15, 2, 9


@dataclass
class Trials:
    """The server, a project, and what uninterrupted runs of it leave."""

    server: Server
    folder: Path

    def __post_init__(self) -> None:
        self._whole: dict[str, tuple[Left, list[str]]] = {}

    def whole(self, case: str) -> tuple[Left, list[str]]:
        """What is left of a run, and its boundaries."""
        if case not in self._whole:
            self._whole[case] = counted(self.server, case, folder=self.folder)
        return self._whole[case]

    def survive(
        self, case: str, *, statuses: tuple[int, ...], fault: dict[str, Any] | None = None, **given: Any
    ) -> Any:
        """See `survived`."""
        full = None if fault is None else fault_at(None, folder=self.folder, log=str(self.folder / "log")) | fault
        (self.folder / "log").unlink(missing_ok=True)
        expected, _ = self.whole(case)
        return survived(
            self.server, case, folder=self.folder, expected=expected, statuses=statuses, fault=full, **given
        )

    def boundary(self, case: str, call: str, number: int) -> int:
        """Where the run makes such a call; negative numbers count from its end."""
        return [at for at, name in enumerate(self.whole(case)[1], start=1) if name == call][number]

    def seconds_after_signal(self, ended: float) -> float:
        """From the first signal of the last trial to its end."""
        (line,) = [line for line in (self.folder / "log").read_text("utf-8").splitlines() if line.startswith("signal")]
        return ended - float(line.split()[1])


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    folder = tmp_path_factory.mktemp("killed")
    make_project(folder)
    with Server() as server:
        yield Trials(server, folder)


# ----------------------------------------------------------------------------------------------------------- killed


@pytest.mark.parametrize(
    ("case", "kind", "call", "number"),
    [
        ("instruction-lora", "kill", "rename", 0),  # the prepared rows
        ("instruction-lora", "kill", "unlink", -2),
        ("instruction-full", "half", "serialize", 3),
        ("instruction-full", "kill", "commit", -1),  # what became of the run
        ("instruction-qlora", "half", "write", -4),
        ("instruction-qlora", "kill", "replace", -3),
        ("classification-lora", "kill", "mkdir", -1),
        ("classification-lora", "half", "write", -1),  # run.json
    ],
)
def test_killed_at_a_write(trials: Trials, case: str, kind: str, call: str, number: int) -> None:
    fault = {"at": trials.boundary(case, call, number), "kind": kind}
    trials.survive(case, statuses=(-KILL,), fault=fault)


@pytest.mark.parametrize(
    ("case", "phase", "number"),
    [
        ("instruction-full", "micro-batch", 2),  # gradients of one micro-batch are there
        ("instruction-lora", "update", 2),
        ("classification-lora", "finishing the head", 1),
    ],
)
def test_killed_while_it_computes(trials: Trials, case: str, phase: str, number: int) -> None:
    trials.survive(case, statuses=(-KILL,), fault={"phase": phase, "call": number, "signals": [KILL]})


def test_killed_again_while_it_goes_on(trials: Trials) -> None:
    case = "instruction-lora"
    expected, names = trials.whole(case)
    clear(trials.folder)
    for at in (len(names) // 2, len(names) // 3):
        fault = fault_at(at, folder=trials.folder, kind="half")
        ended = train(trials.server, case, folder=trials.folder, resume=at == len(names) // 3, fault=fault)
        assert ended.status == -KILL
    go_on(trials.server, case, folder=trials.folder)
    assert left(trials.folder) == expected


# ------------------------------------------------------------------------------------------------- refused by the disk


@pytest.mark.parametrize(
    ("case", "kind", "call", "number"),
    [
        ("instruction-lora", "ENOSPC", "serialize", 2),
        ("instruction-full", "ENOSPC", "commit", -1),
        ("instruction-lora", "EIO", "fsync", -1),
        ("classification-lora", "EIO", "serialize", -2),  # the model
    ],
)
def test_an_error_of_the_disk(trials: Trials, case: str, kind: str, call: str, number: int) -> None:
    fault = {"at": trials.boundary(case, call, number), "kind": kind}
    ended = trials.survive(case, statuses=(2,), fault=fault)
    assert "--resume" in ended.err.splitlines()[-1]


@pytest.mark.parametrize("call", ["serialize", "write"])
def test_a_write_of_fewer_bytes_than_asked_for_is_gone_on_with(trials: Trials, call: str) -> None:
    case = "instruction-lora"
    trials.survive(case, statuses=(0,), fault={"at": trials.boundary(case, call, 1), "kind": "short"})


def test_the_system_itself_refuses_to_write(trials: Trials) -> None:
    """Full tuning: a checkpoint is three times the model, which would still fit."""
    size = (trials.folder / "base" / "model.safetensors").stat().st_size
    ended = trials.survive("instruction-full", statuses=(2,), largest_file_bytes=2 * size)
    assert "File too large" in ended.err
    assert "ulimit" in ended.err.splitlines()[-1]


def test_the_checkpoint_before_is_used_with_a_word(trials: Trials) -> None:
    case = "instruction-lora"
    expected, _ = trials.whole(case)
    clear(trials.folder)
    fault = fault_at(trials.boundary(case, "serialize", -1), folder=trials.folder, kind="kill")  # the model
    assert train(trials.server, case, folder=trials.folder, fault=fault).status == -KILL
    (run,) = runs(trials.folder)
    newest, before = checkpoint.steps(run / "checkpoints")
    (newest / checkpoint.TENSORS).write_bytes(b"damaged")
    ended = go_on(trials.server, case, folder=trials.folder)
    assert (
        f"{newest.name}: the checkpoint's bytes are not those written; {before.name}, the one before it, is used"
        in (ended.err.replace("\n", " "))
    )
    assert left(trials.folder) == expected


# ------------------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(
    ("phase", "call", "numbers"),
    [
        ("loading the base", 1, [TERM]),
        ("preparing data", 1, [INT]),
        ("inserting the method", 1, [TERM]),
        ("entering the run", 1, [INT]),
        ("micro-batch", 1, [TERM]),  # the first forward pass
        ("micro-batch", 2, [INT]),  # amid accumulation
        ("update", 2, [TERM]),
        ("validation", 2, [INT]),
        ("saving", 1, [TERM]),
        ("saving", 2, [TERM, TERM]),
        ("saving", 3, [INT, TERM]),
        ("reading back", 2, [INT]),
        ("the best step", 1, [TERM]),
        ("finishing the head", 1, [TERM]),
        ("writing the model", 1, [INT]),
    ],
)
def test_a_signal_in_any_phase(trials: Trials, phase: str, call: int, numbers: list[int]) -> None:
    statuses = tuple(128 + number for number in numbers)
    fault = {"phase": phase, "call": call, "signals": numbers}
    ended = trials.survive("classification-lora", statuses=statuses, fault=fault)
    assert trials.seconds_after_signal(ended.ended) < LIMIT_SECONDS


def test_a_signal_once_the_end_is_being_written_changes_nothing(trials: Trials) -> None:
    fault = {"phase": "writing the summary", "signals": [TERM]}
    trials.survive("instruction-lora", statuses=(0,), fault=fault)


@pytest.mark.parametrize("number", [TERM, INT])
def test_a_signal_while_it_evaluates(trials: Trials, number: int) -> None:
    folder, server = trials.folder, trials.server
    counted(server, "instruction-lora", folder=folder)
    evaluate = ["evaluate", "latest", "--workspace", WORKSPACE]
    log = folder / "log"
    log.unlink(missing_ok=True)
    fault = fault_at(None, folder=folder, log=str(log)) | {"phase": "evaluating", "signals": [number]}
    ended = server.run(evaluate, folder=folder, fault=fault)
    assert (ended.status, ended.err.splitlines()[-1]) == (128 + number, "stopped")
    assert trials.seconds_after_signal(ended.ended) < LIMIT_SECONDS
    assert not (runs(folder)[0] / "evaluation.json").exists()
    assert server.run(evaluate, folder=folder).status == 0
    assert (runs(folder)[0] / "evaluation.json").exists()
