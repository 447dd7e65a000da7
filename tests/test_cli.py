"""The command line: one JSON document and nothing else, an error and a hint in two lines, and never a traceback."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith import cli

CONFIG = {"model_type": "llama", "max_position_embeddings": 64}
CHECK_KEYS = {"file", "form", "rows", "problems", "tokens", "ledger"}
RUN_COMMANDS = ("evaluate", "show", "report", "generate", "chat", "export", "compare", "combine")
COMMANDS = ("quickstart", "init", "data", "plan", "train", "curve", "bench", "advise", "runs", *RUN_COMMANDS)


@dataclass
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)

    def refused(self) -> tuple[str, str]:
        """The error and the hint of a command that did nothing else."""
        assert self.code == 2, self
        assert self.out == ""
        error, hint = self.err.splitlines()
        assert error.startswith("error: ")
        assert hint.startswith("hint: ")
        assert len(hint) > len("hint: ")
        return error.removeprefix("error: "), hint.removeprefix("hint: ")


@contextlib.contextmanager
def replaced(arguments: list[str], stdin: Any) -> Iterator[None]:
    before = sys.argv, sys.stdin
    sys.argv, sys.stdin = ["tunesmith", *arguments], stdin
    try:
        yield
    finally:
        sys.argv, sys.stdin = before


def call(*arguments: Any, stdin: Any = None, stdout: Any = None) -> Result:
    """`tunesmith ...` in this process."""
    out, err = stdout or io.StringIO(), io.StringIO()
    with (
        replaced([str(a) for a in arguments], stdin or io.StringIO()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as caught,
    ):
        cli.main()
    shown = "" if err.closed else err.getvalue()
    return Result(int(caught.value.code or 0), out.getvalue() if isinstance(out, io.StringIO) else "", shown)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TUNESMITH_WORKSPACE", raising=False)
    return tmp_path


@pytest.fixture
def base(here: Path, toy_tokenizer_folder: Path) -> Path:
    """What `data check` reads of a base: tokenizer, template and context length."""
    shutil.copytree(toy_tokenizer_folder, here / "base")
    (here / "base" / "config.json").write_text(json.dumps(CONFIG))
    return here / "base"


@pytest.fixture
def rows(here: Path) -> Path:
    lines = [json.dumps({"prompt": f"colour of {i}?", "completion": "red"}) for i in range(20)]
    (here / "rows.jsonl").write_text("\n".join(lines))
    return here / "rows.jsonl"


@pytest.fixture
def started(here: Path) -> str:
    """A run that was begun and never finished."""
    folder = here / ".tunesmith" / "runs" / "support-0a1b2c3d"
    folder.mkdir(parents=True)
    value = {"run": folder.name, "name": "support", "created": "2026-01-01T00:00:00+00:00", "state": "started"}
    (folder / "run.json").write_text(json.dumps(value))
    (folder / "resolved.json").write_text('{"recipe": {"data": {"train": "rows.jsonl"}}}')
    return folder.name


def run_arguments(command: str, run: str) -> list[str]:
    more = {"compare": [run], "combine": [run, "--how", "ties"], "generate": ["hello"], "export": ["--out", "taken"]}
    return [command, run, *more.get(command, [])]


# -------------------------------------------------------------------------------------------------------- usage


@pytest.mark.parametrize(
    "command", [(), *((name,) for name in COMMANDS), ("data", "check"), ("data", "prepare"), ("data", "card")]
)
def test_every_command_has_help(command):
    result = call(*command, "--help")
    assert (result.code, result.err) == (0, "")
    assert "Usage: tunesmith" in result.out
    if command not in ((), ("data",), ("chat",)):
        assert "--json" in result.out


def test_without_a_command_the_commands_are_listed():
    result = call()
    assert result.code == 2
    assert all(name in result.out + result.err for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "r.yaml"], "trian"),
        (["train"], "recipe"),
        (["train", "r.yaml", "--sett", "a=b"], "--set"),
        (["train", "r.yaml", "extra"], "extra"),
        (["train", "r.yaml", "--set"], "--set"),
        (["evaluate", "x", "--rows", "many"], "--rows"),
        (["generate", "x", "hello", "--max-tokens", "0"], "--max-tokens"),
        (["generate", "x", "hello", "--temperature", "-1"], "--temperature"),
        (["export", "x"], "--out"),
        (["compare", "x"], "other"),
        (["data", "chek"], "chek"),
    ],
)
def test_wrong_usage_is_an_error_and_a_hint(arguments, message):
    error, hint = call(*arguments).refused()
    assert message in error
    assert "--help" in hint


def test_looking_back_and_checking_need_no_torch(here, base, rows, started):
    program = (
        "import contextlib, io, json, sys\n"
        "from tunesmith import cli\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['tunesmith', *arguments]\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        cli.main()\n"
        "    print(*arguments, 'torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    commands = [["--help"], ["train", "--help"], ["runs"], ["show", started], ["compare", started, started]]
    commands += [["init", "--from", "rows.jsonl"], ["data", "check", "rows.jsonl", "--base", "base"]]
    result = subprocess.run(
        [sys.executable, "-c", program, json.dumps(commands)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(cli.__file__).parents[1]), "PATH": ""},
    )
    assert result.stdout.splitlines() == [f"{' '.join(command)} False False" for command in commands]
    assert (here / "recipe.yaml").exists()


# --------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("command", RUN_COMMANDS)
def test_a_run_that_is_not_there_is_refused_with_the_nearest(started, command):
    error, hint = call(*run_arguments(command, "suport")).refused()
    assert "support" in error
    assert hint


@pytest.mark.parametrize("command", RUN_COMMANDS)
def test_without_any_run_the_hint_is_to_train_one(command):
    error, hint = call(*run_arguments(command, "latest")).refused()
    assert "no runs" in error
    assert "train" in hint


@pytest.mark.parametrize("command", ["evaluate", "generate", "chat", "export"])
def test_a_run_without_a_model_is_refused(started, command):
    error, hint = call(*run_arguments(command, started)).refused()
    assert "is started and has no model yet" in error
    assert "--resume" in hint


@pytest.mark.parametrize("content", ['{"run": "supp', "[]"])
@pytest.mark.parametrize("command", RUN_COMMANDS)
def test_a_damaged_run_is_refused(started, command, content):
    (Path(".tunesmith") / "runs" / started / "run.json").write_text(content)
    error, hint = call(*run_arguments(command, started)).refused()
    assert "run.json" in error
    assert hint


def test_runs_are_listed(started):
    for name in ("latest", "support", started, "supp"):
        assert call("show", name, "--json").document["run"] == started
    (found,) = call("runs", "--json").document
    assert found["run"] == started
    assert found["state"] == "started"
    assert started in call("runs").out


def test_no_runs_are_an_empty_list():
    assert call("runs", "--json").document == []
    assert call("runs").out == "no runs yet\n"
    assert list(Path.cwd().iterdir()) == []  # looking leaves nothing behind


def test_the_workspace_is_found_upward_or_named(started, here, monkeypatch):
    (here / "deep" / "down").mkdir(parents=True)
    monkeypatch.chdir(here / "deep" / "down")
    assert [run["run"] for run in call("runs", "--json").document] == [started]
    assert call("runs", "--json", "--workspace", here / "elsewhere").document == []
    assert len(call("runs", "--json", "--workspace", here).document) == 1
    monkeypatch.setenv("TUNESMITH_WORKSPACE", str(here / "elsewhere"))
    assert call("runs", "--json").document == []
    (here / "file").write_text("")
    error, _ = call("runs", "--workspace", here / "file").refused()
    assert "is a file" in error


# --------------------------------------------------------------------------------------------------------- data


def test_check_prints_one_document(base, rows):
    result = call("data", "check", rows, "--base", base, "--json")
    assert (result.code, result.err) == (0, "")
    assert set(result.document) >= CHECK_KEYS
    assert (result.document["form"], result.document["rows"]) == ("prompt_completion", 20)
    assert sum(result.document["ledger"].values()) == 20


def test_check_says_no_where_a_row_cannot_be_trained_on(base, rows):
    rows.write_text(rows.read_text() + '\n{"prompt": "and this?", "completion": ""}\n{broken')
    result = call("data", "check", rows, "--base", base, "--json")
    assert (result.code, result.err) == (3, "")
    errors = [p for p in result.document["problems"] if p["severity"] == "error"]
    assert [(p["kind"], p["line"]) for p in errors] == [("empty_target", 21), ("bad_row", 22)]
    shown = call("data", "check", rows, "--base", base)
    assert shown.code == 3
    assert f"{rows}:21" in shown.out


def test_scores_are_written_of_the_check_that_gives_them_alone(base, rows, here):
    error, hint = call("data", "check", rows, "--base", base, "--scores", here / "scores.jsonl").refused()
    assert "--scores has no effect" in error
    assert hint == "--only difficulty"
    error, hint = call("data", "check", rows, "--base", base, "--only", "difficulty").refused()
    assert "no weights" in error or "safetensors" in error + hint


def test_check_finds_what_stands_in_the_other_file(base, rows, here):
    (here / "test.jsonl").write_text(rows.read_text().splitlines()[4])
    result = call("data", "check", rows, "--against", "test.jsonl", "--base", base, "--json")
    (leak,) = [p for p in result.document["problems"] if p["kind"] == "leak"]
    assert (leak["line"], leak["other"]) == (5, {"file": "test.jsonl", "line": 1})


def test_check_reads_the_rows_as_the_recipe_says(base, here):
    lines = [json.dumps({"ask": f"colour of {i}?", "say": "red"}) for i in range(20)]
    (here / "own.jsonl").write_text("\n".join(lines))
    (here / "own.jinja").write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    recipe = {"base": "base", "data": {"train": "own.jsonl", "mapping": {"prompt": "ask", "completion": "say"}}}
    (here / "r.yaml").write_text(yaml.safe_dump(recipe))
    tokens = call("data", "check", "own.jsonl", "--recipe", "r.yaml", "--json").document["tokens"]
    recipe["data"]["template"] = "own.jinja"
    (here / "r.yaml").write_text(yaml.safe_dump(recipe))
    doubled = call("data", "check", "own.jsonl", "--recipe", "r.yaml", "--json").document["tokens"]
    # the begin token goes, and each text stands there twice
    assert doubled["longest"] == tokens["longest"] - 1 + len("colour of 10?") + len("red")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.jsonl"], "no such file"),
        (["rows.jsonl", "--against", "rows.jsonl"], "against itself"),
        (["rows.jsonl", "--against", "gone.jsonl"], "gone.jsonl"),
        (["rows.jsonl", "--base", "nowhere"], "no base model at 'nowhere'"),
        (["rows.jsonl", "--recipe", "gone.yaml"], "no such recipe"),
        (["rows.exe"], "'.exe'"),
    ],
)
def test_check_refuses_what_cannot_be_read(base, rows, here, arguments, message):
    (here / "rows.exe").write_text("MZ")
    more = [] if "--base" in arguments else ["--base", str(base)]
    error, _ = call("data", "check", *arguments, *more).refused()
    assert message in error


def test_init_prints_what_it_found(rows):
    document = call("init", "--from", rows, "--json").document
    assert document["recipe"] == "recipe.yaml"
    assert (document["form"], document["rows"]) == ("prompt_completion", 20)
    error, hint = call("init", "--from", rows).refused()
    assert "exists already" in error
    assert "--out" in hint
    assert "next: tunesmith train other.yaml" in call("init", "--from", rows, "--out", "other.yaml").out


# ------------------------------------------------------------------------------------------------------ streams


def test_a_name_that_the_terminal_cannot_show_is_escaped(base, rows):
    rows.rename("größe.jsonl")
    for arguments in (["--json"], []):
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding="ascii")
        assert call("data", "check", "größe.jsonl", "--base", base, *arguments, stdout=stream).code == 0
        shown = raw.getvalue().decode("ascii")
        assert json.loads(shown)["file"] == "größe.jsonl" if arguments else r"gr\xf6\xdfe.jsonl" in shown


class Gone(io.StringIO):
    """A reader that has gone away."""

    def flush(self) -> None:
        raise BrokenPipeError


def test_a_reader_that_went_away_is_no_error():
    result = call("runs", stdout=Gone())
    assert (result.code, result.err) == (0, "")


def test_a_pipe_that_is_closed_leaves_no_message(tmp_path):
    program = f"{sys.executable} -m tunesmith runs 2> err | true; echo ${{PIPESTATUS[0]}}; cat err"
    environment = {"PYTHONPATH": str(Path(cli.__file__).parents[1]), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.stdout == "0\n"


class Impatient(io.StringIO):
    """A terminal at which Ctrl-C is pressed."""

    def read(self, size: int | None = -1) -> str:
        raise KeyboardInterrupt


def test_control_c_is_130():
    result = call("generate", "latest", stdin=Impatient())
    assert result.code == 130
    assert result.err.split() == ["stopped"]


# --------------------------------------------------------------------------------------------------------- fuzz


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe's file; nothing it names is there."""
    return tmp_path_factory.mktemp("fuzz") / "recipe.yaml"


NO_PATH = st.text(st.characters(exclude_characters="/"), max_size=8)  # an owner/name would be looked up on the hub
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | NO_PATH
    | st.sampled_from(["lora", "full", "causal", 0.1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NO_PATH, inner, max_size=3),
)
KEYS = {
    "data": ["train", "validation", "test", "form", "mapping", "system", "template", "max_tokens", "too_long", "x"],
    "train": ["epochs", "max_steps", "learning_rate", "schedule", "warmup", "clip", "precision", "patience", "x"],
    "method": ["kind", "rank", "alpha", "dropout", "targets", "x"],
    "objective": ["kind", "x"],
    "evaluate": ["metrics", "against", "few_shot", "rows", "x"],
    "base": ["config", "tokenizer", "seed", "x"],
}
SECTIONS = {name: st.dictionaries(st.sampled_from(keys), VALUES, max_size=3) | VALUES for name, keys in KEYS.items()}
RECIPES = st.fixed_dictionaries({}, optional=SECTIONS | {"name": VALUES, "x": VALUES}).map(
    lambda value: yaml.safe_dump(value, allow_unicode=True)
)


@settings(max_examples=80, deadline=None)
@given(text=RECIPES | st.text(st.characters(exclude_characters="/"), max_size=60))
def test_any_broken_recipe_is_two_lines_and_a_status(scratch, text):
    scratch.write_text("base: nowhere\n" * ("base" not in text) + text)
    error, _ = call("train", scratch, "--workspace", scratch.parent / "w").refused()
    assert "Traceback" not in error
    assert not (scratch.parent / "w").exists()


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["base", "x", *(f"{s}.{k}" for s, keys in KEYS.items() for k in keys), *KEYS]),
    value=VALUES.map(lambda value: yaml.safe_dump(value, allow_unicode=True)) | NO_PATH,
)
def test_any_override_of_a_recipe_that_cannot_run_is_two_lines(scratch, name, value):
    scratch.write_text("base: nowhere\ndata: {train: gone.jsonl}")
    call("train", scratch, "--set", f"{name}={value}", "--workspace", scratch.parent / "w").refused()
