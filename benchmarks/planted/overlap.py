"""Rows that hold an item of a benchmark, or a passage of a protected text: whole, in part, and lightly edited."""

from collections.abc import Iterator

import numpy as np

from planted import Planted
from planted.words import (
    Change,
    as_they_are,
    beginning,
    case_and_punctuation,
    sentences_reordered,
    some_words,
    words_changed,
)

NUM_ROWS = 200
ITEM_WORDS, ROW_WORDS, BOOK_WORDS = 45, 300, 20_000
CHANGES: dict[str, Change] = {
    "whole": as_they_are,
    "case and punctuation": case_and_punctuation,
    "75 % of it": beginning(0.75),
    "50 % of it": beginning(0.5),
    "one word changed": words_changed(1 / ITEM_WORDS),
    "5 % of the words changed": words_changed(0.05),
    "10 % of the words changed": words_changed(0.1),
    "20 % of the words changed": words_changed(0.2),
    "sentences reordered": sentences_reordered,
}
PASSAGES = {100: True, 50: True, 30: True, 20: False}  # words, and whether that is enough to be told
LICENCES = {
    "GPL": "# This program is free software: you can redistribute it and/or modify\n# it under the terms of the GNU General"
    " Public License as published by\n# the Free Software Foundation.",
    "MIT": "/* Permission is hereby granted, free of charge, to any\n * person obtaining a copy of this software */",
    "SPDX": "// SPDX-License-Identifier: Apache-2.0",
    "copyright": "# Copyright (c) 2019 Jane Doe",
}
MENTIONS = (
    "Is the MIT license compatible with the GPL?",
    "I lost my driver's license.",
    "Choose (a) 2017 or (c) 2019.",
)


def planted(random: np.random.Generator) -> Iterator[Planted]:
    """Every second row has the defect, but where a grade has nothing to find."""
    for grade, change in CHANGES.items():
        items = [some_words(random, ITEM_WORDS) for _ in range(NUM_ROWS)]
        edited = [change(random, item) for item in items]
        yield _rows(
            random, check="contamination", grade=grade, inside=edited, found=True, of=items, name="benchmark.jsonl"
        )
    items = [some_words(random, ITEM_WORDS) for _ in range(NUM_ROWS)]
    pieces = [item[:7] for item in items]
    grade = "seven words of it (nothing to find)"
    yield _rows(
        random, check="contamination", grade=grade, inside=pieces, found=False, of=items, name="benchmark.jsonl"
    )
    books = [some_words(random, BOOK_WORDS) for _ in range(10)]
    for num_words, found in PASSAGES.items():
        starts = random.integers(0, BOOK_WORDS - num_words, NUM_ROWS).tolist()
        inside = [books[number % 10][start : start + num_words] for number, start in enumerate(starts)]
        grade = f"{num_words} words of a book" + ("" if found else " (nothing to find)")
        yield _rows(random, check="protected", grade=grade, inside=inside, found=found, of=books, name="books.jsonl")
    for name, header in LICENCES.items():
        rows = [{"text": "\n".join([header, *some_words(random, 50)])} for _ in range(20)]
        rows += [{"text": f"{mention} {' '.join(some_words(random, 50))}"} for mention in MENTIONS]
        yield Planted("protected", f"licence {name}", rows, set(range(1, 21)))


def _rows(
    random: np.random.Generator,
    *,
    check: str,
    grade: str,
    inside: list[list[str]],
    found: bool,
    of: list[list[str]],
    name: str,
) -> Planted:
    """Long rows, every second with one of `inside` somewhere in it; `of` is what the further file holds."""
    rows = []
    for number in range(NUM_ROWS):
        words = some_words(random, ROW_WORDS)
        place = int(random.integers(0, ROW_WORDS))
        piece = inside[number] if number % 2 else []
        rows.append({"prompt": "Go on.", "completion": " ".join([*words[:place], *piece, *words[place:]])})
    expected = set(range(2, NUM_ROWS + 1, 2)) if found else set()
    return Planted(check, grade, rows, expected, {name: [{"text": " ".join(text)} for text in of]})
