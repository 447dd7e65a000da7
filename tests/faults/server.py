"""Commands of the program, each in a fork of one process that has imported everything: a few of them a second.

    server = Server(); ended = server.run(["train", "r.yaml"], folder=..., fault={...}, kill_after=0.3)

In the child the fault layer is installed, and then `tunesmith.cli.main()` runs as from a shell. The parent never computes
anything, so that no thread exists when it forks.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

TESTS = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 120.0


@dataclass(frozen=True)
class Ended:
    """How a command ended: its status (minus the signal where one killed it), what it said, and when."""

    status: int
    out: str
    err: str
    seconds: float
    ended: float  # on the monotonic clock, which all processes share


class Server:
    """The process that forks. Use it as a context manager."""

    def __enter__(self) -> Self:
        paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(p for p in paths if p),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.server"],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        return self

    def __exit__(self, *details: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(
        self,
        arguments: list[str],
        *,
        folder: Path,
        fault: dict[str, Any] | None = None,
        kill_after: float | None = None,
        largest_file_bytes: int | None = None,
    ) -> Ended:
        """One command in `folder`; killed after so many seconds, or in need of larger files than it may write."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"arguments": arguments, "folder": str(folder), "fault": fault, "kill_after": kill_after}
        self._process.stdin.write(json.dumps(asked | {"largest_file_bytes": largest_file_bytes}) + "\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        out, err = ((folder / name).read_text("utf-8", "replace") for name in ("stdout", "stderr"))
        return Ended(told["status"], out, err, told["seconds"], told["ended"])


def _child(asked: dict[str, Any]) -> int:
    """The program, in the process that was forked for it."""
    os.chdir(asked["folder"])
    for name, number in (("stdout", 1), ("stderr", 2)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    from faults import layer
    from tunesmith.cli import main

    if asked["fault"] is not None:
        os.environ[layer.VARIABLE] = json.dumps(asked["fault"])
    layer.install()
    if asked["largest_file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked["largest_file_bytes"],) * 2)
    sys.argv = ["tunesmith", *asked["arguments"]]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _forked(asked: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = _child(asked)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)
    limit = asked["kill_after"] or LIMIT_SECONDS
    while (waited := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() - started > limit:
            os.kill(child, signal.SIGKILL)
            waited = os.waitpid(child, 0)
            break
        time.sleep(0.002)
    ended = time.monotonic()
    return {"status": os.waitstatus_to_exitcode(waited[1]), "seconds": ended - started, "ended": ended}


def main() -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    import gc

    import bitsandbytes  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import tunesmith.api
    import tunesmith.chat
    import tunesmith.combining
    import tunesmith.texts  # noqa: F401

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # who was started in the background ignores it
    with contextlib.suppress(ImportError):  # half a second of every load, which transformers keeps
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(_forked(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
