"""Answers that would teach a model bad habits: cut off, refusing, echoing, repeating, damaged, of an odd length.

What the row alone says is told at once. An unfinished sentence or a tag is a defect only where the file's other
answers have none, so these wait for the end, and so do lengths, by the robust score of their logarithms

    z = |log(1 + length) - median| / max(1.4826 MAD, 0.4)  >  6

From 4 on, nine further answers of Alpaca, LIMA and Bitext and six prompts would be told, none of them odd to a reader.

Repetition is measured as in Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training
Gopher", table A1: the characters in repeated lines and word 5-grams over all of them. Their bars are for web pages;
answers are shorter and lists repeat words, so ours are higher, and code is left out. Memory is 16 bytes a row, besides
what waits.
"""

import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from tunesmith.data.curate.base import Places, answers, quoted
from tunesmith.data.ledger import Problem
from tunesmith.data.types import Example

MIN_ROWS_FOR_LENGTHS = 50
MIN_GRAMS = 40
MAX_LOOKED_AT_CHARACTERS = 20_000

FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
CODE_SIGNS = re.compile(r"[=;{}<>\\_|]|\w\(|^(?: {4}|\t)", re.MULTILINE)
SENTENCE_STOP = re.compile(r"[.!?…。！？।؟][\"'”’)\]]?\s")
PIECE_END = re.compile(r"\n|(?<=[.!?])\s|(?<=[。！？])")
SIGNED = re.compile(r"\s[-–—] ?[^\W\d_][\w.,' -]{2,40}\Z|\s#\w+\Z")  # a name after a quotation, a hashtag
LIST_ITEM = re.compile(r"\s*(?:[-*•–]|\(?\w{1,3}[.)])\s")
STOPS = ".!?…:。！？।؟"
OPENERS, CLOSERS = "([{", ")]}"
DANGLING = {
    "a", "an", "the", "and", "or", "but", "nor", "of", "to", "from", "with", "by", "at", "as", "for", "than", "that",
    "which", "who", "whose", "because", "if", "while", "although", "between", "into", "onto", "is", "are", "was",
    "were", "be", "has", "have", "had", "will", "would", "can", "could", "should", "may", "must", "this", "these",
    "their", "its", "your", "our", "my", "his", "very", "such", "every", "include", "includes", "including", "e.g",
    "i.e",
}  # fmt: skip

CANNOT = (
    r"(?:can['’]?t|cannot|can not|won['’]?t|will not|could ?n['’]?t|(?:am|['’]m) (?:not able|unable)(?: to)?"
    r"|(?:am|['’]m) not (?:allowed|permitted|programmed|comfortable)(?: to)?)"
)
SORRY = r"(?:i['’]?m (?:\w+ )?sorry|i am (?:\w+ )?sorry|sorry|i apologi[sz]e|(?:my )?apologies|unfortunately)"
HELPING = (
    r"(?:assist|help|comply|fulfil|fulfill|provide|answer|complete|create|generate|engage|discuss|write|do (?:that|this)"
    r"|respond|offer|give|support|produce|participate|continue|answering|providing|discussing|helping|writing)\b"
)
MACHINE = r"an? (?:ai|artificial intelligence|(?:large )?language model)\b[\w -]{0,30}"
REFUSAL = re.compile(
    rf"\s*(?P<phrase>{SORRY}[,.!]? (?:but )?(?:as {MACHINE},? ?)?i ?{CANNOT} {HELPING}"
    rf"|i ?{CANNOT} {HELPING} (?:you )?(?:with |to )?(?:that|this|such|your|any)\b(?: request)?"
    rf"|(?:[^.!?\n]{{0,60}}[,.!] )?as {MACHINE}"
    rf"|i (?:must|have to|will have to) (?:\w+ )?(?:decline|refuse)"
    rf"|[\w ,]{{2,60}} against my (?:guidelines|programming|policy)"
    rf"|(?:[^.!?\n]{{0,20}}[,.!] )?(?:i['’]?m|i am) (?:just |only )?{MACHINE})",
    re.IGNORECASE,
)
REFUSAL_SIGNS = re.compile(
    r"sorry|apolog|unfortunately|\bai\b|language model|artificial|n['’]?t\b|cannot|can not|will not|unable|not able"
    r"|decline|refuse|against my",
    re.IGNORECASE,
)

# UTF-8 read as Windows-1252 or Latin-1: a lead byte's letter, then the signs of its continuation bytes.
_CONTINUATION = "[\x80-\xbf" + bytes(range(0x80, 0xA0)).decode("cp1252", "ignore") + "]"
MOJIBAKE = re.compile(
    rf"[ÂÃ]{_CONTINUATION}|[ÄÅÐÑØÙ](?![\xa0‘’“”–—…«»]){_CONTINUATION}|(?:[ä-éïà]{_CONTINUATION}{{2}}){{2}}"
    rf"|â[€\x80„ˆ†œž]{_CONTINUATION}|ã[€‚ƒ\x80-\x83]{_CONTINUATION}|ð[Ÿ\x9f]{_CONTINUATION}{{2}}|ï[»¿]{_CONTINUATION}"
)
MARKUP = re.compile(
    r"</(?:p|div|span|a|b|i|li|ul|ol|td|tr|table|h[1-6]|strong|em|body|html|section|article|font)>"
    r"|<(?:br|hr|p) ?/?>|<(?:a|div|span|img|p|td|font) [a-z-]{2,12}=|&(?:nbsp|amp|quot|lt|gt|#\d{2,5}|#x[0-9a-f]{2,5});",
    re.IGNORECASE,
)
TALKS_OF_MARKUP = re.compile(
    r"html|css|xml|markup|web ?page|web ?site|\btags?\b|code|script|<\w|&\w{2,5};", re.IGNORECASE
)


@dataclass(frozen=True)
class Bars:
    """From where on it is a defect; benchmarks/thresholds.py measures other values.

    max_unfinished_share, max_markup_share: where more answers end so, or hold markup, it is how the file is written.
    max_length_score, min_deviation: the 6 and the 0.4 above. An echo has min_echo_characters; the shorter of prompt and
    answer is min_echo_share of the longer, or they share min_shared_words_share of its words. Repeated are lines that stand
    min_repeated_times and are min_repeated_share of the text and min_repeated_characters, word 5-grams of which
    min_repeated_grams_share stood before, and a phrase that is said over min_loop_words.
    """

    max_unfinished_share: float = 0.1
    max_markup_share: float = 0.1
    max_length_score: float = 6.0
    min_deviation: float = 0.4
    min_echo_characters: int = 40
    min_echo_share: float = 0.7
    min_shared_words_share: float = 0.9
    min_repeated_share: float = 0.3
    min_repeated_times: int = 3
    min_repeated_characters: int = 60
    min_repeated_grams_share: float = 0.5
    min_loop_words: int = 7


BARS = Bars()


@dataclass
class _Habit:
    """What is a defect only where few rows have it: problems held back until the share of all is known."""

    max_share: float
    num_judged: int = 0
    held: list[Problem] = field(default_factory=list)

    def problems(self) -> list[Problem]:
        """The problems, unless they are the file's habit."""
        return self.held if len(self.held) <= max(1, self.max_share * self.num_judged) else []


class Quality:
    """Cut off answers, refusals, echoes, repetition, damaged encoding, leftover markup, lengths far out."""

    name = "quality"

    def __init__(self, bars: Bars = BARS) -> None:
        self.bars = bars
        self._places = Places()
        self._prompt_characters, self._answer_characters = array("I"), array("I")
        self._unfinished, self._markup = _Habit(bars.max_unfinished_share), _Habit(bars.max_markup_share)

    def look(self, example: Example) -> Iterator[Problem]:
        """What the row alone says; the first finding of each sort."""
        turns = list(answers(example))
        plain = example.plain_text
        self._places.add(example.origin)
        self._prompt_characters.append(len(plain if plain is not None else turns[-1][0] if turns else ""))
        self._answer_characters.append(len(turns[-1][1]) if turns else 0)
        texts = [message.content for message in example.messages] if plain is None else [plain]
        found = [damage for text in texts if (damage := encoding_damage(text))][:1]
        for prompt, answer in turns:
            repeated = echo(prompt, answer=answer, bars=self.bars), repetition(answer, bars=self.bars)
            found += filter(None, (cut_off(answer), refusal(answer), *repeated))
            self._wait(prompt, answer=answer, example=example)
        if plain is not None and example.label is None:
            found += filter(None, [repetition(plain, bars=self.bars)])
        for message, hint in dict(found).items():
            yield _warning(example, message=message, hint=hint)

    def finish(self) -> Iterator[Problem]:
        """Unfinished sentences and markup where they are not the file's habit, and lengths far out."""
        yield from self._unfinished.problems()
        yield from self._markup.problems()
        yield from self._lengths(self._prompt_characters, part="prompt")
        yield from self._lengths(self._answer_characters, part="answer")

    def _wait(self, prompt: str, *, answer: str, example: Example) -> None:
        finished = is_finished(answer)
        self._unfinished.num_judged += finished is not None
        if finished is False:
            end = quoted(answer.rstrip(), end=True)
            message = f"the answer ends in the middle of a sentence: {end}"
            self._unfinished.held.append(
                _warning(example, message=message, hint="write it to its end, or leave it out")
            )
        self._markup.num_judged += 1
        if (tag := leftover_markup(answer)) and not TALKS_OF_MARKUP.search(prompt):
            message = f"the answer holds markup that other answers have not: {quoted(tag)}"
            self._markup.held.append(_warning(example, message=message, hint="take the markup out"))

    def _lengths(self, characters: array, *, part: str) -> Iterator[Problem]:
        length_N = np.frombuffer(characters, np.uint32) if characters else np.zeros(0, np.uint32)
        rows = np.flatnonzero(length_N)
        if len(rows) < MIN_ROWS_FOR_LENGTHS:
            return
        logarithm = np.log1p(length_N[rows])
        distance = logarithm - np.median(logarithm)
        score = distance / max(1.4826 * float(np.median(np.abs(distance))), self.bars.min_deviation)
        typical = int(np.median(length_N[rows]))
        for place in np.flatnonzero(np.abs(score) > self.bars.max_length_score).tolist():
            origin, length = self._places[int(rows[place])], int(length_N[rows[place]])
            long = "long" if score[place] > 0 else "short"
            message = f"the {part} is unusually {long}: {length:,} characters; the file's median is {typical:,}"
            yield Problem("quality", "warning", *origin, message=message, hint="see whether it belongs here")


def _warning(example: Example, *, message: str, hint: str) -> Problem:
    return Problem("quality", "warning", *example.origin, message=message, hint=hint)


# ------------------------------------------------------------------------------------------------- what an answer has
# Each returns (message, hint), or None where nothing is wrong.

Finding = tuple[str, str]


def encoding_damage(text: str) -> Finding | None:
    """Replacement characters, and UTF-8 that was read as a one-byte encoding."""
    if text.isascii():
        return None
    hint = "convert it again from its source, as UTF-8"
    if "\ufffd" in text:
        return "U+FFFD stands where a character was lost when the text was converted", hint
    if found := MOJIBAKE.search(text):
        return (
            f"UTF-8 was read in another encoding: {quoted(found[0])}",
            hint,
        )
    return None


def cut_off(answer: str) -> Finding | None:
    """A code block, JSON or a bracket that is opened and not closed by the end."""
    hint = "write it to its end, or leave it out"
    if answer.count("```") % 2:
        return "the answer is cut off: a code block is opened and not closed", hint
    text = answer.strip()
    if text[:1] in ("{", "["):
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            rest = text[error.pos :]
            if error.msg.startswith("Unterminated string") or re.fullmatch(r"[\s,:\[{]*[\w.+-]{0,4}", rest):
                return "the answer is cut off: JSON that does not end", hint
        except (RecursionError, ValueError):  # nested too deep, or a number too long, to be read
            return None
    elif _open_bracket(text[-400:]):
        return f"the answer is cut off: a bracket is opened and not closed at its end: {quoted(text, end=True)}", hint
    return None


def _open_bracket(tail: str) -> bool:
    """Whether a bracket opens in the last line and neither a bracket, a sentence nor a quotation closes after it."""
    line = tail.rpartition("\n")[2]
    start = max(line.rfind(opener) for opener in OPENERS)
    rest = line[start + 1 :]
    if start < 0 or line[max(0, start - 1) : start] in (":", ";", "-", "="):  # a smiley
        return False
    return not any(closer in rest for closer in CLOSERS) and not rest.endswith(tuple(".!?…\"'`。！？"))


def is_finished(answer: str) -> bool | None:
    """Whether prose ends with the end of a sentence; None where that cannot be told."""
    text = answer.rstrip()
    before, _, line = text.rpartition("\n")
    words = line.split()
    if len(words) < 5 or CODE_SIGNS.search(line) or "`" in line or "://" in line or SIGNED.search(line):
        return None
    last = words[-1].strip("\"'”’*_").casefold()
    if text[-1] == "," or last in DANGLING:
        return False
    item = LIST_ITEM.match(line)
    lines = [other for other in before[-2_000:].split("\n") if other.strip() and (not item or LIST_ITEM.match(other))]
    num_ended = sum(other.rstrip()[-1] in STOPS for other in lines)
    if num_ended < (max(2, len(lines)) if item else len(lines) / 2):  # lists and verse have an end of their own
        return None
    if not item and not SENTENCE_STOP.search(text[-4_000:]):
        return None
    return not (text[-1].isalpha() or text[-1] in "-–—")


def refusal(answer: str) -> Finding | None:
    """An answer that begins by refusing, or by saying that a machine speaks."""
    start = answer[:200]
    if REFUSAL_SIGNS.search(start) and (found := REFUSAL.match(start)):
        hint = "answer it, or leave it out, unless refusing is to be learned"
        return f"the answer refuses, or speaks as a machine: {quoted(found['phrase'])}", hint
    return None


def echo(prompt: str, *, answer: str, bars: Bars = BARS) -> Finding | None:
    """An answer that is a long copy of the prompt, but for a tenth of its words, or holds one and adds little."""
    short, long = sorted((prompt, answer), key=len)
    if not max(bars.min_echo_characters, 0.5 * len(long)) <= len(short) <= len(long) <= MAX_LOOKED_AT_CHARACTERS:
        return None
    words, more_words = short.casefold().split(), long.casefold().split()
    num_shared = (Counter(words) & Counter(more_words)).total()
    text, more_text = (" ".join(each).rstrip(" .?!:") for each in (words, more_words))
    nearly = num_shared >= bars.min_shared_words_share * len(more_words)
    if nearly or (text in more_text and len(text) >= bars.min_echo_share * len(more_text)):
        return "the answer repeats the question and adds little", "write an answer, or leave the row out"
    return None


def repetition(text: str, *, bars: Bars = BARS) -> Finding | None:
    """The same words, line or sentence over and over; code and tables apart."""
    text = FENCED.sub("", text) if "```" in text else text
    text = text[:MAX_LOOKED_AT_CHARACTERS]
    words = text.split()
    hint = "shorten it to what is said once, or leave it out"
    if loop := _loop(words, min_words=bars.min_loop_words):
        return f"the same words come again and again: {quoted(loop)}", hint
    grams = list(zip(words, words[1:], words[2:], words[3:], words[4:], strict=False))
    repeated_share = 1 - len(set(grams)) / max(len(grams), 1)
    has_spaces = len(words) * 20 > len(text)
    if has_spaces and (repeated_share < 0.1 or len(CODE_SIGNS.findall(text)) * 20 > len(words)):
        return None
    pieces = Counter(piece for part in PIECE_END.split(text) if len(piece := part.strip().casefold()) >= 10)
    sizes = {piece: len(piece) * times for piece, times in pieces.items() if times >= bars.min_repeated_times}
    if sum(sizes.values()) >= max(bars.min_repeated_characters, bars.min_repeated_share * len(text)):
        piece = max(sizes, key=sizes.__getitem__)
        return f"a line or sentence stands {pieces[piece]} times in it: {quoted(piece)}", hint
    if has_spaces and len(grams) >= MIN_GRAMS and repeated_share >= bars.min_repeated_grams_share:
        return f"{repeated_share:.0%} of its runs of five words stand in it before", hint
    return None


def _loop(words: list[str], *, min_words: int) -> str:
    """A phrase of up to three words that is said again at once, over and over; empty where there is none."""
    for period in (1, 2, 3):
        run = 0
        for place, (one, other) in enumerate(zip(words, words[period:], strict=False), start=1):
            run = run + 1 if one == other else 0
            phrase = words[place : place + period]
            if run >= max(min_words, 3 * period) and all(len(word) > 1 and word[0].isalpha() for word in phrase):
                return " ".join(phrase)
    return ""


def leftover_markup(answer: str) -> str:
    """A tag or entity of HTML in an answer without code; empty where there is none."""
    if ("<" not in answer and "&" not in answer) or "`" in answer:
        return ""
    found = MARKUP.search(answer)
    return found[0] if found else ""
