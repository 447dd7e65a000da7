"""The house's order: imports run upward only, and torch is loaded only where it is used."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "tunesmith"
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.stat().st_size)

# Lower floors first; rooms of one floor do not import each other.
FLOORS: list[set[str]] = [
    {"errors"},
    {"storage"},
    {"data"},
    {"models"},
    {"methods", "objectives", "tasks"},
    {"generate"},
    {"train"},
    {"evaluate"},
    {"registry"},
    {"recipe"},
    {"runs", "export", "checks"},
    {"export_head"},
    {"vocabulary"},
    {"tuned"},
    {"combination"},
    {"combining", "planning", "proving"},
    {"tuning"},
    {"api"},
    {"advice", "bench", "chat", "curve", "data_card", "init", "quickstart", "texts"},  # what single commands do
    {"cli_options"},
    {"cli_data"},
    {"cli", "serve", "studio", "feedback"},
    {"__main__", "__init__"},  # the package hands out the verbs of api.py on first use
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
WITHOUT_TORCH = [
    "errors",
    "storage",
    "data",
    "registry",
    "evaluate.statistics",
    "evaluate.metrics",
    "evaluate.report",
    "generate.scheduler",
]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> list[tuple[int, str]]:
    """Every import in a file, wherever it stands: (line, dotted name)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are written in full"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_upward_only(path: Path) -> None:
    room = room_of(path)
    assert room in FLOOR_OF, f"the house has no room '{room}'"
    for line, name in imported(path):
        package, _, rest = name.partition(".")
        if package != "tunesmith" or not rest:
            continue
        other = rest.partition(".")[0]
        allowed = other == room or FLOOR_OF.get(other, len(FLOORS)) < FLOOR_OF[room]
        assert allowed, f"{path}:{line}: {room} imports {name}, which stands above it"


def test_only_models_and_methods_know_transformers() -> None:
    for path in FILES:
        if room_of(path) not in ("models", "methods"):
            for line, name in imported(path):
                assert name.partition(".")[0] not in ("transformers", "peft"), f"{path}:{line}: imports {name}"


def test_attributes_of_models_are_not_guessed_outside_models() -> None:
    for path in FILES:
        if room_of(path) in ("models", "methods"):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("getattr", "hasattr")
            ):
                subject = ast.unparse(node.args[0])
                assert not any(word in subject for word in ("model", "causal", "config")), f"{path}:{node.lineno}"


def loaded_after(code: str) -> set[str]:
    """The top-level packages loaded by a fresh interpreter that ran `code`."""
    report = "\nimport json, sys\nprint(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_rooms_that_promise_it_do_not_load_torch() -> None:
    modules = [module_of(p) for p in FILES]
    promised = [m for m in modules if any(f"{m}.".startswith(f"tunesmith.{room}.") for room in WITHOUT_TORCH)]
    assert len(promised) > 15
    loaded = loaded_after("\n".join(f"import {module}" for module in promised))
    assert "numpy" in loaded
    assert not loaded & {"torch", "transformers", "peft"}


HELP = """
import contextlib, io
from tunesmith.cli import main
import sys
sys.argv = ["tunesmith", *{arguments}]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
    main()
assert "{word}" in out.getvalue(), out.getvalue()
"""


@pytest.mark.skipif(not (PACKAGE / "cli.py").is_file(), reason="there is no command line yet")
@pytest.mark.parametrize(("arguments", "word"), [(["--help"], "train"), (["train", "--help"], "recipe")])
def test_help_does_not_wait_for_torch(arguments: list[str], word: str) -> None:
    loaded = loaded_after(HELP.format(arguments=arguments, word=word))
    assert "tunesmith" in loaded
    assert not loaded & {"torch", "transformers", "scipy", "pyarrow", "sqlalchemy", "matplotlib"}
