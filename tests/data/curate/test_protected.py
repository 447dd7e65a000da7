"""Licences by their own wording, and passages of texts that must not be trained on."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.curate.protected import GRAM_WORDS, MIN_PASSAGE_WORDS, Protected, licences_in
from tunesmith.data.types import Example, Message, Origin
from tunesmith.errors import NotFoundError

BOOK = [f"word{number}" for number in range(1000)]
GPL = """
/*  This program is free software: you can redistribute it and/or modify
 *  it under the terms of the GNU General Public License as published by
 *  the Free Software Foundation, either version 3 of the License */"""
MIT = """# Permission is hereby granted, free of charge, to any
# person obtaining a copy of this software"""
BSD = "-- Redistribution and use in source and binary forms,\n-- with or without modification, are permitted"


def row(text: str, line: int = 1) -> Example:
    return Example(Origin("train.jsonl", line), "chat", (Message("user", "Go on."), Message("assistant", text)))


def found(check, *examples):
    return [*(problem for example in examples for problem in check.look(example)), *check.finish()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GPL, "the GNU GPL"),
        (GPL.replace("General", "Lesser General"), "the GNU LGPL"),
        (GPL.replace("General", "Affero General"), "the GNU Affero GPL"),
        (MIT, "the MIT License"),
        (BSD, "the BSD License"),
        ('Licensed under the Apache License, Version 2.0 (the "License")', "the Apache License"),
        ("The ASF licenses this file\n# to you under the Apache License, Version 2.0", "the Apache License"),
        ("subject to the terms of the Mozilla Public\n# License, v. 2.0", "the Mozilla Public License"),
        ("This page is licensed under a Creative Commons Attribution 4.0 licence", "a Creative Commons licence"),
        ("// SPDX-License-Identifier: GPL-2.0-only\n", "the SPDX tag GPL-2.0-only"),
        ("# Copyright (c) 2019 Jane Doe\nimport os", "a copyright line"),
        ("x = 1\n  # (c) 2019-2021, The Authors", "a copyright line"),
        ("© 2020 Some Company", "a copyright line"),
        ("Copyright (c) Facebook, Inc. and its affiliates.", "a copyright line"),
        ("Some story.\n\nAll rights reserved.", "'all rights reserved'"),
        ("Copyright 2001 Some Press. All rights reserved.", "'all rights reserved'"),
    ],
)
def test_licences_are_told_by_name(text, expected):
    assert any(expected in licence for licence in licences_in(text))
    (problem,) = found(Protected(None), row(text))
    assert (problem.kind, problem.severity, problem.line) == ("protected_text", "warning", 1)
    assert problem.message.startswith("the answer carries ")
    assert expected in problem.message


@pytest.mark.parametrize(
    "text",
    [
        "My driver's license was stolen, can I get a new one?",
        "Is the MIT license compatible with the GPL, or with Apache 2.0?",
        "Copyright protects works of authors; the law of 1976 is still in force.",
        "What does 'all rights reserved' mean on a book?",
        "Which options are there: (a) 2017, (b) 2018 or (c) 2019?",
        "Write a poem about the copyright of 2019 songs.",
        "The GNU General Public License is a well-known free software licence.",
        "Under a Creative Commons licence you may share a photo.",
        "The redistribution of income is a matter of politics.",
    ],
)
def test_the_mere_word_is_no_header(text):
    assert licences_in(text) == []


def write_book(folder):
    lines = [" ".join(BOOK[start : start + 10]) for start in range(0, 1000, 10)]
    (folder / "book.txt").write_text("\n".join(lines), "utf-8")
    return Protected(str(folder))


def test_a_passage_is_located_in_both_places(tmp_path):
    check = write_book(tmp_path)
    passage = BOOK[203 : 203 + MIN_PASSAGE_WORDS]
    (problem,) = found(check, row("Here it comes: " + ", ".join(passage).upper() + " and no more."))
    assert problem.other == (str(tmp_path / "book.txt"), 21)
    place = f"words 4 to {MIN_PASSAGE_WORDS + 3} of the answer, 'WORD203, WORD204"
    assert problem.message.startswith(f"{MIN_PASSAGE_WORDS} words in a row stand in {problem.other}: {place}")


def test_shorter_passages_and_changed_words_are_not_found(tmp_path):
    check = write_book(tmp_path)
    changed = BOOK[:40]
    changed[20] = "other"
    short = " ".join(BOOK[500 : 500 + MIN_PASSAGE_WORDS - 1])
    assert found(check, row(short), row(" ".join(changed))) == []


def test_rows_and_nested_files_are_read_and_what_is_no_text_is_told(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "code.py").write_text("\n\n" + " ".join(BOOK[:30]), "utf-8")
    rows = [{"id": 1, "content": "short"}, {"id": 2, "content": " ".join(BOOK[100:130])}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0\0")
    (tmp_path / ".hidden").write_text(" ".join(BOOK[200:230]), "utf-8")
    examples = [row(" ".join(BOOK[start : start + 30]), line) for line, start in enumerate((0, 100, 200), start=1)]
    one, two, unread = found(Protected(str(tmp_path)), *examples)
    assert (one.line, one.other) == (1, (str(tmp_path / "deep" / "code.py"), 3))
    assert (two.line, two.other) == (2, (str(tmp_path / "rows.jsonl"), 2))
    assert (unread.kind, unread.file) == ("quality", str(tmp_path / "picture.png"))


def test_a_passage_that_two_files_have_is_found_once_and_whole(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(BOOK[10:30]), "utf-8")
    (tmp_path / "b.txt").write_text(" ".join(BOOK[:60]), "utf-8")
    (problem,) = found(Protected(str(tmp_path)), row(" ".join(BOOK[:60])))
    assert problem.message.startswith("60 words in a row stand in ")
    assert problem.other == (str(tmp_path / "b.txt"), 1)


def test_a_folder_without_files_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(NotFoundError):
            Protected(str(folder))


def test_findings_come_in_the_order_of_the_rows(tmp_path):
    check = write_book(tmp_path)
    texts = [" ".join(BOOK[line : line + 30]) if line % 3 else MIT for line in range(600)]
    problems = found(check, *(row(text, line) for line, text in enumerate(texts)))
    assert [problem.line for problem in problems] == list(range(600))


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    return write_book(tmp_path_factory.mktemp("book"))


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(BOOK), max_size=50),
    st.lists(st.sampled_from(BOOK), max_size=50),
    st.integers(0, 1000 - MIN_PASSAGE_WORDS),
    st.integers(MIN_PASSAGE_WORDS, 60),
)
def test_a_planted_passage_is_always_found(book, before, after, start, size):
    passage = BOOK[start : start + size]
    problems = found(book, row(" ".join([*before, *passage, *after])))
    (spans,) = [
        [int(number) for number in problem.message.split("words ")[2].split(" of ")[0].split(" to ")]
        for problem in problems
        if int(problem.message.split()[0]) >= len(passage)
    ]
    assert spans[0] <= len(before) + 1
    assert spans[1] >= len(before) + len(passage)


@settings(deadline=None)
@given(st.lists(st.integers(0, 999), max_size=100))
def test_a_row_without_a_common_gram_is_never_found(book, places):
    steps = np.diff(places) == 1
    longest = max((len(streak) for streak in "".join("x" if step else " " for step in steps).split()), default=0) + 1
    problems = found(book, row(" ".join(BOOK[place] for place in places)))
    if longest < GRAM_WORDS:
        assert problems == []
