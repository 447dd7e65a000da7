"""Metrics of what heads say: classes, numbers and tags. Shapes: B rows, K classes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.answers import Classes, Floats, Numbers, Tags, entities
from tunesmith.evaluate.metric import FRACTION, MEAN, Aggregate, Metric

Truth = NDArray[np.bool_]
TagRows = Sequence[tuple[str, ...]]

LEAST_PROBABILITY = 1e-12
NUM_BINS = 10


def accuracy(*, predicted: Classes, truth: Truth) -> Floats:
    """1 where exactly the row's classes are answered."""
    found: Floats = (predicted.decided_BK == truth).all(1).astype(np.float64)
    return found


def top_accuracy(*, predicted: Classes, truth: Truth) -> Floats:
    """1 where the answered class has the same top level in the hierarchy; the whole class where there is none."""
    separator = predicted.hierarchy
    tops = [label.split(separator)[0] if separator else label for label in predicted.labels]
    names = {name: number for number, name in enumerate(dict.fromkeys(tops))}
    member_KM = np.eye(len(names))[[names[top] for top in tops]]
    found: Floats = ((predicted.decided_BK @ member_KM > 0) == (truth @ member_KM > 0)).all(1).astype(np.float64)
    return found


def class_counts(*, predicted: Classes, truth: Truth) -> Floats:
    """[B, 3K]: answered and true, answered, true; for F1."""
    answered_BK = predicted.decided_BK
    return np.concatenate([answered_BK & truth, answered_BK, truth], axis=1).astype(np.float64)


def _macro_f1(sums: Floats, num_rows: Floats) -> Floats:
    """Mean of F1 = 2 both / (answered + true) over the classes that occur."""
    both, answered, true = np.split(sums, 3, axis=-1)
    f1, present = 2 * both / np.maximum(answered + true, 1), true > 0
    found: Floats = np.where(present, f1, 0).sum(-1) / np.maximum(present.sum(-1), 1)
    return found


def _micro_f1(sums: Floats, num_rows: Floats) -> Floats:
    both, answered, true = (part.sum(-1) for part in np.split(sums, 3, axis=-1))
    found: Floats = 2 * both / np.maximum(answered + true, 1)
    return found


def log_loss(*, predicted: Classes, truth: Truth) -> Floats:
    """-log p of the row's class; of several, the mean over the classes of their binary losses."""
    p_BK = np.clip(predicted.probability_BK, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    if predicted.several:
        found: Floats = -np.where(truth, np.log(p_BK), np.log(1 - p_BK)).mean(1)
        return found
    of_truth: Floats = np.clip((predicted.probability_BK * truth).sum(1), LEAST_PROBABILITY, 1)
    return -np.log(of_truth)


def confidence_bins(*, predicted: Classes, truth: Truth) -> Floats:
    """[B, 2 bins]: in the bin of its confidence, a row's confidence and whether the most likely class is right."""
    best_B = predicted.probability_BK.argmax(1)
    rows_B = np.arange(len(best_B))
    confidence_B = predicted.probability_BK[rows_B, best_B]
    bin_B = np.minimum((confidence_B * NUM_BINS).astype(int), NUM_BINS - 1)
    found = np.zeros((len(best_B), 2 * NUM_BINS))
    found[rows_B, bin_B], found[rows_B, NUM_BINS + bin_B] = confidence_B, truth[rows_B, best_B]
    return found


def _calibration_error(sums: Floats, num_rows: Floats) -> Floats:
    """ECE (Naeini et al. 2015; Guo et al. 2017, eq. 3): sum over bins of |right - confidence| / rows."""
    confidence, right = np.split(sums, 2, axis=-1)
    found: Floats = np.abs(right - confidence).sum(-1) / num_rows
    return found


def answered_rows(*, predicted: Classes, truth: Truth) -> Floats:
    """1 where there is an answer."""
    return np.asarray(predicted.decided_BK.any(1), dtype=np.float64)


def answered_right(*, predicted: Classes, truth: Truth) -> Floats:
    """[B, 2]: an answer that is right, an answer."""
    answered_B = predicted.decided_BK.any(1)
    return np.stack([(predicted.decided_BK == truth).all(1) & answered_B, answered_B], axis=1).astype(np.float64)


def _ratio(sums: Floats, num_rows: Floats) -> Floats:
    found: Floats = sums[..., 0] / np.maximum(sums[..., 1], 1)
    return found


def absolute_error(*, predicted: Numbers, truth: Floats) -> Floats:
    """|estimate - number|."""
    return np.abs(predicted.estimate_B - truth)


def squared_error(*, predicted: Numbers, truth: Floats) -> Floats:
    """(estimate - number)^2."""
    found: Floats = (predicted.estimate_B - truth) ** 2
    return found


def inside(*, predicted: Numbers, truth: Floats) -> Floats:
    """1 where the number lies in the interval."""
    return ((predicted.low_B <= truth) & (truth <= predicted.high_B)).astype(np.float64)


def interval_width(*, predicted: Numbers, truth: Floats) -> Floats:
    """high - low."""
    return predicted.high_B - predicted.low_B


def right_tags(*, predicted: Tags, truth: TagRows) -> Floats:
    """[B, 2]: words with the right tag, words."""
    pairs = zip(predicted.rows, truth, strict=True)
    counts = [[sum(a == b for a, b in zip(*row, strict=True)), len(row[1])] for row in pairs]
    return np.array(counts, dtype=np.float64).reshape(-1, 2)


def entity_counts(*, predicted: Tags, truth: TagRows) -> Floats:
    """[B, 3]: entities answered and true, answered, true."""
    pairs = [(entities(a), entities(b)) for a, b in zip(predicted.rows, truth, strict=True)]
    return np.array([[len(a & b), len(a), len(b)] for a, b in pairs], dtype=np.float64).reshape(-1, 3)


def _root_mean(sums: Floats, num_rows: Floats) -> Floats:
    found: Floats = np.sqrt(sums[..., 0] / num_rows)
    return found


HEAD_METRICS = (
    Metric("accuracy", "exactly the right class, or classes", accuracy, FRACTION, right_or_wrong=True, reads="classes"),
    Metric(
        "top_accuracy",
        "the right top level of the hierarchy",
        top_accuracy,
        FRACTION,
        right_or_wrong=True,
        reads="classes",
    ),
    Metric(
        "macro_f1",
        "mean F1 of the classes that occur",
        class_counts,
        Aggregate(_macro_f1, bounds=(0.0, 1.0)),
        reads="classes",
    ),
    Metric(
        "micro_f1",
        "F1 of all answered classes together",
        class_counts,
        Aggregate(_micro_f1, bounds=(0.0, 1.0)),
        reads="classes",
    ),
    Metric(
        "log_loss", "-log of the right class's probability", log_loss, MEAN, higher_is_better=False, reads="classes"
    ),
    Metric(
        "calibration_error",
        "how far confidence is from the share that is right, in ten bins",
        confidence_bins,
        Aggregate(_calibration_error, bounds=(0.0, 1.0)),
        higher_is_better=False,
        reads="classes",
    ),
    Metric("answered", "share of the rows with an answer", answered_rows, FRACTION, reads="classes"),
    Metric(
        "answered_accuracy",
        "share of the answers that are right",
        answered_right,
        Aggregate(_ratio, bounds=(0.0, 1.0)),
        reads="classes",
    ),
    Metric(
        "entity_f1",
        "F1 of whole entities, kind and extent (conlleval)",
        entity_counts,
        Aggregate(_micro_f1, bounds=(0.0, 1.0)),
        reads="tags",
    ),
    Metric(
        "tag_accuracy",
        "share of the words with the right tag",
        right_tags,
        Aggregate(_ratio, bounds=(0.0, 1.0)),
        reads="tags",
    ),
    Metric("mae", "mean absolute error", absolute_error, MEAN, higher_is_better=False, reads="numbers"),
    Metric(
        "rmse",
        "root of the mean squared error",
        squared_error,
        Aggregate(_root_mean),
        higher_is_better=False,
        reads="numbers",
    ),
    Metric("coverage", "share of the numbers inside their interval", inside, FRACTION, reads="numbers"),
    Metric(
        "interval_width",
        "mean width of the intervals",
        interval_width,
        MEAN,
        higher_is_better=False,
        reads="numbers",
    ),
)
