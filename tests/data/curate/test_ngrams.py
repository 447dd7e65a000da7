"""Words, grams, parts of rows, and the index against sets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.curate.base import quoted
from tunesmith.data.curate.ngrams import (
    Batches,
    Index,
    grams_of,
    hashed,
    parts_of,
    passage,
    runs_of,
    texts_in,
    words_of,
)
from tunesmith.data.types import Example, Message, Origin

WORDS = st.lists(st.sampled_from("abcdef"), max_size=30)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't PANIC, 3.5!", ["don", "t", "panic", "3", "5"]),
        ("def min_cost(a, b):", ["def", "min_cost", "a", "b"]),
        ("Straße ﬁn", ["strasse", "fin"]),
        ("東京 Tower", ["東", "京", "tower"]),
        ("", []),
    ],
)
def test_words(text, expected):
    assert words_of(text) == expected


@given(st.text())
def test_every_word_has_a_place_in_the_text(text):
    words = words_of(text)
    if words:
        assert len(quoted(passage(text, first=0, last=len(words) - 1))) >= 2
        passage(text, first=len(words) - 1, last=len(words) - 1)


def test_a_quote_is_short_and_of_the_text_itself():
    assert quoted(passage("Say: “Hello,  World” now.", first=1, last=2)) == "'Hello, World'"
    assert len(eval(quoted(passage("word " * 50, first=0, last=49)))) == 60


@given(WORDS, st.integers(1, 5))
def test_equal_grams_are_equal_words(words, size):
    grams = grams_of(hashed(words), size=size).tolist()
    by_hand = [tuple(words[place : place + size]) for place in range(len(words) - size + 1)]
    assert len(grams) == len(by_hand)
    for one in range(len(grams)):
        for other in range(len(grams)):
            assert (grams[one] == grams[other]) == (by_hand[one] == by_hand[other])


@given(st.lists(WORDS, max_size=6), WORDS, st.booleans())
def test_the_index_finds_what_is_there_and_nothing_else(texts, asked, every_place):
    index = Index(size=2, every_place=every_place)
    for text in texts:
        index.add(hashed(text))
    index.close()
    query_H, entry_H = index.find(grams_of(hashed(asked), size=2))
    found = [
        (int(query), int(index.text_G[entry]), int(index.place_G[entry]))
        for query, entry in zip(query_H, entry_H, strict=True)
    ]
    expected = []
    for query in range(len(asked) - 1):
        pair = asked[query : query + 2]
        for number, text in enumerate(texts):
            places = [place for place in range(len(text) - 1) if text[place : place + 2] == pair]
            if places:
                expected.append((query, number, places[0]))
                if not every_place:
                    break
    assert found == expected


def test_common_grams_are_those_of_many_owners_and_not_of_many_texts():
    index = Index(size=2)
    for text in ("a b x", "a b y", "a b z", "c d e", "c d f", "c d g"):
        index.add(hashed(text.split()))
    index.close()
    index.drop_common(np.array([0, 1, 2, 3, 3, 3]), most=2)
    assert index.num_grams().tolist() == [1, 1, 1, 2, 2, 2]
    assert len(index.find(grams_of(hashed(["a", "b"]), size=2))[0]) == 0
    assert len(index.find(grams_of(hashed(["c", "d"]), size=2))[0]) == 3


def test_grams_of_a_batch_lie_within_one_part():
    batches = Batches()
    for line, text in enumerate(["a b c", "", "d", "e f"], start=1):
        assert batches.add(Example(Origin("f", line), "text", text=text)) is None
    batch = batches.take()
    grams, parts, words = batch.grams(size=2)
    assert (parts.tolist(), words.tolist()) == ([0, 0, 3], [0, 1, 0])
    assert grams.tolist() == [grams_of(hashed(pair.split()), size=2)[0] for pair in ("a b", "b c", "e f")]
    assert batches.take().grams(size=2)[0].tolist() == []


def test_runs():
    first, last = runs_of(np.array([0, 0, 0, 1, 1, 1]), np.array([1, 2, 4, 5, 5, 6]))
    assert list(zip(first.tolist(), last.tolist(), strict=True)) == [(0, 1), (2, 2), (3, 5)]
    assert [len(bounds) for bounds in runs_of(np.zeros(0, int), np.zeros(0, int))] == [0, 0]


def test_parts_have_the_names_a_reader_knows():
    turns = [Message("system", "s"), Message("user", "u"), Message("assistant", "a")]
    names = [name for name, _ in parts_of(Example(Origin("f", 1), "chat", tuple(turns)))]
    assert names == ["the system prompt", "the prompt", "the answer"]
    longer = (*turns, Message("user", "u2"), Message("assistant", "a2"))
    assert parts_of(Example(Origin("f", 1), "chat", longer))[3] == ("message 4 (user)", "u2")
    assert parts_of(Example(Origin("f", 1), "tagged", words=("a", "b"), label=("x", "y"))) == [("the text", "a b")]


def test_all_texts_of_a_value():
    value = {"a": "one", "n": 3, "list": ["two", "three"], "deep": [{"b": "four"}, 5], "empty": [], "null": None}
    assert list(texts_in(value)) == ["one", "two\nthree", "four"]
