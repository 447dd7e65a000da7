"""Words in prompts: found whole, whatever their case, and swapped in theirs."""

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.data.types import Example, Message, Origin
from tunesmith.errors import DataError, NotFoundError
from tunesmith.evaluate.words import asked_text, read_groups, read_swaps, swapped

SWAPS = {"he": "she", "she": "he", "mary": "John", "john": "Mary"}


def text(content: str) -> Example:
    return Example(Origin("rows.jsonl", 1), "labelled", text=content, label="a")


def write(folder: Path, value: Any) -> str:
    (folder / "words.yaml").write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
    return str(folder / "words.yaml")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("He said that she left.", "She said that he left."),
        ("HE LEFT", "SHE LEFT"),
        ("mary met John", "John met Mary"),
        ("MARY!", "JOHN!"),
        ("the theme, heeded; he's", "the theme, heeded; she's"),
    ],
)
def test_whole_words_are_swapped_in_their_case(before: str, after: str) -> None:
    found = swapped(text(before), swaps=SWAPS)
    assert found is not None
    assert found.text == after
    assert found.label == "a"


def test_a_row_without_the_words_has_no_other() -> None:
    assert swapped(text("the theme"), swaps=SWAPS) is None


def test_of_a_conversation_the_question_is_swapped_and_the_rest_stays() -> None:
    turns = (
        Message("system", "he"),
        Message("user", "Is he in?"),
        Message("assistant", "he is"),
        Message("user", "And she?"),
        Message("assistant", "she is"),
    )
    row = Example(Origin("rows.jsonl", 1), "chat", turns)
    found = swapped(row, swaps=SWAPS)
    assert found is not None
    assert [m.content for m in found.messages] == ["he", "Is she in?", "she is", "And he?", "she is"]
    assert "he is" in asked_text(row)
    assert swapped(Example(row.origin, "chat", (turns[0], Message("user", "?"), turns[4])), swaps=SWAPS) is None


def test_files_of_words_are_yaml_or_json(tmp_path: Path) -> None:
    assert read_swaps(write(tmp_path, "- [he, she]\n- [Mary, John]\n")) == SWAPS
    assert read_swaps(write(tmp_path, [["he", "she"], ["Mary", "John"]])) == SWAPS
    groups = read_groups(write(tmp_path, {"women": ["she", "her"], "men": ["he"]}))
    assert list(groups) == ["women", "men"]
    assert groups["women"].search("For HER.")
    assert not groups["men"].search("the other")


@pytest.mark.parametrize(
    "value", ["[]", "[he, she]", "[[he]]", "[[no, yes]]", "{he: she}", "[[he, she], [she, it]]", "["]
)
def test_what_is_no_list_of_pairs_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(DataError) as error:
        read_swaps(write(tmp_path, value))
    assert error.value.hint


@pytest.mark.parametrize("value", ["{women: [she]}", "{women: she, men: he}", "[she, he]", "{women: [], men: [he]}"])
def test_what_is_no_groups_of_words_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(DataError) as error:
        read_groups(write(tmp_path, value))
    assert error.value.hint


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"gone\.yaml"):
        read_swaps(str(tmp_path / "gone.yaml"))
