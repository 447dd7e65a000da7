"""Looking up: BM25 equals its formula, prompts stay within their room, and what was found is written down."""

import math
import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.retrieval import (
    K1,
    PASSAGE_CHARACTERS,
    B,
    Bm25,
    Embedded,
    Passage,
    asked_text,
    look_up_passages,
    look_up_rows,
    read_passages,
)
from tunesmith.data.types import Example, Message, Origin
from tunesmith.errors import DataError, NotFoundError


def row(question: str, answer: str = "yes", *, line: int = 1) -> Example:
    return Example(Origin("rows.jsonl", line), "chat", (Message("user", question), Message("assistant", answer)))


def naive(texts: list[str], query: str) -> list[float]:
    """The formula, word by word."""
    words = [re.findall(r"\w+", text.casefold()) for text in texts]
    mean = max(1.0, sum(map(len, words)) / len(words))
    scores = []
    for found in words:
        counts, score = Counter(found), 0.0
        for word in set(re.findall(r"\w+", query.casefold())):
            having = sum(word in other for other in words)
            if not counts[word]:
                continue
            idf = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
            score += idf * counts[word] * (K1 + 1) / (counts[word] + K1 * (1 - B + B * len(found) / mean))
        scores.append(score)
    return scores


TEXT = st.lists(st.sampled_from(["red", "Green", "blue,", "fox", "dog!", ""]), max_size=8).map(" ".join)


@given(st.lists(TEXT, min_size=1, max_size=12), TEXT, st.integers(1, 12))
def test_the_nearest_are_those_of_the_formula(texts: list[str], query: str, count: int) -> None:
    scores = naive(texts, query)
    found = Bm25(texts).nearest(query, count=count)
    assert len(found) == min(count, sum(score > 0 for score in scores))
    expected = sorted((score for score in scores if score > 0), reverse=True)[:count]
    assert [scores[place] for place in found] == pytest.approx(expected)


def test_a_rare_word_counts_more_than_a_common_one() -> None:
    texts = ["the red fox", "the blue dog", "the blue fish", "the blue fish again"]
    index = Bm25(texts)
    assert index.nearest("the fox", count=1) == [0]
    assert index.nearest("which BLUE?", count=9) == [1, 2, 3]  # the longest last
    assert index.nearest("nothing like it", count=9) == []
    assert Bm25([]).nearest("fox", count=1) == []


def letters(texts: list[str]) -> np.ndarray:
    """Embeddings that know which letters a text has, and nothing of words."""
    found_ND = np.array([[text.count(chr(97 + place)) + 1e-3 for place in range(26)] for text in texts]).reshape(-1, 26)
    return found_ND / np.linalg.norm(found_ND, axis=1, keepdims=True)


@given(st.lists(TEXT, max_size=8), TEXT, st.integers(1, 9))
def test_the_nearest_in_meaning_have_the_largest_cosine(texts: list[str], query: str, count: int) -> None:
    found = Embedded(texts, embed=letters).nearest(query, count=count)
    cosines = [float(letters([text])[0] @ letters([query])[0]) for text in texts]
    assert [cosines[place] for place in found] == pytest.approx(sorted(cosines, reverse=True)[:count])
    assert len(set(found)) == len(found) == min(count, len(texts))


def test_passages_and_rows_are_looked_up_in_any_index() -> None:
    passages = [Passage(Origin("a.txt", 1), "dog bark"), Passage(Origin("a.txt", 2), "listen silent")]
    asked = row("tinsel?")  # shares no word with either, and its letters with the second
    indexer = partial(Embedded, embed=letters)
    fits = lambda messages, example: True  # noqa: E731
    assert look_up_passages(passages, count=1, fits=fits).origins(asked) == []
    assert look_up_passages(passages, count=1, fits=fits, indexer=indexer).origins(asked) == ["a.txt:2"]
    rows = [row("dog bark", line=1), row("listen", line=2)]
    lookup = look_up_rows(rows, plain=False, count=1, fits=fits, indexer=indexer)
    assert lookup.origins(asked) == ["rows.jsonl:2"]


def test_the_rows_most_alike_stand_last_and_fewer_are_shown_where_they_do_not_fit() -> None:
    rows = [row("the red fox", line=1), row("the red fox jumps over it", line=2), row("a blue dog", line=3)]
    asked = row("does the red fox jump over it")
    limit = 10_000

    def fits(messages: list[Message], example: Example) -> bool:
        return sum(len(m.content) for m in messages) <= limit

    plain_text = Example(Origin("t", 1), "text", text="red fox")
    lookup = look_up_rows([*rows, plain_text], plain=False, count=2, fits=fits)
    assert lookup.origins(asked) == ["rows.jsonl:2", "rows.jsonl:1"]
    assert [m.content for m in lookup.prompt(asked)] == [
        "the red fox", "yes", "the red fox jumps over it", "yes", "does the red fox jump over it",
    ]  # fmt: skip
    for size, origins in ((60, ["rows.jsonl:2"]), (10, [])):
        limit = size
        lookup = look_up_rows(rows, plain=False, count=2, fits=fits)
        assert lookup.origins(asked) == origins
    assert lookup.prompt(asked) == list(asked.asked[0])


def test_passages_stand_before_the_question_with_the_nearest_first(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.md").write_text("# Foxes\n\nA fox is red.\n\n\nA dog is not.\n" + "\n" + "word " * 300)
    (tmp_path / "b.TXT").write_text("The red fox jumps.")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
    passages = read_passages(tmp_path)
    assert [(str(p.origin), len(p.text) < PASSAGE_CHARACTERS) for p in passages] == [
        ("b.TXT:1", True), (str(Path("deep/a.md")) + ":1", True), (str(Path("deep/a.md")) + ":8", False),
    ]  # fmt: skip
    assert passages[1].text == "# Foxes\n\nA fox is red.\n\nA dog is not."
    lookup = look_up_passages(passages, count=2, fits=lambda messages, example: True)
    asked = Example(
        Origin("rows.jsonl", 1), "chat",
        (Message("system", "Be brief."), Message("user", "Who jumps?"), Message("assistant", "The fox.")),
    )  # fmt: skip
    assert lookup.origins(asked) == ["b.TXT:1"]
    assert [m.content for m in lookup.prompt(asked)] == ["Be brief.", "The red fox jumps.\n\nWho jumps?"]
    none = look_up_passages(passages, count=2, fits=lambda messages, example: False)
    assert none.prompt(asked) == list(asked.asked[0])
    assert asked_text(asked) == "Who jumps?"


def test_lines_of_passages_are_those_of_the_file(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    lines = []
    for number in range(200):
        lines += [f"paragraph {number} " + "x" * int(random.integers(1, 400))] + [""] * int(random.integers(1, 4))
    (tmp_path / "a.txt").write_text("\n".join(lines))
    for passage in read_passages(tmp_path):
        assert lines[passage.origin.line - 1] == passage.text.split("\n")[0]


def test_a_folder_without_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such folder"):
        read_passages(tmp_path / "none")
    with pytest.raises(DataError, match="no text"):
        read_passages(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="not UTF-8"):
        read_passages(tmp_path)
