"""Rows that say the same in other words, with embeddings made by hand."""

import numpy as np
import pytest

from tunesmith.data.curate import semantic
from tunesmith.data.curate.semantic import SemanticRepeats, other_facts
from tunesmith.data.types import Example, Origin


def rows(texts):
    return [Example(Origin("train.jsonl", line), "text", text=text) for line, text in enumerate(texts, start=1)]


def found(check, examples):
    return [*(problem for example in examples for problem in check.look(example)), *check.finish()]


def directions(angles):
    """An embedding that knows each text's angle in the plane."""

    def embed(texts):
        return np.array([[np.cos(angles[text]), np.sin(angles[text])] for text in texts], np.float32)

    return embed


def test_the_later_row_is_told_with_its_nearest_earlier_row():
    angles = {"one way": 0.0, "far away": 1.5, "another way": 0.3, "yet another": 0.25}
    problems = found(SemanticRepeats(directions(angles), min_cosine=0.9), rows(angles))
    assert [(problem.line, problem.other.line, problem.kind) for problem in problems] == [
        (3, 1, "near_duplicate"),
        (4, 3, "near_duplicate"),
    ]
    assert "similarity 0.96; train.jsonl:1" in problems[0].message


def test_equal_rows_and_other_facts_are_left_out():
    texts = ["It has seven legs", "it has seven LEGS!", "It has 7 legs", "It has 8 legs", "We met Ann", "We met Bob"]
    problems = found(SemanticRepeats(directions(dict.fromkeys(texts, 0.0))), rows([*texts[:2], *texts[3:]]))
    assert [problem.line for problem in problems] == [3, 4, 5]  # each has a partner that tells nothing else
    assert found(SemanticRepeats(directions(dict.fromkeys(texts, 0.0))), rows(texts[2:4])) == []
    assert found(SemanticRepeats(directions(dict.fromkeys(texts, 0.0))), rows(texts[4:])) == []
    assert found(SemanticRepeats(directions({})), rows(["", " "])) == []


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("Fly to Rome on Monday.", "Book a flight to Oslo.", True),
        ("It costs 5 euros.", "The price is 6 euros.", True),
        ("Open Settings there.", "go to the settings, please", False),
        ("Within 30 days.", "Within thirty days.", False),
        ("Ask Ann now.", "You should ask her.", False),
    ],
)
def test_other_facts(one, other, expected):
    assert other_facts(one, other) is expected
    assert other_facts(other, one) is expected


def test_blocks_give_what_one_product_gives(monkeypatch):
    monkeypatch.setattr(semantic, "BLOCK_ROWS", 7)
    monkeypatch.setattr(semantic, "BLOCK_COLUMNS", 10)
    monkeypatch.setattr(semantic, "EMBEDDED_ROWS", 5)
    chance = np.random.default_rng(0)
    vectors = chance.normal(size=(60, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    texts = ["".join(chance.choice(list("abcdefghij"), 9)) for _ in range(60)]
    known = dict(zip(texts, vectors, strict=True))
    problems = found(SemanticRepeats(lambda some: np.stack([known[text] for text in some])), rows(texts))
    cosine = np.tril(vectors @ vectors.T, -1) - np.triu(np.ones((60, 60)))
    expected = [
        (row + 1, int(cosine[row].argmax()) + 1) for row in range(60) if cosine[row].max() >= semantic.MIN_COSINE
    ]
    assert len(expected) > 10
    assert [(problem.line, problem.other.line) for problem in problems] == expected


def test_more_rows_than_can_be_compared_are_told(monkeypatch):
    monkeypatch.setattr(semantic, "MAX_ROWS", 2)
    (problem,) = found(SemanticRepeats(directions({"a": 0.0, "b": 1.5})), rows(["a", "b", "c", "d"]))
    assert (problem.kind, problem.severity) == ("quality", "warning")
