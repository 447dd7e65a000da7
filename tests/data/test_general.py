"""General rows: texts in passages, questions as they are, and a draw that only their content decides."""

from pathlib import Path

import pytest

from tunesmith.data.general import PASSAGE_CHARACTERS, draw_key, drawn_keys, read_general
from tunesmith.data.types import Example, Origin
from tunesmith.errors import DataError


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


def test_what_is_drawn_does_not_depend_on_the_order_of_the_rows() -> None:
    rows = [Example(Origin("a", line), "text", text=f"general text number {line}") for line in range(50)]
    found = drawn_keys(rows, count=7)
    assert len(found) == 7
    assert found == drawn_keys(rows[::-1] + rows[:5], count=7) < drawn_keys(rows, count=8)  # repeated, and drawn once
    assert drawn_keys(rows, count=99) == {draw_key(row) for row in rows}
