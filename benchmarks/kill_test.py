"""Does a run that is killed come to the same bytes? Every write boundary of four kinds of run, random moments, full disks.

    python benchmarks/kill_test.py --kills 200

For each of LoRA, full tuning and QLoRA on conversations and LoRA on classes: SIGKILL before every call that changes the
disk, and in the middle of every write; SIGKILL at `--kills` random moments (in all); ENOSPC, EIO and short writes at every
`--errors-every`th boundary; SIGTERM and SIGINT in every phase. After each the run is resumed until it is finished, and
model, checkpoints, metrics and summary are compared with those of the uninterrupted run. Status 3 where any differs.
"""

import argparse
import collections
import contextlib
import itertools
import json
import math
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from _machine import code, command, machine
from faults.layer import NEEDS_ROOM, PHASES, WRITES
from faults.project import CASES, Left, counted, fault_at, make_project, survived
from faults.server import Server

ROOT = Path(__file__).resolve().parent.parent
LIMIT_SECONDS = 10.0
SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
CALLS = {"micro-batch": (1, 2), "saving": (1, 2), "validation": (1, 2)}  # 2: amid accumulation, a save after the first


@dataclass(frozen=True)
class Trial:
    """One run that something befalls."""

    case: str
    kind: str  # kill, half, random, ENOSPC, EIO, short, SIGTERM, SIGINT, twice
    where: str
    fault: dict[str, Any] | None = None
    kill_after: float | None = None

    @property
    def statuses(self) -> tuple[int, ...]:
        """How the first command may end."""
        if self.kind in ("kill", "half"):
            return (-signal.SIGKILL,)
        if self.kind == "random":
            return (-signal.SIGKILL, 0)
        if self.kind in SIGNALS or self.kind == "twice":
            done = self.where == "writing the summary"
            return (0,) if done else (128 + SIGNALS.get(self.kind, signal.SIGTERM),)
        return (0,) if self.kind == "short" else (2, 0)  # 0: an error while tidying up is none


def trials_of(case: str, *, names: list[str], kills: int, errors_every: int) -> Iterator[Trial]:
    """All that befalls runs of a case, of which an uninterrupted one passes the boundaries `names`."""
    for at, name in enumerate(names, start=1):
        yield Trial(case, "kill", name, {"at": at, "kind": "kill"})
        if name in WRITES:
            yield Trial(case, "half", name, {"at": at, "kind": "half"})
        if at % errors_every == 0:
            yield Trial(case, "EIO", name, {"at": at, "kind": "EIO"})
            if name in NEEDS_ROOM:
                yield Trial(case, "ENOSPC", name, {"at": at, "kind": "ENOSPC"})
            if name in WRITES:
                yield Trial(case, "short", name, {"at": at, "kind": "short"})
    for number in range(kills):
        yield Trial(case, "random", f"moment {number}")
    for phase, (kind, number) in itertools.product(PHASES, SIGNALS.items()):
        if phase == "evaluating" or (phase == "finishing the head" and not case.startswith("classification")):
            continue
        for call in CALLS.get(phase, (1,)):
            yield Trial(case, kind, phase, {"phase": phase, "call": call, "signals": [number]})
    for call in CALLS["saving"]:
        yield Trial(case, "twice", "saving", {"phase": "saving", "call": call, "signals": [signal.SIGTERM] * 2})


class Trials:
    """The trials still to be made, and what came of the others; several threads share it, each with a server."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.started = time.monotonic()
        self.head: dict[str, Any] = {
            "command": command(),
            "date": time.strftime("%Y-%m-%d"),
            "code": code(),
            "machine": machine(),
        }
        self.waiting: list[Trial] = []
        self.made: list[Trial] = []
        self.num_killed = 0
        self.failures: list[dict[str, Any]] = []
        self.seconds: dict[str, list[float]] = collections.defaultdict(list)  # from a signal to the end, by phase
        self.boundaries: dict[str, int] = {}
        self.expected: dict[tuple[str, Path], Left] = {}
        self.whole_seconds: dict[str, float] = {}
        self.random = random.Random(0)
        self.until = math.inf

    def prepare(self, case: str, *, servers: list[Server], folders: list[Path], arguments: argparse.Namespace) -> None:
        """Run a case undisturbed for each server (an adapter names its base's folder), and list its trials."""
        for server, folder in zip(servers, folders, strict=True):
            begun = time.monotonic()
            self.expected[case, folder], names = counted(server, case, folder=folder)
            self.whole_seconds[case] = time.monotonic() - begun
        self.boundaries[case] = len(names)
        kills = arguments.kills // len(arguments.cases.split(","))
        for index, trial in enumerate(trials_of(case, names=names, kills=kills, errors_every=arguments.errors_every)):
            if trial.fault is None or "at" not in trial.fault or index % arguments.boundaries_every == 0:
                self.waiting.append(trial)

    def work(self, server: Server, folder: Path) -> None:
        """Make trials until none waits, or the time is up."""
        while self.waiting and time.monotonic() < self.until:
            trial = self.waiting.pop()
            try:
                self._make(trial, server=server, folder=folder)
            except Exception as error:
                what = str(error).replace(str(folder), "")
                failure = asdict(trial) | {"what": what}
                self.failures.append(failure)
                print(json.dumps(failure, indent=1), file=sys.stderr, flush=True)
            self.made.append(trial)
            if len(self.made) % 50 == 0:
                self.write()
                print(f"{len(self.made)} made, {len(self.waiting)} to go", file=sys.stderr, flush=True)

    def _make(self, trial: Trial, *, server: Server, folder: Path) -> None:
        log = folder / "log"
        log.unlink(missing_ok=True)
        fault, kill_after = None, None
        if trial.fault is None:
            kill_after = self.random.uniform(0.02, self.whole_seconds[trial.case])
        else:
            fault = fault_at(None, folder=folder, log=str(log)) | trial.fault
        ended = survived(
            server,
            trial.case,
            folder=folder,
            expected=self.expected[trial.case, folder],
            statuses=trial.statuses,
            fault=fault,
            kill_after=kill_after,
        )
        self.num_killed += ended.status == -signal.SIGKILL
        lines = log.read_text("utf-8").splitlines() if log.exists() else []
        for line in [line for line in lines if line.startswith("signal ")][:1]:
            self.seconds[trial.where].append(ended.ended - float(line.split()[1]))

    def write(self) -> dict[str, Any]:
        """Counts by kind, the longest waits after a signal, and what failed; also into the file."""
        longest = {phase: max(values) for phase, values in sorted(self.seconds.items())}
        report = {
            "seconds": round(time.monotonic() - self.started),
            "boundaries": self.boundaries,
            "not_made": len(self.waiting),
            "trials": _counts(trial.kind for trial in self.made),
            "killed": self.num_killed,
            "killed_by_call": _counts(trial.where for trial in self.made if trial.kind in ("kill", "half")),
            "signals": {p: {"times": len(self.seconds[p]), "longest_seconds": round(s, 3)} for p, s in longest.items()},
            "later_than_10_seconds": [phase for phase, seconds in longest.items() if seconds > LIMIT_SECONDS],
            "failures": self.failures,
        }
        self.out.write_text(json.dumps(self.head | report, indent=1) + "\n", "utf-8")
        return report


def main() -> int:
    """Make all trials, print the counts and write them. Exit code 3 where anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="at random moments, in all")
    parser.add_argument("--errors-every", type=int, default=12)
    parser.add_argument("--boundaries-every", type=int, default=1, help="for a look: only some of them")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no more trials then; they come in any order"
    )
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "kill_test.json"))
    arguments = parser.parse_args()
    trials = Trials(Path(arguments.out))
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folders = [scratch / str(number) for number in range(arguments.processes)]
        for folder in folders:
            make_project(folder)
        servers = [stack.enter_context(Server()) for _ in folders]
        for case in arguments.cases.split(","):
            trials.prepare(case, servers=servers, folders=folders, arguments=arguments)
        trials.random.shuffle(trials.waiting)
        trials.until = trials.started + 60 * arguments.minutes
        workers = [threading.Thread(target=trials.work, args=pair) for pair in zip(servers, folders, strict=True)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    report = trials.write()
    print(json.dumps(report, indent=1))
    return 3 if report["failures"] or report["later_than_10_seconds"] else 0


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(collections.Counter(values).items()))


if __name__ == "__main__":
    raise SystemExit(main())
