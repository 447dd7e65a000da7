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
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Protocol, TypeVar

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
        having = [slice(*self._by_word.indptr[word : word + 2]) for word in known]
        places = np.concatenate([self._by_word.indices[part] for part in having])
        parts = np.concatenate([self._by_word.data[part] for part in having])
        score_N = np.bincount(places, weights=parts, minlength=self._by_word.shape[0])
        found = np.flatnonzero(score_N)
        if len(found) > count:  # only those that can be among the first are sorted
            found = found[score_N[found] >= np.partition(score_N[found], -count)[-count]]
        return [int(place) for place in found[np.argsort(-score_N[found], kind="stable")][:count]]


def _words(text: str) -> list[str]:
    return WORD.findall(text.casefold())


Fits = Callable[[list[Message], Example], bool]


@dataclass(frozen=True)
class Passage:
    """A piece of a document; the line it begins at."""

    origin: Origin
    text: str


Item = TypeVar("Item", Example, Passage)


class Lookup(Generic[Item]):
    """Finds the items most like a question and puts them into its prompt; fewer where the prompt would not fit.

    `texts` are what the items are looked up by; `before` puts items, the most alike first, before a question.
    """

    def __init__(
        self,
        items: Sequence[Item],
        *,
        texts: list[str],
        before: Callable[[Example, Sequence[Item]], list[Message]],
        count: int,
        fits: Fits,
        indexer: Indexer = Bm25,
    ):
        self.items: Sequence[Item] = items
        self.before: Callable[[Example, Sequence[Item]], list[Message]] = before
        self.count, self.fits = count, fits
        self._index = indexer(texts)
        self._known: dict[str, list[Item]] = {}  # by the key of what is asked

    def found(self, example: Example) -> list[Item]:
        """The items that are shown, as many as fit; the most alike first."""
        key = example.prompt_key
        if key not in self._known:
            self._known[key] = self._fitting(example, places=self.nearest(example))
        return self._known[key]

    def nearest(self, example: Example, *, without: Collection[int] = ()) -> list[int]:
        """Places of the items most like the question, but for some."""
        found = self._index.nearest(asked_text(example), count=self.count + len(without))
        return [place for place in found if place not in without][: self.count]

    def put(self, example: Example, *, places: list[int]) -> tuple[list[Message], int]:
        """The question with the first of these items before it, as many as fit, and how many they are."""
        found = self._fitting(example, places=places)
        return self.before(example, found), len(found)

    def _fitting(self, example: Example, *, places: list[int]) -> list[Item]:
        found = [self.items[place] for place in places]
        while found and not self.fits(self.before(example, found), example):
            found.pop()
        return found

    def prompt(self, example: Example) -> list[Message]:
        """The question with what was found before it."""
        return self.before(example, self.found(example))

    def origins(self, example: Example) -> list[str]:
        """Files and lines of what was found."""
        return [str(item.origin) for item in self.found(example)]


def look_up_rows(
    rows: Iterable[Example], *, plain: bool, count: int, fits: Fits, indexer: Indexer = Bm25
) -> Lookup[Example]:
    """Rows as examples before a question like theirs, the most alike last; `plain`: the base has no chat template."""
    rows = [row for row in rows if row.text is None]
    return Lookup(
        rows,
        texts=[asked_text(row) for row in rows],
        before=lambda example, found: prompt_messages(example, shots=found[::-1], plain=plain),
        count=count,
        fits=fits,
        indexer=indexer,
    )


def look_up_passages(
    passages: Sequence[Passage], *, count: int, fits: Fits, indexer: Indexer = Bm25
) -> Lookup[Passage]:
    """Passages in the turn of a question, before it, the most alike first."""
    texts = [passage.text for passage in passages]
    return Lookup(passages, texts=texts, before=_with_passages, count=count, fits=fits, indexer=indexer)


def _with_passages(example: Example, passages: Sequence[Passage]) -> list[Message]:
    messages = list(example.asked[0])
    if not passages:
        return messages
    place = max(n for n, message in enumerate(messages) if message.role == "user")
    context = "\n\n".join(passage.text for passage in passages)
    messages[place] = replace(messages[place], content=f"{context}\n\n{messages[place].content}")
    return messages


def asked_text(example: Example) -> str:
    """The words by which a row is looked up: of the last user turn."""
    return next(m.content for m in reversed(example.asked[0]) if m.role == "user")


def prompt_messages(example: Example, *, shots: Sequence[Example], plain: bool) -> list[Message]:
    """The prompt of a row with `shots` before it: as earlier turns, or as text where the base has no chat template."""
    messages = list(example.asked[0])
    if not shots:
        return messages
    if plain:
        shown = "\n\n".join(f"{s.asked[0][-1].content}\n{s.asked[1].content}" for s in shots)
        return [*messages[:-1], Message("user", f"{shown}\n\n{messages[-1].content}")]
    lead = [m for m in messages[:1] if m.role == "system"]
    turns: list[Message] = []
    for shot in shots:
        before, answer = shot.asked
        turns += [replace(m, weight=0.0) for m in (*before, answer) if m.role != "system"]
    return lead + turns + messages[len(lead) :]


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
