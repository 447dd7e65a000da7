"""Tasks that need no generation: which of several continuations does a model find likelier, or is it the likeliest?

    right  <=>  argmax_c log p(c | context) is the right one,        log p(c | x) = sum_t log p(c_t | x, c_<t)

Three kinds of rows, told by their columns:

    minimal pairs      sentence_good, sentence_bad, UID          BLiMP (Warstadt et al. 2020), two whole sentences
    last words         context, continuation                     LAMBADA (Paperno et al. 2016): likeliest at each token
    multiple choice    question, choices, answer                 ARC (Clark et al. 2018); asked as in lm-eval

What the continuations of a context have in common is computed once. Texts are cut into tokens as lm-evaluation-harness does:
context and continuation together, so that a token may not span the two, and spaces at the end go to the continuation.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tunesmith.data.ledger import Problem
from tunesmith.data.sources import read_rows
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.types import Origin, Row, Sequence
from tunesmith.errors import DataError
from tunesmith.models.load import Model

Kind = Literal["minimal_pairs", "last_words", "multiple_choice"]
CHUNK_ITEMS = 512
PACK_TOKENS = 4096
QUESTIONS = {"question": "Question: {}\nAnswer:", "ctx": "{}", "context": "{}", "goal": "Question: {}\nAnswer:"}
CHOICES = ("choices", "options", "endings")
ANSWERS = ("answer", "answerKey", "label", "gold")
HINT = "columns: sentence_good, sentence_bad, UID; or context, continuation; or question, choices, answer"


@dataclass(frozen=True)
class Item:
    """A context, what may follow, which of it is right, and the group that it is counted with.

    A single continuation is right where each of its tokens is the likeliest one.
    """

    kind: Kind
    context: str
    choices: tuple[str, ...]
    right: int
    group: str
    origin: Origin


@dataclass(frozen=True)
class Scores:
    """A number for each of B items: `right_B` 0 or 1, `right_by_length_B` with log-likelihoods a character, and the
    log-likelihood of the right continuation in nats, with its number of tokens."""

    right_B: np.ndarray
    right_by_length_B: np.ndarray
    logprob_B: np.ndarray
    tokens_B: np.ndarray


def read_items(path: str | Path) -> list[Item]:
    """The items of a file, which are all of one kind. Raises DataError naming the row that is none."""
    problems: list[Problem] = []
    items = [_item(row) for row in read_rows(path, on_bad=problems.append)]
    if errors := [problem for problem in problems if problem.severity == "error"]:
        raise errors[0].as_error()
    if not items:
        raise DataError("there are no rows in it", file=path, hint=HINT)
    if odd := next((item for item in items if item.kind != items[0].kind), None):
        message = f"a row of {odd.kind} among {items[0].kind}"
        raise DataError(message, file=odd.origin.file, line=odd.origin.line, hint="one kind a file")
    return items


def _item(row: Row) -> Item:
    value: dict[str, Any] = row.value if isinstance(row.value, dict) else {}
    if isinstance(value.get("sentence_good"), str) and isinstance(value.get("sentence_bad"), str):
        pair = (value["sentence_good"], value["sentence_bad"])
        return Item("minimal_pairs", "", pair, 0, str(value.get("UID", "")), row.origin)
    if isinstance(value.get("context"), str) and isinstance(value.get("continuation"), str) and value["continuation"]:
        word = value["continuation"]
        spaced = word if word[0].isspace() or value["context"][-1:].isspace() else f" {word}"
        return Item("last_words", value["context"], (spaced,), 0, "", row.origin)
    asked = next((name for name in QUESTIONS if isinstance(value.get(name), str)), None)
    given = next((value[name] for name in CHOICES if value.get(name)), None)
    answer = next((value[name] for name in ANSWERS if value.get(name) is not None), None)
    if asked is None or given is None or answer is None:
        found = ", ".join(value) or "none"
        raise _error(row, f"this row is no item of a task: its columns are {found}", hint=HINT)
    texts, labels = _choices(row, given)
    right = _right(row, answer, texts=texts, labels=labels)
    context = QUESTIONS[asked].format(value[asked])
    group = str(value.get("group", value.get("subject", "")))
    return Item("multiple_choice", context, tuple(f" {text}" for text in texts), right, group, row.origin)


def _choices(row: Row, given: Any) -> tuple[list[str], list[str]]:
    """The texts to choose from and their labels, which are letters where none are given."""
    texts, labels = given, None
    if isinstance(given, dict):
        texts, labels = given.get("text"), given.get("label")
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) and text for text in texts):
        raise _error(row, "its choices are not two texts or more", hint='choices: ["one", "two"]')
    return texts, [str(label) for label in labels or [chr(ord("A") + i) for i in range(len(texts))]]


def _right(row: Row, answer: Any, *, texts: list[str], labels: list[str]) -> int:
    """Which choice is right: by its place from 0, by its label, or by its text."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(texts):
        return answer
    for names in (labels, texts):
        if str(answer) in names:
            return names.index(str(answer))
    if str(answer).isdecimal() and int(answer) < len(texts):
        return int(answer)
    raise _error(
        row, f"its answer {str(answer)[:60]!r} is none of its choices", hint="a place from 0, a label or a text"
    )


def _error(row: Row, message: str, *, hint: str) -> DataError:
    return DataError(message, file=row.origin.file, line=row.origin.line, hint=hint)


def at_most(items: list[Item], *, rows: int | None) -> list[Item]:
    """At most `rows` of them, of every group as many as of the others, in order."""
    if rows is None or rows >= len(items):
        return items
    groups = dict.fromkeys(sorted({item.group for item in items}), 0)
    most, kept = max(1, rows // len(groups)), []
    for item in items:
        if groups[item.group] < most:
            groups[item.group] += 1
            kept.append(item)
    return kept


def score(model: Model, *, items: SequenceOf[Item]) -> Scores:
    """What a model makes of items, which may be longer than its context: contexts lose their beginning then."""
    parts = [_score(model, items[start : start + CHUNK_ITEMS]) for start in range(0, len(items), CHUNK_ITEMS)]
    columns = zip(*parts, strict=True)
    return Scores(*(np.concatenate(column) for column in columns))


def _score(model: Model, items: SequenceOf[Item]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    asked = [(item.context, choice) for item in items for choice in item.choices]
    logprob_C, greedy_C, tokens_C = continuation_logprobs(model, asked)
    length_C = np.array([len(choice) for _, choice in asked])
    right_B, by_length_B = np.zeros(len(items)), np.zeros(len(items))
    chosen = []
    start = 0
    for number, item in enumerate(items):
        of = slice(start, start + len(item.choices))
        chosen.append(start + item.right)
        start = of.stop
        if len(item.choices) == 1:
            right_B[number] = by_length_B[number] = greedy_C[of.start]
        else:
            right_B[number] = int(logprob_C[of].argmax()) == item.right
            by_length_B[number] = int((logprob_C[of] / length_C[of]).argmax()) == item.right
    return right_B, by_length_B, logprob_C[chosen], tokens_C[chosen]


def continuation_logprobs(
    model: Model, pairs: SequenceOf[tuple[str, str]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For pairs of a context and its continuation: log p of the continuation in nats, whether each of its tokens is the
    likeliest, and how many tokens it has, each [B]."""
    sequences = [
        _sequence(context, continuation, row=row, model=model) for row, (context, continuation) in enumerate(pairs)
    ]
    with model.evaluating():
        logprob_B, greedy_B = model.row_scores(sequences, num_rows=len(pairs), max_tokens=PACK_TOKENS)
    return logprob_B, greedy_B, np.array([sequence.num_targets for sequence in sequences], dtype=np.int64)


def _sequence(context: str, continuation: str, *, row: int, model: Model) -> Sequence:
    """The last tokens that fit into the context, those of the continuation trained."""
    before, after = encoded_pair(model.tokenizer, context=context, continuation=continuation)
    tokens = [*before, *after][-model.room_tokens :]
    tokens_T = np.array(tokens, dtype=np.int32)
    weight_T = np.zeros(len(tokens), dtype=np.float32)
    weight_T[max(1, len(tokens) - len(after)) :] = 1
    return Sequence(tokens_T, weight_T, row)


def encoded_pair(tokenizer: Tokenizer, *, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The ids of both, cut apart where those of the context end; an empty context is begin-of-text, or end-of-text."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole, part = tokenizer.encode_text([context + continuation, context])
    begin = tokenizer.begin_ids
    if not part:
        return begin or [tokenizer.eos_id], whole
    return [*begin, *whole[: len(part)]], whole[len(part) :]
