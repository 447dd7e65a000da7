"""What every objective promises: one row an objective, each with a reference of its own written down naively."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from tunesmith.data.types import Example, Label, Message, Origin, Sequence
from tunesmith.errors import DataError
from tunesmith.models.heads import attach_head
from tunesmith.models.load import Model
from tunesmith.objectives import OBJECTIVES, Objective
from tunesmith.objectives.base import Readout, Totals
from tunesmith.objectives.causal import Causal
from tunesmith.objectives.classification import Classification
from tunesmith.objectives.contrastive import Contrastive
from tunesmith.objectives.distillation import Distillation
from tunesmith.objectives.headed import Headed
from tunesmith.objectives.instruction import Instruction
from tunesmith.objectives.label_words import LabelWords
from tunesmith.objectives.regression import Regression
from tunesmith.objectives.seq2seq import Seq2seq
from tunesmith.objectives.token_classification import TokenClassification
from tunesmith.train.passes import forward

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
    "seq2seq": Row(Seq2seq(), weighted_likelihood),
}


@dataclass(frozen=True)
class HeadedRow:
    """An objective with a head, and its reference: (weighted loss, weight) of a text from its K outputs and its label.

    `outputs` of texts with `labels` are what the number worked by hand belongs to.
    """

    objective: Headed
    reference: Callable[[list[float], Label], tuple[float, float]]
    outputs: tuple[tuple[float, ...], ...]
    labels: tuple[Label, ...]
    by_hand: float


def softmax(outputs: list[float]) -> list[float]:
    total = sum(math.exp(z) for z in outputs)
    return [math.exp(z) / total for z in outputs]


def one_class(outputs: list[float], label: Label) -> tuple[float, float]:
    return -math.log(softmax(outputs)["abc".index(str(label))]), 1.0


def weighted_class(outputs: list[float], label: Label) -> tuple[float, float]:
    weight = {"a": 3.0, "b": 0.5}.get(str(label), 1.0)
    return weight * one_class(outputs, label)[0], weight


def smoothed_class(outputs: list[float], label: Label) -> tuple[float, float]:
    """Cross-entropy with 0.7 on the class and 0.1 more on each of the three."""
    target = [0.1 + 0.7 * (name == label) for name in "abc"]
    return -sum(t * math.log(p) for t, p in zip(target, softmax(outputs), strict=True)), 1.0


def several_classes(outputs: list[float], label: Label) -> tuple[float, float]:
    chances = [1 / (1 + math.exp(-z)) for z in outputs]
    return -sum(math.log(p if name in label else 1 - p) for name, p in zip("ab", chances, strict=True)) / 2, 1.0


def class_on_two_levels(outputs: list[float], label: Label) -> tuple[float, float]:
    chances = dict(zip(TREE, softmax(outputs), strict=True))
    above = sum(p for name, p in chances.items() if name.split("/")[0] == str(label).split("/")[0])
    return -(math.log(above) + math.log(chances[str(label)])) / 2, 1.0


def error_of(kind: str, *, centre: float = 10.0, spread: float = 2.0, log: bool = False) -> Any:
    """The reference of one kind of error, its numbers scaled to z-scores."""

    def error(outputs: list[float], label: Label) -> tuple[float, float]:
        number = float(str(label))
        wanted = ((math.log(1 + number) if log else number) - centre) / spread
        away = abs(wanted - outputs[0])
        if kind == "quantile":
            pairs = zip((0.1, 0.5, 0.9), outputs, strict=True)
            return sum(q * (wanted - z) if wanted >= z else (1 - q) * (z - wanted) for q, z in pairs), 1.0
        if kind == "squared" or (kind == "huber" and away <= 0.5):
            return away * away / 2, 1.0
        return (away, 1.0) if kind == "absolute" else (0.5 * (away - 0.25), 1.0)

    return error


LN2, LN3 = math.log(2), math.log(3)
THREE: Any = {"labels": ("a", "b", "c"), "pooling": "mean"}
SCALED: Any = {"centre": 10.0, "spread": 2.0, "pooling": "last"}
QUARTERS = (0.0, LN2, 0.0)  # probabilities 1/4, 1/2, 1/4
TREE = ("a/x", "a/y", "b")
HEADED_ROWS = {
    "classification": HeadedRow(
        Classification(**THREE), one_class, (QUARTERS, QUARTERS), ("b", "a"), (LN2 + 2 * LN2) / 2
    ),
    "classification, weighted": HeadedRow(
        Classification(**THREE, class_weights={"a": 3.0, "b": 0.5}),
        weighted_class, (QUARTERS, QUARTERS, QUARTERS), ("b", "a", "c"), (0.5 * LN2 + 3 * 2 * LN2 + 2 * LN2) / 4.5,
    ),
    "classification, smoothed": HeadedRow(
        Classification(**THREE | {"pooling": "last"}, label_smoothing=0.3),
        smoothed_class, (QUARTERS,), ("b",), 0.7 * LN2 + 0.3 * (2 + 1 + 2) * LN2 / 3,
    ),
    "classification, several": HeadedRow(
        Classification(labels=("a", "b"), several=True, pooling="mean"),
        several_classes, ((0.0, LN3), (0.0, LN3)), (("b",), ()), ((LN2 + math.log(4 / 3)) / 2 + (LN2 + 2 * LN2) / 2) / 2,
    ),
    "classification, hierarchy": HeadedRow(
        Classification(labels=TREE, hierarchy="/", pooling="mean"),
        class_on_two_levels, (QUARTERS, QUARTERS), ("a/x", "b"), ((math.log(4 / 3) + 2 * LN2) / 2 + 2 * LN2) / 2,
    ),
    "regression": HeadedRow(  # the numbers are 2 and 0.5 spreads above the centre
        Regression(delta=0.5, **SCALED), error_of("huber"), ((0.5,), (0.25,)), ("14", "11"), (0.5 * 1.25 + 1 / 32) / 2
    ),
    "regression, squared": HeadedRow(
        Regression(error="squared", **SCALED), error_of("squared"), ((0.5,), (0.25,)), ("14", "11"), (9 / 8 + 1 / 32) / 2
    ),
    "regression, absolute": HeadedRow(
        Regression(error="absolute", **SCALED | {"pooling": "mean"}),
        error_of("absolute"), ((0.5,), (0.25,)), ("14", "11"), (1.5 + 0.25) / 2,
    ),
    "regression, quantile": HeadedRow(
        Regression(error="quantile", coverage=0.8, **SCALED),
        error_of("quantile"), ((1.0, 2.0, 3.0), (1.0, 2.0, 3.0)), ("14", "18"),
        ((0.1 + 0.0 + 0.1) + (0.1 * 3 + 0.5 * 2 + 0.9 * 1)) / 2,
    ),
    "regression, log": HeadedRow(
        Regression(error="squared", scale="log", centre=1.0, spread=0.5),
        error_of("squared", centre=1.0, spread=0.5, log=True), ((0.0,), (3.0,)), ("0", "6.38905609893065"), (2 + 0.5) / 2,
    ),
}  # fmt: skip
HEADED_ROWS = {
    name: replace(row, objective=row.objective.for_model(encoder=False)) for name, row in HEADED_ROWS.items()
}
LABELS: dict[str, tuple[Label, ...]] = {
    name: ((), ("a",), ("a", "b"))
    if "several" in name
    else row.objective.labels or ()
    if isinstance(row.objective, Classification)
    else ("14", "11", "9.5", "0")
    for name, row in HEADED_ROWS.items()
}


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


@pytest.fixture(params=HEADED_ROWS)
def headed(request: pytest.FixtureRequest) -> HeadedRow:
    return HEADED_ROWS[request.param]


def test_every_objective_is_in_the_table() -> None:
    objectives = [row.objective for row in (*ROWS.values(), *HEADED_ROWS.values())]
    elsewhere = {TokenClassification, Contrastive, Distillation}  # test_objectives_of_words_pairs_and_teachers.py
    elsewhere |= {LabelWords}  # test_objectives_of_label_words.py
    assert {type(objective) for objective in objectives} | elsewhere == set(OBJECTIVES.values())
    assert all(OBJECTIVES[objective.kind_name] is type(objective) for objective in objectives)
    assert all(bool(row.objective.num_outputs) for row in HEADED_ROWS.values())
    assert not any(row.objective.num_outputs for row in ROWS.values())


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


@pytest.mark.parametrize("objective", [row.objective for row in (*ROWS.values(), *HEADED_ROWS.values())])
def test_an_unknown_knob_is_refused(objective: Any) -> None:
    with pytest.raises(ValueError, match="unheard_of"):
        type(objective).model_validate({"unheard_of": 1})
    with pytest.raises(ValueError, match="frozen"):
        objective.kind = "x"


# With a head


def labelled(label: Label | None, text: str = "a") -> Example:
    return Example(Origin("rows.jsonl", 3), "labelled", text=text, label=label)


def text_of(tokens: list[int], label: Label, *, objective: Headed, row: int = 0) -> Sequence:
    """A text of these tokens with what is to be learned of it, and the tokens that are read of it."""
    weights = [0.0] * (len(tokens) - 1) + [1.0] if objective.pooling == "last" else [1.0] * len(tokens)
    values = np.array(objective.values(labelled(label)), np.float32)
    return Sequence(np.array(tokens, np.int32), np.array(weights, np.float32), row, values)


def table_outputs(tokens: list[int], *, num_outputs: int) -> list[float]:
    """Outputs made up from a token and what stands before it."""
    return [hash((k, *tokens)) % 1000 / 250 - 2 for k in range(num_outputs)]


def outputs_of(pack: Pack, rows: list[Sequence], *, num_outputs: int) -> Tensor:
    """The table's outputs where the pack reads a token."""
    values = []
    for index, number in enumerate(pack.rows_S.tolist()):
        tokens, weight_T = next((r.tokens_T.tolist(), r.weight_T) for r in rows if r.row == number)
        values += [table_outputs(tokens[: k + 1], num_outputs=num_outputs) for k in np.flatnonzero(weight_T)]
        assert int((pack.sequence_N <= index).sum()) == len(values)
    return torch.tensor(values, dtype=torch.float64)


def reference_of(row: HeadedRow, pooled: list[list[float]], labels: list[Label]) -> tuple[float, float]:
    pairs = [row.reference(outputs, label) for outputs, label in zip(pooled, labels, strict=True)]
    return math.fsum(loss for loss, _ in pairs), math.fsum(weight for _, weight in pairs)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from([1, 2, 1 << 30]), st.integers(1, 30), st.randoms(use_true_random=False))
@pytest.mark.parametrize("name", HEADED_ROWS)
def test_with_a_head_sum_and_count_equal_the_reference_however_rows_are_laid_out(
    name: str, data: st.DataObject, min_shared: int, max_tokens: int, random: Any
) -> None:
    row = HEADED_ROWS[name]
    objective, k = row.objective, row.objective.num_outputs
    tokens = st.lists(st.integers(0, 3), min_size=1, max_size=6)
    drawn = data.draw(st.lists(st.tuples(tokens, st.sampled_from(LABELS[name])), min_size=1, max_size=5))
    texts = [text_of(t, label, objective=objective, row=number) for number, (t, label) in enumerate(drawn)]
    pooled = []
    for text in texts:
        read = [table_outputs(text.tokens_T[: i + 1].tolist(), num_outputs=k) for i in np.flatnonzero(text.weight_T)]
        pooled.append([sum(column) / len(read) for column in zip(*read, strict=True)])
    expected, expected_count = reference_of(row, pooled, [label for _, label in drawn])
    shuffled = list(texts)
    random.shuffle(shuffled)
    twice = texts + [replace(text, row=len(texts) + text.row) for text in texts]
    layouts = [
        (1, [build_pack(texts, min_shared=min_shared)]),
        (1, list(build_packs(shuffled, max_tokens=max_tokens, min_shared=min_shared))),
        (1, [build_pack([text]) for text in shuffled]),
        (2, [build_pack(twice, min_shared=min_shared)]),
    ]
    for times, layout in layouts:
        counted = [objective.count(pack) for pack in layout]  # known before anything is computed
        losses = [objective.loss(readout_of(p, outputs_of(p, twice, num_outputs=k)), p) for p in layout]
        assert sum(float(loss.sum) for loss in losses) == pytest.approx(times * expected, rel=1e-6, abs=1e-6)
        assert [loss.count for loss in losses] == counted
        assert sum(counted) == pytest.approx(times * expected_count, rel=1e-12)
        assert all(loss.metrics.keys() == losses[0].metrics.keys() != set() for loss in losses)
        assert sum(count for loss in losses for _, count in loss.metrics.values()) == times * len(texts)


def test_with_a_head_a_hand_worked_number(headed: HeadedRow) -> None:
    """The reference is held to the same number."""
    objective = headed.objective
    texts = [text_of([5 + i], label, objective=objective, row=i) for i, label in enumerate(headed.labels)]
    pack = build_pack(texts)
    loss = objective.loss(readout_of(pack, torch.tensor(headed.outputs, dtype=torch.float64)), pack)
    assert float(loss.sum) / loss.count == pytest.approx(headed.by_hand, rel=1e-6)
    total, count = reference_of(headed, [list(z) for z in headed.outputs], list(headed.labels))
    assert total / count == pytest.approx(headed.by_hand, rel=1e-12)


def test_with_a_head_gradcheck(headed: HeadedRow) -> None:
    labels = (*headed.labels, *headed.labels)
    texts = [text_of([5 + i, 6, 7], label, objective=headed.objective, row=i) for i, label in enumerate(labels)]
    pack = build_pack(texts)
    generator = torch.Generator().manual_seed(4)
    shape = (len(pack.source_N), headed.objective.num_outputs)
    output_NK = torch.randn(shape, dtype=torch.float64, generator=generator).mul(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: headed.objective.loss(readout_of(pack, x), pack).sum, (output_NK,))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_through_a_model_the_loss_is_the_reference_over_transformers_hidden_states(
    headed: HeadedRow, build_model: BuildModel, eager_twin: Callable[[Model], Any], architecture: str
) -> None:
    objective = headed.objective
    model = build_model(architecture)
    attach_head(model, num_outputs=objective.num_outputs)
    assert model.outputs is not None
    torch.nn.init.normal_(model.outputs.double().weight, generator=torch.Generator().manual_seed(2))
    random = np.random.default_rng(5)
    beginning = random.integers(6, 262, 20).tolist()
    labels = list(itertools.islice(itertools.cycle(headed.labels), 5))
    texts = [
        text_of(beginning[: 20 - 4 * i] + random.integers(6, 262, i).tolist(), label, objective=objective, row=i)
        for i, label in enumerate(labels)
    ]
    twin, pooled = eager_twin(model), []
    with torch.no_grad():
        for text in texts:
            hidden_TD = twin.base_model(input_ids=torch.from_numpy(text.tokens_T).long()[None]).last_hidden_state[0]
            read_TK = hidden_TD[text.weight_T > 0] @ model.outputs.weight.T
            pooled.append(read_TK.mean(0).tolist())
    expected, count = reference_of(headed, pooled, labels)
    for max_tokens in (1, 30, 10_000):
        totals = Totals()
        for pack in build_packs(texts[::-1], max_tokens=max_tokens, min_shared=model.min_shared_tokens):
            loss = forward(model, pack, objective=objective)
            totals.add("loss", sum=float(loss.sum.detach()), count=loss.count)
        assert totals.mean("loss") == pytest.approx(expected / count, rel=1e-6)


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
        (Causal(), labelled("red"), "classification"),
        (Instruction(), labelled("red"), "classification"),
        (
            Classification(labels=("a", "b"), pooling="last"),
            Example(Origin("rows.jsonl", 3), "tagged", words=("a",), label=("b",)),
            "token_classification",
        ),
    ],
    ids=["causal", "instruction", "causal, labelled", "instruction, labelled", "classification, tagged"],
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
