"""Labels that do not fit their text."""

import sys

import numpy as np
import pytest

from tunesmith.data.curate.label_errors import LabelErrors, label_errors
from tunesmith.data.types import Example, Message, Origin
from tunesmith.errors import MissingExtraError

CLASSES, ROWS_A_CLASS = 12, 40


def intents(*, seed=0, flipped_share=0.0):
    """Texts of eight words, five of them of twelve that their class prefers; and the rows whose label was changed."""
    random = np.random.default_rng(seed)
    words = [f"w{chr(97 + a)}{chr(97 + b)}" for a in range(20) for b in range(20)]
    own = random.permutation(words)[: 12 * CLASSES].reshape(CLASSES, 12)
    rows, flipped = [], set()
    for row in range(CLASSES * ROWS_A_CLASS):
        label = row % CLASSES
        text = " ".join([*random.choice(own[label], 5), *random.choice(words, 3)])
        if random.random() < flipped_share:
            label = (label + int(random.integers(1, CLASSES))) % CLASSES
            flipped.add(row + 1)
        rows.append((text, f"intent_{label}"))
    return rows, flipped


def check(rows, form="labelled"):
    pytest.importorskip("sklearn", reason="the extra `curate` is not installed")
    labels = LabelErrors()
    for line, (text, label) in enumerate(rows, start=1):
        if form == "labelled":
            example = Example(Origin("rows.jsonl", line), form, text=text, label=label)
        else:
            example = Example(Origin("rows.jsonl", line), form, (Message("user", text), Message("assistant", label)))
        assert not list(labels.look(example))
    return list(labels.finish())


@pytest.mark.parametrize("form", ["labelled", "chat"])
def test_one_label_in_ten_is_wrong_and_most_are_found(form):
    rows, flipped = intents(flipped_share=0.1)
    problems = check(rows, form)
    found = {problem.line for problem in problems}
    assert len(flipped) > 40
    assert len(found & flipped) >= 0.55 * len(flipped)  # 0.65 to 0.81 over eight seeds
    assert len(found & flipped) >= 0.95 * len(found)
    assert {problem.kind for problem in problems} == {"label_error"}
    truth, _ = intents()
    right = [problem for problem in problems if f"'{truth[problem.line - 1][1]}' has probability" in problem.message]
    assert len(right) >= 0.9 * len(problems)
    assert str(problems[0].origin).startswith("rows.jsonl:")
    assert problems[0].hint


def test_right_labels_are_left_alone():
    assert check(intents()[0]) == []


def test_the_result_is_the_same_every_time():
    rows, _ = intents(flipped_share=0.1)
    assert check(rows) == check(rows)


def test_labels_that_the_text_does_not_decide_are_left_alone():
    random = np.random.default_rng(0)
    rows = [(text, f"intent_{random.integers(4)}") for text, _ in intents()[0]]
    assert len(check(rows)) <= 0.01 * len(rows)


def test_small_classes_are_left_out():
    rows, _ = intents()
    rows[::60] = [(text, "rare") for text, _ in rows[::60]]  # eight rows
    assert check(rows) == []
    assert check(rows[:9]) == []


def test_free_text_and_several_labels_are_not_judged():
    rows = [(text, f"a reply of its own to number {number}") for number, (text, _) in enumerate(intents()[0])]
    assert check(rows, "chat") == []
    labels = LabelErrors()
    for line, (text, label) in enumerate(intents()[0], start=1):
        list(labels.look(Example(Origin("a", line), "labelled", text=text, label=(label,))))
    assert list(labels.finish()) == []


def test_the_texts_of_answers_that_are_no_labels_are_let_go():
    labels = LabelErrors()
    for line in range(1, 20):
        turns = Message("user", "a question"), Message("assistant", "short" if line < 10 else "long " * 40)
        list(labels.look(Example(Origin("a", line), "chat", turns)))
    assert labels._texts == []


def test_rows_beyond_the_bound_are_left_out_and_told(monkeypatch):
    rows, _ = intents(flipped_share=0.1)
    monkeypatch.setattr("tunesmith.data.curate.label_errors.MAX_ROWS", 400)
    problems = check(rows)
    assert "first 400 rows; 80 were left out" in problems[0].message
    assert max(problem.line for problem in problems[1:]) <= 400


def test_the_confident_joint_by_hand():
    probability = np.array([[0.9, 0.1], [0.8, 0.2], [0.01, 0.99], [0.2, 0.8], [0.1, 0.9], [0.45, 0.55]], np.float32)
    label = np.array([0, 0, 0, 1, 1, 1])
    # t_0 = (0.9 + 0.8 + 0.01) / 3 = 0.57: the third row is far below it, and reaches t_1 = 0.75.
    assert label_errors(probability, label_N=label) == [(2, 1)]
    assert label_errors(probability[:2], label_N=label[:2]) == []


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    labels = LabelErrors()
    for line, (text, label) in enumerate(intents()[0], start=1):
        list(labels.look(Example(Origin("a", line), "labelled", text=text, label=label)))
    with pytest.raises(MissingExtraError, match="scikit-learn") as error:
        list(labels.finish())
    assert "tunesmith[curate]" in error.value.hint
