"""Metrics against their reference implementations, hand-worked numbers and whatever text a model may write."""

import json
import math
import subprocess
import sys
from decimal import Decimal

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from tunesmith.data.answers import Classes, Numbers, Tags
from tunesmith.errors import DataError, RecipeError
from tunesmith.evaluate.metrics import METRICS, find_metric, last_number, leaves, normalise

TEXT_METRICS = [name for name, metric in METRICS.items() if metric.reads == "text" and not metric.needs]

words = st.sampled_from(
    ["the", "cat", "sat", "on", "a", "mat", ",", ".", "Don't", "naïve", "1,200", "犬", "x" * 30, "-"]
)
sentences = st.lists(words, max_size=14).map(" ".join)


def score(name, prediction, reference):
    (value,) = METRICS[name].score_rows([prediction], [reference])
    return value


@pytest.mark.parametrize(
    ("name", "prediction", "reference", "expected"),
    [
        ("exact_match", " yes\n", "yes", 1),
        ("exact_match", "Yes", "yes", 0),
        ("exact_match", "no", ["yes", "no"], 1),
        ("normalised_match", "The  Straße!", "strasse", 1),
        ("normalised_match", "“Quoted” — text", "quoted text", 1),
        ("normalised_match", "theatre", "atre", 0),
        ("token_f1", "the cat sat", "cat sat down", 2 * 2 / 5),
        ("token_f1", "cat cat", "cat", 2 * 1 / 3),
        ("token_f1", "", "", 1),
        ("token_f1", "...", "cat", 0),
        ("rouge_l", "the cat sat on the mat", "the cat lay on the mat", 5 / 6),
        ("rouge_l", "собака спит", "собака ест", 0.5),
        ("json_valid", '{"a": 1}', "", 1),
        ("json_valid", "```json\n{}\n```", "", 0),
        ("json_valid", '{"a": NaN}', "", 0),
        ("json_valid", '{"a": 1} done', "", 0),
        ("json_valid", "[" * 100_000, "", 0),
        ("json_valid", "9" * 5000, "", 0),
        ("json_fields", '{"a": 1, "b": {"c": "x", "d": 2}}', '{"a": 1, "b": {"c": "x", "d": 3}}', 2 / 3),
        ("json_fields", '{"a": 1, "more": 2}', '{"a": 1.0}', 1),
        ("json_fields", '{"a": true}', '{"a": 1}', 0),
        ("json_fields", '{"a": [1, 2]}', '{"a": [1, 3, 2]}', 1 / 3),
        ("json_fields", '{"a": {}}', '{"a": []}', 0),
        ("json_fields", "null", "null", 1),
        ("json_fields", "not json", "null", 0),
        ("json_fields", '{"a": 2}', ['{"a": 1}', '{"a": 2}'], 1),
        ("number_match", "so it is 1,200.", "work\n#### 1200", 1),
        ("number_match", "#### 42 and not 7", "42", 0),
        ("number_match", "first 7\n#### 42", "42.0", 1),
        ("number_match", "none", "42", 0),
        ("number_match", "between 3-4", "4", 1),
        ("number_match", "it fell to −5 degrees", "-5", 1),
        ("number_match", "$1,234,567.80!", "1234567.8", 1),
    ],
)
def test_hand_worked(name, prediction, reference, expected):
    assert score(name, prediction, reference) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,2,3", Decimal(3)),
        ("1,2000", Decimal(2000)),
        ("2.50", Decimal("2.5")),
        ("6e3", Decimal(6000)),
        ("#### none, but 5", Decimal(5)),
        ("", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


@given(st.lists(st.tuples(sentences, st.lists(sentences, min_size=1, max_size=3)), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize(
    ("name", "reference_score"), [("bleu", sacrebleu.corpus_bleu), ("chrf", sacrebleu.corpus_chrf)]
)
def test_corpus_scores_are_sacrebleus(name, reference_score, rows):
    predictions, references = [row[0] for row in rows], [row[1] for row in rows]
    streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(max(map(len, references)))]
    metric = METRICS[name]
    scores = metric.score_rows(predictions, references)
    assert metric.aggregate(scores) == pytest.approx(reference_score(predictions, streams).score, abs=1e-9)
    sentence = sacrebleu.sentence_bleu if name == "bleu" else sacrebleu.sentence_chrf
    expected = [sentence(*row).score for row in rows]
    np.testing.assert_allclose(metric.row_values(scores), expected, atol=1e-9)


def test_corpus_score_of_many_sets_at_once():
    metric = METRICS["bleu"]
    rows = metric.score_rows(
        ["the cat sat on the mat", "a dog ran away"], ["the cat sat on a mat", "a dog ran off home"]
    )
    sets = np.stack([rows[0], rows[1], rows.sum(0)])
    together = metric.aggregate.of_sums(sets, np.array([1, 1, 2]))
    alone = [metric.aggregate(rows[:1]), metric.aggregate(rows[1:]), metric.aggregate(rows)]
    np.testing.assert_allclose(together, alone, rtol=1e-12)


@given(sentences, sentences)
@settings(max_examples=60, deadline=None)
def test_rouge_is_rouge_scores_on_ascii(prediction, reference):
    prediction, reference = (text.encode("ascii", "ignore").decode() for text in (prediction, reference))
    expected = RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure
    assert score("rouge_l", prediction, reference) == pytest.approx(expected, abs=1e-12)


@given(prediction=st.text(max_size=60))
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("name", TEXT_METRICS)
def test_any_output_gets_a_score_within_bounds(name, prediction):
    metric = METRICS[name]
    rows = metric.score_rows([prediction], ['{"answer": 42}'])
    low, high = metric.aggregate.bounds or (0, 100)
    assert rows.dtype == np.float64
    assert low <= metric.aggregate(rows) <= high
    assert not metric.right_or_wrong or rows[0] in (0, 1)


@given(st.text(alphabet='ab 1{}[]",:.the', min_size=1, max_size=30))
@pytest.mark.parametrize("name", ["exact_match", "normalised_match", "token_f1"])
def test_a_text_matches_itself(name, text):
    assert score(name, text, text) == 1


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(values, values)
def test_json_fields_of_any_values(value, other):
    text = json.dumps(value)
    assert score("json_fields", text, text) == 1
    assert 0 <= score("json_fields", json.dumps(other), text) <= 1


def test_leaves_of_deep_nesting():
    deep = 0
    for _ in range(5000):
        deep = [deep]
    assert list(leaves(deep).values()) == [0]


@given(st.text())
def test_normalise_is_stable_under_case_and_spacing(text):
    assert normalise(text.casefold() + " \n") == normalise("  " + text.casefold())


def test_perplexity_and_bits_per_byte():
    losses = np.array([2.0, 6.0])
    perplexity = METRICS["perplexity"]
    rows = perplexity.score_rows(negative_log_likelihood=losses, tokens=np.array([1, 3]))
    assert perplexity.aggregate(rows) == pytest.approx(math.exp(8 / 4))
    np.testing.assert_allclose(perplexity.row_values(rows), [math.exp(2), math.exp(2)])
    bits = METRICS["bits_per_byte"]
    assert bits.aggregate(bits.score_rows(negative_log_likelihood=losses, bytes=np.array([4, 12]))) == pytest.approx(
        0.5 / math.log(2)
    )
    assert not perplexity.higher_is_better
    assert not bits.higher_is_better


def test_perplexity_of_a_broken_model_is_finite():
    rows = METRICS["perplexity"].score_rows(negative_log_likelihood=[5000.0], tokens=[2])
    assert math.isfinite(METRICS["perplexity"].aggregate(rows))


def test_likelihood_of_an_empty_row_is_refused():
    with pytest.raises(DataError, match="row 2 has nothing to predict"):
        METRICS["perplexity"].score_rows(negative_log_likelihood=[1.0, 0.0], tokens=[3, 0])


@pytest.mark.parametrize(
    ("name", "predictions", "references", "message"),
    [
        ("exact_match", ["a"], [], "1 predictions for 0 references"),
        ("bleu", ["a", "b"], ["a", []], "row 2 has no reference"),
        ("json_fields", ["{}"], ["hello"], "not JSON: 'hello'"),
        ("number_match", ["1"], ["no idea"], "holds no number: 'no idea'"),
    ],
)
def test_what_cannot_be_scored_is_refused(name, predictions, references, message):
    with pytest.raises(DataError, match=message) as caught:
        METRICS[name].score_rows(predictions, references)
    assert name in caught.value.message


# ---- classes and numbers ---------------------------------------------------------------------------------------------

CLASS_METRICS = [name for name, metric in METRICS.items() if metric.reads == "classes"]
NUMBER_METRICS = [name for name, metric in METRICS.items() if metric.reads == "numbers"]


def classes(probabilities, *, decided, labels=("a/x", "a/y", "b"), several=False, hierarchy="/"):
    """What a head says: probabilities, and for each row the numbers of the classes that it answers."""
    decided_BK = np.zeros((len(decided), len(labels)), bool)
    for row, numbers in enumerate(decided):
        decided_BK[row, list(numbers)] = True
    return Classes(labels, np.array(probabilities).reshape(-1, len(labels)), decided_BK, several, hierarchy)


def truth_of(rows, num_classes=3):
    return np.array([[k in row for k in range(num_classes)] for row in rows], bool).reshape(-1, num_classes)


def scored(name, predicted, truth):
    metric = METRICS[name]
    rows = metric.score_rows(predicted=predicted, truth=truth)
    assert rows.dtype == np.float64
    assert not metric.right_or_wrong or set(rows.tolist()) <= {0.0, 1.0}
    return metric.aggregate(rows)


# Four rows, of which one is wrong within its top level, one wrong altogether and one without an answer.
FOUR = classes([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.4, 0.3, 0.3]], decided=[{0}, {0}, {0}, set()])
FOUR_TRUE = [{0}, {1}, {2}, {0}]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("accuracy", 1 / 4),
        ("top_accuracy", 2 / 4),
        ("macro_f1", (2 * 1 / (3 + 2) + 0 + 0) / 3),
        ("micro_f1", 2 * 1 / (3 + 4)),
        ("log_loss", -(math.log(0.7) + math.log(0.3) + math.log(0.4) + math.log(0.4)) / 4),
        # the bins are [0.4, 0.5): one, right; [0.5, 0.6): one, wrong; [0.6, 0.7): one, wrong; [0.7, 0.8): one, right
        ("calibration_error", ((1 - 0.4) + 0.5 + 0.6 + (1 - 0.7)) / 4),
        ("answered", 3 / 4),
        ("answered_accuracy", 1 / 3),
    ],
)
def test_classes_by_hand(name, expected):
    assert scored(name, FOUR, truth_of(FOUR_TRUE)) == pytest.approx(expected, abs=1e-12)


def test_several_classes_by_hand():
    predicted = classes(
        [[0.9, 0.6, 0.2], [0.1, 0.2, 0.3]],
        decided=[{0, 1}, set()],
        labels=("a", "b", "c"),
        several=True,
        hierarchy=None,
    )
    truth = truth_of([{0, 2}, set()])
    expected = -(math.log(0.9) + math.log(0.4) + math.log(0.2) + math.log(0.9) + math.log(0.8) + math.log(0.7)) / 6
    assert scored("log_loss", predicted, truth) == pytest.approx(expected)
    assert scored("accuracy", predicted, truth) == 1 / 2
    assert scored("micro_f1", predicted, truth) == pytest.approx(2 * 1 / (2 + 2))
    assert scored("macro_f1", predicted, truth) == pytest.approx((1 + 0) / 2)  # a and c occur
    assert scored("top_accuracy", predicted, truth) == 1 / 2


def test_a_class_that_is_not_known_is_never_right():
    """A row whose label no training row had: nothing is true of it."""
    predicted, truth = classes([[0.8, 0.1, 0.1]], decided=[{0}]), truth_of([set()])
    assert scored("accuracy", predicted, truth) == scored("answered_accuracy", predicted, truth) == 0
    assert scored("log_loss", predicted, truth) == pytest.approx(-math.log(1e-12))


def test_a_probability_of_zero_is_no_infinite_loss():
    assert scored("log_loss", classes([[1.0, 0.0, 0.0]], decided=[{0}]), truth_of([{1}])) == pytest.approx(
        12 * math.log(10)
    )


def test_all_right_and_sure():
    predicted = classes([[1, 0, 0], [0, 1, 0], [0, 0, 1]], decided=[{0}, {1}, {2}])
    best = {name: 0.0 if name in ("log_loss", "calibration_error") else 1.0 for name in CLASS_METRICS}
    found = {name: scored(name, predicted, truth_of([{0}, {1}, {2}])) for name in CLASS_METRICS}
    assert found == pytest.approx(best, abs=1e-12)


def naive_scores(rows):
    """The textbook's definitions, one row at a time; `rows` are (probabilities, answers, truths)."""
    counts = [
        [sum(k in r[1] and k in r[2] for r in rows), *(sum(k in r[i] for r in rows) for i in (1, 2))] for k in range(3)
    ]

    def f1(both, answered, true):
        precision, recall = (both / n if n else 0.0 for n in (answered, true))
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0

    bins = {}
    for p, _, truths in rows:
        best = p.index(max(p))
        bins.setdefault(min(int(max(p) * 10), 9), []).append((max(p), best in truths))
    gap = sum(abs(sum(right for _, right in b) - sum(sure for sure, _ in b)) for b in bins.values())
    answered = [r for r in rows if r[1]]
    present = [c for c in counts if c[2]]
    return {
        "accuracy": sum(r[1] == r[2] for r in rows) / len(rows),
        "macro_f1": sum(f1(*c) for c in present) / max(1, len(present)),
        "micro_f1": f1(*(sum(c[i] for c in counts) for i in range(3))),
        "calibration_error": gap / len(rows),
        "answered": len(answered) / len(rows),
        "answered_accuracy": sum(r[1] == r[2] for r in answered) / max(1, len(answered)),
    }


some_classes = st.sets(st.integers(0, 2))
chances = st.lists(st.floats(0, 1), min_size=3, max_size=3)


@given(st.lists(st.tuples(chances, some_classes, some_classes), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_classes_equal_the_textbook_and_stay_in_bounds(rows):
    predicted = classes([r[0] for r in rows], decided=[r[1] for r in rows], several=True)
    truth = truth_of([r[2] for r in rows])
    found = {name: scored(name, predicted, truth) for name in CLASS_METRICS}
    naive = naive_scores(rows)
    assert {name: found[name] for name in naive} == pytest.approx(naive, abs=1e-9)
    for name, value in found.items():
        low, high = METRICS[name].aggregate.bounds or (0.0, 12 * math.log(10) + 1e-9)
        assert low - 1e-12 <= value <= high + 1e-12


def test_numbers_by_hand():
    predicted = Numbers(np.array([1.0, 4.0]), np.array([0.0, 3.0]), np.array([2.0, 6.0]), coverage=0.9)
    truth = np.array([2.0, 1.0])  # the first on its interval's border, the second below it
    expected = {"mae": 2.0, "rmse": math.sqrt(5), "coverage": 0.5, "interval_width": 2.5}
    assert set(expected) == set(NUMBER_METRICS)
    for name, value in expected.items():
        assert scored(name, predicted, truth) == pytest.approx(value)
    rows = METRICS["rmse"].score_rows(predicted=predicted, truth=truth)
    np.testing.assert_allclose(METRICS["rmse"].row_values(rows), [1, 3])


def test_tags_by_hand():
    """Of 5 words 3 have the right tag; of 2 true entities and 2 answered ones 1 is the same."""
    predicted, truth = Tags((("B-X", "I-X", "O"), ("B-X", "O"))), [("B-X", "I-X", "O"), ("B-Y", "I-Y")]
    words = METRICS["tag_accuracy"].score_rows(predicted=predicted, truth=truth)
    assert METRICS["tag_accuracy"].aggregate(words) == pytest.approx(3 / 5)
    found = METRICS["entity_f1"].score_rows(predicted=predicted, truth=truth)
    assert found.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert METRICS["entity_f1"].aggregate(found) == pytest.approx(2 * 1 / (2 + 2))


@pytest.mark.parametrize("name", list(METRICS))
def test_no_rows(name):
    metric = METRICS[name]
    needed = {"json_schema": None, "pattern": None, "examples": [], "code_seconds": 5, "pass_at": 1}
    needed = {key: value for key, value in needed.items() if key in metric.needs}
    none = np.zeros(0)
    contexts = {
        "text": {},
        "samples": {"samples": []},
        "likelihood": {"negative_log_likelihood": [], "tokens": []},
        "classes": {"predicted": classes([], decided=[]), "truth": np.zeros((0, 3), bool)},
        "numbers": {"predicted": Numbers(none, none, none, coverage=0.9), "truth": none},
        "tags": {"predicted": Tags(()), "truth": []},
    }
    with pytest.raises(DataError, match="no rows"):
        metric.aggregate(metric.score_rows(**contexts[metric.reads], **needed))


def test_unknown_metric_names_the_nearest():
    with pytest.raises(RecipeError) as caught:
        find_metric("exact_mach")
    assert caught.value.hint == "did you mean exact_match?"
    assert "rouge_l" in caught.value.message
    assert find_metric("chrf") is METRICS["chrf"]


def test_registry_names_and_no_torch():
    assert all(name == metric.name and metric.description for name, metric in METRICS.items())
    code = "import sys, tunesmith.evaluate.statistics; print({'torch', 'nltk', 'sacrebleu'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
