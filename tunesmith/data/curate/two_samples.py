"""Are two sets of texts alike? A classifier that tries to tell them apart, and the words and topics that differ.

Classifier two-sample test (Lopez-Paz, Oquab 2017): were the sets draws from one source, no classifier could do better than
chance on rows it has not seen. Here a logistic regression on TF-IDF (words.py) scores each fold of the rows after learning
from the others; equal texts stand in one fold. The AUC is the folds' mean, its interval DeLong's within folds (LeDell et
al. 2015) on the logit scale, and p that of the Mann-Whitney statistic's normal limit, two-sided. Folds are not independent:
what row i taught of row j, j teaches of i. Both variances are therefore taken 1 + K / (K - 1) times, K folds (Nadeau, Bengio
2003, section 3, with K mean folds); without this, two draws of one source are told apart 15 % of the time and not 5 %.

A difference in AUC bounds the difference in total variation t: AUC <= 1/2 + t - t^2 / 2.

Shapes: N rows of both sets, A rows of the first, B of the second, F columns, K topics.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tunesmith.data.curate.duplicates import key_of, normalise
from tunesmith.data.curate.words import tfidf, word_counts, words_of

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

FOLDS = 5
DEPENDENCE = 1 + FOLDS / (FOLDS - 1)  # by which the variance of the mean of the folds exceeds that of as many alone
LEVEL, POWER = 0.95, 0.8
PRIOR_WORDS = (
    1_000.0  # of the log-odds: what is said of a word rests on its counts once they outweigh its part of these
)
SHOWN_WORDS = 10
DIMENSIONS, MAX_TOPICS, ROWS_A_TOPIC, TOPIC_WORDS = 50, 20, 50, 5


class Apart(NamedTuple):
    """How well the sets are told apart: AUC with its interval and p; the AUC that would be found with probability 0.8."""

    auc: float
    low: float
    high: float
    p: float
    detectable: float

    @property
    def found(self) -> bool:
        """Whether there is a difference: p below 0.05, and the interval above chance."""
        return self.p < 1 - LEVEL and self.low > 0.5

    @property
    def share_unlike(self) -> float:
        """At least this share of the second set is not as the first (a bound on total variation, by the interval's end)."""
        return max(0.0, 1 - math.sqrt(2 * (1 - self.low))) if self.low > 0.5 else 0.0


class Word(NamedTuple):
    """A word, the rows of each set that have it, and by how many standard errors its log-odds differ (Monroe et al.)."""

    word: str
    rows_a: int
    rows_b: int
    z: float


class Topic(NamedTuple):
    """A cluster of rows: its most telling words, its share of each set, and the difference b - a with its interval."""

    words: tuple[str, ...]
    share_a: float
    share_b: float
    low: float
    high: float


def vectors_of(texts: Sequence[str]) -> "csr_matrix":
    """TF-IDF [N, F] of texts in the columns that two texts have at least; others tell nothing about another text."""
    counts_NF = word_counts(texts)
    rows_F = np.bincount(counts_NF.indices, minlength=counts_NF.shape[1])
    return tfidf(counts_NF.tocsc()[:, rows_F >= 2].tocsr())


def tell_apart(texts: Sequence[str], vectors_NF: "csr_matrix", *, is_second_N: np.ndarray) -> tuple[Apart, np.ndarray]:
    """The test, and for each row how sure a classifier that has not seen it is that it is of the second set, [N] in (0, 1).

    Each set needs some 30 rows, so that every fold has rows of both.
    """
    from sklearn.linear_model import LogisticRegression

    fold_N = np.array([key_of(normalise(text)) % FOLDS for text in texts])
    score_N = np.full(len(texts), 0.5)
    aucs, variances, null_variances, weights = [], [], [], []
    for fold in range(FOLDS):
        test = fold_N == fold
        num_a, num_b = int((test & ~is_second_N).sum()), int((test & is_second_N).sum())
        if not num_a or not num_b or len(np.unique(is_second_N[~test])) < 2:
            continue
        model = LogisticRegression(solver="liblinear", class_weight="balanced").fit(
            vectors_NF[~test], is_second_N[~test]
        )
        score_N[test] = model.predict_proba(vectors_NF[test])[:, 1]
        auc, variance = _auc(score_N[test & ~is_second_N], score_N[test & is_second_N])
        aucs.append(auc)
        variances.append(variance)
        null_variances.append((num_a + num_b + 1) / (12 * num_a * num_b))
        weights.append(num_a * num_b / (num_a + num_b))
    return _apart(*map(np.array, (aucs, variances, null_variances, weights))), score_N


def _auc(score_A: np.ndarray, score_B: np.ndarray) -> tuple[float, float]:
    """The share of pairs in which the second set's row scores higher, and its variance (DeLong et al. 1988)."""
    from scipy.stats import rankdata

    below_B = (rankdata(np.r_[score_A, score_B])[len(score_A) :] - rankdata(score_B)) / len(score_A)
    above_A = 1 - (rankdata(np.r_[score_A, score_B])[: len(score_A)] - rankdata(score_A)) / len(score_B)
    parts = [np.var(part, ddof=1) / len(part) if len(part) > 1 else 0.25 for part in (above_A, below_B)]
    return float(below_B.mean()), float(sum(parts))


def _apart(auc_: np.ndarray, variance_: np.ndarray, null_variance_: np.ndarray, weight_: np.ndarray) -> Apart:
    """The folds together."""
    from scipy.stats import norm

    weight_ = weight_ / weight_.sum()
    auc, null_error = float(weight_ @ auc_), math.sqrt(DEPENDENCE * float(weight_**2 @ null_variance_))
    # A set that is told apart without an error has no spread, and one row more might have been an error.
    error = max(math.sqrt(DEPENDENCE * float(weight_**2 @ variance_)), null_error**2)
    z = float(norm.isf((1 - LEVEL) / 2))
    inside = min(max(auc, null_error**2), 1 - null_error**2)
    middle, half = math.log(inside / (1 - inside)), z * error / (inside * (1 - inside))
    low, high = (1 / (1 + math.exp(-min(max(end, -700.0), 700.0))) for end in (middle - half, middle + half))
    p = 2 * float(norm.sf(abs(auc - 0.5) / null_error))
    detectable = 0.5 + (z + float(norm.isf(1 - POWER))) * null_error
    return Apart(auc, min(low, auc), max(high, auc), p, min(detectable, 1.0))


def telling_words(
    rows_a: Counter[str], rows_b: Counter[str], *, most: int = SHOWN_WORDS
) -> tuple[list[Word], list[Word]]:
    """Words that more rows of the first set have, and of the second, by log-odds with an informative Dirichlet prior.

    With y the rows of a set that have the word, n their sum over words, and prior counts a = PRIOR_WORDS times the word's
    share of both sets (Monroe, Colaresi, Quinn 2008):

        d = log((y_b + a) / (n_b + a_0 - y_b - a)) - log((y_a + a) / (n_a + a_0 - y_a - a))
        z = d / sqrt(1 / (y_b + a) + 1 / (y_a + a))

    Only words whose z could not be luck with so many words (Bonferroni, 5 %) are given, the surest first.
    """
    from scipy.stats import norm

    words = sorted(rows_a.keys() | rows_b.keys())
    if not words:
        return [], []
    y_a, y_b = (np.array([rows[word] for word in words], float) for rows in (rows_a, rows_b))
    prior = PRIOR_WORDS * (y_a + y_b) / (y_a + y_b).sum()
    odds = [np.log((y + prior) / np.maximum(y.sum() + PRIOR_WORDS - y - prior, 1e-9)) for y in (y_a, y_b)]
    z = (odds[1] - odds[0]) / np.sqrt(1 / (y_b + prior) + 1 / (y_a + prior))
    least = float(norm.isf((1 - LEVEL) / 2 / len(words)))

    def first(order: np.ndarray, sign: int) -> list[Word]:
        best = [place for place in order[:most].tolist() if sign * z[place] > least]
        return [Word(words[place], int(y_a[place]), int(y_b[place]), float(z[place])) for place in best]

    return first(np.argsort(z, kind="stable"), -1), first(np.argsort(-z, kind="stable"), 1)


def topics(texts: Sequence[str], vectors_NF: "csr_matrix", *, is_second_N: np.ndarray) -> list[Topic]:
    """Clusters of both sets together (k-means of the first 50 singular vectors), those whose shares differ most first.

    Intervals are those of Agresti and Caffo (2000) at 95 % for all clusters together; none with fewer than 100 rows.
    """
    from scipy.stats import norm
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD

    num_topics = min(MAX_TOPICS, len(texts) // ROWS_A_TOPIC)
    if num_topics < 2 or vectors_NF.shape[1] <= DIMENSIONS:
        return []
    places_ND = TruncatedSVD(DIMENSIONS, random_state=0).fit_transform(vectors_NF)
    topic_N = KMeans(num_topics, n_init=3, random_state=0).fit_predict(places_ND)
    num_b, num_a = int(is_second_N.sum()), int((~is_second_N).sum())
    z = float(norm.isf((1 - LEVEL) / 2 / num_topics))
    all_rows: Counter[str] = Counter()
    topic_rows: list[Counter[str]] = [Counter() for _ in range(num_topics)]
    for text, topic in zip(texts, topic_N.tolist(), strict=True):
        topic_rows[topic].update(set(words_of(text)))
    for rows in topic_rows:
        all_rows.update(rows)
    found = []
    for topic, rows in enumerate(topic_rows):
        in_a, in_b = int((~is_second_N & (topic_N == topic)).sum()), int((is_second_N & (topic_N == topic)).sum())
        p_a, p_b = (in_a + 1) / (num_a + 2), (in_b + 1) / (num_b + 2)
        half = z * math.sqrt(p_a * (1 - p_a) / (num_a + 2) + p_b * (1 - p_b) / (num_b + 2))
        words = tuple(word.word for word in telling_words(all_rows - rows, rows, most=TOPIC_WORDS)[1])
        found.append(Topic(words, in_a / num_a, in_b / num_b, p_b - p_a - half, p_b - p_a + half))
    return sorted(found, key=lambda topic: -abs(topic.share_b - topic.share_a))
