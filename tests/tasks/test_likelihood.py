"""Tasks by likelihood: rows read, tokens cut as the harness cuts them, and scores against logits one text at a time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.data.types import Origin
from tunesmith.errors import DataError
from tunesmith.models.load import Model
from tunesmith.tasks.likelihood import Item, at_most, continuation_logprobs, encoded_pair, read_items, score


@pytest.fixture(scope="module")
def model(build_model: Any) -> Model:
    return build_model("llama", dtype=torch.float64, max_position_embeddings=64)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_three_kinds_of_rows_are_told_by_their_columns(tmp_path: Path) -> None:
    (pair,) = read_items(write(tmp_path / "a", {"sentence_good": "He is.", "sentence_bad": "He are.", "UID": "agree"}))
    assert (pair.kind, pair.context, pair.choices, pair.right, pair.group) == (
        "minimal_pairs", "", ("He is.", "He are."), 0, "agree",
    )  # fmt: skip
    last, spaced = read_items(
        write(tmp_path / "b", *({"context": "It was a", "continuation": word} for word in ("dog", " dog")))
    )
    assert last.choices == spaced.choices == (" dog",)
    rows = [
        {"question": "Which?", "choices": ["red", "green"], "answer": 1},
        {"question": "Which?", "choices": {"text": ["red", "green"], "label": ["1", "2"]}, "answerKey": "2"},
        {"question": "Which?", "options": ["red", "green"], "answer": "B"},
        {"question": "Which?", "choices": ["red", "green"], "answer": "green"},
        {"question": "Which?", "choices": ["red", "green"], "label": "1"},
    ]
    for item in read_items(write(tmp_path / "c", *rows)):
        assert (item.context, item.choices, item.right) == ("Question: Which?\nAnswer:", (" red", " green"), 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], "its columns are text"),
        ([{"question": "a", "choices": ["b"], "answer": 0}], "not two texts"),
        ([{"question": "a", "choices": ["b", "c"], "answer": "d"}], "none of its choices"),
        ([{"question": "a", "choices": ["b", "c"], "answer": 2}], "none of its choices"),
        ([{"context": "a", "continuation": "b"}, {"sentence_good": "a", "sentence_bad": "b"}], "minimal_pairs among"),
        ([], "no rows"),
    ],
)
def test_what_is_no_item_is_refused_at_its_line(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_items(write(tmp_path / "rows.jsonl", *rows))
    assert "rows.jsonl" in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("context", "continuation"), [("one two", " three"), ("one two ", "three"), ("", "three"), ("Q: a\nA:", " b")]
)
def test_a_text_is_cut_into_the_tokens_of_the_whole(model: Model, context: str, continuation: str) -> None:
    before, after = encoded_pair(model.tokenizer, context=context, continuation=continuation)
    assert after
    whole = model.tokenizer.encode_text([context + continuation])[0]
    assert [*before, *after][-len(whole) :] == whole
    assert model.tokenizer.decode(after).strip() == continuation.strip()


def test_scores_are_those_of_one_text_at_a_time(model: Model, eager_twin: Any) -> None:
    twin = eager_twin(model)
    pairs = [("one two", " three"), ("one two", " four five"), ("", "six"), ("one two three " * 12, "x")]
    logprob_B, greedy_B, tokens_B = continuation_logprobs(model, pairs)
    for number, (context, continuation) in enumerate(pairs):
        before, after = encoded_pair(model.tokenizer, context=context, continuation=continuation)
        ids = [*before, *after][-model.room_tokens :]
        with torch.no_grad():
            logits_TV = twin(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        first = len(ids) - len(after)
        wanted = torch.tensor(ids[first:])
        found_TV = logits_TV[first - 1 : -1]
        assert logprob_B[number] == pytest.approx(
            float(found_TV.log_softmax(-1).gather(1, wanted[:, None]).sum()), abs=1e-5
        )
        assert greedy_B[number] == bool((found_TV.argmax(-1) == wanted).all())
        assert tokens_B[number] == len(after)


def test_the_likeliest_choice_counts_and_by_length_the_likeliest_a_character(model: Model) -> None:
    choices = (" a", " a much longer answer than the other one")
    logprob_B = continuation_logprobs(model, [("Q:", choice) for choice in choices])[0]
    assert logprob_B[0] > logprob_B[1]  # a longer text is less likely
    by_length = logprob_B / np.array([len(choice) for choice in choices])
    items = [Item("multiple_choice", "Q:", choices, right, "", Origin("f", 1)) for right in (0, 1)]
    scores = score(model, items=items)
    assert scores.right_B.tolist() == [1, 0]
    assert scores.right_by_length_B.tolist() == [float(by_length.argmax() == right) for right in (0, 1)]
    assert scores.logprob_B == pytest.approx(logprob_B)
    greedy = [Item("last_words", "Q:", (choice,), 0, "", Origin("f", 1)) for choice in choices]
    assert score(model, items=greedy).right_B.tolist() == [0, 0]


def test_some_items_are_taken_from_every_group() -> None:
    items = [Item("minimal_pairs", "", ("a", "b"), 0, "xyz"[n % 3], Origin("f", n)) for n in range(30)]
    assert [sum(item.group == group for item in at_most(items, rows=6)) for group in "xyz"] == [2, 2, 2]
    assert at_most(items, rows=30) == at_most(items, rows=None) == items
