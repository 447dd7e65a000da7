"""The side of a row depends on its prompt and on nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.split import side
from tunesmith.data.types import Example, Message, Origin

SHARES = {"validation": 0.1, "test": 0.2}
RECORDED = [
    "test",
    "validation",
    "train",
    "train",
    "train",
    "train",
    "validation",
    "train",
    "train",
    "test",
    "train",
    "train",
]
shares = st.fixed_dictionaries({}, optional={"validation": st.floats(0.01, 0.49), "test": st.floats(0.01, 0.49)})


def example(prompt, answer, line=1):
    return Example(Origin("a", line), "chat", (Message("user", prompt), Message("assistant", answer)))


@given(st.text(), st.text(), st.text(), shares)
def test_rows_with_one_prompt_stand_on_one_side(prompt, answer, other_answer, shares):
    one, two = example(prompt, answer), example(prompt, other_answer, line=99)
    assert side(one.prompt_key, shares=shares) == side(two.prompt_key, shares=shares)


@given(st.lists(st.text(), unique=True, max_size=30), st.lists(st.text(), max_size=30), st.randoms())
def test_growing_and_shuffling_move_no_row(prompts, added, chance):
    before = {prompt: side(example(prompt, "a").prompt_key, shares=SHARES) for prompt in prompts}
    grown = prompts + added
    chance.shuffle(grown)
    after = {prompt: side(example(prompt, "a").prompt_key, shares=SHARES) for prompt in grown}
    assert {prompt: after[prompt] for prompt in prompts} == before


@given(st.text(), st.floats(0.01, 0.4), st.floats(0.01, 0.4))
def test_changing_one_share_moves_no_row_of_the_other(key, one, two):
    first = side(key, shares={"validation": 0.2, "test": one})
    second = side(key, shares={"validation": 0.2, "test": two})
    assert (first == "validation") == (second == "validation")


@given(st.text())
def test_without_shares_everything_is_trained(key):
    assert side(key, shares={}) == "train"


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_the_shares_are_met(share):
    sides = [side(str(number), shares={"validation": share, "test": share / 2}) for number in range(20_000)]
    assert sides.count("validation") / len(sides) == pytest.approx(share, abs=0.01)
    assert sides.count("test") / len(sides) == pytest.approx(share / 2, abs=0.01)


def test_sides_stay_what_they_are():
    """Recorded: a change here would move the rows of every user's data set."""
    sides = [side(example(f"question {number}", "a").prompt_key, shares=SHARES) for number in range(12)]
    assert sides == RECORDED


@given(st.text(), st.text(), st.lists(st.text()), shares)
def test_a_text_stands_on_one_side_whatever_its_label(text, label, several, shares):
    labels = (label, tuple(several), "3.5")
    rows = [Example(Origin("a", 1), "labelled", text=text, label=label) for label in labels]
    assert len({side(row.prompt_key, shares=shares) for row in rows}) == 1
    assert len({row.key for row in rows}) == len(set(labels))
