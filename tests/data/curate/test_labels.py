"""Answers that are labels."""

import pytest

from tunesmith.data.curate.labels import MAX_LABELS, Labels
from tunesmith.data.types import Origin


def problems(answers, certain=False):
    labels = Labels()
    labels.certain = certain
    for line, answer in enumerate(answers, start=1):
        labels.add(answer, origin=Origin("a", line))
    return [(problem.kind, problem.line) for problem in labels.finish()]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["late"] * 6, [("imbalance", 1)]),
        (["late"] * 9 + ["broken"], [("imbalance", 10)]),
        (["late"] * 5 + ["lost"] * 5, []),
        (["late"] * 5 + ["lost"] * 5 + ["Late"], [("label_error", 11)]),
        (["LATE"] + ["late"] * 5 + ["Lost"] + ["lost"] * 5, [("label_error", 1), ("label_error", 7)]),
        (["Late", "late", "late ", "late"] + ["lost"] * 8, [("label_error", 1), ("label_error", 3)]),
        ([f"answer {number}" for number in range(30)], []),
        (['{"a": 1}'] * 6, []),
        (["a long answer that goes on and on, well beyond what anybody calls a label"] * 6, []),
        (["late"] * 55 + ["lost"] * 5, [("imbalance", 1)]),
        (["late"] * 50 + ["lost"] * 10, []),
        (["late"] * 300 + ["broken"] * 300 + ["lost"] * 5, [("imbalance", 601)]),
        (["late"] * 300 + ["broken"] * 300 + ["lost"] * 6, []),
        (["late"], []),
        ([], []),
    ],
)
def test_labels(answers, expected):
    assert problems(answers) == expected


def test_a_label_column_is_certain_however_few_its_rows():
    answers = ["late", "lost", "broken", "Late "]
    assert problems(answers) == []
    assert problems(answers, certain=True) == [("label_error", 4)]


def test_too_many_answers_are_no_labels_and_take_no_memory():
    labels = Labels()
    for number in range(5 * MAX_LABELS):
        labels.add(f"answer {number}", origin=Origin("a", number + 1))
    assert list(labels.finish()) == []
    assert not labels._labels
