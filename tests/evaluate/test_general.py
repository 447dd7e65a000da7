"""General rows: texts in passages, flips from right to wrong, and differences drawn by text."""

from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import DataError
from tunesmith.evaluate.general import MAX_FLIPS, PASSAGE_CHARACTERS, entry_of, read_general
from tunesmith.evaluate.result import Evaluation


def test_texts_are_cut_into_passages_without_losing_a_character(tmp_path: Path) -> None:
    text = "".join(f"{'word ' * (number % 60)}end of {number}\n" for number in range(100)) + "x" * 5000
    (tmp_path / "a.txt").write_text(text)
    found = read_general(str(tmp_path / "a.txt"))
    assert "".join(e.text or "" for e in found) == text
    assert max(len(e.text or "") for e in found) == PASSAGE_CHARACTERS
    assert {str(e.origin) for e in found} == {f"{tmp_path / 'a.txt'}:1"}
    assert sum((e.text or "").endswith("\n") for e in found) >= len(found) - 6


def test_questions_stay_as_they_are_and_kinds_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a?", "completion": "b"}\n{"prompt": "c?", "completion": "d"}\n')
    assert [e.asked[1].content for e in read_general(str(path))] == ["b", "d"]
    path.write_text('{"prompt": "a?", "completion": "b"}\n{"text": "c"}\n')
    with pytest.raises(DataError):
        read_general(str(path))
    path.write_text("{broken\n")
    with pytest.raises(DataError, match="broken JSON"):
        read_general(str(path))


def test_answers_that_were_right_before_are_listed() -> None:
    rows: list[dict[str, Any]] = [
        {
            "origin": f"g:{n}", "prompt": [], "reference": "r", "outputs": {},
            "scores": {"base": {"exact_match": before}, "tuned": {"exact_match": after}},
        }
        for n, (before, after) in enumerate([(1.0, 0.0), (1.0, 1.0), (0.0, 1.0)] * 60)
    ]  # fmt: skip
    difference = {"value": 0.0, "low": -0.1, "high": 0.1, "p": 1.0}
    document = {
        "primary": "exact_match", "data": "g", "rows": 180,
        "metrics": {"exact_match": {"higher_is_better": True, "systems": {}, "differences": {"tuned - base": difference}}},
    }  # fmt: skip
    entry = entry_of(Evaluation(document, rows), margin=0.2)
    assert (entry["right_before"], len(entry["flips"]), entry["outcome"]) == (60, MAX_FLIPS, "kept")
    assert [flip["origin"] for flip in entry["flips"][:2]] == ["g:0", "g:3"]
