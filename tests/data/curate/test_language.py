"""Rows and answers in another language than the others."""

import sys

import pytest

from tunesmith.data.curate import language
from tunesmith.data.curate.language import Language
from tunesmith.data.types import Example, Message, Origin
from tunesmith.errors import MissingExtraError

ENGLISH = "The sensor in the garden has not sent a single value since yesterday evening."
GERMAN = "Der Sensor im Garten hat seit gestern Abend keinen einzigen Wert mehr gesendet."
FRENCH = "Le capteur du jardin n'a pas envoyé une seule valeur depuis hier soir."
CODE = "```python\nfür_jeden = der_sensor_im_garten(hat, keinen, wert)\n```"


def row(prompt, answer, line):
    return Example(Origin("rows.jsonl", line), "chat", (Message("user", prompt), Message("assistant", answer)))


def check(pairs):
    pytest.importorskip("py3langid", reason="the extra `curate` is not installed")
    language = Language()
    assert not [p for line, pair in enumerate(pairs, start=1) for p in language.look(row(*pair, line))]
    return [(problem.kind, str(problem.origin), problem.message) for problem in language.finish()]


def test_a_row_in_another_language():
    pairs = [(ENGLISH, ENGLISH)] * 60
    assert check(pairs) == []
    pairs[10] = (GERMAN, GERMAN)
    assert check(pairs) == [("language", "rows.jsonl:11", "the row is in German, the file in English")]


def test_an_answer_in_another_language_than_its_prompt():
    pairs = [(ENGLISH, ENGLISH)] * 60
    pairs[3], pairs[4] = (ENGLISH, FRENCH), (f"Say this in French: {ENGLISH}", FRENCH)
    assert check(pairs) == [("language", "rows.jsonl:4", "the prompt is in English, the answer in French")]


def test_languages_in_quantity_are_the_files_own():
    assert check([(ENGLISH, ENGLISH), (GERMAN, GERMAN)] * 20) == []
    assert check([(ENGLISH, FRENCH)] * 20 + [(ENGLISH, ENGLISH)] * 20) == []


def test_short_texts_and_code_are_not_judged():
    pairs = [(ENGLISH, ENGLISH)] * 60
    pairs[5], pairs[6] = ("Wie geht es Ihnen?", "Sehr gut, danke."), (ENGLISH, CODE)
    assert check(pairs) == []


def test_labelled_texts_are_judged_too():
    pytest.importorskip("py3langid", reason="the extra `curate` is not installed")
    language = Language()
    for line in range(1, 41):
        text = FRENCH if line == 9 else ENGLISH
        assert not list(language.look(Example(Origin("a", line), "labelled", text=text, label="x")))
    assert [problem.line for problem in language.finish()] == [9]


def test_an_empty_file_has_no_language():
    assert check([]) == []


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    language._identifier.cache_clear()
    with pytest.raises(MissingExtraError, match="py3langid") as error:
        Language()
    assert "tunesmith[curate]" in error.value.hint
