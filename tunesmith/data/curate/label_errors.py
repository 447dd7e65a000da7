"""Labels that do not fit their text: confident learning (Northcutt, Jiang, Chuang 2021, "Confident Learning:
Estimating Uncertainty in Dataset Labels", section 3).

Each row i with label y gets out-of-sample probabilities p_i from five-fold cross-validation of a multinomial logistic
regression over TF-IDF of hashed words and pairs of words. A class j has the threshold

    t_j = mean of p_i[j] over the rows labelled j

and a row counts for the largest p_i[j] that reaches its threshold: the confident joint. A row is reported where that
class is not its label. Differs from the paper in both bars, as a list to read should be short and right: reached is
0.6 t_j, as wrong labels themselves lower the probabilities; and p_i[y] must be below 0.04 t_y. The rows come with
the least p_i[y] / t_y first. Memory is bounded by the texts kept; time is linear in rows times classes.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.curate.base import Places, quoted
from tunesmith.data.curate.duplicates import key_of, normalise, said
from tunesmith.data.curate.labels import Labels
from tunesmith.data.ledger import Problem
from tunesmith.data.types import Example
from tunesmith.errors import MissingExtraError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

MAX_TEXT_CHARACTERS = 2_000
MAX_CHARACTERS = 50_000_000
MAX_ROWS = 200_000
MAX_CELLS = 10_000_000  # rows times classes
MIN_CLASS_ROWS = 10
FOLDS = 5
HASHED_FEATURES, MAX_FEATURES = 2**18, 20_000
REACHED_SHARE, MAX_SELF_SHARE = 0.6, 0.04
PENALTY = 10.0  # scikit-learn's C


class LabelErrors:
    """Rows whose label is probably another; nothing where the answers are no labels.

    reached_share, max_self_share: the bars 0.6 and 0.04 above.
    """

    name = "label_errors"

    def __init__(self, *, reached_share: float = REACHED_SHARE, max_self_share: float = MAX_SELF_SHARE) -> None:
        self.reached_share, self.max_self_share = reached_share, max_self_share
        self._labels = Labels()
        self._places = Places()
        self._texts: list[str] = []
        self._classes: dict[str, int] = {}
        self._names: list[str] = []
        self._class_of_row: list[int] = []
        self._num_characters = self._num_left_out = 0

    def look(self, example: Example) -> Iterator[Problem]:
        """Keep the text and the label; a row alone says nothing."""
        if not self._labels.may_be_labels or isinstance(example.label, tuple):
            return
        _, text, label = said(example)
        if not label:
            return
        self._labels.add(label, origin=example.origin)
        if not self._labels.may_be_labels:
            self._texts, self._class_of_row, self._places = [], [], Places()
        elif len(self._texts) >= MAX_ROWS or self._num_characters >= MAX_CHARACTERS:
            self._num_left_out += 1
        else:
            self._keep(text[:MAX_TEXT_CHARACTERS], label=label, example=example)
        yield from ()

    def _keep(self, text: str, *, label: str, example: Example) -> None:
        number = self._classes.setdefault(normalise(label), len(self._classes))
        if number == len(self._names):
            self._names.append(label)
        self._texts.append(text)
        self._class_of_row.append(number)
        self._places.add(example.origin)
        self._num_characters += len(text)

    def finish(self) -> Iterator[Problem]:
        """Raises MissingExtraError where there are labels and scikit-learn is not installed."""
        if not self._labels.are_labels:
            return
        class_N = np.array(self._class_of_row)
        large = np.bincount(class_N) >= MIN_CLASS_ROWS
        rows = np.flatnonzero(large[class_N])
        num_classes = int(large.sum())
        if num_classes < 2:
            return
        judged = rows[: MAX_CELLS // num_classes]
        if left_out := self._num_left_out + len(rows) - len(judged):
            message = (
                f"labels were compared with their texts in the first {len(judged):,} rows; {left_out:,} were left out"
            )
            yield Problem("label_error", "warning", *self._places[int(judged[-1])], message=message)
        numbers = np.cumsum(large) - 1  # of the classes that are large enough
        classes = np.flatnonzero(large)
        texts, label_N = [self._texts[row] for row in judged], numbers[class_N[judged]]
        probability_NK = _out_of_sample(texts, label_N=label_N, num_classes=num_classes)
        found = label_errors(
            probability_NK, label_N=label_N, reached_share=self.reached_share, max_self_share=self.max_self_share
        )
        for place, suggested in found:
            own, other = (self._names[classes[number]] for number in (label_N[place], suggested))
            probabilities = probability_NK[place, suggested], probability_NK[place, label_N[place]]
            message = (
                f"the label {quoted(own)} does not fit the text: {quoted(other)} has probability {probabilities[0]:.0%},"
                f" the label {probabilities[1]:.1%}"
            )
            origin, hint = self._places[int(judged[place])], "read it, and correct the label where it is wrong"
            yield Problem("label_error", "warning", *origin, message=message, hint=hint)


def label_errors(
    probability_NK: np.ndarray,
    *,
    label_N: np.ndarray,
    reached_share: float = REACHED_SHARE,
    max_self_share: float = MAX_SELF_SHARE,
) -> list[tuple[int, int]]:
    """(row, suggested class) off the diagonal of the confident joint, the least fitting label first."""
    rows = np.arange(len(label_N))
    num_K = np.bincount(label_N, minlength=probability_NK.shape[1])
    own_N = probability_NK[rows, label_N]
    threshold_K = np.bincount(label_N, own_N, minlength=len(num_K)) / np.maximum(num_K, 1)
    reached_NK = probability_NK >= reached_share * threshold_K
    suggested_N = np.where(reached_NK, probability_NK, -1.0).argmax(axis=1)
    share_N = own_N / np.maximum(threshold_K[label_N], 1e-9)
    wrong = reached_NK.any(axis=1) & (suggested_N != label_N) & (share_N < max_self_share)
    order = np.argsort(share_N, kind="stable")
    return [(int(row), int(suggested_N[row])) for row in order if wrong[row]]


def _out_of_sample(texts: list[str], *, label_N: np.ndarray, num_classes: int) -> np.ndarray:
    """float32 [rows, classes]: the probabilities that a model which has not seen a row gives it."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise MissingExtraError(
            f"the check of labels needs scikit-learn, which cannot be imported: {error}",
            hint="pip install 'tunesmith[curate]'",
        ) from error
    import warnings

    features = _features(texts)
    fold_N = _folds(texts, label_N=label_N)
    probability_NK = np.zeros((len(texts), num_classes), np.float32)
    for fold in range(FOLDS):
        held_out = fold_N == fold
        present = np.unique(label_N[~held_out])
        if not held_out.any() or len(present) < 2:
            continue
        model = LogisticRegression(C=PENALTY, solver="saga", tol=1e-2, max_iter=30, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # probabilities settle long before the weights
            model.fit(features[~held_out], label_N[~held_out])
        probability_NK[np.ix_(held_out, present)] = model.predict_proba(features[held_out])
    return probability_NK


def _features(texts: list[str]) -> "csr_matrix":
    """TF-IDF [rows, at most MAX_FEATURES] of the words and pairs of words that most rows have, two at least."""
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    hashed = HashingVectorizer(
        ngram_range=(1, 2), n_features=HASHED_FEATURES, alternate_sign=False, norm=None, dtype=np.float32
    ).transform(texts)
    num_rows_F = np.bincount(hashed.indices, minlength=HASHED_FEATURES)
    often = np.argsort(-num_rows_F, kind="stable")[:MAX_FEATURES]
    kept = np.sort(often[num_rows_F[often] > 1])
    return TfidfTransformer(sublinear_tf=True).fit_transform(hashed[:, kept])


def _folds(texts: list[str], *, label_N: np.ndarray) -> np.ndarray:
    """The fold of each row: the texts of a class in the order of their keys, in turn; equal ones in one fold."""
    key_N = np.array([key_of(normalise(text)) for text in texts], np.uint64)
    fold_N = np.zeros(len(texts), np.int64)
    for label in np.unique(label_N):
        rows = np.flatnonzero(label_N == label)
        fold_N[rows] = np.unique(key_N[rows], return_inverse=True)[1] % FOLDS
    return fold_N
