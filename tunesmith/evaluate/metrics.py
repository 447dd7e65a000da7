"""The metrics: each is one row of `METRICS`. Those of texts and likelihoods are here."""

import difflib
import functools
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np

from tunesmith.data.answers import Floats
from tunesmith.errors import DataError, RecipeError
from tunesmith.evaluate.adherence import MISSING, parse_json, pattern_rows, schema_rows
from tunesmith.evaluate.code import pass_at_k_rows, passing_rows
from tunesmith.evaluate.head_metrics import HEAD_METRICS
from tunesmith.evaluate.metric import FRACTION, Aggregate, Metric


def find_metric(name: str) -> Metric:
    """The metric of that name; raises RecipeError naming the nearest ones."""
    if name in METRICS:
        return METRICS[name]
    near = difflib.get_close_matches(name, METRICS, n=1)
    hint = f"did you mean {near[0]}?" if near else "choose one of them"
    raise RecipeError(f"there is no metric {name!r}; there are: {', '.join(METRICS)}", hint=hint)


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


def json_valid(prediction: str, reference: str) -> float:
    """1 if the prediction is JSON; the reference is not read."""
    return float(parse_json(prediction) is not MISSING)


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
    if expected is MISSING:
        raise DataError(
            f"json_fields: a reference is not JSON: {reference[:80]!r}",
            hint="use this metric only where every test answer is JSON, or choose token_f1",
        )
    found = leaves(parse_json(prediction))
    wanted = leaves(expected)
    return sum(_same_leaf(found.get(path, MISSING), value) for path, value in wanted.items()) / len(wanted)


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
            "json_schema",
            "the answer is JSON that is valid under evaluate.json_schema",
            schema_rows,
            FRACTION,
            right_or_wrong=True,
            needs=("json_schema",),
        ),
        Metric(
            "pattern_match",
            "the whole answer, without whitespace around it, matches evaluate.pattern",
            pattern_rows,
            FRACTION,
            right_or_wrong=True,
            needs=("pattern",),
        ),
        Metric(
            "number_match", "the last number is the reference's", best_of(number_match), FRACTION, right_or_wrong=True
        ),
        Metric(
            "code_passes",
            "the answer is code that passes the tests of its row",
            passing_rows,
            FRACTION,
            right_or_wrong=True,
            needs=("examples", "code_seconds"),
        ),
        Metric(
            "pass_at_k",
            "the chance that of evaluate.pass_at drawn answers at least one passes the tests of its row",
            pass_at_k_rows,
            FRACTION,
            reads="samples",
            needs=("examples", "code_seconds", "pass_at"),
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
        *HEAD_METRICS,
    )
}
