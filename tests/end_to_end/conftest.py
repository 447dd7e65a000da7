"""A toy base in a folder, and the command line in this process."""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith import cli
from tunesmith.models.load import Model

CONTEXT_TOKENS = 2048


@dataclass
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)

    @property
    def refusal(self) -> tuple[str, str]:
        """The error and the hint, after whatever progress was shown."""
        assert self.code == 2, self
        assert self.out == ""
        lines = self.err.splitlines()
        assert [line.partition(": ")[0] for line in lines[-2:]] == ["error", "hint"]
        assert not any(line.startswith(("error:", "hint:")) for line in lines[:-2])
        return lines[-2].removeprefix("error: "), lines[-1].removeprefix("hint: ")


Command = Callable[..., Result]


@pytest.fixture(scope="session")
def tunesmith() -> Command:
    """`tunesmith("train", "r.yaml", folder=...)`: a command run in a folder."""

    def run(*arguments: Any, folder: Path, stdin: str = "") -> Result:
        out, err = io.StringIO(), io.StringIO()
        before = sys.argv, sys.stdin, Path.cwd()
        sys.argv, sys.stdin = ["tunesmith", *map(str, arguments)], io.StringIO(stdin)
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                cli.main()
        except SystemExit as end:
            return Result(int(end.code or 0), out.getvalue(), err.getvalue())
        finally:
            sys.argv, sys.stdin = before[:2]
            os.chdir(before[2])
        raise AssertionError("a command ends with a status")

    return run


@pytest.fixture(scope="session")
def base(build_model: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model as it comes from elsewhere: weights, configuration, tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("base")
    build_model("llama", dtype=torch.float32, max_position_embeddings=CONTEXT_TOKENS).save(folder)
    return folder
