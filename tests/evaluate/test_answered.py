"""What a base said before is not asked again, unless anything that decides it has changed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.evaluate import answered
from tunesmith.evaluate.answered import Answered
from tunesmith.models.load import Model

ANSWER = {"texts": ["a"], "seconds": 0.25, "nll": [0.1, 1 / 3]}


@pytest.fixture
def model(build_model: Callable[..., Model]) -> Model:
    return build_model("llama")


@pytest.fixture
def asked(tmp_path: Path) -> Callable[..., tuple[bool, dict[str, Any]]]:
    """Ask, and whether it was computed."""

    def ask(model: Model, *parts: bytes) -> tuple[bool, dict[str, Any]]:
        calls: list[int] = []

        def answer() -> dict[str, Any]:
            calls.append(1)
            return ANSWER

        found = Answered(tmp_path / "answers", model).get(parts, ask=answer)
        return bool(calls), found

    return ask


def test_the_same_is_computed_once_and_any_other_anew(
    asked: Any, model: Model, build_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked(model, b"one", b"two") == (True, ANSWER)
    assert asked(model, b"one", b"two") == (False, ANSWER)
    assert asked(model, b"onet", b"wo")[0]
    assert asked(model, b"one")[0]
    assert asked(build_model("llama", dtype=torch.float32), b"one", b"two")[0]
    other = build_model("llama")
    other.digest = "other"
    assert asked(other, b"one", b"two")[0]
    monkeypatch.setattr(answered, "code_digest", lambda *folders: "changed")
    assert asked(model, b"one", b"two")[0]


def test_a_damaged_entry_is_written_anew(asked: Any, model: Model, tmp_path: Path) -> None:
    asked(model, b"one")
    (path,) = (tmp_path / "answers").iterdir()
    path.write_text('{"texts": [')
    assert asked(model, b"one") == (True, ANSWER)
    assert asked(model, b"one") == (False, ANSWER)


def test_a_full_disk_costs_the_entry_and_not_the_answer(
    asked: Any, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "answers").touch()  # no folder can be made there
    assert asked(model, b"one") == (True, ANSWER)
    (tmp_path / "answers").unlink()
    monkeypatch.setattr(answered, "MAX_BYTES", 10)
    assert asked(model, b"one") == (True, ANSWER)
    assert asked(model, b"one") == (True, ANSWER)


def test_entries_used_longest_ago_go_first(
    asked: Any, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(model, b"one")
    (first,) = (tmp_path / "answers").iterdir()
    monkeypatch.setattr(answered, "MAX_BYTES", 2 * first.stat().st_size + 10)
    os.utime(first, (1, 1))
    asked(model, b"two")
    assert not asked(model, b"one")[0]  # and so it is used later than the other
    os.utime(next(p for p in (tmp_path / "answers").iterdir() if p != first), (2, 2))
    assert asked(model, b"three")[0]
    assert not asked(model, b"one")[0]
    assert asked(model, b"two")[0]
