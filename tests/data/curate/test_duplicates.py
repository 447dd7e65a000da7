"""Normalising, keys, signatures and the true similarity."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.curate.duplicates import (
    BINS,
    MIN_JACCARD,
    Repeats,
    _hash_grams,
    _signatures,
    another_fact,
    normalise,
    said,
)
from tunesmith.data.types import Example, Message, Origin


def example(prompt, answer="yes", line=1, system=None):
    opening = (Message("system", system),) if system else ()
    return Example(Origin("a", line), "chat", (*opening, Message("user", prompt), Message("assistant", answer)))


def sentence(chance, words=40):
    return " ".join(f"w{number}x" for number in chance.integers(0, 5_000, words)).translate(
        str.maketrans("0123456789", "abcdefghij")
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How many LEGS?", "how  many legs "),
        ("“Hi,” she said…", '"Hi" she said'),
        ("ｆｕｌｌ width", "full width"),
        ("Straße", "STRASSE"),
        ("don't", "don’t"),
        ("a – b", "a - b"),
        ("Yes.", "yes!"),
    ],
)
def test_what_normalising_takes_away(one, other):
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("5 - 3", "5 + 3"), ("3.5", "35"), ("1,000", "1 000"), ("a != b", "a = b"), ("C++", "C"), ("50%", "50")],
)
def test_what_normalising_keeps(one, other):
    assert normalise(one) != normalise(other)


@given(st.text())
def test_normalising_twice_changes_nothing_more(text):
    once = normalise(text)
    assert normalise(once).casefold() == normalise(normalise(once)).casefold()
    assert "  " not in once


@given(st.lists(st.text(max_size=30), max_size=6))
def test_grams_of_a_batch_are_those_of_its_texts(texts):
    hashes, rows = _hash_grams(texts, size=5)
    for number, text in enumerate(texts):
        alone, _ = _hash_grams([text], size=5)
        assert hashes[rows == number].tolist() == alone.tolist()
        assert len(alone) == max(len(text.encode()) - 4, 0)


def test_signatures_estimate_the_similarity():
    chance = np.random.default_rng(0)
    errors = []
    for size, shared in ((30, 20), (200, 150), (1000, 300)):
        for _ in range(40):
            hashes = np.unique(chance.integers(0, 2**32, 2 * size - shared + 50, dtype=np.uint32))[: 2 * size - shared]
            hashes = chance.permutation(hashes)
            one, other = hashes[:size], hashes[size - shared :]
            both = np.concatenate([one, other])
            rows = np.repeat([0, 1], [len(one), len(other)])
            signatures = _signatures(both, rows, num_rows=2)
            errors.append((signatures[0] == signatures[1]).mean() - shared / (2 * size - shared))
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 2.5 * np.sqrt(0.25 / BINS)


def test_near_repeats_are_found_among_many_rows():
    chance = np.random.default_rng(0)
    repeats, examples = Repeats(), []
    for number in range(600):
        if number % 10 == 9:  # every tenth row is the one before it with one word changed
            words = said(examples[-1])[1].split()
            words[int(chance.integers(len(words)))] = "changed"
            examples.append(example(" ".join(words), line=number + 1))
        else:
            examples.append(example(sentence(chance), line=number + 1))
        repeats.add(examples[-1])
    found = {(a, b) for a, b in repeats.candidates() if repeats.is_near(examples[a], examples[b])}
    planted = {(number, number - 1) for number in range(9, 600, 10)}
    assert found <= planted
    assert len(found) >= 0.95 * len(planted)


def test_short_and_empty_rows_are_no_candidates():
    repeats = Repeats()
    for number, text in enumerate(["", "a", "ab cd", "ab ce", "🙂"]):
        repeats.add(example(text, answer="", line=number + 1))
    assert repeats.candidates() == []
    assert Repeats().candidates() == []
    assert list(Repeats().repeats()) == list(Repeats().leaks()) == list(Repeats().contradictions()) == []


def test_a_long_system_prompt_does_not_make_rows_alike():
    system = "You are a very careful assistant who reads everything twice. " * 20
    repeats = Repeats()
    for number, text in enumerate(["where is my parcel", "please cancel the order", "the colour is wrong"]):
        repeats.add(example(text, line=number + 1, system=system))
    assert repeats.candidates() == []


@given(st.lists(st.sampled_from("abcdef"), max_size=30), st.lists(st.sampled_from("abcdef"), max_size=10))
def test_equal_keys_are_found_as_by_hand(own, other):
    repeats = Repeats()
    for line, text in enumerate(other, start=1):
        repeats.add(example(text, line=line))
    repeats.start()
    for line, text in enumerate(own, start=1):
        repeats.add(example(text, line=line))
    first = len(other)
    by_hand = [(first + number, first + own.index(text)) for number, text in enumerate(own) if own.index(text) < number]
    assert [(repeat.row, repeat.other) for repeat in repeats.repeats()] == by_hand
    leaks = [(first + number, other.index(text)) for number, text in enumerate(own) if text in other]
    assert [(repeat.row, repeat.other) for repeat in repeats.leaks()] == leaks


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("It has 7 legs.", "It has 8 legs.", True),
        ("He lives in Oslo now.", "He lives in Rome now.", True),
        ("it has legs", "it have legs", False),
        ("The dog barks.", "A dog barks.", False),
        ("the SPIDER sleeps", "The spider sleeps", False),
    ],
)
def test_numbers_and_names_make_another_fact(one, other, expected):
    assert another_fact(one, other) is expected


def test_another_answer_is_another_row():
    repeats = Repeats()
    asked = "How many legs does a spider have when it has lost none of them in its garden?"
    near = asked.replace("lost", "shed")
    assert repeats.is_near(example(asked, "Eight."), example(near, "eight"))
    assert not repeats.is_near(example(asked, "Eight."), example(near, "Six."))
    assert 0 < MIN_JACCARD < 1
