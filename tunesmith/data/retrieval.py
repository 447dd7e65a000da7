"""For every question the rows, or passages of documents, that are most like it, put into its prompt.

They are found by their words or by their meaning. By words, with Okapi BM25 (Robertson and Zaragoza 2009, "The
Probabilistic Relevance Framework", eq. 3.15):

    score(q, d) = sum_{w in q} log(1 + (n - n_w + 1/2) / (n_w + 1/2)) tf (k1 + 1) / (tf + k1 (1 - b + b |d| / mean|d|))

with n texts, n_w of them with the word w, and tf its number in d. By meaning, with the cosine of their embeddings (dense
retrieval; Karpukhin et al. 2020, eq. 1).

Shapes: N texts, D embedding, W words.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from scipy import sparse

from tunesmith.data.types import Example, Message, Origin
from tunesmith.errors import DataError, NotFoundError

K1, B = 1.2, 0.75  # the usual constants
WORD = re.compile(r"\w+")
DOCUMENTS = (".txt", ".md", ".rst")
PASSAGE_CHARACTERS = 800


class Index(Protocol):
    """Texts in which those most like another are found."""

    def nearest(self, text: str, *, count: int) -> list[int]:
        """Places of at most `count` texts, the most alike first; ties by their order."""


Indexer = Callable[[list[str]], Index]


class Embedded:
    """An index of texts by their meaning; `embed` gives embeddings of length 1 [N, D], as models/embed.py does."""

    def __init__(self, texts: list[str], *, embed: Callable[[list[str]], np.ndarray]):
        self._embed = embed
        self._embedding_ND = embed(texts)

    def nearest(self, text: str, *, count: int) -> list[int]:
        """At most `count` texts, the most alike first; ties by their order."""
        cosine_N = self._embedding_ND @ self._embed([text])[0]
        return [int(place) for place in np.argsort(-cosine_N, kind="stable")[:count]]


class Bm25:
    """An index of texts by their words."""

    def __init__(self, texts: Iterable[str]):
        words: dict[str, int] = {}
        counts: list[float] = []
        columns: list[int] = []
        starts, lengths = [0], []
        for text in texts:
            found = Counter(_words(text))
            columns += [words.setdefault(word, len(words)) for word in found]
            counts += found.values()
            starts.append(len(columns))
            lengths.append(sum(found.values()))
        self.words = words
        frequency = sparse.csr_array((np.array(counts), columns, starts), shape=(len(lengths), len(words)))
        length_N = np.array(lengths, dtype=np.float64)
        with_W = np.bincount(columns, minlength=len(words))
        idf_W = np.log1p((len(lengths) - with_W + 0.5) / (with_W + 0.5))
        norm_N = K1 * (1 - B + B * length_N / max(1.0, length_N.mean() if lengths else 1.0))
        weighted = frequency * (K1 + 1)
        weighted.data /= frequency.data + np.repeat(norm_N, np.diff(starts))
        weighted.data *= idf_W[np.array(columns, dtype=np.int64)]
        self._by_word = weighted.tocsc()

    def nearest(self, text: str, *, count: int) -> list[int]:
        """At most `count` texts that share a word with `text`, the most alike first; ties by their order."""
        known = sorted({self.words[word] for word in _words(text) if word in self.words})
        if not known:
            return []
        score_N = np.asarray(self._by_word[:, known].sum(axis=1)).ravel()
        order = np.argsort(-score_N, kind="stable")[:count]
        return [int(place) for place in order if score_N[place] > 0]


def _words(text: str) -> list[str]:
    return WORD.findall(text.casefold())


class Lookup(Protocol):
    """Finds something for a question and puts it into its prompt."""

    def prompt(self, example: Example) -> list[Message]:
        """The messages that are asked, with what was found."""

    def origins(self, example: Example) -> list[str]:
        """Where what was found stands."""


Fits = Callable[[list[Message], Example], bool]


def asked_text(example: Example) -> str:
    """The words by which a row is looked up: of the last user turn."""
    return next(m.content for m in reversed(example.asked[0]) if m.role == "user")


class RowLookup:
    """The training rows most like a question, as examples before it; the most alike stands last.

    `show` puts rows before a question; fewer are shown where the prompt would not fit.
    """

    def __init__(
        self,
        rows: Iterable[Example],
        *,
        count: int,
        fits: Fits,
        show: Callable[[Example, tuple[Example, ...]], list[Message]],
        indexer: Indexer = Bm25,
    ):
        self.rows = [row for row in rows if row.text is None]
        self.count, self.fits, self.show = count, fits, show
        self._index = indexer([asked_text(row) for row in self.rows])
        self._known: dict[str, tuple[Example, ...]] = {}  # by the key of what is asked

    def shown(self, example: Example) -> tuple[Example, ...]:
        """The rows that are shown, as many as fit."""
        key = example.prompt_key
        if key not in self._known:
            self._known[key] = self._shown(example)
        return self._known[key]

    def _shown(self, example: Example) -> tuple[Example, ...]:
        found = [self.rows[place] for place in self._index.nearest(asked_text(example), count=self.count)][::-1]
        while found and not self.fits(self.show(example, tuple(found)), example):
            found = found[1:]
        return tuple(found)

    def prompt(self, example: Example) -> list[Message]:
        """The rows before the question."""
        return self.show(example, self.shown(example))

    def origins(self, example: Example) -> list[str]:
        """Files and lines."""
        return [str(row.origin) for row in self.shown(example)]


@dataclass(frozen=True)
class Passage:
    """A piece of a document; the line it begins at."""

    origin: Origin
    text: str


class PassageLookup:
    """The passages most like a question, in front of it in the same turn; the most alike stands first."""

    def __init__(self, passages: Sequence[Passage], *, count: int, fits: Fits, indexer: Indexer = Bm25):
        self.passages, self.count, self.fits = passages, count, fits
        self._index = indexer([passage.text for passage in passages])
        self._known: dict[str, list[Passage]] = {}  # by the key of what is asked

    def found(self, example: Example) -> list[Passage]:
        """The passages that are shown, as many as fit."""
        key = example.prompt_key
        if key not in self._known:
            self._known[key] = self.fitting(example, self.nearest(example))
        return self._known[key]

    def nearest(self, example: Example) -> list[int]:
        """Places of the passages that are most like the question."""
        return self._index.nearest(asked_text(example), count=self.count)

    def fitting(self, example: Example, places: Iterable[int]) -> list[Passage]:
        """The first of these passages, as many as fit before the question."""
        found = [self.passages[place] for place in places]
        while found and not self.fits(self.before(example, found), example):
            found.pop()
        return found

    def prompt(self, example: Example) -> list[Message]:
        """The question with the passages before it."""
        return self.before(example, self.found(example))

    def origins(self, example: Example) -> list[str]:
        """Files and lines."""
        return [str(passage.origin) for passage in self.found(example)]

    def before(self, example: Example, passages: list[Passage]) -> list[Message]:
        """The messages that are asked, with these passages in the turn of the question."""
        messages = list(example.asked[0])
        if not passages:
            return messages
        place = max(n for n, message in enumerate(messages) if message.role == "user")
        context = "\n\n".join(passage.text for passage in passages)
        messages[place] = Message("user", f"{context}\n\n{messages[place].content}", messages[place].weight)
        return messages


def documents_in(folder: Path) -> list[Path]:
    """All text files below a folder (DOCUMENTS), in order. NotFoundError where there is no such folder."""
    if not folder.is_dir():
        raise NotFoundError("no such folder", file=folder, hint="documents is a folder with text files")
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in DOCUMENTS and p.is_file())


def read_passages(folder: Path) -> list[Passage]:
    """The paragraphs of all text files below a folder, joined up to PASSAGE_CHARACTERS.

    NotFoundError where there is no such folder, DataError where it holds no text or one that is not UTF-8.
    """
    passages = []
    for path in documents_in(folder):
        try:
            passages += _passages(path.read_text("utf-8"), name=str(path.relative_to(folder)))
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8: {error}", file=path, hint="convert it to UTF-8, or move it away") from None
    if not passages:
        raise DataError(f"holds no text in {', '.join(DOCUMENTS)} files", file=folder, hint="add some, or leave it out")
    return passages


def _passages(text: str, *, name: str) -> list[Passage]:
    found: list[Passage] = []
    held: list[str] = []
    first = line = 1
    for paragraph in re.split(r"\n[ \t]*\n", text):
        if held and sum(map(len, held)) + len(paragraph) > PASSAGE_CHARACTERS:
            found.append(Passage(Origin(name, first), "\n\n".join(held)))
            held = []
        if paragraph.strip():
            first = first if held else line + paragraph[: -len(paragraph.lstrip())].count("\n")
            held.append(paragraph.strip())
        line += paragraph.count("\n") + 2
    return [*found, Passage(Origin(name, first), "\n\n".join(held))] if held else found
