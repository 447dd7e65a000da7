"""The metrics: each is one row of `METRICS`.

A metric gives every test row a score, or a few counts from which a score of the whole set follows (corpus BLEU,
perplexity). Everything said about a set of rows is a function of the *sum* of its rows, so an interval or a p-value
resamples numbers and never reads a text twice:

    score of a set = of_sums(sum over rows of rows_BS, number of rows)

Shapes: B rows of the test set, S statistics of a row. Rows are [B] where the score of a set is the mean of its rows
and [B, S] otherwise.
"""

import difflib
import functools
import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.answers import Classes, Floats, Numbers, Tags, entities
from tunesmith.errors import DataError, RecipeError

Truth = NDArray[np.bool_]
TagRows = Sequence[tuple[str, ...]]
References = Sequence[str] | Sequence[Sequence[str]]
"""One reference a row, or several of which the best counts."""


@dataclass(frozen=True, slots=True)
class Aggregate:
    """The score of a set of rows, as a function of the sum of its rows.

    of_sums: (sums [..., S], number of rows [...]) -> scores [...].
    of_row: the same for a single row; `of_sums` with one row where a set and a row are scored alike.
    bounds: least and greatest score, None where there is no such number.
    """

    of_sums: Callable[[Floats, Floats], Floats]
    of_row: Callable[[Floats, Floats], Floats] | None = None
    bounds: tuple[float, float] | None = None

    def __call__(self, rows: Floats) -> float:
        """The score of `rows` ([B] or [B, S]); raises DataError if there are none."""
        if len(rows) == 0:
            raise DataError("there are no rows to score", hint="give a test file with at least one row")
        return float(self.of_sums(as_statistics(rows).sum(axis=0), np.asarray(len(rows))))

    def row_values(self, rows: Floats) -> Floats:
        """The score of every row alone, [B]."""
        return (self.of_row or self.of_sums)(as_statistics(rows), np.ones(len(rows)))


def as_statistics(rows: Floats) -> Floats:
    """`rows` as [B, S], S = 1 for [B]."""
    return rows[:, None] if rows.ndim == 1 else rows


@dataclass(frozen=True, slots=True)
class Metric:
    """One way to score.

    score: (predictions, references) -> rows for `reads == "text"`; for `reads == "likelihood"` keyword arrays [B]:
        `negative_log_likelihood` (nats, summed over the row's target tokens) and `tokens` or `bytes`; for "classes",
        "numbers" and "tags" `predicted` (Classes, Numbers, Tags) and `truth` ([B, K] bool, [B], or tags of each row).
    right_or_wrong: rows are 0 or 1, so two systems are compared with McNemar's exact test.
    """

    name: str
    description: str
    score: Callable[..., Floats]
    aggregate: Aggregate
    higher_is_better: bool = True
    right_or_wrong: bool = False
    reads: Literal["text", "likelihood", "classes", "numbers", "tags"] = "text"

    def score_rows(self, predictions: Sequence[str] = (), references: References = (), **context: Any) -> Floats:
        """Scores of the rows, [B] or [B, S] float64.

        Text metrics read `predictions` and `references` (equally many; a reference may be a list of texts, of which
        the best match counts). Likelihood metrics read `context`, see the class. Raises DataError where the numbers
        of rows differ or a reference cannot be read by this metric.
        """
        if self.reads != "text":
            return self.score(**context)
        if len(predictions) != len(references):
            raise DataError(f"{self.name}: {len(predictions)} predictions for {len(references)} references")
        several = [[texts] if isinstance(texts, str) else list(texts) for texts in references]
        for number, texts in enumerate(several, start=1):
            if not texts:
                raise DataError(f"{self.name}: row {number} has no reference", hint="give each test row an answer")
        return self.score(list(predictions), several)

    def row_values(self, rows: Floats) -> Floats:
        """One number a row, [B], for tables and for counting rows that became better; on the metric's own scale."""
        return self.aggregate.row_values(rows)


def find_metric(name: str) -> Metric:
    """The metric of that name; raises RecipeError naming the nearest ones."""
    if name in METRICS:
        return METRICS[name]
    near = difflib.get_close_matches(name, METRICS, n=1)
    hint = f"did you mean {near[0]}?" if near else "choose one of them"
    raise RecipeError(f"there is no metric {name!r}; there are: {', '.join(METRICS)}", hint=hint)


def _mean_of_sums(sums: Floats, num_rows: Floats) -> Floats:
    return sums[..., 0] / num_rows


MEAN = Aggregate(_mean_of_sums)
FRACTION = Aggregate(_mean_of_sums, bounds=(0.0, 1.0))


# ---- rows that are scored one at a time ------------------------------------------------------------------------------


def best_of(score_one: Callable[[str, str], float]) -> Callable[..., Floats]:
    """Score rows by their best reference."""

    def score(predictions: list[str], references: list[list[str]]) -> Floats:
        scores = [
            max(score_one(prediction, reference) for reference in texts)
            for prediction, texts in zip(predictions, references, strict=True)
        ]
        return np.array(scores, dtype=np.float64)

    return score


def exact_match(prediction: str, reference: str) -> float:
    """1 if the texts are equal but for surrounding whitespace."""
    return float(prediction.strip() == reference.strip())


ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str) -> str:
    """Case, punctuation, English articles and runs of whitespace removed, as in SQuAD's official script.

    Punctuation is ASCII's plus Unicode's, so typographic quotes and other scripts' marks go too.
    """
    kept = (c for c in text.casefold() if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    return " ".join(ARTICLES.sub(" ", "".join(kept)).split())


def normalised_match(prediction: str, reference: str) -> float:
    """1 if the texts are equal after `normalise`."""
    return float(normalise(prediction) == normalise(reference))


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the words left by `normalise`, counted with repetition."""
    words, expected = normalise(prediction).split(), normalise(reference).split()
    if not words or not expected:
        return float(words == expected)
    shared = (Counter(words) & Counter(expected)).total()
    return 2.0 * shared / (len(words) + len(expected))


class _UnicodeWords:
    """Tokenizer for rouge_score. Its own drops every letter outside a-z; on ASCII text the two agree."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk: half a second

    return RougeScorer(["rougeL"], tokenizer=_UnicodeWords())


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004), without stemming."""
    return float(_rouge_scorer().score(reference, prediction)["rougeL"].fmeasure)


# ---- JSON and numbers ------------------------------------------------------------------------------------------------

_MISSING = object()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse_json(text: str) -> Any:
    """The JSON value, or `_MISSING` if `text` is not JSON to the letter (fences, NaN and trailing words are not)."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # a model may well write ten thousand opening brackets
        return _MISSING


def json_valid(prediction: str, reference: str) -> float:
    """1 if the prediction is JSON; the reference is not read."""
    return float(parse_json(prediction) is not _MISSING)


def leaves(value: Any) -> dict[tuple[str | int, ...], Any]:
    """Path -> value of everything that is not a filled object or list; an empty one is a leaf."""
    found: dict[tuple[str | int, ...], Any] = {}
    waiting: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while waiting:  # a loop, since the nesting is the model's choice
        path, node = waiting.pop()
        if isinstance(node, dict) and node:
            waiting.extend(((*path, name), child) for name, child in node.items())
        elif isinstance(node, list) and node:
            waiting.extend(((*path, index), child) for index, child in enumerate(node))
        else:
            found[path] = node
    return found


def json_fields(prediction: str, reference: str) -> float:
    """Share of the reference's leaf fields that the prediction holds with the same value; invalid JSON scores 0.

    Further fields cost nothing. 1 equals 1.0; true does not equal 1. Raises DataError if the reference is not JSON.
    """
    expected = parse_json(reference)
    if expected is _MISSING:
        raise DataError(
            f"json_fields: a reference is not JSON: {reference[:80]!r}",
            hint="use this metric only where every test answer is JSON, or choose token_f1",
        )
    found = leaves(parse_json(prediction))
    wanted = leaves(expected)
    return sum(_same_leaf(found.get(path, _MISSING), value) for path, value in wanted.items()) / len(wanted)


def _same_leaf(left: Any, right: Any) -> bool:
    return isinstance(left, bool) == isinstance(right, bool) and left == right


NUMBER = re.compile(r"(?<![\d.])[-−]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,3}(?!\d))?")


def last_number(text: str) -> Decimal | None:
    """The last number of the text, after the last `####` where there is one (gsm8k); None if there is none.

    A comma before three digits groups them (1,200); the decimal mark is a point.
    """
    answer = text.rpartition("####")[2]
    numbers = NUMBER.findall(answer) or NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "").replace("−", "-")) if numbers else None


def number_match(prediction: str, reference: str) -> float:
    """1 if the last numbers are equal. Raises DataError if the reference holds none."""
    expected = last_number(reference)
    if expected is None:
        raise DataError(
            f"number_match: a reference holds no number: {reference[-80:]!r}",
            hint="use this metric only where every test answer ends with a number, or choose exact_match",
        )
    return float(last_number(prediction) == expected)


# ---- corpus scores ---------------------------------------------------------------------------------------------------

BLEU_ORDER = 4
CHRF_ORDER = 6
CHRF_BETA = 2


@functools.cache
def _sacrebleu(name: str) -> Any:
    from sacrebleu.metrics import BLEU, CHRF

    return BLEU(force=True) if name == "bleu" else CHRF()


def _sacrebleu_statistics(name: str) -> Callable[..., Floats]:
    """Rows of sacrebleu's own sentence statistics, [B, 10] for BLEU and [B, 18] for chrF."""

    def score(predictions: list[str], references: list[list[str]]) -> Floats:
        # sacrebleu wants streams of first, second, ... references, None where a row has fewer.
        longest = max((len(texts) for texts in references), default=1)
        streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(longest)]
        statistics = _sacrebleu(name)._extract_corpus_statistics(predictions, streams)
        return np.array(statistics, dtype=np.float64)

    return score


def _bleu(sums: Floats, *, effective_order: bool) -> Floats:
    """BLEU (Papineni et al. 2002) of summed statistics [..., 10], 0 to 100, smoothed as sacrebleu does ("exp").

    The statistics: length, reference length, 4 counts of matching n-grams, 4 counts of n-grams. `effective_order`
    leaves out the orders that a text is too short for, which suits single sentences.
    """
    length, reference_length = sums[..., 0], sums[..., 1]
    matches, totals = sums[..., 2 : 2 + BLEU_ORDER], sums[..., 2 + BLEU_ORDER :]
    present = totals > 0
    missed = present & (matches == 0)
    smoothing = 2.0 ** np.cumsum(missed, axis=-1)  # halved once more for every order without a match
    precision = np.where(missed, 1.0 / smoothing, matches) / np.where(present, totals, 1.0)
    log_precision = np.log(np.where(present, precision, 1.0)).sum(axis=-1)
    num_orders = present.sum(axis=-1) if effective_order else np.where(present.all(axis=-1), BLEU_ORDER, 0)
    short = length < reference_length
    log_brevity = np.where(short, 1.0 - reference_length / np.maximum(length, 1e-300), 0.0)
    scored = (num_orders > 0) & (matches > 0).any(axis=-1)
    return np.where(scored, 100.0 * np.exp(log_brevity + log_precision / np.maximum(num_orders, 1)), 0.0)


def _chrf(sums: Floats, num_rows: Floats) -> Floats:
    """chrF2 (Popović 2015) of summed statistics [..., 18], 0 to 100: for each order hypothesis, reference, matches.

    Precision and recall are averaged over the orders that both sides are long enough for.
    """
    guessed, wanted, matched = (sums[..., i::3] for i in range(3))
    used = (guessed > 0) & (wanted > 0)
    num_used = np.maximum(used.sum(axis=-1), 1)
    precision = np.where(used, matched / np.where(used, guessed, 1.0), 0.0).sum(axis=-1) / num_used
    recall = np.where(used, matched / np.where(used, wanted, 1.0), 0.0).sum(axis=-1) / num_used
    weight = CHRF_BETA**2
    below = weight * precision + recall
    return 100.0 * (1 + weight) * precision * recall / np.where(below > 0, below, 1.0)


# ---- likelihood ------------------------------------------------------------------------------------------------------


def likelihood_rows(*, negative_log_likelihood: Floats, **units: Floats) -> Floats:
    """[B, 2]: summed negative log-likelihood (nats) of each row, and its number of units (`tokens` or `bytes`)."""
    if len(units) != 1:
        raise TypeError(f"one of tokens and bytes is needed, got {sorted(units)}")
    (counts,) = units.values()
    rows = np.stack([np.asarray(negative_log_likelihood, dtype=np.float64), np.asarray(counts, dtype=np.float64)], 1)
    if (rows[:, 1] <= 0).any():
        raise DataError(f"row {int(np.argmax(rows[:, 1] <= 0)) + 1} has nothing to predict", hint="drop empty rows")
    return rows


MAX_NATS = 700.0  # exp of more is not a number that JSON can hold; only a broken model gets there


def _perplexity(sums: Floats, num_rows: Floats) -> Floats:
    return np.exp(np.minimum(sums[..., 0] / sums[..., 1], MAX_NATS))


def _bits_per_byte(sums: Floats, num_rows: Floats) -> Floats:
    return sums[..., 0] / sums[..., 1] / np.log(2.0)


# ---- classes and numbers ---------------------------------------------------------------------------------------------

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


BLEU_AGGREGATE = Aggregate(
    of_sums=lambda sums, num_rows: _bleu(sums, effective_order=False),
    of_row=lambda sums, num_rows: _bleu(sums, effective_order=True),
    bounds=(0.0, 100.0),
)
CHRF_AGGREGATE = Aggregate(_chrf, bounds=(0.0, 100.0))

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "exact_match", "equal but for surrounding whitespace", best_of(exact_match), FRACTION, right_or_wrong=True
        ),
        Metric(
            "normalised_match",
            "equal but for case, punctuation, articles and whitespace",
            best_of(normalised_match),
            FRACTION,
            right_or_wrong=True,
        ),
        Metric("token_f1", "overlap of words as in SQuAD, 0 to 1", best_of(token_f1), FRACTION),
        Metric("bleu", "corpus BLEU as sacrebleu computes it, 0 to 100", _sacrebleu_statistics("bleu"), BLEU_AGGREGATE),
        Metric(
            "chrf", "corpus chrF2 as sacrebleu computes it, 0 to 100", _sacrebleu_statistics("chrf"), CHRF_AGGREGATE
        ),
        Metric("rouge_l", "longest common subsequence of words, 0 to 1", best_of(rouge_l), FRACTION),
        Metric("json_valid", "the answer is valid JSON", best_of(json_valid), FRACTION, right_or_wrong=True),
        Metric("json_fields", "share of the reference's JSON fields reproduced", best_of(json_fields), FRACTION),
        Metric(
            "number_match", "the last number is the reference's", best_of(number_match), FRACTION, right_or_wrong=True
        ),
        Metric(
            "perplexity",
            "exp of the mean negative log-likelihood of a target token",
            likelihood_rows,
            Aggregate(_perplexity),
            higher_is_better=False,
            reads="likelihood",
        ),
        Metric(
            "bits_per_byte",
            "negative log-likelihood in bits for each byte of text; comparable between tokenizers",
            likelihood_rows,
            Aggregate(_bits_per_byte),
            higher_is_better=False,
            reads="likelihood",
        ),
        Metric(
            "accuracy", "exactly the right class, or classes", accuracy, FRACTION, right_or_wrong=True, reads="classes"
        ),
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
}
