import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wording import expand, listed, pairs, with_typo

seeds = st.integers(min_value=0, max_value=10_000)


def wordings(pattern: str, **slots) -> set[str]:
    return {expand(pattern, chooser=random.Random(seed), slots=slots) for seed in range(200)}


def test_choices_nest_and_may_be_empty():
    assert wordings("{a|b{c|d}}{|!}") == {"a", "a!", "bc", "bc!", "bd", "bd!"}


def test_a_text_slot_is_a_pattern_and_a_function_slot_is_a_value():
    assert wordings("<x> {<x>|y}", x="{1|2}") == {"1 1", "1 2", "2 1", "2 2", "1 y", "2 y"}
    assert wordings("<x>", x=lambda chooser: "{1|2} <y>") == {"{1|2} <y>"}


def test_an_unknown_slot_is_an_error():
    with pytest.raises(KeyError):
        expand("<nobody>", chooser=random.Random(0))


@given(text=st.text(alphabet="abc dE.\n", max_size=60), seed=seeds)
def test_a_typo_is_one_slip_inside_one_long_word(text: str, seed: int):
    slipped = with_typo(text, chooser=random.Random(seed))
    if not any(len(word) >= 5 for word in "".join(c if c.islower() else " " for c in text).split()):
        assert slipped == text
        return
    assert len(text) - len(slipped) in (0, 1)
    differing = [at for at, (one, other) in enumerate(zip(text, slipped, strict=False)) if one != other]
    if len(text) == len(slipped):
        assert sorted(text) == sorted(slipped)
        assert len(differing) in (0, 2)


def test_a_missing_brace_is_our_own_bug():
    with pytest.raises(AssertionError, match="brace"):
        expand("{a|b} c|d}", chooser=random.Random(0))


def test_word_lists():
    assert listed("a b\n c") == ["a", "b", "c"]
    assert pairs("hot/cold big/small") == {"hot": "cold", "big": "small"}
