"""Rows side by side: which to show, and only the part of their prompts in which they differ."""

import difflib
import heapq
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.evaluate.metrics import METRICS
from tunesmith.evaluate.texts import MAX_TEXT, as_text, clip, number_text, read_lines

EXAMPLES_A_GROUP = 10
MAX_TITLE = 160  # characters
LEAST_SHARED = 60  # characters that prompts must have in common before they are shown only once


@dataclass(frozen=True, slots=True)
class Headline:
    """The question a report answers first: which system, against which, on which metric."""

    metric: str
    ours: str
    theirs: str
    higher_is_better: bool

    @classmethod
    def of(cls, evaluation: Mapping[str, Any] | None) -> "Headline | None":
        """The evaluation's `primary` metric, else its first, and its first difference; None if there is none."""
        if not evaluation or not evaluation["metrics"]:
            return None
        metric = evaluation.get("primary") or next(iter(evaluation["metrics"]))
        entry = evaluation["metrics"][metric]
        for pair in entry["differences"]:
            ours, _, theirs = pair.partition(" - ")
            return cls(metric, ours, theirs, entry["higher_is_better"])
        return None

    @property
    def pair(self) -> str:
        """Its key among the differences."""
        return f"{self.ours} - {self.theirs}"

    def gain(self, row: Mapping[str, Any]) -> float:
        """By how much a row of examples.jsonl became better; 0 where it was not scored."""
        ours, theirs = (row.get("scores", {}).get(system, {}).get(self.metric) for system in (self.ours, self.theirs))
        if ours is None or theirs is None:
            return 0.0
        return ours - theirs if self.higher_is_better else theirs - ours


def common_start(left: str, right: str) -> str:
    """The longest text with which both begin."""
    if right.startswith(left):
        return left
    return left[: next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), len(right))]


@dataclass
class Common:
    """What all prompts have in common, learned one prompt at a time.

    messages: for each place of the conversation, its role, the text's common beginning and end, and whether the whole
    text is the same.
    """

    num_prompts: int = 0
    messages: list[dict[str, Any]] = field(default_factory=list)

    def add(self, prompt: list[dict[str, str]]) -> None:
        self.num_prompts += 1
        if self.num_prompts == 1:
            self.messages = [
                {"role": m["role"], "start": m["content"], "end": m["content"], "same": True} for m in prompt
            ]
            return
        del self.messages[len(prompt) :]
        for place, (seen, message) in enumerate(zip(self.messages, prompt, strict=False)):
            if seen["role"] != message["role"]:
                del self.messages[place:]
                return
            text = message["content"]
            seen["same"] = seen["same"] and seen["start"] == text
            seen["start"] = common_start(seen["start"], text)
            seen["end"] = common_start(seen["end"][::-1], text[::-1])[::-1]

    def num_shared(self) -> int:
        """Leading messages that are the same in all prompts; the last message of a prompt is never one of them."""
        if self.num_prompts < 2:
            return 0
        same = [message["same"] for message in self.messages]
        return min(same.index(False) if False in same else len(same), max(0, len(same) - 1))

    def edges(self) -> tuple[str, str]:
        """The common beginning and end of the first message that differs, cut between words; empty where short."""
        place = self.num_shared()
        if self.num_prompts < 2 or place >= len(self.messages) or self.messages[place]["same"]:
            return "", ""
        message = self.messages[place]
        start = message["start"][: max(message["start"].rfind(mark) + 1 for mark in "\n ")]
        cut = re.search(r"\s", message["end"])
        end = message["end"][cut.start() :] if cut else ""
        return start if len(start) >= LEAST_SHARED else "", end if len(end) >= LEAST_SHARED else ""

    def shared(self) -> list[dict[str, str]]:
        """The texts to show once: shared messages, and the common beginning and end of the next."""
        place, (start, end) = self.num_shared(), self.edges()
        texts = [(m["role"], m["start"]) for m in self.messages[:place]]
        role = self.messages[place]["role"] if place < len(self.messages) else ""
        texts += [(f"{role}, beginning", start)] * bool(start) + [(f"{role}, end", end)] * bool(end)
        return [{"role": role, "text": clip(text, 2 * MAX_TEXT)} for role, text in texts]


def _messages(prompt: Any) -> list[dict[str, str]]:
    """A prompt as role and text of each turn."""
    if isinstance(prompt, str):
        return [{"role": "prompt", "content": prompt}]
    return [{"role": str(message.get("role", "")), "content": as_text(message.get("content"))} for message in prompt]


@dataclass
class Selection:
    """Ten rows that became better, ten that became worse and ten at random, from any number of rows in one pass."""

    headline: Headline | None
    generator: random.Random = field(default_factory=lambda: random.Random(0))
    better: list[tuple[float, float, int, dict[str, Any]]] = field(default_factory=list)
    worse: list[tuple[float, float, int, dict[str, Any]]] = field(default_factory=list)
    sample: list[dict[str, Any]] = field(default_factory=list)
    num_rows: int = 0
    num_better: int = 0
    num_worse: int = 0

    def add(self, row: dict[str, Any]) -> None:
        self.num_rows += 1
        gain = self.headline.gain(row) if self.headline else 0.0
        self.num_better += gain > 0
        self.num_worse += gain < 0
        # Among equal gains chance decides, so that the shown rows are not the first of the file.
        entry = (abs(gain), self.generator.random(), self.num_rows, row)
        if gain:
            group = self.better if gain > 0 else self.worse
            (heapq.heappush if len(group) < EXAMPLES_A_GROUP else heapq.heappushpop)(group, entry)
        place = self.generator.randrange(self.num_rows)
        if len(self.sample) < EXAMPLES_A_GROUP:
            self.sample.append(row)
        elif place < EXAMPLES_A_GROUP:
            self.sample[place] = row

    def groups(self) -> list[tuple[str, int, list[dict[str, Any]]]]:
        """Title, how many rows there are of that kind, and those to show; without a headline only those at random."""
        better, worse = ([entry[3] for entry in sorted(group, reverse=True)] for group in (self.better, self.worse))
        everything = sorted(self.sample, key=lambda row: row.get("row", 0))
        titled = (
            ("better", self.num_better, better),
            ("worse", self.num_worse, worse),
            ("random", self.num_rows, everything),
        )
        return list(titled) if self.headline else list(titled[2:])


def examples(path: Path, *, headline: Headline | None) -> dict[str, Any] | None:
    """The rows to show side by side, and what their prompts share."""
    selection, common = Selection(headline), Common()
    for row in read_lines(path):
        selection.add(row)
        common.add(_messages(row["prompt"]))
    if not selection.num_rows:
        return None
    num_shared, edges = common.num_shared(), common.edges()
    groups = [
        {
            "title": title,
            "total": total,
            "rows": [_example(row, num_shared=num_shared, edges=edges, headline=headline) for row in rows],
        }
        for title, total, rows in selection.groups()
    ]
    return {"groups": groups, "shared": common.shared(), "headline": headline, "num_rows": selection.num_rows}


def _example(
    row: dict[str, Any], *, num_shared: int, edges: tuple[str, str], headline: Headline | None
) -> dict[str, Any]:
    """A row as the template shows it."""
    messages: list[dict[str, Any]] = []
    for place, message in enumerate(_messages(row["prompt"])[num_shared:]):
        start, end = edges if place == 0 else ("", "")
        text = message["content"].removeprefix(start)
        cut_end = bool(end) and text.endswith(end)
        text = text.removesuffix(end)
        messages.append({"role": message["role"], "text": clip(text), "cut": bool(start), "cut_end": cut_end})
    reference = row.get("reference")
    expected = "\nor\n".join(reference) if isinstance(reference, list) else as_text(reference)
    written, scored = row.get("outputs", {}), row.get("scores", {})
    outputs = []
    for system in written or scored:  # plain texts are scored without being answered
        scores = {name: value for name, value in scored.get(system, {}).items() if value is not None}
        outputs.append(
            {
                "system": system,
                "pieces": compared(clip(written[system]), reference=clip(expected)) if system in written else None,
                "scores": [{"metric": name, "value": number_text(value)} for name, value in scores.items()],
                "right": _right(scores, headline=headline),
            }
        )
    return {
        "origin": row.get("origin") or f"row {row.get('row', '')}",
        "title": " ".join((messages[-1]["text"] if messages else expected[:MAX_TITLE]).split())[:MAX_TITLE],
        "messages": messages,
        "reference": clip(expected),
        "outputs": outputs,
    }


def _right(scores: Mapping[str, float], *, headline: Headline | None) -> bool | None:
    """Whether the output is right; None where the deciding metric knows more than right and wrong."""
    if headline is None or headline.metric not in METRICS or not METRICS[headline.metric].right_or_wrong:
        return None
    return scores[headline.metric] == 1 if headline.metric in scores else None


MAX_COMPARED = 1_500  # characters; to compare longer texts word by word takes too long and helps nobody
LEAST_SAME = 0.4  # below this share of words in common, a comparison word by word hides more than it shows


def compared(text: str, *, reference: str) -> list[tuple[str, str]]:
    """What turns `reference` into `text`, as pieces that are `equal`, `inserted` (in the text alone) or `deleted`.

    One equal piece, the text, where little is the same, nothing differs, or either is longer than MAX_COMPARED.
    """
    if text.strip() == reference.strip() or max(len(text), len(reference)) > MAX_COMPARED:
        return [(text, "equal")]
    words, expected = (re.findall(r"\s+|\w+|[^\w\s]", t) for t in (text, reference))
    matcher = difflib.SequenceMatcher(None, expected, words, autojunk=False)
    if matcher.ratio() < LEAST_SAME:
        return [(text, "equal")]
    pieces: list[tuple[str, str]] = []
    deleted = inserted = ""
    codes = matcher.get_opcodes()
    for place, (kind, a, b, c, d) in enumerate(codes):
        old, new = "".join(expected[a:b]), "".join(words[c:d])
        between = kind == "equal" and old.strip(" ") == "" and 0 < place < len(codes) - 1
        if kind != "equal" or between:  # a space between two changes is read as part of one change
            deleted, inserted = deleted + old, inserted + new
            continue
        pieces += [(deleted, "deleted"), (inserted, "inserted"), (old, "equal")]
        deleted = inserted = ""
    pieces += [(deleted, "deleted"), (inserted, "inserted")]
    return [piece for piece in pieces if piece[0]]
