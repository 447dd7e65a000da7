"""Texts as sparse vectors of their words, for what compares whole texts.

Words and pairs of neighbouring words are hashed into COLUMNS columns (Weinberger et al. 2009), so nothing has to be known
of the texts before they are read. With c the count of a column in a text, n texts and d those that have it, its weight is

    (1 + ln c) (1 + ln((1 + n) / (1 + d))),   each text then scaled to length 1

so the product of two vectors is their cosine. Chinese and Japanese are taken by characters, which stand without spaces.

Shapes: N texts, F columns.
"""

import itertools
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.errors import MissingExtraError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

COLUMNS = 1 << 20
MAX_CHARACTERS = 20_000  # of a text; what stands behind changes little in what it is like
UNSPACED = "\u3040-\u30ff\u3400-\u9fff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case."""
    return WORD.findall(text[:MAX_CHARACTERS].lower())


def check_installed(what: str) -> None:
    """MissingExtraError where scikit-learn, which `what` needs, is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"{what} needs scikit-learn, which is not installed", hint="pip install 'tunesmith[curate]'"
        ) from error


def word_counts(texts: Iterable[str]) -> "csr_matrix":
    """Counts [N, F] of words and pairs of neighbouring words, float64. The texts are read one at a time."""
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(
        analyzer=_words_and_pairs, alternate_sign=False, norm=None, n_features=COLUMNS, dtype=np.float64
    )
    texts = iter(texts)
    first = next(texts, None)
    if first is None:  # which the vectorizer does not take
        return csr_matrix((0, COLUMNS))
    return vectorizer.transform(itertools.chain([first], texts))


def _words_and_pairs(text: str) -> list[str]:
    words = words_of(text)
    return words + [f"{one} {two}" for one, two in itertools.pairwise(words)]


def tfidf(counts_NF: "csr_matrix", *, most_rows: int | None = None) -> "csr_matrix":
    """The weights [N, F] of these counts. Columns that more than `most_rows` texts have are left out."""
    from sklearn.feature_extraction.text import TfidfTransformer

    if most_rows is not None:
        rows_F = np.bincount(counts_NF.indices, minlength=counts_NF.shape[1])
        counts_NF = counts_NF.copy()
        counts_NF.data[rows_F[counts_NF.indices] > most_rows] = 0
        counts_NF.eliminate_zeros()
    return TfidfTransformer(sublinear_tf=True).fit_transform(counts_NF)
