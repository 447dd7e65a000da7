"""Every bar of a check is an argument: a row that lies between two values is told of with one and not with the other."""

import json
from pathlib import Path

import numpy as np
import pytest

from tunesmith.data.curate.contamination import Contamination
from tunesmith.data.curate.duplicates import Repeats
from tunesmith.data.curate.label_errors import label_errors
from tunesmith.data.curate.labels import Labels
from tunesmith.data.curate.language import Language
from tunesmith.data.curate.protected import Protected
from tunesmith.data.curate.quality import Bars, Quality
from tunesmith.data.settings import DataSettings
from tunesmith.data.types import Example, Message, Origin

WORDS = [f"word{chr(97 + number // 26)}{chr(97 + number % 26)}" for number in range(400)]


def text(words, line=1):
    return Example(Origin("rows.jsonl", line), "text", text=" ".join(words))


def num_found(check, examples):
    return sum(1 for example in examples for _ in check.look(example)) + sum(1 for _ in check.finish())


@pytest.mark.parametrize(("given", "expected"), [({}, False), ({"min_jaccard": 0.6}, True), ({"gram": 1}, True)])
def test_near_repeats(given, expected):
    repeats, changed = Repeats(**given), WORDS[:40]
    changed[10:14] = ["river", "stone", "mill", "green"]
    repeats.add(text(WORDS[:40]))
    repeats.add(text(changed, line=2))
    assert repeats.is_near(text(changed), text(WORDS[:40])) is expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, 0), ({"min_passage_words": 20}, 1), ({"min_containment": 0.02}, 1), ({"gram_words": 30}, 0)],
)
def test_contamination(tmp_path: Path, given, expected):
    (tmp_path / "bench.jsonl").write_text(json.dumps({"text": " ".join(WORDS)}) + "\n", "utf-8")
    check = Contamination([str(tmp_path / "bench.jsonl")], DataSettings(train="rows.jsonl"), **given)
    assert num_found(check, [text(WORDS[100:124])]) == expected


def test_a_gram_of_another_length_finds_another_share(tmp_path: Path):
    (tmp_path / "bench.jsonl").write_text(json.dumps({"text": " ".join(WORDS[:40])}) + "\n", "utf-8")
    row = [word for start in range(0, 40, 8) for word in [*WORDS[start : start + 6], "other", "words"]]
    for gram_words, expected in ((8, 0), (3, 1)):
        check = Contamination([str(tmp_path)], DataSettings(train="rows.jsonl"), gram_words=gram_words)
        assert num_found(check, [text(row)]) == expected


@pytest.mark.parametrize(("given", "expected"), [({}, 0), ({"min_passage_words": 15}, 1)])
def test_protected_passages(tmp_path: Path, given, expected):
    (tmp_path / "book.txt").write_text(" ".join(WORDS), "utf-8")
    assert num_found(Protected(str(tmp_path), **given), [text(WORDS[100:120])]) == expected


@pytest.mark.parametrize(
    ("given", "expected"), [({}, 5), ({"main_share": 0.01}, 0), ({"min_letters": 80}, 0), ({"min_probability": 1.1}, 0)]
)
def test_languages(given, expected):
    pytest.importorskip("py3langid", reason="the extra `curate` is not installed")
    english = "The sensor in the garden has not sent a single value since yesterday evening."
    german = "Der Sensor im Garten hat seit gestern Abend keinen einzigen Wert mehr gesendet."
    rows = [text([german if line <= 5 else english], line) for line in range(1, 121)]
    assert num_found(Language(**given), rows) == expected


@pytest.mark.parametrize(
    ("small", "given", "expected"),
    [
        (15, {}, 0),
        (15, {"max_class_share": 0.8}, 1),
        (15, {"max_class_ratio": 4}, 1),
        (5, {}, 1),
        (5, {"max_class_share": 0.99}, 0),
    ],
)
def test_uneven_classes(small, given, expected):
    labels = Labels(**given)
    for line in range(1, 101):
        labels.add("late" if line > small else "lost", origin=Origin("rows.jsonl", line))
    assert sum(1 for _ in labels.finish()) == expected


@pytest.mark.parametrize(
    ("given", "expected"), [({}, [(2, 0)]), ({"max_self_share": 0.01}, []), ({"reached_share": 2.0}, [])]
)
def test_wrong_labels(given, expected):
    probability_NK = np.array([[0.9, 0.1], [0.1, 0.9], [0.985, 0.015], [0.1, 0.9]])
    assert label_errors(probability_NK, label_N=np.array([0, 1, 1, 1]), **given) == expected


@pytest.mark.parametrize(
    ("bars", "expected"),
    [
        ({}, {"echo", "loop"}),
        ({"min_echo_characters": 200}, {"loop"}),
        ({"min_echo_share": 0.99, "min_shared_words_share": 0.99}, {"loop"}),
        ({"min_loop_words": 20}, {"echo"}),
        ({"max_length_score": 0.5}, {"echo", "loop", "length"}),
    ],
)
def test_answers(bars, expected):
    prompt = "Could you tell me how to replace the old battery of the sensor in my garden shed please"
    answers = {
        "echo": f"{prompt} now.",
        "loop": "We will see. It is " + "very " * 12 + "big.",
        "length": "It is done. " * 2,
    }
    rows = [
        Example(Origin("rows.jsonl", line), "chat", (Message("user", prompt), Message("assistant", answer)))
        for line, answer in enumerate(
            [*answers.values(), *["Open the lid and put another one in, then close it."] * 60]
        )
    ]
    quality = Quality(Bars(**bars))
    problems = [problem for row in rows for problem in quality.look(row)] + list(quality.finish())
    assert {list(answers)[problem.line] for problem in problems} == expected
