"""The documentation says what the code does: the reference, every command, every link, recipe, setting and example."""

import ast
import importlib
import importlib.util
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import typer
import yaml

from tunesmith import cli
from tunesmith.data.formats import READERS
from tunesmith.data.ledger import STATES
from tunesmith.data.settings import DataSettings
from tunesmith.evaluate.metrics import METRICS
from tunesmith.evaluate.settings import EvaluateSettings
from tunesmith.methods import METHODS
from tunesmith.models.base import ENCODERS, SUPPORTED
from tunesmith.objectives import OBJECTIVES
from tunesmith.recipe import parse_recipe
from tunesmith.train.settings import TrainSettings

REPOSITORY = Path(__file__).resolve().parents[1]
GUIDE = sorted(page for page in (REPOSITORY / "docs").glob("*.md") if page.name != "log.md")  # the log says what was
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *GUIDE]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
SETTING = re.compile(r"(data|train|evaluate|method|objective)\.(\w+)(?:: .*|=.*)?")


class Piece(NamedTuple):
    """A piece of a page and where it stands."""

    page: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}: {self.text.splitlines()[0]}"


def blocks(*languages: str) -> Iterator[Piece]:
    """The fenced blocks in one of the languages."""
    for page in PAGES:
        text = page.read_text("utf-8")
        for match in FENCE.finditer(text):
            if match[1] in languages:
                yield Piece(page, text.count("\n", 0, match.start()) + 2, match[2])


def spans() -> Iterator[Piece]:
    """The inline code outside fenced blocks. A backslash before a bar is a table's, not the code's."""
    for page in PAGES:
        text = FENCE.sub(lambda match: "\n" * match[0].count("\n"), page.read_text("utf-8"))
        for match in SPAN.finditer(text):
            yield Piece(page, text.count("\n", 0, match.start()) + 1, match[1].replace("\\|", "|"))


def shell_commands(program: str) -> Iterator[Piece]:
    """The calls of a program in blocks of shell commands, comments and pipes taken apart."""
    for block in blocks("sh"):
        for number, line in enumerate(block.text.splitlines()):
            for part in re.split(r"&&|\|", line.partition(" #")[0]):
                words = part.split()
                if words and Path(words[0]).name == program:
                    yield Piece(block.page, block.line + number, part.strip())


COMMANDS = list(shell_commands("tunesmith"))
INLINE_COMMANDS = [piece for piece in spans() if piece.text.startswith("tunesmith ")]


@pytest.fixture(scope="module")
def make_reference() -> ModuleType:
    """The program docs/make_reference.py."""
    spec = importlib.util.spec_from_file_location("make_reference", REPOSITORY / "docs" / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- the reference ---------------------------------------------------------------------------------------------------


def test_the_reference_is_what_the_code_says(make_reference: ModuleType) -> None:
    assert make_reference.main(["--check"]) == 0, "run: make reference"


def test_a_stale_reference_is_found(make_reference: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "recipe.md"
    assert make_reference.main(["--check", "--out", str(page)]) == 1
    assert make_reference.main(["--out", str(page)]) == 0
    assert make_reference.main(["--check", "--out", str(page)]) == 0
    page.write_text(page.read_text("utf-8").replace("| `16` |", "| `8` |"), "utf-8")
    assert make_reference.main(["--check", "--out", str(page)]) == 1


def test_the_reference_has_every_setting_with_its_default(make_reference: ModuleType) -> None:
    page = make_reference.render()
    for model in (DataSettings, TrainSettings, EvaluateSettings, *METHODS.values(), *OBJECTIVES.values()):
        for name, field in model.model_fields.items():
            if name != "kind":
                row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
                assert field.description, name
                assert row.count(" | ") == 3, row
    assert "| `batch_rows` | whole number, at least 1 | `16` | rows an optimiser step" in page
    assert "| `schedule` | `cosine` or `linear` or `constant` | `cosine` |" in page
    assert "| `mapping` | section of text: text | none |" in page
    assert "| `train` | text or list of text | required |" in page


# ---- commands --------------------------------------------------------------------------------------------------------


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words name, and the words after its name."""
    command: Any = typer.main.get_command(cli.app)
    while hasattr(command, "commands"):
        assert words, "a group without a command"
        assert words[0] in command.commands, f"there is no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


@pytest.mark.parametrize("piece", COMMANDS, ids=str)
def test_commands_in_blocks_parse(piece: Piece) -> None:
    command, words = command_of(shlex.split(piece.text)[1:])
    with command.make_context(piece.text, words) as context:
        assert set(context.params) == {parameter.name for parameter in command.params if parameter.name != "help"}


@pytest.mark.parametrize("piece", INLINE_COMMANDS, ids=str)
def test_commands_in_sentences_exist_with_their_options(piece: Piece) -> None:
    words = shlex.split(piece.text.replace("...", ""))[1:]
    if not words or words[0].startswith("-"):
        return
    command, words = command_of(words)
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known


def test_every_command_is_in_the_guide() -> None:
    mentioned = {tuple(shlex.split(piece.text)[1:3]) for piece in (*COMMANDS, *INLINE_COMMANDS)}
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        for inner in getattr(command, "commands", [""]):
            names = (name, inner) if inner else (name,)
            assert any(words[: len(names)] == names for words in mentioned), names


def test_make_targets_and_programs_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for piece in (*shell_commands("make"), *(s for s in spans() if s.text.startswith("make "))):
        assert set(piece.text.split()[1:]) <= targets, str(piece)
    for piece in shell_commands("python"):
        words = shlex.split(piece.text)
        assert words[1] == "-m" or (REPOSITORY / words[1]).is_file(), str(piece)


@pytest.mark.parametrize("piece", list(shell_commands("python")), ids=str)
def test_options_of_programs_exist(piece: Piece) -> None:
    words = shlex.split(piece.text)
    if words[1] != "-m":
        program = REPOSITORY / words[1]
        shared = program.parent.glob("_*.py") if "from _" in program.read_text("utf-8") else ()
        source = "".join(path.read_text("utf-8") for path in (program, *shared))
        for option in (word for word in words if word.startswith("--")):
            assert f'"{option}"' in source, option


# ---- links and names -------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The names that headings get."""
    headings = HEADING.findall(FENCE.sub("", page.read_text("utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links() -> Iterator[Piece]:
    for page in PAGES:
        text = page.read_text("utf-8")
        for match in LINK.finditer(text):
            yield Piece(page, text.count("\n", 0, match.start()) + 1, match[1])


@pytest.mark.parametrize("piece", list(links()), ids=str)
def test_links_lead_somewhere(piece: Piece) -> None:
    if re.match(r"[a-z]+:", piece.text):
        return
    path, _, anchor = piece.text.partition("#")
    target = (piece.page.parent / path).resolve() if path else piece.page
    assert target.is_relative_to(REPOSITORY)
    assert target.exists()
    if anchor:
        assert anchor in anchors(target)


def test_paths_of_the_repository_that_are_named_exist() -> None:
    folders = "tunesmith|tests|docs|recipes|benchmarks|examples"
    named = [s for s in spans() if re.fullmatch(rf"(?:{folders})/[\w./-]*", s.text) and "NAME" not in s.text]
    assert len(named) > 10
    for piece in named:
        assert (REPOSITORY / piece.text).exists(), str(piece)


def test_the_house_is_described_room_by_room() -> None:
    named = {piece.text for piece in spans() if piece.page.name == "CONTRIBUTING.md"}
    for path in (REPOSITORY / "tunesmith").iterdir():
        if path.is_dir() and (path / "__init__.py").is_file():
            assert f"{path.name}/" in named
        elif path.suffix == ".py" and not path.name.startswith("__"):
            assert path.name in named


def test_settings_that_are_named_exist() -> None:
    sections: dict[str, list[Any]] = {"data": [DataSettings], "train": [TrainSettings], "evaluate": [EvaluateSettings]}
    sections |= {"method": list(METHODS.values()), "objective": list(OBJECTIVES.values())}
    found = [(piece, match) for piece in spans() if (match := SETTING.fullmatch(piece.text))]
    assert len(found) > 20
    for piece, match in found:
        assert any(match[2] in model.model_fields for model in sections[match[1]]), str(piece)


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("models.md", SUPPORTED | ENCODERS),
        ("evaluation.md", METRICS),
        ("data.md", STATES),
        ("data.md", READERS),
        ("tuning.md", [f"method: {name}" for name in METHODS]),
        ("tuning.md", [f"objective: {name}" for name in OBJECTIVES]),
    ],
    ids=["architectures", "metrics", "states", "forms", "methods", "objectives"],
)
def test_what_there_is_is_named(page: str, names: Any) -> None:
    named = {piece.text for piece in spans() if piece.page.name == page}
    assert set(names) <= named


# ---- recipes and examples --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", list(blocks("yaml")), ids=str)
def test_recipes_are_valid(piece: Piece) -> None:
    """A block may be a part of a recipe; what it leaves out is filled in."""
    value = yaml.safe_load(piece.text)
    value["data"] = {"train": "tickets.jsonl"} | value.get("data", {})
    recipe = parse_recipe(json.dumps(value), file=piece.page)
    assert recipe.data.train_paths


@pytest.mark.parametrize("piece", list(blocks("json")), ids=str)
def test_json_is_valid(piece: Piece) -> None:
    assert json.loads(piece.text)


@pytest.mark.parametrize("piece", list(blocks("python")), ids=str)
def test_names_that_examples_import_exist(piece: Piece) -> None:
    tree = ast.parse(piece.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "tunesmith":
            assert node.attr in importlib.import_module("tunesmith").__all__


@pytest.fixture
def project(build_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a toy base, some rows and a recipe, to stand in while an example runs."""
    import torch

    build_model("llama", dtype=torch.float32, max_position_embeddings=256).save(tmp_path / "base")
    rows = [{"prompt": f"Where is parcel {number}?", "completion": "At the depot."} for number in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    recipe = {
        "base": "base",
        "data": {"train": "rows.jsonl", "validation": 0.3},
        "evaluate": {"max_tokens": 8, "few_shot": 1},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNESMITH_WORKSPACE", str(tmp_path / ".tunesmith"))
    return tmp_path


def test_the_python_examples_run(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = [piece for piece in blocks("python") if piece.page.name == "using.md"]
    assert len(examples) == 2
    names: dict[str, Any] = {}
    for piece in examples:
        exec(compile("\n" * (piece.line - 1) + piece.text, str(piece.page), "exec"), names)
    assert names["run"].finished
    assert names["run"].summary["steps"] <= 20
    assert names["evaluation"].document["systems"] == ["base", "few_shot", "tuned"]
    assert (project / "my-model" / "token_contract.json").is_file()
    assert names["evaluation"].sentence in capsys.readouterr().out
