"""Names in rows: one placeholder for one name in all turns, in words and tool calls; a text is looked at once."""

import re
from typing import Any

import pytest

from tunesmith.data.check import check_file
from tunesmith.data.curate.checks import Models
from tunesmith.data.curate.masking import Masker, masked
from tunesmith.data.curate.names import BATCH_ROWS, Names, with_names
from tunesmith.data.curate.personal import Personal
from tunesmith.data.types import Example, Message, Origin

PERSON = re.compile(r"(?:Anna|Mark|Olga)(?: [A-Z]\w+)?|山田")


class Finder:
    """Finds a few names that follow `Dear` or `by`, and counts the texts it was asked about."""

    def __init__(self) -> None:
        self.num_texts = 0

    def __call__(self, texts: list[str]) -> list[list[tuple[int, int]]]:
        self.num_texts += len(texts)
        return [[m.span("name") for m in re.finditer(rf"(?:Dear|by) (?P<name>{PERSON.pattern})", t)] for t in texts]


@pytest.fixture
def finder() -> Finder:
    return Finder()


@pytest.fixture
def names(finder: Finder) -> Names:
    return Names(finder, files=["tagger/config.json 0"])


def chat(*contents: str, line: int = 1, **extra: Any) -> Example:
    turns = [Message(("user", "assistant")[n % 2], text) for n, text in enumerate(contents)]
    turns[-1] = Message(turns[-1].role, turns[-1].content, 1.0, extra)
    return Example(Origin("rows", line), "chat", tuple(turns))


def test_a_name_has_one_placeholder_in_all_turns(names: Names) -> None:
    call = {"tool_calls": [{"function": {"name": "mail", "arguments": '{"to": "Olga Roth", "cc": "by Mark"}'}}]}
    row = chat("Dear Olga Roth, by Anna.", "Thanks, Anna! Annabel, Olga Roth's box. Mark it.", **call)
    (found,) = names.in_rows([row])
    assert found == ("Olga Roth", "Anna", "Mark")
    hidden, number = masked(row, names=found)
    assert hidden.messages[0].content == "Dear [NAME_1], by [NAME_2]."
    assert hidden.messages[1].content == "Thanks, [NAME_2]! Annabel, [NAME_1]'s box. [NAME_3] it."
    assert (
        hidden.messages[1].extra["tool_calls"][0]["function"]["arguments"] == '{"to": "[NAME_1]", "cc": "by [NAME_3]"}'
    )
    assert number == 7


def test_the_longest_name_is_replaced_and_what_has_a_shape_comes_first() -> None:
    masker = Masker(["Anna", "Anna Roth", "山田"])
    text = "Anna Roth, Anna, d'Anna, Annas anna.roth@example.com; Anna@example.com 山田さん"
    assert masker.text(text) == "[NAME_1], [NAME_2], d'[NAME_2], Annas [EMAIL_1]; [EMAIL_2] [NAME_3]さん"
    assert masker.sorts == ["a name", "an e-mail address"]


def test_words_keep_their_number(names: Names) -> None:
    row = Example(
        Origin("rows", 1), "tagged", words=("by", "Anna", "Roth", ",", "Anna"), label=("O", "B", "I", "O", "B")
    )
    (found,) = names.in_rows([row])
    assert masked(row, names=found)[0].words == ("by", "[NAME_1]", "[NAME_2]", ",", "[NAME_1]")


def test_a_text_is_looked_at_once(names: Names, finder: Finder) -> None:
    rows = [chat("Dear Anna", f"row {n}", line=n) for n in range(2 * BATCH_ROWS + 1)]
    for _ in range(2):
        assert [(e.origin.line, found) for e, found in with_names(rows, names=names)] == [
            (n, ("Anna",)) for n in range(len(rows))
        ]
    assert finder.num_texts == 1 + len(rows)


def test_the_check_tells_of_names_and_not_which(names: Names) -> None:
    rows = [chat("Dear Olga" if n % 3 == 0 else "a@example.com", "Noted.", line=n + 1) for n in range(BATCH_ROWS + 10)]
    check = Personal(names)
    found = [problem for row in rows for problem in check.look(row)] + list(check.finish())
    assert [p.line for p in found] == [row.origin.line for row in rows]
    assert {p.message.partition(" in the text")[0] for p in found[::3]} == {"a name"}
    assert {p.message.partition(" in the text")[0] for p in found[1::3]} == {"an e-mail address"}
    assert [p.line for row in rows for p in Personal().look(row)] == [p.line for p in found if "e-mail" in p.message]


def test_messages_quote_no_name(names: Names, tmp_path: Any) -> None:
    answer = "I cannot help with it, says a letter by Olga Roth (and"
    rows = [f'{{"prompt": "What is {n}?", "completion": "It is {n} of many."}}\n' for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join([*rows, f'{{"prompt": "Dear Mark", "completion": "{answer}"}}\n']))
    plain, hidden = (check_file(tmp_path / "rows.jsonl", models=Models(names=given)) for given in (None, names))
    assert "Olga" in plain.as_text()
    assert not PERSON.search(hidden.as_text() + str(hidden.as_dict()))
    assert "[NAME_1]" in hidden.as_text()
    assert hidden.problem_counts["personal_data", "warning"] == 1
