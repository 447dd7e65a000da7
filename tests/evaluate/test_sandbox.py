"""Code that a model wrote: what passes, what only pretends to, and what it cannot reach."""

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tunesmith.errors import RecipeError
from tunesmith.evaluate import sandbox
from tunesmith.evaluate.sandbox import Program, all_passed, check_enforced, passed
from tunesmith.evaluate.sandboxed import ALLOWED, ARCHITECTURES, filter_program

PACKAGE = Path(sandbox.__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def enforced() -> None:
    try:
        check_enforced()
    except RecipeError as error:
        pytest.skip(error.message)


RIGHT = "def add(a, b):\n    return a + b\n"
WRITE = "import os\nfor n in range(64):\n    try:\n        os.write(n, b'{text}')\n    except OSError:\n        pass\n"
TESTS = "assert add(1, 2) == 3\nassert add('a', 'b') == 'ab'"


def test_right_code_passes_and_wrong_code_does_not():
    programs = [
        Program(RIGHT, TESTS),
        Program(RIGHT.replace("+", "*"), TESTS),
        Program("def add(:\n", TESTS),
        Program("", TESTS),
    ]
    assert all_passed([*programs, programs[0]]) == [True, False, False, False, True]


@pytest.mark.parametrize(
    "code",
    [
        "import collections, dataclasses, datetime, decimal, fractions, functools, heapq, itertools, json, math, re, string",
        "import hashlib, bisect, typing, enum, statistics, operator, copy, unicodedata, zoneinfo, random\nrandom.random()",
        "import time\nassert time.time() > 0 and time.perf_counter() > 0\ntime.sleep(0.01)",
        "import sys\nsys.setrecursionlimit(3000)\ndef f(n):\n    return n and f(n - 1)\nf(2000)",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int' = 1\nassert A() == A(1)",
        "import logging, traceback, collections\nT = collections.namedtuple('T', 'a b')\nlogging.error('x')\nprint(T(1, 2))",
        "import io, contextlib\nwith contextlib.redirect_stdout(io.StringIO()) as o:\n    print(1)\nassert o.getvalue()",
        "x = [0] * 10_000_000\nif __name__ == '__main__':\n    raise SystemExit(1)",
        "import os\nos.environ.get('HOME')\nos.cpu_count()\nassert os.getcwd() == '/'",
    ],
)
def test_ordinary_code_runs(code):
    assert passed(Program(code, ""))


@pytest.mark.parametrize(
    "code",
    [
        "import sys\nsys.exit(0)",
        "raise SystemExit(0)",
        "import os\nos._exit(0)",
        "def add(a, b):\n    import os\n    os._exit(0)",
        "def add(a, b):\n    raise SystemExit(0)",
        "print('locked')\nprint('passed')",
        WRITE.format(text="0" * 32) + "os._exit(0)",
        WRITE.format(text="locked\\n"),
        "import os\nos.closerange(0, 64)",
        "import builtins\nbuiltins.compile = lambda *a: None\nbuiltins.exec = lambda *a: None",
        "import builtins\nbuiltins.AssertionError = type('A', (BaseException,), {})",
        "import os, sys\nos._exit = sys.exit = lambda code: None\nimport atexit\natexit.register(print, 'passed')",
        "print(open(__import__('sys').modules['__main__'].__file__).read())",
        "import json, sys\nsys.stdin.read()",
        "input()",
        "import ctypes\nctypes.string_at(0)",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(n):\n    return f(n + 1)\nf(0)",
        "(" * 100_000,
        "x = 'a' * (1 << 31)",
        "x = []\nwhile True:\n    x.append(' ' * 10_000_000)",
    ],
)
def test_what_does_not_compute_the_answer_does_not_pass(code):
    assert not passed(Program(code, "assert add(1, 2) == 3"))


@pytest.mark.parametrize(
    "code",
    [
        "while True:\n    pass",
        "import time\ntime.sleep(10 ** 6)",
        "while True:\n    print('flood' * 1000)",
        "9 ** 9 ** 9",
    ],
)
def test_what_does_not_end_is_ended(code):
    started = time.monotonic()
    assert not passed(Program(code, ""), seconds=1)
    assert time.monotonic() - started < 30


def test_a_flood_on_the_channel_is_bounded():
    flood = WRITE.format(text="x" * 60_000).replace("\n", "\n    ")
    code = f"while True:\n    {flood}"
    assert not passed(Program(code, ""), seconds=1)


def reaches(action: str) -> bool:
    """Whether the action gets anywhere: a program that would do harm ends without an error."""
    return passed(Program(action, ""))


def test_it_reaches_nothing_outside(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o666)
    tmp_path.chmod(0o777)
    for action in (
        f"open({str(secret)!r}).read()",
        f"open({str(secret)!r}, 'a').write('x')",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os\nos.listdir({str(tmp_path)!r})",
        f"import os\nos.rename({str(secret)!r}, {str(tmp_path / 'new')!r})",
        f"import os\nos.truncate({str(secret)!r}, 0)",
        f"import os\nos.symlink('/', {str(tmp_path / 'new')!r})",
        f"import os\nos.utime({str(secret)!r})",
        "open('/etc/shadow').read()",
        "open('/etc/passwd').read()",
        f"open({str(Path(__file__))!r}).read()",
        "open('/proc/self/environ').read()",
        f"open('/proc/{os.getpid()}/cmdline').read()",
        "import tempfile\ntempfile.TemporaryFile()",
        "import socket\nsocket.create_connection(('127.0.0.1', 9))",
        "import socket\nsocket.socket(socket.AF_UNIX)",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')",
        "import os\nos.fork()",
        "import os\nwhile True:\n    os.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nassert os.system('true') == 0",
        "import threading\nthreading.Thread(target=print).start()",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
        f"import os\nos.kill({os.getpid()}, 0)",
        "import os\nos.setpriority(os.PRIO_PROCESS, 0, 10)",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (100, 100))",
        f"import resource\nresource.prlimit({os.getpid()}, resource.RLIMIT_CPU)",
        f"import fcntl\nfcntl.fcntl(0, fcntl.F_SETOWN, {os.getpid()})",
        "import fcntl, os\nfcntl.fcntl(0, fcntl.F_SETFL, os.O_ASYNC)",
        "import os\nos.memfd_create('x')",
        "import mmap\nmmap.mmap(-1, 1 << 31)",
    ):
        assert not reaches(action), action
    assert secret.read_text() == "secret"
    assert os.listdir(tmp_path) == ["secret"]


def test_environment_and_site_packages_are_not_there(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "value")
    assert passed(
        Program(
            "import os, sys", "assert 'SECRET_KEY' not in os.environ\nassert not any('site-' in p for p in sys.path)"
        )
    )
    assert not passed(Program("import tunesmith", ""))


def copied(tmp_path: Path, *, without: str) -> Path:
    """The inside of the sandbox, with one of the steps left out."""
    text = sandbox.INSIDE.read_text()
    calls = [line for line in text.splitlines() if line.strip().startswith(f"{without}(")]
    assert len(calls) == 1
    (tmp_path / "inside.py").write_text(text.replace(calls[0], calls[0].replace(calls[0].strip(), "pass")))
    return tmp_path / "inside.py"


@pytest.mark.parametrize("step", ["restrict_files", "restrict_calls", "restrict_amounts"])
def test_every_protection_is_tried_before_anything_runs(tmp_path, monkeypatch, step):
    monkeypatch.setattr(sandbox, "INSIDE", copied(tmp_path, without=step))
    with pytest.raises(RecipeError, match=r"cannot be shut in on this machine, so it is not run: it can") as caught:
        check_enforced.__wrapped__()
    assert "Landlock" in caught.value.hint


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("restrict_calls(library)", "no seccomp"),
        ("drop_capabilities(library)", "no seccomp"),
        ("os.chdir('/')", "ended with 1"),
    ],
)
def test_nothing_runs_where_a_protection_cannot_be_had(tmp_path, monkeypatch, step, message):
    failing = step.replace("'", '"')
    text = sandbox.INSIDE.read_text()
    assert text.count(f"    {failing}\n") == 1
    (tmp_path / "inside.py").write_text(text.replace(f"    {failing}\n", '    raise OSError(38, "no seccomp")\n'))
    monkeypatch.setattr(sandbox, "INSIDE", tmp_path / "inside.py")
    with pytest.raises(RecipeError, match=message):
        passed(Program(RIGHT, TESTS))


def test_the_filter_allows_the_list_and_nothing_else(monkeypatch):
    for machine, (column, architecture) in ARCHITECTURES.items():
        monkeypatch.setattr(platform, "machine", lambda name=machine: name)
        program = filter_program()
        allowed = {numbers[column] for numbers in ALLOWED.values()} - {None}
        found = {
            number
            for number in range(-1, 600)
            if number >= 0 and decided(program, architecture, number, 7, 7) == "allow"
        }
        assert found == allowed
        assert len(allowed) == sum(numbers[column] is not None for numbers in ALLOWED.values())
        limit, control = {"x86_64": (302, 72), "aarch64": (261, 25)}[machine]
        assert [decided(program, architecture, limit, pid) for pid in (0, 1)] == ["allow", "refuse"]
        commands = [
            command for command in range(2000) if decided(program, architecture, control, 5, command) == "allow"
        ]
        assert commands == [0, 1, 2, 3, 1030]
        assert decided(program, 1, 0, 0) == "kill"
        assert decided(program, architecture, 0x40000000 | 1, 0) == "refuse"


def decided(program: list[tuple[int, int, int, int]], architecture: int, number: int, *arguments: int) -> str:
    """What the kernel would do: a plain reading of the program."""
    data = {0: number, 4: architecture} | {16 + 8 * place: argument for place, argument in enumerate(arguments)}
    value, place = 0, 0
    while True:
        code, equal, other, operand = program[place]
        place += 1
        if code == 0x20:
            value = data[operand]
        elif code == 0x15:
            place += equal if value == operand else other
        else:
            return {0x80000000: "kill", 0x7FFF0000: "allow"}.get(operand, "refuse")


ELSEWHERE = """
import os, sys
sys.path.insert(0, {folder!r})
from tunesmith.evaluate.sandbox import Program, check_enforced, passed
assert os.getuid() == 65534
check_enforced()
assert passed(Program("import math, json", "assert math.pi > 3"))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="the other tests run as an unprivileged user already")
def test_it_holds_for_an_unprivileged_user_too(tmp_path_factory):
    python = next((p for p in ("/usr/bin/python3", "/usr/local/bin/python3") if Path(p).exists()), None)
    if (
        python is None
        or subprocess.run([python, "-c", "import sys; assert sys.version_info >= (3, 11)"], check=False).returncode
    ):
        pytest.skip("there is no Python 3.11 that every user can read")
    folder = Path("/tmp") / f"tunesmith-sandbox-{os.getpid()}"
    try:
        (folder / "tunesmith" / "evaluate").mkdir(parents=True)
        for name in (
            "__init__.py",
            "errors.py",
            "evaluate/__init__.py",
            "evaluate/sandbox.py",
            "evaluate/sandboxed.py",
        ):
            shutil.copy(PACKAGE / name, folder / "tunesmith" / name)
        code = ELSEWHERE.format(folder=str(folder))
        done = subprocess.run(
            [python, "-c", code], user=65534, group=65534, cwd="/", env={}, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
    finally:
        shutil.rmtree(folder)


def test_other_machines_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(RecipeError, match="this is darwin"):
        check_enforced.__wrapped__()
