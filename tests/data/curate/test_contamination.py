"""What of a benchmark is found in training rows, and what only looks like it."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.curate.contamination import GRAM_WORDS, MIN_PASSAGE_WORDS, Contamination
from tunesmith.data.formats import read_examples
from tunesmith.data.ledger import Problem
from tunesmith.data.settings import DataSettings
from tunesmith.data.types import Example, Message, Origin

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
TRAIN = DataSettings(train="train.jsonl")
ITEM = "A spider with eight legs meets a beetle with six legs; how many legs have they together in the garden"
LONG = [f"word{number}" for number in range(400)]


def benchmark(folder: Path, rows: list[object], name: str = "bench.jsonl") -> Contamination:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return Contamination([str(path)], TRAIN)


def asked(prompt: str, answer: str = "fine", line: int = 1) -> Example:
    return Example(Origin("train.jsonl", line), "chat", (Message("user", prompt), Message("assistant", answer)))


def found(check: Contamination, *examples: Example) -> list[Problem]:
    return [*(problem for example in examples for problem in check.look(example)), *check.finish()]


@pytest.mark.parametrize(
    "text",
    [
        ITEM,
        ITEM.upper().replace(";", " --"),
        f"Please think about this. {ITEM}? Answer with a number.",
        " ".join(ITEM.split()[:15]),  # three quarters
        ITEM.replace("garden", "meadow"),
        ITEM.replace("beetle", "fly"),
    ],
)
@pytest.mark.parametrize("part", ["prompt", "answer"])
def test_an_item_is_found_in_a_row(tmp_path, text, part):
    check = benchmark(
        tmp_path, [{"question": "Some other question that nobody asks", "answer": "x"}, {"question": ITEM}]
    )
    row = asked(text) if part == "prompt" else asked("What?", text)
    (problem,) = found(check, asked("An innocent row about the weather in spring and summer days"), row)
    assert (problem.kind, problem.severity, problem.file, problem.line) == ("contamination", "warning", *row.origin)
    assert problem.other == (str(tmp_path / "bench.jsonl"), 2)
    assert f"the {part}" in problem.message
    assert problem.hint


@pytest.mark.parametrize(
    "text",
    [
        "A spider with eight legs meets a fly",  # the beginning alone
        " ".join(reversed(ITEM.split())),
        "How many legs has a spider, and how many has a beetle, and how many have they together?",
        "",
    ],
)
def test_a_row_with_some_of_its_words_is_not_contaminated(tmp_path, text):
    assert found(benchmark(tmp_path, [{"question": ITEM, "answer": "14"}]), asked(text)) == []


def test_the_place_and_the_quote_are_those_of_the_passage(tmp_path):
    check = benchmark(tmp_path, [{"question": ITEM, "answer": "14"}])
    (problem,) = found(check, asked("What is it?", f"Well, let me see: {ITEM} indeed!"))
    assert "holds 100% of a text" in problem.message
    assert f"words 5 to {4 + len(ITEM.split())} of the answer: 'A spider with eight legs meets" in problem.message


def test_short_items_must_be_a_whole_text(tmp_path):
    check = benchmark(tmp_path, [{"text": "Who killed Gandhi ?", "coarse": "HUM"}, {"text": "Hello", "coarse": "HUM"}])
    rows = [asked("who killed GANDHI"), asked("Tell me who killed Gandhi, please", line=2), asked("Hello", line=3)]
    (problem,) = found(check, *rows)
    assert problem.line == 1
    assert "words 1 to 3 of the prompt: 'who killed GANDHI'" in problem.message


@pytest.mark.parametrize("template_words", [8, 30])
def test_what_many_items_share_does_not_count(tmp_path, template_words):
    template = " ".join(f"Instruction{number}" for number in range(template_words))
    own = [
        f"the one about {thing} on the way home after a long day" for thing in ("cheap flights", "a lost red suitcase")
    ]
    rows = [{"question": f"{template} {number}", "answer": "?"} for number in range(11)]
    check = benchmark(tmp_path, [*rows, *({"question": f"{template} {text}", "answer": "?"} for text in own)])
    (problem,) = found(check, asked(f"{template} something else", line=1), asked(f"Now {own[1]}", line=2))
    assert (problem.line, problem.other.line) == (2, 13)


def test_a_long_passage_counts_however_long_the_item_is(tmp_path):
    check = benchmark(tmp_path, [{"text": " ".join(LONG)}])
    enough, less = (" ".join(LONG[100 : 100 + size]) for size in (MIN_PASSAGE_WORDS, MIN_PASSAGE_WORDS - 1))
    (problem,) = found(check, asked(less, line=1), asked(f"so {enough} so", line=2))
    assert problem.line == 2
    assert f"words 2 to {MIN_PASSAGE_WORDS + 1} of the prompt" in problem.message


def test_one_problem_a_row_names_the_item_it_holds_most_of(tmp_path):
    other = "Another question with more than eight words that has nothing to do with the first one"
    check = benchmark(tmp_path, [{"question": other, "answer": "x"}, {"question": ITEM, "answer": "x"}])
    (problem,) = found(check, asked(" ".join(other.split()[:12]), ITEM))
    assert problem.other.line == 2
    assert "and texts of 1 more of its rows" in problem.message


def test_any_form_and_unknown_columns(tmp_path):
    texts = [f"{' '.join(LONG[place : place + 12])}" for place in range(0, 96, 12)]
    rows = [
        {"messages": [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": "x"}]},
        {"task_id": 1, "prompt": texts[1], "canonical_solution": texts[2], "entry_point": "f"},
        {"sentence_good": texts[3], "sentence_bad": "no"},
        {"code": "x", "test_list": texts[4].split()},
        {"chosen": {"deep": texts[5]}, "rejected": "no"},
    ]
    check = benchmark(tmp_path, rows)
    problems = found(check, *(asked(text, line=line) for line, text in enumerate(texts, start=1)))
    assert [(problem.line, problem.other.line) for problem in problems] == [
        (1, 1),
        (2, 2),
        (3, 2),
        (4, 3),
        (5, 4),
        (6, 5),
    ]


def test_rows_of_a_benchmark_that_cannot_be_read_are_told(tmp_path):
    path = tmp_path / "bench.jsonl"
    path.write_text(json.dumps({"question": ITEM, "answer": "14"}) + "\n{broken\n", "utf-8")
    problems = found(Contamination([str(path)], TRAIN), asked(ITEM))
    assert [(problem.kind, problem.severity, problem.line) for problem in problems] == [
        ("contamination", "warning", 1),
        ("quality", "warning", 2),
    ]


def test_an_empty_benchmark_finds_nothing(tmp_path):
    assert found(benchmark(tmp_path, [{"n": 1}]), asked(ITEM)) == []


def test_findings_come_in_the_order_of_the_rows_and_are_the_same_again(tmp_path):
    check = benchmark(tmp_path, [{"question": ITEM, "answer": "14"}])
    rows = [asked(f"{ITEM} {line}" if line % 7 == 0 else f"row {line}", line=line) for line in range(1, 1500)]
    problems = found(check, *rows)
    assert [problem.line for problem in problems] == list(range(7, 1500, 7))
    assert found(benchmark(tmp_path, [{"question": ITEM, "answer": "14"}]), *rows) == problems


@pytest.fixture(scope="module")
def long_item(tmp_path_factory):
    return benchmark(tmp_path_factory.mktemp("benchmark"), [{"text": " ".join(LONG)}])


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(LONG), max_size=60),
    st.lists(st.sampled_from(LONG), max_size=60),
    st.integers(0, 400 - MIN_PASSAGE_WORDS),
    st.integers(MIN_PASSAGE_WORDS, 80),
)
def test_a_planted_passage_is_always_found(long_item, before, after, start, size):
    passage = LONG[start : start + size]
    (problem,) = found(long_item, asked(" ".join([*before, *passage, *after])))
    assert problem.kind == "contamination"


@settings(deadline=None)
@given(st.lists(st.integers(0, 399), max_size=100))
def test_a_row_without_a_common_gram_is_never_found(long_item, places):
    steps = np.diff(places)
    streak = longest = 0
    for step in steps:
        streak = streak + 1 if step == 1 else 0
        longest = max(longest, streak)
    problems = found(long_item, asked(" ".join(LONG[place] for place in places)))
    if longest + 1 < GRAM_WORDS:
        assert problems == []


@pytest.mark.skipif(not (SHARED / "gsm8k").is_dir(), reason="the development data is not here")
def test_real_overlap_of_gsm8k():
    path = SHARED / "gsm8k" / "train.jsonl"
    check = Contamination([str(SHARED / "gsm8k" / "test.jsonl")], TRAIN)
    problems = found(check, *read_examples(str(path), settings=DataSettings(train=str(path))))
    assert {problem.line: problem.other.line for problem in problems} == {21: 633, 1315: 603, 5163: 603}
