"""Do the prompts of the training rows look like those of production?

A classifier tries to tell them apart (two_samples.py); besides, lengths, words, topics and labels are compared, and the
production rows are named that it is surest are not like training. Prompts are what the user says, without system prompts,
which are one setting and not a matter of the rows. The classifier and the topics see as many rows of both sides, drawn at
random, and MAX_ROWS at most; lengths, words and labels are those of all rows.

When is a difference a concern? From CONCERN_AUC = 0.55 on. Were a share s of production of a sort that training lacks,
and told at sight, AUC would be 1/2 + s / 2: 0.55 is then one row in ten. Words tell less: in benchmarks/drift.py one row in
five of a domain that training lacks gives 0.58, one in twenty 0.51. Below, the list of rows says whether it matters.
"""

import math
import random
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tunesmith.data.curate.masking import Masker
from tunesmith.data.curate.two_samples import Apart, Topic, Word, tell_apart, telling_words, topics, vectors_of
from tunesmith.data.curate.words import check_installed, words_of
from tunesmith.data.formats import LABEL_COLUMNS, PAIRS, examine
from tunesmith.data.ledger import Problem
from tunesmith.data.settings import PLACEHOLDER, DataSettings
from tunesmith.data.sources import read_rows
from tunesmith.data.types import Example, Origin, Row
from tunesmith.errors import DataError

MAX_ROWS = 10_000
MIN_ROWS = 30
CONCERN_AUC = 0.55
SHOWN_ROWS, SHOWN_TOPICS, SHOWN_LABELS = 10, 5, 5
EXCERPT_CHARACTERS = 80
NO_ANSWER = "(no answer)"  # stands where a row of production has none, while it is read
TEXT_FILE = re.compile(r"\.txt(\.gz|\.xz)?$", re.IGNORECASE)


class Prompt(NamedTuple):
    """What a row asks, where it stands, and its class where it has one."""

    text: str
    origin: Origin
    label: str | None = None


class UnlikeRow(NamedTuple):
    """A production row, how sure the classifier is that it is not of training, and its beginning without personal data."""

    origin: Origin
    score: float
    excerpt: str


@dataclass(frozen=True)
class Lengths:
    """Words a prompt: medians, and the largest distance of the distribution functions with its p (Kolmogorov, Smirnov)."""

    train_median: float
    production_median: float
    distance: float
    p: float


@dataclass(frozen=True)
class Labels:
    """Shares of the labels by name, (training, production); half the sum of their differences, and what luck would give."""

    shares: dict[str, tuple[float, float]]
    total_variation: float
    by_chance: float


@dataclass(frozen=True)
class Drift:
    """How production differs from training.

    `compared_rows` of each side were seen by the classifier. `unknown_words` is the share of production's words (each once a
    row) that no training row has, `unknown_expected` what would be expected of further training rows (Good 1953: the share
    of words that one row has). `more_in_training` and `more_in_production` are words and the rows that have them. `rows` is
    empty where no difference was found. `num_unread` rows of either file could not be read.
    """

    train_rows: int
    production_rows: int
    compared_rows: int
    apart: Apart
    lengths: Lengths
    unknown_words: float
    unknown_expected: float
    more_in_training: list[Word]
    more_in_production: list[Word]
    topics: list[Topic]
    labels: Labels | None
    rows: list[UnlikeRow]
    num_unread: int = 0

    @property
    def verdict(self) -> str:
        """`no difference found`, `slight` (found, of less than CONCERN_AUC) or `different`."""
        if not self.apart.found:
            return "no difference found"
        return "different" if self.apart.auc >= CONCERN_AUC else "slight"

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        apart = self.apart
        p = "p < 0.001" if apart.p < 0.001 else f"p = {apart.p:.2g}"
        auc = f"AUC {apart.auc:.2f} ({apart.low:.2f}-{apart.high:.2f}), {p}"
        if not apart.found:
            return (
                f"no difference between training rows and production was found: a classifier tells them apart with {auc};"
                f" 0.5 is chance, and from {apart.detectable:.2f} on it would have been found (with probability 0.8)"
            )
        unlike = f"at least {100 * apart.share_unlike:.1f} % of production is unlike training"
        if self.verdict == "slight":
            return f"production differs a little from the training rows: a classifier tells them apart with {auc}; {unlike}"
        return f"training rows do not look like production: a classifier tells them apart with {auc}; {unlike}"

    def as_dict(self) -> dict[str, Any]:
        """As JSON. Topics, words and rows are those that differ most, first."""
        words = {
            name: [{"word": w.word, "train_rows": w.rows_a, "production_rows": w.rows_b, "z": w.z} for w in found]
            for name, found in (("training", self.more_in_training), ("production", self.more_in_production))
        }
        lengths, labels = self.lengths, self.labels
        return {
            "verdict": self.verdict,
            "sentence": self.sentence,
            "train_rows": self.train_rows,
            "production_rows": self.production_rows,
            "compared_rows": self.compared_rows,
            "unread_rows": self.num_unread,
            "auc": {"value": self.apart.auc, "low": self.apart.low, "high": self.apart.high},
            "p": self.apart.p,
            "detectable_auc": self.apart.detectable,
            "share_unlike": self.apart.share_unlike,
            "lengths": {
                "train_median_words": lengths.train_median,
                "production_median_words": lengths.production_median,
                "kolmogorov_smirnov": lengths.distance,
                "p": lengths.p,
            },
            "unknown_words": {"share": self.unknown_words, "expected": self.unknown_expected},
            "more_in": words,
            "topics": [
                {
                    "words": list(topic.words),
                    "train_share": topic.share_a,
                    "production_share": topic.share_b,
                    "difference": {"value": topic.share_b - topic.share_a, "low": topic.low, "high": topic.high},
                }
                for topic in self.topics
            ],
            "labels": None
            if labels is None
            else {
                "total_variation": labels.total_variation,
                "by_chance": labels.by_chance,
                "shares": {
                    name: {"train": train, "production": production}
                    for name, (train, production) in labels.shares.items()
                },
            },
            "rows": [
                {"file": row.origin.file, "line": row.origin.line, "score": row.score, "excerpt": row.excerpt}
                for row in self.rows
            ],
        }

    def as_text(self) -> str:
        """For people: the verdict, what differs, and the rows to look at."""
        sides = f"{self.train_rows:,} training rows, {self.production_rows:,} of production"
        unread = f", {self.num_unread:,} that could not be read" if self.num_unread else ""
        lengths = self.lengths
        lines = [
            self.sentence,
            "",
            f"rows:    {sides}; {self.compared_rows:,} of each were compared{unread}",
            f"length:  {lengths.train_median:g} words in training, {lengths.production_median:g} in production (medians;"
            f" Kolmogorov-Smirnov {lengths.distance:.2f}, {_p(lengths.p)})",
            f"words:   {100 * self.unknown_words:.1f} % of production's are not in training;"
            f" {100 * self.unknown_expected:.1f} % would be expected of more such rows",
        ]
        for side, found in (("training", self.more_in_training), ("production", self.more_in_production)):
            if found:
                lines.append(f"         more in {side}: {', '.join(word.word for word in found)}")
        for topic in [topic for topic in self.topics if not topic.low <= 0 <= topic.high][:SHOWN_TOPICS]:
            shares = f"{100 * topic.share_a:.1f} % of training, {100 * topic.share_b:.1f} % of production"
            lines.append(f"topic:   {', '.join(topic.words) or 'rows without a word of their own'}: {shares}")
        if self.labels is not None:
            lines.append(
                f"labels:  {100 * self.labels.total_variation:.1f} % would have another label"
                f" ({100 * self.labels.by_chance:.1f} % by chance)"
            )
            for name, (train, production) in list(self.labels.shares.items())[:SHOWN_LABELS]:
                lines.append(
                    f"         {name}: {100 * train:.1f} % of training, {100 * production:.1f} % of production"
                )
        if self.rows:
            lines += ["", "production rows that are least like training:"]
            lines += [f"  {row.origin}: {row.score:.2f}  {row.excerpt}" for row in self.rows]
        return "\n".join(lines)


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def drift_of(path: str, like: str, *, settings: DataSettings | None = None) -> Drift:
    """Compare the prompts of the training file `path` with those of `like`, whose rows need no answer.

    `like` may hold rows of any form with or without answers, rows with a `prompt` or a `text` alone, or be a .txt file with
    a prompt a line. `settings` says how the training rows are read, and those of `like` where they have the same columns.
    Raises DataError where a file has fewer than MIN_ROWS rows that can be read.
    """
    settings = settings or DataSettings(train=path)
    unread: list[Problem] = []

    def read(name: str, *, lenient: bool) -> list[Prompt]:
        first = len(unread)
        prompts = list(_prompts(name, settings=settings, lenient=lenient, unread=unread))
        if len(prompts) < MIN_ROWS and len(unread) > first:
            raise unread[first].as_error()
        return prompts

    train, production = read(path, lenient=False), read(like, lenient=True)
    for name, prompts in ((path, train), (like, production)):
        if len(prompts) < MIN_ROWS:
            raise _too_few(len(prompts), file=name)
    return compare_prompts(train, production, num_unread=len(unread))


def compare_sets(train: Iterable[str], production: Iterable[str]) -> Drift:
    """Compare two sets of texts; their rows are named by their numbers, from 1."""
    sides = [
        [Prompt(text, Origin(name, number)) for number, text in enumerate(texts, start=1)]
        for name, texts in (("train", train), ("production", production))
    ]
    return compare_prompts(*sides)


def compare_prompts(train: Sequence[Prompt], production: Sequence[Prompt], *, num_unread: int = 0) -> Drift:
    """Compare two sets of prompts. DataError with fewer than MIN_ROWS on a side, MissingExtraError without scikit-learn."""
    check_installed("comparing with production")
    for name, side in (("training", train), ("production", production)):
        if len(side) < MIN_ROWS:
            raise _too_few(len(side), file=name)
    num_rows = min(len(train), len(production), MAX_ROWS)
    sample = [*random.Random(0).sample(train, num_rows), *random.Random(1).sample(production, num_rows)]
    texts = [prompt.text for prompt in sample]
    is_second_N = np.arange(len(sample)) >= num_rows
    vectors_NF = vectors_of(texts)
    apart, score_N = tell_apart(texts, vectors_NF, is_second_N=is_second_N)
    rows_train, rows_production = (_rows_with(side) for side in (train, production))
    telling = telling_words(rows_train, rows_production)
    unknown = sum(rows for word, rows in rows_production.items() if word not in rows_train)
    unlike = np.argsort(-score_N[num_rows:], kind="stable")[:SHOWN_ROWS] + num_rows
    return Drift(
        train_rows=len(train),
        production_rows=len(production),
        compared_rows=num_rows,
        apart=apart,
        lengths=_lengths(train, production),
        unknown_words=unknown / max(rows_production.total(), 1),
        unknown_expected=sum(rows == 1 for rows in rows_train.values()) / max(rows_train.total(), 1),
        more_in_training=telling[0],
        more_in_production=telling[1],
        topics=topics(texts, vectors_NF, is_second_N=is_second_N),
        labels=_labels(train, production),
        rows=[_unlike(sample[row], score=float(score_N[row])) for row in unlike] if apart.found else [],
        num_unread=num_unread,
    )


def _too_few(num_rows: int, *, file: str) -> DataError:
    return DataError(
        f"{num_rows} rows are too few to compare", file=file, hint=f"give {MIN_ROWS} or more; hundreds tell far more"
    )


def _unlike(prompt: Prompt, *, score: float) -> UnlikeRow:
    return UnlikeRow(prompt.origin, score, " ".join(Masker().text(prompt.text).split())[:EXCERPT_CHARACTERS])


def _rows_with(prompts: Sequence[Prompt]) -> Counter[str]:
    """How many of the prompts have each word."""
    rows: Counter[str] = Counter()
    for prompt in prompts:
        rows.update(set(words_of(prompt.text)))
    return rows


def _lengths(train: Sequence[Prompt], production: Sequence[Prompt]) -> Lengths:
    from scipy.stats import ks_2samp

    one, two = (array("I", (len(words_of(prompt.text)) for prompt in side)) for side in (train, production))
    found = ks_2samp(one, two, method="asymp")
    return Lengths(float(np.median(one)), float(np.median(two)), float(found.statistic), float(found.pvalue))


def _labels(train: Sequence[Prompt], production: Sequence[Prompt]) -> Labels | None:
    """The labels, those whose shares differ most first; None unless all rows have one."""
    one, two = (Counter(prompt.label for prompt in side) for side in (train, production))
    if None in one or None in two:
        return None
    num_one, num_two = one.total(), two.total()
    shares = {str(name): (one[name] / num_one, two[name] / num_two) for name in one.keys() | two.keys()}
    order = sorted(shares, key=lambda name: (-abs(shares[name][1] - shares[name][0]), name))
    pooled = np.array([(one[name] + two[name]) / (num_one + num_two) for name in one.keys() | two.keys()])
    # The mean of |x| of a normal x is sqrt(2 / pi) of its standard deviation.
    errors = np.sqrt(pooled * (1 - pooled) * (1 / num_one + 1 / num_two))
    apart = sum(abs(production - train) for train, production in shares.values()) / 2
    return Labels({name: shares[name] for name in order}, apart, float(errors.sum() * math.sqrt(2 / math.pi) / 2))


# ----------------------------------------------------------------------------------------------------- reading


def _prompts(name: str, *, settings: DataSettings, lenient: bool, unread: list[Problem]) -> Iterator[Prompt]:
    """The prompts of a file; what cannot be read goes to `unread`."""

    def on_bad(problem: Problem) -> None:
        if problem.severity == "error":
            unread.append(problem)

    for row in read_rows(name, on_bad=on_bad):
        found = _leniently(row, settings=settings) if lenient else examine(row, settings=settings)
        if isinstance(found, Problem):
            unread.append(found)
        elif lenient and TEXT_FILE.search(row.origin.file):
            lines = enumerate((found.text or "").split("\n"), start=row.origin.line)
            yield from (Prompt(line, Origin(row.origin.file, number)) for number, line in lines if line.strip())
        else:
            label = found.label if isinstance(found.label, str) and found.label != NO_ANSWER else None
            yield Prompt(_asked(found), row.origin, label)


def _asked(example: Example) -> str:
    """What the user says; of plain text all of it."""
    if example.plain_text is not None:
        return example.plain_text
    return "\n".join(message.content for message in example.messages if message.role == "user")


def _leniently(row: Row, *, settings: DataSettings) -> Example | Problem:
    """The row as the settings read it, else as its columns say, else its text; with an answer put in where none is."""
    plain = DataSettings(train=settings.train)
    found = examine(Row(row.origin, _answered(row.value, mapping=settings.mapping)), settings=settings)
    for how in (plain, plain.model_copy(update={"form": "text"})):
        if isinstance(found, Problem):
            other = examine(Row(row.origin, _answered(row.value, mapping={})), settings=how)
            found = other if isinstance(other, Example) else found
    return found


def _answered(value: Any, *, mapping: dict[str, str]) -> Any:
    """A row's value with an answer where it has none, so that it is read like any other row."""
    if not isinstance(value, dict):
        return value
    names: list[str] = []
    for key in ("completion", "label"):
        if key in mapping:
            names += PLACEHOLDER.findall(mapping[key]) or [mapping[key]]
    if not mapping:
        for prompt, _ in (*PAIRS, ("instruction", "output")):
            answers = [answer for asked, answer in (*PAIRS, ("instruction", "output")) if asked == prompt]
            if value.get(prompt) is not None and not any(value.get(answer) for answer in answers):
                names.append(answers[0])
        if "text" in value:
            names += [column for column in LABEL_COLUMNS if column in value and value[column] is None]
    filled = value | {name: NO_ANSWER for name in names if not value.get(name)}
    turns = mapping.get("messages", "messages" if "messages" in value else "conversations")
    last = value[turns][-1] if isinstance(value.get(turns), list) and value[turns] else None
    if isinstance(last, dict) and (last.get("role") or last.get("from")) in ("user", "human"):
        answer = {"from": "gpt", "value": NO_ANSWER} if "from" in last else {"role": "assistant", "content": NO_ANSWER}
        filled[turns] = [*value[turns], answer]
    return filled
