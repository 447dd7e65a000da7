"""Objectives with a head: what is read of a row, what is taken from the rows, and how outputs are to be read afterwards."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.answers import NO_ANSWER
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.types import Example, Label, Message, Origin
from tunesmith.errors import DataError, RecipeError
from tunesmith.objectives.classification import Classification
from tunesmith.objectives.regression import Regression


@pytest.fixture(scope="module")
def template(toy_tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(toy_tokenizer)


def labelled(label: Label | None, text: str = "ab") -> Example:
    return Example(Origin("rows.jsonl", 3), "labelled", text=text, label=label)


def asked(answer: str) -> Example:
    return Example(Origin("rows.jsonl", 4), "prompt_completion", (Message("user", "ab"), Message("assistant", answer)))


def all_trained(*labels: Label | None) -> list[tuple[Example, bool]]:
    return [(labelled(label), True) for label in labels]


TWO = Classification(labels=("a", "b"), several=False)


# ------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    ("pooling", "weights"), [("last", [0, 0, 0, 1]), ("first", [1, 0, 0, 0]), ("mean", [1, 1, 1, 1])]
)
def test_a_text_is_read_between_begin_and_end(template: ChatTemplate, pooling: Any, weights: list[int]) -> None:
    objective = TWO.model_copy(update={"pooling": pooling})
    ((sequence,),) = objective.sequences([labelled("b")], template=template, max_tokens=100)
    tokenizer = template.tokenizer
    assert sequence.tokens_T.tolist() == [
        *tokenizer.begin_ids,
        *tokenizer.encode_text(["ab"])[0],
        tokenizer.eos_id,
    ]
    assert sequence.weight_T.tolist() == weights
    assert sequence.values is not None
    assert sequence.values.tolist() == [1.0]


def test_a_conversation_is_read_as_it_is_rendered_for_an_answer(template: ChatTemplate) -> None:
    objective = TWO.for_model(encoder=False)
    ((sequence,),) = objective.sequences([asked(" b\n")], template=template, max_tokens=100)
    assert sequence.tokens_T.tolist() == template.prompt([Message("user", "ab")]).ids
    assert sequence.values is not None
    assert sequence.values.tolist() == [1.0]
    assert objective.read([asked("?")], template=template)[0][0].tokens_T.tolist() == sequence.tokens_T.tolist()


def test_what_is_read_depends_on_the_kind_of_base() -> None:
    assert TWO.for_model(encoder=False).pooling == "last"
    assert TWO.for_model(encoder=True).pooling == "mean"
    first = TWO.model_copy(update={"pooling": "first"})
    assert first.for_model(encoder=True).pooling == "first"
    with pytest.raises(RecipeError, match="sees nothing of the text") as error:
        first.for_model(encoder=False)
    assert "last or mean" in error.value.hint


@pytest.mark.parametrize(
    ("objective", "example", "message", "hint"),
    [
        (TWO, labelled("c"), "the class 'c' is none of objective.labels", "add it"),
        (TWO, labelled(("a", "b")), "the row has 2 classes and one is expected", "several: true"),
        (TWO, labelled(()), "the row has 0 classes and one is expected", "several: true"),
        (TWO, labelled(None), "a text and no label", "data.mapping: {text: COLUMN, label: COLUMN}"),
        (Regression(centre=0, spread=1), labelled("fast"), "'fast' and no number", "mend"),
        (Regression(centre=0, spread=1), labelled("nan"), "'nan' and no number", "mend"),
        (Regression(centre=0, spread=1), labelled(("1", "2")), "no number", "mend"),
        (Regression(centre=0, spread=1, scale="log"), labelled("-1"), "-1 has no logarithm", "scale: linear"),
    ],
)
def test_rows_that_say_nothing_fit_are_refused_by_place(
    template: ChatTemplate, objective: Any, example: Example, message: str, hint: str
) -> None:
    with pytest.raises(DataError) as error:
        objective.for_model(encoder=False).sequences([example], template=template, max_tokens=9)
    assert message in error.value.message
    assert hint in error.value.hint
    assert (error.value.file, error.value.line) == ("rows.jsonl", 3)


# ------------------------------------------------------------------------------------- what is taken from the rows


def test_classes_are_those_of_all_rows_and_weights_those_of_the_training_rows() -> None:
    rows = [*all_trained("b", "b", "b", "a"), (labelled("c"), False), (asked("a "), True)]
    found = Classification(class_weights="balanced").fitted(rows)
    assert found.labels == ("a", "b", "c")
    assert found.several is False
    assert found.class_weights == {"a": 5 / (3 * 2), "b": 5 / (3 * 3)}  # n / (K n_k)
    assert [found.row_weight(np.array([k])) for k in range(3)] == [5 / 6, 5 / 9, 1.0]
    assert found.fitted(rows) == found


def test_lists_of_labels_mean_several() -> None:
    found = Classification().fitted(all_trained(("b", "a"), "c", ()))
    assert (found.labels, found.several) == (("a", "b", "c"), True)
    assert [found.values(labelled(x)) for x in (("c", "a"), "b", ())] == [[2.0, 0.0], [1.0], [-1.0]]
    assert Classification(several=False).fitted(all_trained(("a",), ("b",))).several is False


def test_given_classes_stay_in_their_order() -> None:
    given = Classification(labels=("low", "high"))
    found = given.fitted(all_trained("high", "low", "odd"))
    assert (found.labels, found.num_outputs) == (("low", "high"), 2)


@pytest.mark.parametrize(
    ("objective", "labels", "message"),
    [
        (Classification(), ("a", "a"), "1 classes"),
        (Classification(), (), "0 classes"),
        (Classification(), (None, None), "a text and no label"),
        (Classification(class_weights={"x": 2.0}), ("a", "b"), "class_weights names 'x', which is no class"),
        (Classification(right_share=0.9), (("a",), ("b",)), "right_share has no effect"),
        (
            Classification(class_weights="balanced"),
            (("a",), ("b",)),
            "class_weights and label_smoothing have no effect",
        ),
    ],
)
def test_rows_that_do_not_fit_the_settings_are_refused(
    objective: Classification, labels: tuple[Label | None, ...], message: str
) -> None:
    with pytest.raises((DataError, RecipeError), match=message) as error:
        objective.fitted(all_trained(*labels))
    assert error.value.hint


def test_a_row_without_a_label_does_not_stop_the_fit() -> None:
    """It is refused, or dropped, where it is rendered."""
    assert Classification().fitted(all_trained("a", None, "b")).labels == ("a", "b")
    found = Regression().fitted(all_trained("1", None, "many", "3"))
    assert (found.centre, found.spread) == (2.0, 1.0)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Classification, {"labels": ("a", "a")}, "names a class twice"),
        (Classification, {"several": True, "hierarchy": "/"}, "hierarchy has no effect"),
        (Classification, {"several": True, "right_share": 0.9}, "right_share has no effect"),
        (Classification, {"several": True, "label_smoothing": 0.1}, "have no effect"),
        (Classification, {"hierarchy": "/", "label_smoothing": 0.1}, "beside a hierarchy"),
        (Classification, {"class_weights": {"a": 0.0}}, "above zero"),
        (Classification, {"labels": ("a", "b"), "class_weights": {"c": 1.0}}, "'c', which is no class"),
        (Regression, {"error": "squared", "delta": 2.0}, "delta has no effect"),
    ],
)
def test_settings_without_effect_are_refused(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)


def test_numbers_are_scaled_by_the_training_rows() -> None:
    rows = [*all_trained("2", "4", "6", "8"), (labelled("1000"), False)]
    found = Regression().fitted(rows)
    assert (found.centre, found.spread) == (5.0, math.sqrt(5))
    assert found.values(labelled("5")) == [0.0]
    log = Regression(scale="log").fitted([(labelled(str(math.e**k - 1)), True) for k in (1, 3)])
    assert (log.centre, log.spread) == (pytest.approx(2.0), pytest.approx(1.0))
    assert log.values(labelled(str(math.e**4 - 1))) == [pytest.approx(2.0)]
    same = Regression().fitted(all_trained("3", "3"))
    assert (same.centre, same.spread) == (3.0, 1.0)
    assert Regression(centre=1.0).fitted(rows).centre == 1.0


# ------------------------------------------------------------------------------------------------- calibration


def outputs_and_classes(*, num_rows: int, sharpness: float, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Classes drawn from softmax(z), and z times `sharpness`: the temperature that undoes it is `sharpness`."""
    random = np.random.default_rng(seed)
    z_BK = random.normal(size=(num_rows, 3)) * 1.5
    p_BK = np.exp(z_BK) / np.exp(z_BK).sum(1, keepdims=True)
    return z_BK * sharpness, [np.array([random.choice(3, p=p)], np.float32) for p in p_BK]


def log_loss_at(temperature: float, output_BK: np.ndarray, classes: list[np.ndarray]) -> float:
    z_BK = output_BK / temperature
    p_BK = np.exp(z_BK - z_BK.max(1, keepdims=True))
    p_BK /= p_BK.sum(1, keepdims=True)
    return -sum(math.log(p_BK[row, int(k[0])]) for row, k in enumerate(classes))


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0])
def test_the_temperature_has_the_least_log_loss(sharpness: float) -> None:
    output_BK, classes = outputs_and_classes(num_rows=400, sharpness=sharpness, seed=1)
    objective = Classification(labels=("a", "b", "c"), several=False)
    temperature = objective.calibrated(output_BK, classes)["temperature"]
    grid = [log_loss_at(t, output_BK, classes) for t in np.geomspace(0.05, 20, 400)]
    assert log_loss_at(temperature, output_BK, classes) <= min(grid) + 1e-3
    assert temperature == pytest.approx(sharpness, rel=0.3)
    predicted = objective.predictions(output_BK, calibration={"temperature": temperature})
    assert predicted.decided_BK.sum(1).tolist() == [1] * 400
    assert predicted.decided_BK.argmax(1).tolist() == output_BK.argmax(1).tolist()


@pytest.mark.parametrize("share", [0.6, 0.8, 0.95])
def test_the_threshold_reaches_the_share_of_right_answers(share: float) -> None:
    output_BK, classes = outputs_and_classes(num_rows=500, sharpness=2.0, seed=2)
    objective = Classification(labels=("a", "b", "c"), several=False, right_share=share)
    calibration = objective.calibrated(output_BK, classes)
    decided_BK = objective.predictions(output_BK, calibration=calibration).decided_BK
    answered_B = decided_BK.any(1)
    assert np.mean([decided_BK[row, int(k[0])] for row, k in enumerate(classes) if answered_B[row]]) >= share
    sure_B = objective.probabilities(output_BK, temperature=calibration["temperature"]).max(1)
    right_B = np.array([int(k[0]) for k in classes]) == output_BK.argmax(1)
    reaching = [int((sure_B >= t).sum()) for t in sure_B if right_B[sure_B >= t].mean() >= share]
    assert 0 < answered_B.sum() == max(reaching)
    assert share < 0.7 or not answered_B.all()


def test_thresholds_do_not_part_rows_that_are_equally_sure() -> None:
    """Three texts that are alike, one of them right: answering only the right one is not to be had."""
    objective = Classification(labels=("a", "b"), several=False, right_share=0.9)
    output_BK = np.array([[9.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    classes = [np.array([k], np.float32) for k in (0, 0, 1, 1)]
    found = objective.predictions(output_BK, calibration=objective.calibrated(output_BK, classes))
    assert found.decided_BK.any(1).tolist() == [True, False, False, False]


def test_where_the_share_is_out_of_reach_nothing_is_answered() -> None:
    objective = Classification(labels=("a", "b"), several=False, right_share=0.9)
    output_BK, wrong = np.array([[5.0, 0.0], [4.0, 0.0]]), [np.array([1.0], np.float32)] * 2
    found = objective.predictions(output_BK, calibration=objective.calibrated(output_BK, wrong))
    assert found.texts() == [NO_ANSWER, NO_ANSWER]
    assert found.documents()[0]["labels"] == []


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0]), st.sampled_from([-2.0, 0.5, 2.0]), st.sets(st.integers(0, 1))
        ),
        min_size=1,
        max_size=8,
    )
)
def test_with_several_classes_the_threshold_has_the_best_f1(rows: list[tuple[float, float, set[int]]]) -> None:
    objective = Classification(labels=("a", "b"), several=True)
    output_BK = np.array([row[:2] for row in rows])
    values = [np.array(sorted(row[2]) or [-1.0], np.float32) for row in rows]
    calibration = objective.calibrated(output_BK, values)
    truth_BK = np.array([[0 in row[2], 1 in row[2]] for row in rows])

    def f1(decided_BK: np.ndarray) -> float:
        return float(2 * (decided_BK & truth_BK).sum() / max(1, decided_BK.sum() + truth_BK.sum()))

    if not truth_BK.any():
        assert calibration.keys() == {"temperature"}
        return
    p_BK = objective.probabilities(output_BK, temperature=calibration["temperature"])
    best = max(f1(p_BK >= threshold) for threshold in p_BK.ravel())
    decided_BK = objective.predictions(output_BK, calibration=calibration).decided_BK
    assert f1(decided_BK) == pytest.approx(best)


@pytest.mark.parametrize("error", ["huber", "quantile"])
@pytest.mark.parametrize(("scale", "coverage"), [("linear", 0.8), ("log", 0.5)])
def test_intervals_hold_the_share_of_new_numbers(error: Any, scale: Any, coverage: float) -> None:
    """Exchangeable rows: on average over draws of the calibration rows the share is at least what was asked for."""
    objective = Regression(error=error, scale=scale, coverage=coverage, centre=2.0, spread=0.5, pooling="last")
    random = np.random.default_rng(0)
    shares, widths = [], []
    for _ in range(300):
        truth_B = random.standard_t(3, size=60)
        output_BK = truth_B[:, None] + random.normal(size=(60, 1))
        if error == "quantile":
            output_BK = output_BK + np.array([-0.1, 0.0, 0.1])  # far too narrow, and still it holds
        calibration = objective.calibrated(output_BK[:20], [np.array([t]) for t in truth_B[:20]])
        found = objective.predictions(output_BK[20:], calibration=calibration)
        number_B = truth_B[20:] * 0.5 + 2.0
        number_B = np.expm1(number_B) if scale == "log" else number_B
        shares.append(float(((found.low_B <= number_B) & (number_B <= found.high_B)).mean()))
        widths.append(float((found.high_B - found.low_B).min()))
        assert ((found.low_B <= found.estimate_B) & (found.estimate_B <= found.high_B)).all()
    assert coverage - 0.01 <= np.mean(shares) <= coverage + 0.06
    assert min(widths) > 0


@pytest.mark.parametrize(("rows", "known"), [(8, False), (9, True), (10, True)])
def test_too_few_rows_give_no_interval(rows: int, known: bool) -> None:
    """Nine of ten needs the greatest of nine: the rank is ceil(0.9 (n + 1))."""
    objective = Regression(centre=0.0, spread=2.0, coverage=0.9, pooling="last")
    output_BK = np.zeros((rows, 1))
    calibration = objective.calibrated(output_BK, [np.array([float(row)]) for row in range(rows)])
    assert calibration == ({"margin": float(min(rows, math.ceil(0.9 * (rows + 1))) - 1)} if known else {})
    found = objective.predictions(output_BK[:1] + 1.0, calibration=calibration)
    assert found.estimate_B.tolist() == [2.0]
    margin = calibration.get("margin", math.nan)
    assert np.array_equal([found.low_B[0], found.high_B[0]], [2 * (1 - margin), 2 * (1 + margin)], equal_nan=True)
    assert found.documents()[0].keys() == ({"estimate", "low", "high"} if known else {"estimate"})


def test_quantiles_that_cross_are_put_in_order_and_no_interval_is_empty() -> None:
    objective = Regression(error="quantile", coverage=0.8, centre=0.0, spread=1.0)
    found = objective.predictions(np.array([[3.0, 1.0, 2.0]]), calibration={"margin": -5.0})
    assert (found.estimate_B[0], found.low_B[0], found.high_B[0]) == (2.0, 2.0, 2.0)
    wide = objective.predictions(np.array([[3.0, 1.0, 2.0]]), calibration={"margin": 0.5})
    assert (wide.low_B[0], wide.high_B[0]) == (0.5, 3.5)


def test_levels_of_a_hierarchy() -> None:
    objective = Classification(labels=("a/x/1", "a/y", "b"), several=False, hierarchy="/")
    found = [(ancestor_K.tolist(), names) for ancestor_K, names in objective.levels()]
    assert found == [
        ([0, 0, 1], ("a", "b")),
        ([0, 1, 2], ("a/x", "a/y", "b")),
        ([0, 1, 2], ("a/x/1", "a/y", "b")),
    ]


def test_answers_as_text_and_for_scripts() -> None:
    objective = Classification(labels=("b", "a"), several=True)
    found = objective.decided(np.array([[0.9, 0.7], [0.1, 0.2]]))
    assert found.texts() == ["a, b", ""]
    assert found.documents()[1] == {"labels": [], "probabilities": {"a": 0.2, "b": 0.1}}
    assert len(TWO.decided(np.eye(2)).documents(most=1)[0]["probabilities"]) == 1
