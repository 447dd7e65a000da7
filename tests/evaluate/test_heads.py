"""A tuned head against its base in words and against constants: the numbers are those of a naive computation."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tunesmith.data.answers import Answer, Classes, Numbers, Tags
from tunesmith.data.retrieval import prompt_messages
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.types import Example, Label, Message, Origin
from tunesmith.errors import DataError, RecipeError
from tunesmith.evaluate.heads import baseline, evaluate_heads, named_classes, systems_of
from tunesmith.evaluate.run import System
from tunesmith.evaluate.settings import EvaluateSettings
from tunesmith.models.load import Model
from tunesmith.objectives.classification import Classification
from tunesmith.objectives.headed import Headed
from tunesmith.objectives.label_words import in_words
from tunesmith.objectives.regression import Regression
from tunesmith.objectives.token_classification import TokenClassification

LABELS = ("red", "green", "dark green")
COLOURS = Classification(labels=LABELS, several=False)
SEVERAL = Classification(labels=("a", "b", "c"), several=True)
HOURS = Regression(centre=2.0, spread=1.0, coverage=0.8)


def labelled(label: Label, text: str = "ab", line: int = 1) -> Example:
    return Example(Origin("rows.jsonl", line), "labelled", text=text, label=label)


@pytest.fixture(scope="session")
def template(toy_tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(toy_tokenizer)


# ------------------------------------------------------------------------------------------------ the base in words


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("num_shots", [0, 2])
def test_classes_by_name_are_those_of_one_likelihood_at_a_time(
    build_model: Callable[..., Model], eager_twin: Callable[[Model], Any], template: ChatTemplate, num_shots: int
) -> None:
    model = build_model("llama", max_position_embeddings=256)
    twin = eager_twin(model)
    rows = [labelled("red", text=f"colour {i}?") for i in range(3)]
    shots = tuple(in_words(labelled(name, text=name)) for name in LABELS[:num_shots])
    entered: list[str] = []

    class Switch:
        def __enter__(self) -> None:
            entered.append("in")

        def __exit__(self, *details: Any) -> None:
            entered.append("out")

    found = named_classes(
        System("base", model, Switch, shots),  # type: ignore[arg-type]
        rows,
        objective=COLOURS,
        template=template,
    )
    assert entered == ["in", "out"]
    for row, example in enumerate(rows):
        prompt = template.prompt(prompt_messages(in_words(example), shots=shots, plain=template.plain)).ids
        logprobs = []
        for name in LABELS:
            answer = [*template.tokenizer.encode_text([name])[0], template.tokenizer.eos_id]
            with torch.no_grad():
                logits = twin(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            logprobs.append(sum(float(logits[len(prompt) + i - 1, t]) for i, t in enumerate(answer)))
        weights = np.exp(np.array(logprobs) - max(logprobs))
        np.testing.assert_allclose(found.probability_BK[row], weights / weights.sum(), rtol=1e-8)
        assert found.decided_BK[row].tolist() == [k == int(np.argmax(logprobs)) for k in range(3)]


def test_a_label_becomes_an_answer_in_words() -> None:
    found = in_words(labelled("red", text="x?"))
    assert [(m.role, m.content) for m in found.messages] == [("user", "x?"), ("assistant", "red")]
    assert in_words(found) is found
    assert in_words(labelled(("b", "a"))).messages[-1].content == "b, a"
    assert in_words(Example(Origin("rows.jsonl", 1), "text", text="x?")).messages[-1].content == ""
    with pytest.raises(DataError, match="of the form 'tagged' has no text"):
        in_words(Example(Origin("rows.jsonl", 1), "tagged", words=("x",), label=("O",)))


# ------------------------------------------------------------------------------------------------------- constants


def test_the_majority_by_hand() -> None:
    train = [labelled(name) for name in ("red", "red", "red", "green")]
    found = baseline("majority", train[:2], objective=COLOURS, train=train)
    assert isinstance(found, Classes)
    assert found.probability_BK.tolist() == [[0.75, 0.25, 0.0]] * 2
    assert found.texts() == ["red", "red"]
    some = [labelled(label) for label in (("a", "b"), ("a",), ())]
    several = baseline("majority", some[:1], objective=SEVERAL, train=some)
    assert isinstance(several, Classes)
    np.testing.assert_allclose(several.probability_BK, [[2 / 3, 1 / 3, 0]])
    assert several.decided_BK.tolist() == [[True, False, False]]


def test_mean_and_median_by_hand() -> None:
    train = [labelled(str(n)) for n in (1, 2, 3, 4, 10)]
    for name, middle in (("mean", 4.0), ("median", 3.0)):
        found = baseline(name, train[:3], objective=HOURS, train=train)
        assert isinstance(found, Numbers)
        assert found.estimate_B.tolist() == [middle] * 3
        assert found.low_B.tolist() == pytest.approx([1.4] * 3)  # the quantile 0.1 of five numbers
        assert found.high_B.tolist() == pytest.approx([7.6] * 3)


def test_the_most_frequent_tag_by_hand() -> None:
    train = [Example(Origin("a", 1), "tagged", words=("x",) * len(t), label=t) for t in (("B-X", "O"), ("O",))]
    found = baseline("majority", train, objective=TokenClassification(labels=("B-X", "O")), train=train)
    assert found == Tags((("O", "O"), ("O",)))


@pytest.mark.parametrize(
    ("objective", "against", "speaks", "expected"),
    [
        (TokenClassification(), None, True, ("majority",)),
        (COLOURS, None, True, ("base", "few_shot", "majority")),
        (COLOURS, None, False, ("majority",)),
        (SEVERAL, None, True, ("majority",)),
        (HOURS, None, True, ("median", "mean")),
        (COLOURS, ("majority", "base"), True, ("majority", "base")),
    ],
)
def test_what_a_head_is_compared_with(objective: Headed, against: Any, speaks: bool, expected: tuple[str, ...]) -> None:
    assert systems_of(objective, settings=EvaluateSettings(against=against), speaks=speaks) == expected


@pytest.mark.parametrize(
    ("objective", "against", "speaks"),
    [(HOURS, "base", True), (SEVERAL, "few_shot", True), (COLOURS, "base", False), (COLOURS, "median", True)],
)
@pytest.mark.parametrize("rows", [[labelled("1"), labelled("2")]])
def test_what_cannot_be_compared_is_refused_by_name(
    objective: Headed, against: Any, speaks: bool, rows: list[Example]
) -> None:
    def compared() -> list[Answer]:
        names = systems_of(objective, settings=EvaluateSettings(against=(against,)), speaks=speaks)
        return [baseline(name, rows, objective=objective, train=rows) for name in names]

    with pytest.raises(RecipeError, match=f"'{against}'") as error:
        compared()
    assert all(name in error.value.hint for name in objective.baselines)
    with pytest.raises(ValidationError):
        EvaluateSettings(against=("best",))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ evaluation


def evaluated(objective: Headed, systems: dict[str, Any], rows: list[Example], **settings: Any) -> dict[str, Any]:
    evaluation = evaluate_heads(
        {name: (lambda examples, found=found: found) for name, found in systems.items()},
        examples=rows,
        objective=objective,
        settings=EvaluateSettings(**settings),
        run="toy",
        data="test",
    )
    return evaluation.as_dict() | {"examples": evaluation.rows}


def decided(*numbers: int) -> Classes:
    return COLOURS.decided(np.eye(3)[list(numbers)] * 0.7 + 0.1)


ROWS = [
    labelled(name, text=f"{i}", line=i) for i, name in enumerate(["red", "green", "red", "dark green"] * 6, start=1)
]


def test_an_evaluation_has_the_metrics_of_its_objective_and_the_first_decides() -> None:
    right = decided(*([0, 1, 0, 2] * 6))
    document = evaluated(COLOURS, {"tuned": right, "majority": decided(*([0] * 24))}, ROWS)
    assert list(document["metrics"]) == ["accuracy", "macro_f1", "log_loss", "calibration_error"]
    assert (document["primary"], document["verdict"], document["rows"]) == ("accuracy", "better", 24)
    accuracy = document["metrics"]["accuracy"]
    assert {name: s["value"] for name, s in accuracy["systems"].items()} == {"tuned": 1.0, "majority": 0.5}
    difference = accuracy["differences"]["tuned - majority"]
    assert (difference["test"], difference["better_rows"], difference["worse_rows"]) == ("mcnemar", 12, 0)
    first = document["examples"][3]
    assert (first["reference"], first["outputs"]) == ("dark green", {"tuned": "dark green", "majority": "red"})
    assert first["prompt"] == [{"role": "user", "content": "4"}]
    assert first["scores"]["majority"]["accuracy"] == 0.0


def test_text_metrics_read_the_names_of_classes() -> None:
    systems = {"tuned": decided(*([1, 1, 0, 2] * 6))}
    document = evaluated(COLOURS, systems, ROWS, metrics=("exact_match", "token_f1"))
    assert document["metrics"]["exact_match"]["systems"]["tuned"]["value"] == 0.75


def test_names_of_several_classes_are_compared_in_one_order() -> None:
    objective = Classification(labels=("b", "a"), several=True)
    rows = [labelled(label, text=str(i)) for i, label in enumerate([("a", "b"), ("b", "a"), (), ("a",)])]
    found = objective.decided(np.array([[0.9, 0.9], [0.9, 0.9], [0.1, 0.1], [0.1, 0.9]]))
    document = evaluated(objective, {"tuned": found}, rows, metrics=("accuracy", "exact_match"))
    assert [document["metrics"][name]["systems"]["tuned"]["value"] for name in document["metrics"]] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("objective", "found", "metric"),
    [(COLOURS, decided(0, 1), "mae"), (COLOURS, decided(0, 1), "perplexity"), (HOURS, None, "accuracy")],
)
def test_metrics_that_do_not_fit_are_refused_by_name(objective: Headed, found: Any, metric: str) -> None:
    found = found or Numbers(np.ones(2), np.zeros(2), np.ones(2), coverage=0.8)
    with pytest.raises(RecipeError, match=f"'{metric}' does not fit a {objective.kind_name}") as error:
        evaluated(objective, {"tuned": found}, [labelled("1"), labelled("2", text="b")], metrics=(metric,))
    assert objective.metrics[0] in error.value.hint


@pytest.mark.parametrize("known", [True, False])
def test_without_intervals_their_metrics_are_left_out(known: bool) -> None:
    rows = [labelled(str(n), text=str(n)) for n in range(1, 7)]
    middle_B = np.arange(1.0, 7.0)
    bounds_B = (middle_B - 1, middle_B + 1) if known else (np.full(6, np.nan),) * 2
    tuned = Numbers(middle_B, *bounds_B, coverage=0.8)
    median = Numbers(np.full(6, 3.5), np.full(6, 1.0), np.full(6, 6.0), coverage=0.8)
    document = evaluated(HOURS, {"tuned": tuned, "median": median}, rows)
    assert list(document["metrics"]) == ["mae", "rmse", *(["coverage", "interval_width"] if known else [])]
    assert document["metrics"]["mae"]["systems"]["median"]["value"] == pytest.approx(1.5)
    assert document["metrics"]["mae"]["higher_is_better"] is False
    assert document["verdict"] == "better" or document["metrics"]["mae"]["differences"]["tuned - median"]["p"] > 0.05


def test_rows_are_drawn_by_the_seed_and_one_alone_is_refused() -> None:
    def all_red(examples: list[Example]) -> Classes:
        return decided(*([0] * len(examples)))

    def rows_of(seed: int) -> list[int]:
        settings = EvaluateSettings(rows=10, seed=seed)
        how: Any = {"examples": ROWS, "objective": COLOURS, "settings": settings, "run": "r", "data": "test"}
        return [int(row["origin"].rpartition(":")[2]) for row in evaluate_heads({"tuned": all_red}, **how).rows]

    assert rows_of(1) == rows_of(1) == sorted(rows_of(1))
    assert len(rows_of(1)) == 10
    assert any(rows_of(1) != rows_of(seed) for seed in (2, 3))
    with pytest.raises(DataError, match="one held-out row"):
        evaluated(COLOURS, {"tuned": decided(0)}, ROWS[:1])


def test_a_conversation_is_shown_without_its_answer() -> None:
    turns = tuple(Message(role, text) for role, text in itertools.product(["user", "assistant"], ["red"]))
    rows = [Example(Origin("rows.jsonl", i), "chat", turns) for i in (1, 2)]
    document = evaluated(COLOURS, {"tuned": decided(0, 0)}, rows)
    assert document["examples"][0]["prompt"] == [{"role": "user", "content": "red"}]
    assert document["examples"][0]["reference"] == "red"
