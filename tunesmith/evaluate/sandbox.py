"""Running code that a model wrote, where it can do no harm: one process without files, network, threads or time.

Each program has an interpreter of its own (`sandboxed.py`, which says what it gives up). It has passed if that process wrote
a random token after the last test, and nothing else; leaving early, printing, or crashing is not passing. A program
shares a process with its tests, so one that sets out to deceive them can, as by returning what equals everything; it cannot
reach beyond that process.

No container and no privilege is needed: Landlock and seccomp hold for whoever asks for them. Where the kernel does not
enforce all of it, nothing is run.
"""

import functools
import json
import os
import platform
import secrets
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import RecipeError
from tunesmith.evaluate.sandboxed import ARCHITECTURES, LOCKED

SECONDS = 5
MEMORY_BYTES = 1 << 30
PROCESSES = 2  # at a time
INSIDE = Path(__file__).with_name("sandboxed.py")
SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
SYSTEM_FILES = ("/dev/null", "/dev/urandom", "/usr/share/zoneinfo", "/etc/localtime")


@dataclass(frozen=True, slots=True)
class Program:
    """Python code, and statements that run after it and raise where it is wrong."""

    code: str
    tests: str


def all_passed(programs: Sequence[Program], *, seconds: int = SECONDS, memory_bytes: int = MEMORY_BYTES) -> list[bool]:
    """Whether each program passed its tests: some at a time, equal ones once, with `seconds` of processor time for each.

    RecipeError where this machine cannot enforce what `sandboxed.py` promises.
    """
    check_enforced()
    run = functools.partial(passed, seconds=seconds, memory_bytes=memory_bytes)
    different = list(dict.fromkeys(programs))
    with ThreadPoolExecutor(min(PROCESSES, os.cpu_count() or 1)) as pool:
        found = dict(zip(different, pool.map(run, different), strict=True))
    return [found[program] for program in programs]


def passed(program: Program, *, seconds: int = SECONDS, memory_bytes: int = MEMORY_BYTES) -> bool:
    """Whether the program passed its tests. RecipeError where it could not be shut in, and then it was not run."""
    token = secrets.token_hex(16)
    told, tell = os.pipe()
    try:
        request = {
            "program": program.code,
            "tests": program.tests,
            "token": token,
            "told": tell,
            "seconds": seconds,
            "memory_bytes": memory_bytes,
            "readable": _readable(),
        }
        with tempfile.TemporaryFile() as file:
            file.write(json.dumps(request).encode())
            file.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(INSIDE)],
                stdin=file,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(tell,),
                env={},
                cwd="/",
                start_new_session=True,
            )
        os.close(tell)
        tell = -1
        expected = LOCKED + token.encode()
        try:
            output = _read(told, most=len(expected) + 1000, seconds=2.0 * seconds + 5.0)
        finally:
            process.kill()  # it has no others
            process.wait()
    finally:
        for descriptor in (told, tell):
            if descriptor >= 0:
                os.close(descriptor)
    if not output.startswith(LOCKED):
        raise _refusal(output.decode("utf-8", "replace") or f"the interpreter ended with {process.returncode}")
    return output == expected


def _read(descriptor: int, *, most: int, seconds: float) -> bytes:
    """What is written until the other end is closed, `most` bytes came or the time is over."""
    output, deadline = b"", time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while len(output) < most and selector.select(max(0.0, deadline - time.monotonic())):
            piece = os.read(descriptor, most - len(output))
            if not piece:
                break
            output += piece
    return output


@functools.cache
def _readable() -> list[str]:
    """Files and folders that an interpreter reads: its standard library and shared libraries, time zones, devices."""
    library = os.path.dirname(os.path.realpath(os.__file__))
    own = [library, os.path.join(os.path.realpath(sys.base_prefix), "lib")]
    return [*own, *SYSTEM_LIBRARIES, *SYSTEM_FILES]


def _refusal(why: str) -> RecipeError:
    return RecipeError(
        f"code that a model wrote cannot be shut in on this machine, so it is not run: {why}",
        hint="use Linux 5.13 or newer with Landlock and seccomp, or leave code_passes and pass_at_k out of evaluate.metrics",
    )


# ---- does it hold ----------------------------------------------------------------------------------------------------

PROBE = """
import ctypes, _thread, os, socket
def refused(action):
    try:
        result = action()
    except (OSError, MemoryError, RuntimeError):
        return True
    return isinstance(result, int) and result == -1
library = ctypes.CDLL(None)
"""
PROBES = {
    "it can open a socket": "socket.socket()",
    "it can open a pair of sockets": "socket.socketpair()",
    "it can read files of others": "open({secret!r})",
    "it can list a folder of others": "os.listdir({folder!r})",
    "it can read about other processes": "open('/proc/self/status')",
    "it can write files": "open({folder!r} + '/new', 'w')",
    "it can change files": "open({secret!r}, 'r+')",
    "it can remove files": "os.remove({secret!r})",
    "it can make folders": "os.mkdir({folder!r} + '/new')",
    "it can change rights": "os.chmod({secret!r}, 0o777)",
    "it can start processes": "os.fork()",
    "it can run other programs": "os.execv('/bin/sh', ['sh', '-c', 'true'])",
    "it can start threads": "_thread.start_new_thread(print, ())",
    "it can send signals": "os.kill(os.getppid(), 0)",
    "it can have signals sent": "__import__('fcntl').fcntl(0, 8, os.getppid())",
    "it can look into other processes": "library.ptrace(16, os.getppid(), None, None)",
    "it can make namespaces": "library.unshare(0x10000000)",
    "it can mount": "library.mount(b'none', b'/tmp', b'tmpfs', 0, None)",
    "it can change who it is": "os.setuid(os.getuid())",
    "it can have more memory": "bytearray({memory_bytes})",
    "it can raise its limits": "__import__('resource').prlimit(os.getppid(), 0, (1, 1))",
}


@functools.cache
def check_enforced() -> None:
    """RecipeError where any of the protections does not hold on this machine: each is tried, once a process."""
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        raise _refusal(f"this is {sys.platform} on {platform.machine()}")
    with tempfile.TemporaryDirectory() as folder:
        secret = Path(folder, "secret")
        secret.write_text("secret")
        given = {"secret": str(secret), "folder": folder, "memory_bytes": MEMORY_BYTES}
        probes = {what: f"assert refused(lambda: {action.format(**given)})" for what, action in PROBES.items()}
        if not passed(Program(PROBE, "\n".join(probes.values()))):
            for what, probe in probes.items():
                if not passed(Program(PROBE, probe)):
                    raise _refusal(what)
            raise _refusal("its protections do not hold together")
        if secret.read_text() != "secret" or len(os.listdir(folder)) != 1:
            raise _refusal("it can change files")
    if passed(Program("while True:\n    pass", ""), seconds=1):
        raise _refusal("an endless loop ends well")
