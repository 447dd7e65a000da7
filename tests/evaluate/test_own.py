"""A metric of the user's own: checked before anything runs, called with the row, reported where it fails."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from tunesmith.data.types import Example, Message, Origin
from tunesmith.errors import DataError, RecipeError
from tunesmith.evaluate.chosen import chosen
from tunesmith.evaluate.own import own_digest, settled
from tunesmith.evaluate.settings import EvaluateSettings

NUMBERS = itertools.count()
ROWS = [
    Example(Origin("rows.jsonl", line), "chat", (Message("user", f"{line}?"), Message("assistant", text)))
    for line, text in enumerate(["red", "green", "red"], start=1)
]
REFERENCES = [row.asked[1].content for row in ROWS]
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a module into the working directory, each under a name of its own, and names the function in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def module(code: str, *, function: str = "score", folder: str = "") -> str:
        name = f"own_metric_{next(NUMBERS)}"
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.py").write_text(code)
        return f"{f'{folder}.' if folder else ''}{name}:{function}"

    return module


def rows_of(name: str, predictions: list[str]) -> np.ndarray:
    metric = chosen([name], settings=EvaluateSettings(metrics=(name,)))[name]
    assert metric.name == name
    return metric.score_rows(predictions, REFERENCES, examples=ROWS)


def test_a_function_is_called_for_each_row(write):
    name = write("def score(prediction, reference):\n    return len(prediction) / len(reference)\n", folder="scoring")
    assert rows_of(name, ["re", "green", ""]).tolist() == pytest.approx([2 / 3, 1, 0])


def test_a_third_parameter_is_the_row(write):
    name = write("def score(p, r, example=None):\n    return example.asked[0][-1].content == p\n")
    assert rows_of(name, ["1?", "1?", "3?"]).tolist() == [True, False, True]
    class_name = write(
        "class Metric:\n    def __call__(self, p, r, row):\n        return row.origin.line\nscore = Metric()\n"
    )
    assert rows_of(class_name, ["", "", ""]).tolist() == [1, 2, 3]


def test_rows_of_truth_values_are_right_or_wrong_and_others_are_numbers(write):
    name = write("def score(p, r):\n    return p == r if p != 'half' else 0.5\n")
    metric = chosen([name], settings=EvaluateSettings(metrics=(name,)))[name]
    right, graded = rows_of(name, ["red", "red", "red"]), rows_of(name, ["red", "half", "red"])
    assert settled(metric, {"tuned": right, "base": right}).right_or_wrong
    assert not settled(metric, {"tuned": right, "base": graded}).right_or_wrong
    assert graded.tolist() == [1, 0.5, 1]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def score(p):\n    return 1\n", "too many positional arguments"),
        ("def score(a, b, c, d):\n    return 1\n", "missing a required argument: 'd'"),
        ("def score(a, b, *, c):\n    return 1\n", "missing a required argument: 'c'"),
        ("def other(a, b):\n    return 1\n", "there is no score"),
        ("score = 3\n", "this is no function: score"),
        ("import nothing_of_this_name\n", "ModuleNotFoundError"),
        ("def score(:\n", "SyntaxError"),
    ],
)
def test_what_cannot_be_called_is_refused_before_anything_runs(write, code, message):
    name = write(code)
    with pytest.raises(RecipeError, match=message) as caught:
        chosen([name], settings=EvaluateSettings(metrics=(name,)))
    assert caught.value.file is not None
    assert Path(caught.value.file).read_text() == code


@pytest.mark.parametrize("name", ["os:rename", "shutil:copyfile", "numpy:save", "no.such.module:score"])
def test_only_modules_in_the_working_directory_are_imported(write, name):
    with pytest.raises(RecipeError, match="in the working directory, where it is not"):
        chosen([name], settings=EvaluateSettings(metrics=(name,)))


def test_a_module_that_hides_another_is_refused(write, tmp_path):
    (tmp_path / "json.py").write_text("def loads(a, b):\n    return 1\n")
    with pytest.raises(RecipeError, match="another module json"):
        chosen(["json:loads"], settings=EvaluateSettings(metrics=("json:loads",)))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def score(p, r):\n    return 1 / (p != 'bad')\n", "ZeroDivisionError: division by zero"),
        ("def score(p, r):\n    return float('nan' if p == 'bad' else 1)\n", "gave nan for this row"),
        ("def score(p, r):\n    return None if p == 'bad' else True\n", "gave None for this row"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named(write, code, message):
    with pytest.raises(DataError, match=message) as caught:
        rows_of(write(code), ["red", "bad", "red"])
    assert (caught.value.file, caught.value.line) == ("rows.jsonl", 2)


def test_a_digest_tells_code_apart(write):
    one, same, other = (own_digest(write(f"def score(p, r):\n    return {n}\n")) for n in (1, 1, 2))
    assert one == same != other
    assert len(one) == 64


def test_rules_of_the_gate_may_name_it():
    name = "scoring:score"
    assert EvaluateSettings(metrics=(name,), gate={name: "> base"}).gate == {name: "> base"}
    for bad in ("scoring.score", "scoring:", ":score", "a b:c", "../scoring:score"):
        with pytest.raises(ValidationError, match="there is no metric"):
            EvaluateSettings(metrics=(bad,))
