"""Answers that are code, scored by running the tests of their rows in a sandbox.

`code_passes` runs the greedy answer. `pass_at_k` runs n drawn ones, of which c pass, and gives the chance that at least one
of k passes, without bias (Chen et al. 2021, "Evaluating large language models trained on code", eq. 1):

    pass@k = mean over rows of 1 - C(n - c, k) / C(n, k)
"""

import math
import re

import numpy as np

from tunesmith.data.answers import Floats
from tunesmith.data.types import CodeTests, Example
from tunesmith.errors import DataError
from tunesmith.evaluate.sandbox import Program, all_passed, check_enforced

CODE_METRICS = ("code_passes", "pass_at_k")
FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
PYTHON = ("python", "py", "python3")


def code_of(answer: str) -> str:
    """The first fenced block of Python, else the first fenced block, else the answer as it is."""
    blocks = FENCE.findall(answer)
    return next((text for name, text in blocks if name.lower() in PYTHON), blocks[0][1] if blocks else answer)


def program_of(answer: str, tests: CodeTests) -> Program:
    """What stands before the answer, the answer's code, and then the tests."""
    apart = "" if not tests.before or tests.before[-1].isspace() else "\n"
    return Program(tests.before + apart + code_of(answer), tests.after)


def tests_of(example: Example) -> CodeTests:
    """The row's tests; DataError where it has none."""
    if example.tests is None:
        raise DataError(
            "the row has no tests to run its answer with",
            file=example.origin.file,
            line=example.origin.line,
            hint="name their column in data.mapping: {prompt: COLUMN, completion: COLUMN, tests: COLUMN}",
        )
    return example.tests


def enforced_seconds(seconds: int) -> int:
    """`evaluate.code_seconds`, where this machine can shut in what it runs; RecipeError elsewhere."""
    check_enforced()
    return seconds


def passing_rows(
    predictions: list[str], references: list[list[str]], *, examples: list[Example], code_seconds: int
) -> Floats:
    """1 for each prediction that passes its row's tests; references are not read. [B]."""
    programs = [program_of(text, tests_of(row)) for text, row in zip(predictions, examples, strict=True)]
    return np.array(all_passed(programs, seconds=code_seconds), dtype=np.float64)


def pass_at_k_rows(*, samples: list[list[str]], examples: list[Example], pass_at: int, code_seconds: int) -> Floats:
    """pass@k of each row, [B]; `samples` are the n drawn answers of each."""
    programs = [[program_of(t, tests_of(row)) for t in texts] for texts, row in zip(samples, examples, strict=True)]
    passed = iter(all_passed([program for of_row in programs for program in of_row], seconds=code_seconds))
    counts = [(len(of_row), sum(next(passed) for _ in of_row)) for of_row in programs]
    return np.array([1.0 - math.comb(n - c, pass_at) / math.comb(n, pass_at) for n, c in counts], dtype=np.float64)
