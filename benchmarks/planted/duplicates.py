"""Rows that repeat an earlier row: from exact copies to rows in other words; and rows that are only alike."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from planted import Planted
from planted.paraphrases import PARAPHRASES
from planted.words import (
    Change,
    as_they_are,
    case_and_punctuation,
    sentences_reordered,
    some_words,
    words_changed,
)

NUM_ROWS, NUM_PLANTED = 400, 100
GRADES: dict[str, Change] = {
    "exact copy": as_they_are,
    "case and punctuation": case_and_punctuation,
    "one word in thirty changed": words_changed(1 / 30),
    "5 % of the words changed": words_changed(0.05),
    "10 % of the words changed": words_changed(0.1),
    "20 % of the words changed": words_changed(0.2),
    "30 % of the words changed": words_changed(0.3),
    "sentences reordered": sentences_reordered,
}


def planted(random: np.random.Generator) -> Iterator[Planted]:
    """Rows of 60 words of which every fourth repeats one of the others; rows that differ in a number; paraphrases."""
    for grade, change in GRADES.items():
        pairs = [(some_words(random, 30), some_words(random, 30)) for _ in range(NUM_ROWS)]
        for source in range(NUM_PLANTED):
            pairs.append((change(random, pairs[source][0]), change(random, pairs[source][1])))
        yield _shuffled(random, check="duplicates", grade=grade, pairs=pairs)
    text = some_words(random, 30)
    numbers = [([*text, f"It is number {number}."], [*text, f"So it is {number}."]) for number in range(NUM_PLANTED)]
    rows = [_row(prompt, answer) for prompt, answer in numbers]
    yield Planted("duplicates", "another number (nothing to find)", rows, set())
    said = [*(one for one, _ in PARAPHRASES), *(other for _, other in PARAPHRASES)]
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in said]
    yield Planted("semantic", "paraphrases by hand", rows, set(range(len(PARAPHRASES), len(said))))


def _row(prompt: list[str], answer: list[str]) -> dict[str, Any]:
    return {"prompt": " ".join(prompt), "completion": " ".join(answer)}


def _shuffled(
    random: np.random.Generator, *, check: str, grade: str, pairs: list[tuple[list[str], list[str]]]
) -> Planted:
    """The rows in random order; of a row and its repeat the later one is expected."""
    order = random.permutation(len(pairs)).tolist()
    place = {number: place for place, number in enumerate(order)}
    expected = {max(place[source], place[NUM_ROWS + source]) + 1 for source in range(NUM_PLANTED)}
    return Planted(check, grade, [_row(*pairs[number]) for number in order], expected)
