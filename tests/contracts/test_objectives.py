"""What every objective promises: one row an objective, each with a reference of its own written down naively."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tunesmith.data.pack import Pack, build_pack, build_packs
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.types import Example, Message, Origin, Sequence
from tunesmith.errors import DataError
from tunesmith.models.load import Model
from tunesmith.objectives import OBJECTIVES, Objective
from tunesmith.objectives.base import Readout, Totals
from tunesmith.objectives.causal import Causal
from tunesmith.objectives.instruction import Instruction
from tunesmith.train.loop import forward

BuildModel = Callable[..., Model]
Logprob = Callable[[Sequence, int], Tensor]


@dataclass(frozen=True)
class Row:
    """An objective and its reference: (sum, count) over rows, from the log-probability of token k of a row."""

    objective: Objective
    reference: Callable[[list[Sequence], Logprob], tuple[Tensor, float]]


def weighted_likelihood(rows: list[Sequence], logprob: Logprob) -> tuple[Tensor, float]:
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for row in rows:
        for k in range(1, len(row.tokens_T)):
            total = total - float(row.weight_T[k]) * logprob(row, k)
            count += float(row.weight_T[k])
    return total, count


ROWS = {
    "instruction": Row(Instruction(), weighted_likelihood),
    "causal": Row(Causal(), weighted_likelihood),
}


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


def test_every_objective_is_in_the_table() -> None:
    assert {type(row.objective) for row in ROWS.values()} == set(OBJECTIVES.values())
    assert all(OBJECTIVES[row.objective.kind] is type(row.objective) for row in ROWS.values())  # type: ignore[attr-defined]


def readout_of(pack: Pack, logprob_N: Tensor) -> Readout:
    weight_N = torch.from_numpy(pack.weight_N).to(logprob_N.dtype)
    return Readout(logprob_N, weight_N, torch.from_numpy(pack.sequence_N), len(pack.rows_S))


@st.composite
def some_rows(draw: st.DrawFn) -> list[Sequence]:
    """Rows of few tokens with weights of all kinds; at least one token is trained."""
    rows = []
    for number in range(draw(st.integers(1, 5))):
        length = draw(st.integers(2, 8))
        tokens = draw(st.lists(st.integers(0, 3), min_size=length, max_size=length))
        weights = draw(st.lists(st.sampled_from([0.0, 0.25, 1.0, 2.0]), min_size=length - 1, max_size=length - 1))
        rows.append(Sequence(np.array(tokens, np.int32), np.array([0.0, *weights], np.float32), number))
    rows[0].weight_T[1] = 1.0
    return rows


def table_logprob(row: Sequence, k: int) -> float:
    """A log-probability made up from what stands before and the token itself."""
    context = hash(tuple(row.tokens_T[: k + 1].tolist()))
    return -1.0 - (context % 1000) / 1000


def logprobs_of(pack: Pack, rows: list[Sequence]) -> Tensor:
    """The table's numbers where the pack has its targets."""
    values = []
    for index, number in enumerate(pack.rows_S.tolist()):
        row = next(r for r in rows if r.row == number)
        values += [table_logprob(row, int(k)) for k in np.flatnonzero(row.weight_T)]
        assert int((pack.sequence_N <= index).sum()) == len(values)
    return torch.tensor(values, dtype=torch.float64)


@settings(max_examples=50, deadline=None)
@given(some_rows(), st.sampled_from([1, 2, 1 << 30]), st.integers(1, 30), st.randoms(use_true_random=False))
@pytest.mark.parametrize("name", ROWS)
def test_sum_and_count_equal_the_reference_however_rows_are_laid_out(
    name: str, rows: list[Sequence], min_shared: int, max_tokens: int, random: Any
) -> None:
    objective, reference = ROWS[name].objective, ROWS[name].reference
    expected, expected_count = reference(rows, lambda r, k: torch.tensor(table_logprob(r, k), dtype=torch.float64))
    shuffled = list(rows)
    random.shuffle(shuffled)
    packs = [
        [build_pack(rows, min_shared=min_shared)],
        list(build_packs(shuffled, max_tokens=max_tokens, min_shared=min_shared)),
        [build_pack([row]) for row in shuffled],
    ]
    for layout in packs:
        losses = [objective.loss(readout_of(pack, logprobs_of(pack, rows)), pack) for pack in layout]
        assert sum(float(loss.sum) for loss in losses) == pytest.approx(float(expected), rel=1e-12)
        assert sum(loss.count for loss in losses) == pytest.approx(expected_count, rel=1e-12)
        assert [loss.count for loss in losses] == [objective.count(pack) for pack in layout]


def test_a_hand_worked_number(row: Row) -> None:
    """Probabilities 1/2 and 1/4 with weights 1 and 3: (ln 2 + 3 ln 4) / 4 = 7 ln 2 / 4."""
    pack = build_pack([Sequence(np.array([5, 6, 7], np.int32), np.array([0, 1, 3], np.float32))])
    loss = row.objective.loss(readout_of(pack, torch.tensor([0.5, 0.25], dtype=torch.float64).log()), pack)
    assert loss.count == 4
    assert float(loss.sum) / loss.count == pytest.approx(7 * math.log(2) / 4)


def test_gradcheck(row: Row) -> None:
    rows = [Sequence(np.arange(4, dtype=np.int32) + k, np.array([0, 1, 0.5, 2], np.float32), k) for k in range(3)]
    pack = build_pack(rows)
    logprob_N = torch.randn(len(pack.target_N), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: row.objective.loss(readout_of(pack, x), pack).sum, (logprob_N,))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_through_a_model_the_loss_is_the_reference_over_transformers_logits(
    row: Row, build_model: BuildModel, eager_twin: Callable[[Model], Any], architecture: str, tree_rows: list[Sequence]
) -> None:
    model = build_model(architecture)
    twin = eager_twin(model)
    with torch.no_grad():
        logits = [
            twin(input_ids=torch.from_numpy(r.tokens_T).long()[None]).logits[0].log_softmax(-1) for r in tree_rows
        ]
    expected, count = row.reference(tree_rows, lambda r, k: logits[r.row][k - 1, r.tokens_T[k]])
    for max_tokens in (1, 30, 10_000):
        packs = list(build_packs(tree_rows[::-1], max_tokens=max_tokens, min_shared=2))
        totals = Totals()
        for pack in packs:
            loss = forward(model, pack, objective=row.objective)
            totals.add("loss", sum=float(loss.sum.detach()), count=loss.count)
        assert totals.mean("loss") == pytest.approx(float(expected) / count, rel=1e-11)


def test_the_count_is_known_before_the_forward_pass_and_exact(row: Row) -> None:
    """A sum of a million float32 weights would lose digits in float32."""
    weight_T = np.full(100_001, 0.1, dtype=np.float32)
    weight_T[0] = 0
    pack = build_pack([Sequence(np.zeros(100_001, np.int32), weight_T)])
    assert row.objective.count(pack) == pytest.approx(100_000 * float(np.float32(0.1)), rel=1e-12)


def test_an_unknown_knob_is_refused(row: Row) -> None:
    with pytest.raises(ValueError, match="unheard_of"):
        type(row.objective).model_validate({"unheard_of": 1})
    with pytest.raises(ValueError, match="frozen"):
        row.objective.kind = "x"  # type: ignore[attr-defined]


# What is trained on


@pytest.fixture(scope="module")
def template(toy_tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(toy_tokenizer)


def plain(text: str) -> Example:
    return Example(Origin("rows.jsonl", 3), "text", text=text)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40), max_tokens=st.integers(2, 20))
def test_causal_windows_train_every_token_once_and_overlap_by_one(
    template: ChatTemplate, text: str, max_tokens: int
) -> None:
    tokenizer = template.tokenizer
    (windows,) = Causal().sequences([plain(text)], template=template, max_tokens=max_tokens)
    whole = [*tokenizer.begin_ids, *tokenizer.encode_text([text])[0], tokenizer.eos_id]
    assert [t for w in windows for t in w.tokens_T[w.weight_T > 0].tolist()] == whole[1:]
    for window in windows:
        assert 2 <= len(window.tokens_T) <= max_tokens
        assert window.weight_T.tolist() == [0.0] + [1.0] * (len(window.tokens_T) - 1)
    for a, b in itertools.pairwise(windows):
        assert a.tokens_T[-1] == b.tokens_T[0]
        assert len(a.tokens_T) == max_tokens
    assert Causal().units(windows) == [[window] for window in windows]


def test_causal_text_that_looks_special_stays_text(template: ChatTemplate) -> None:
    ((window,),) = Causal().sequences([plain("a<|end|>b")], template=template, max_tokens=100)
    special = set(template.tokenizer.special_ids.values())
    assert [i for i in window.tokens_T.tolist() if i in special] == [
        *template.tokenizer.begin_ids,
        template.tokenizer.eos_id,
    ]


def test_instruction_trains_what_the_template_says_and_keeps_a_row_together(template: ChatTemplate) -> None:
    turns = (Message("user", "a"), Message("assistant", "bc"), Message("user", "d"), Message("assistant", "e"))
    example = Example(Origin("rows.jsonl", 3), "chat", turns)
    (sequences,) = Instruction().sequences([example], template=template, max_tokens=3)
    (expected,) = template.sequences([example])
    assert [s.tokens_T.tolist() for s in sequences] == [s.tokens_T.tolist() for s in expected]
    assert [s.num_targets for s in sequences] == [3 + 2]
    assert Instruction().units(sequences) == [sequences]


@pytest.mark.parametrize(
    ("objective", "example", "hint"),
    [
        (
            Causal(),
            Example(Origin("rows.jsonl", 3), "chat", (Message("user", "a"), Message("assistant", "b"))),
            "instruction",
        ),
        (Instruction(), plain("a"), "causal"),
    ],
    ids=["causal", "instruction"],
)
def test_rows_of_another_form_are_refused_with_the_objective_they_fit(
    template: ChatTemplate, objective: Objective, example: Example, hint: str
) -> None:
    with pytest.raises(DataError) as error:
        objective.sequences([example], template=template, max_tokens=100)
    assert (error.value.file, error.value.line) == ("rows.jsonl", 3)
    assert f"objective: {hint}" in error.value.hint


# Totals


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(0.01, 1e3)), min_size=1))
def test_totals_divide_once(pairs: list[tuple[float, float]]) -> None:
    totals = Totals()
    for value, count in pairs:
        totals.add("a", sum=value, count=count)
        totals.add("b", sum=1.0, count=1.0)
    expected = math.fsum(v for v, _ in pairs) / math.fsum(c for _, c in pairs)
    assert totals.mean("a") == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert totals.mean("b") == 1.0
