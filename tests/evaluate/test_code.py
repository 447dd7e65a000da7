"""Answers that are code: what is run of them, pass@k, and that public problems' own solutions pass."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from tunesmith.data.formats import read_examples
from tunesmith.data.settings import DataSettings
from tunesmith.data.types import CodeTests, Example, Message, Origin
from tunesmith.errors import DataError, RecipeError
from tunesmith.evaluate.chosen import chosen
from tunesmith.evaluate.code import code_of, program_of
from tunesmith.evaluate.sandbox import check_enforced
from tunesmith.evaluate.settings import EvaluateSettings

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
HUMAN_EVAL = {
    "prompt": "prompt",
    "completion": "canonical_solution",
    "before": "prompt",
    "tests": "{test}\ncheck({entry_point})",
}
MBPP = {"prompt": "text", "completion": "code", "tests": "{test_setup_code}\n{test_list}"}


@pytest.fixture
def enforced() -> None:
    try:
        check_enforced()
    except RecipeError as error:
        pytest.skip(error.message)


def row(before: str, after: str | None) -> Example:
    turns = (Message("user", "?"), Message("assistant", "x"))
    return Example(Origin("rows.jsonl", 7), "chat", turns, tests=None if after is None else CodeTests(before, after))


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("    return a + b", "    return a + b"),
        ("Sure:\n```python\nx = 1\n```\nand\n```python\ny = 2\n```", "x = 1\n"),
        ("```\nnot this\n```\n```Python\nx = 1\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```py\nx = '```'\n", "x = '```'\n"),
        ("so ```x``` it is", "so ```x``` it is"),
        ("", ""),
    ],
)
def test_the_code_of_an_answer(answer, code):
    assert code_of(answer) == code


def test_what_stands_before_an_answer_is_joined_to_it():
    assert program_of("  return 1", CodeTests("def f():\n", "t")).code == "def f():\n  return 1"
    assert program_of("1", CodeTests("x = ", "t")).code == "x = 1"
    assert program_of("y = 2", CodeTests("x = 1", "t")).code == "x = 1\ny = 2"
    assert program_of("y = 2", CodeTests("", "t")).tests == "t"


def test_greedy_answers_pass_or_not(enforced):
    settings = EvaluateSettings(metrics=("code_passes",), code_seconds=4)
    metric = chosen(["code_passes"], settings=settings)["code_passes"]
    answers = ["    return 2 * n\n", "```python\ndef f(n):\n    return n + n\n```", "    return n", "I do not know."]
    rows = [row("def f(n):\n    'twice n'\n", "assert f(4) == 8")] * 4
    assert metric.score_rows(answers, ["-"] * 4, examples=rows).tolist() == [1, 1, 0, 0]


def test_pass_at_k_is_the_chance_that_one_of_k_passes(enforced):
    """Against all ways to draw k of the samples."""
    chance = random.Random(0)
    right = [[chance.random() < share for _ in range(6)] for share in (0, 0.3, 0.6, 1)]
    samples = [[f"x = {1 if good else 2}  # {i % 2}" for i, good in enumerate(of_row)] for of_row in right]
    for k in (1, 2, 6):
        settings = EvaluateSettings(metrics=("pass_at_k",), samples=6, pass_at=k)
        metric = chosen(["pass_at_k"], settings=settings)["pass_at_k"]
        rows = metric.score_rows(samples=samples, examples=[row("", "assert x == 1")] * 4)
        expected = [np.mean([any(drawn) for drawn in itertools.combinations(of_row, k)]) for of_row in right]
        assert rows.tolist() == pytest.approx(expected)


def test_a_row_without_tests_is_named(enforced):
    metric = chosen(["code_passes"], settings=EvaluateSettings(metrics=("code_passes",)))["code_passes"]
    with pytest.raises(DataError, match="has no tests") as caught:
        metric.score_rows(["x"], ["x"], examples=[row("", None)])
    assert (caught.value.file, caught.value.line) == ("rows.jsonl", 7)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"metrics": ["pass_at_k"]}, "metric 'pass_at_k' needs samples"),
        ({"metrics": ["code_passes"], "samples": 3}, "samples has no effect"),
        ({"pass_at": 2}, "pass_at has no effect"),
        ({"temperature": 0.5}, "temperature has no effect"),
        ({"samples": 3, "pass_at": 4}, "draw as many"),
        ({"metrics": ["exact_match"], "code_seconds": 3}, "code_seconds has no effect"),
    ],
)
def test_settings_without_effect_are_refused(given, what):
    with pytest.raises(ValidationError, match=what):
        EvaluateSettings(**given)


@pytest.mark.parametrize(
    ("mapping", "what"),
    [
        ({"text": "a", "tests": "t"}, "goes with `prompt` and `completion`, or with `messages`"),
        ({"prompt": "a", "completion": "b", "before": "a"}, "goes with `tests` only"),
    ],
)
def test_tests_go_with_answers(mapping, what):
    with pytest.raises(ValidationError, match=what):
        DataSettings(train="a", mapping=mapping)


@pytest.mark.parametrize("name", ["prompt_completion", "chat"])
def test_rows_carry_their_tests(tmp_path, name):
    given = {"tests": ["assert f(1)", "assert f(2)"], "name": "f", "n": 3}
    answer = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    given |= {"q": "a", "a": "b"} if name == "prompt_completion" else answer
    (tmp_path / "rows.jsonl").write_text(json.dumps(given) + "\n")
    mapping = {"prompt": "q", "completion": "a"} if name == "prompt_completion" else {"messages": "messages"}
    path = str(tmp_path / "rows.jsonl")
    (example,) = read_examples(path, settings=DataSettings(train=path, mapping=mapping | {"tests": "tests"}))
    assert example.tests == CodeTests("", "assert f(1)\nassert f(2)")
    mapping |= {"tests": "{tests}\n{name}({n})", "before": "name"}
    (example,) = read_examples(path, settings=DataSettings(train=path, mapping=mapping))
    assert example.tests == CodeTests("f", "assert f(1)\nassert f(2)\nf(3)")
    with pytest.raises(DataError, match="no column 'test'"):
        read_examples(path, settings=DataSettings(train=path, mapping=mapping | {"tests": "test"}))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
@pytest.mark.parametrize(("file", "mapping"), [("human_eval/test.jsonl", HUMAN_EVAL), ("mbpp/train.jsonl", MBPP)])
def test_public_problems_own_solutions_pass(enforced, file, mapping):
    path = str(SHARED / file)
    examples = read_examples(path, settings=DataSettings(train=path, mapping=mapping))[::16]
    metric = chosen(["code_passes"], settings=EvaluateSettings(metrics=("code_passes",)))["code_passes"]
    answers = [example.asked[1].content for example in examples]
    assert metric.score_rows(answers, answers, examples=examples).tolist() == [1] * len(examples)
    assert not metric.score_rows(["pass"] * 4, ["-"] * 4, examples=examples[:4]).any()
