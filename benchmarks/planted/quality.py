"""Planted defects of answers, languages and labels.

`planted` needs nothing but the starter's sample tickets and the words below; `real` puts the same defects into published
sets: into the answers of Alpaca, wrong labels into TREC and CLINC150, and answers behind another's question.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from planted import Planted
from planted.sentences import ADDITIONS, LANGUAGES, REFUSALS, SENTENCES, SLOTS

SAMPLE = Path(__file__).resolve().parents[2] / "tunesmith" / "starter" / "sample" / "train.jsonl"
NUM_ROWS, PLANTED_SHARE, FLIPPED_SHARE = 400, 0.05, 0.05
REAL_FLIPS = (("trec", "coarse"), ("trec", "fine"), ("clinc150", "label"))
REAL_EXCHANGED = {
    "alpaca": ("instruction", "output"),
    "bitext_support": ("instruction", "response"),
    "gsm8k": ("question", "answer"),
}
EXCHANGED_ROWS, EXCHANGED_SHARE, MOST_CHARACTERS = 600, 0.1, 2_500
GRADES = ("easy", "medium", "hard")

Pair = tuple[str, str]  # prompt, answer
Defect = Callable[[Pair, np.random.Generator], Pair]


def planted(random: np.random.Generator) -> Iterator[Planted]:
    """Every defect in generated text."""
    yield from _answers(_replies(random), random=random)
    tickets = [(user, answer) for user, answer in _sample()]
    for grade, cut in zip(GRADES, (0.5, 0.8, 1.0), strict=True):  # the last leaves all but the closing brace
        yield _plant(f"cut JSON, {grade}", tickets, _json_cut_at(cut), random=random)
    yield from _languages(random)
    yield from _labels(random)


def real(random: np.random.Generator, *, folder: Path) -> Iterator[Planted]:
    """The same defects in published sets, each in a folder of its name with a `train.jsonl`."""
    rows = [json.loads(line) for line in _lines(folder / "alpaca" / "train.jsonl")]
    pairs = [("\n\n".join(filter(None, (row["instruction"], row["input"]))), row["output"]) for row in rows]
    long = [pair for pair in pairs if len(pair[1]) > 150 and pair[1].isascii()]
    for corpus in _answers(long[:2_000], random=random):
        yield Planted(corpus.check, f"{corpus.grade}, in Alpaca", corpus.rows, corpus.expected)
    for name, (prompt, answer) in REAL_EXCHANGED.items():
        rows = [json.loads(line) for line in _lines(folder / name / "train.jsonl")]
        usable = [(row[prompt], row[answer]) for row in rows if len(row[prompt]) + len(row[answer]) < MOST_CHARACTERS]
        few = [usable[place] for place in random.permutation(len(usable))[:EXCHANGED_ROWS]]
        yield _exchanged(f"exchanged, in {name}", few, random=random)
    for name, column in REAL_FLIPS:
        rows = [json.loads(line) for line in _lines(folder / name / "train.jsonl")]
        yield _flipped(f"random, in {name} ({column})", [(row["text"], row[column]) for row in rows], random=random)


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text("utf-8").split("\n") if line]


# ------------------------------------------------------------------------------------------------- clean rows


def _sample() -> Iterator[Pair]:
    for line in _lines(SAMPLE):
        _, user, assistant = json.loads(line)["messages"]
        yield user["content"], assistant["content"]


def _replies(random: np.random.Generator) -> list[Pair]:
    """The sample's tickets with replies of two to seven sentences."""
    pairs = []
    tickets = [user for user, _ in _sample()]
    for number in range(NUM_ROWS):
        chosen = random.choice(len(SENTENCES), size=int(random.integers(2, 8)), replace=False)
        sentences = [SENTENCES[place].format(**_slots(random)) for place in chosen]
        pairs.append((tickets[number % len(tickets)], " ".join(sentences)))
    return pairs


def _slots(random: np.random.Generator) -> dict[str, str]:
    return {name: str(random.choice(words)) for name, words in SLOTS.items()}


# ------------------------------------------------------------------------------------------------- answers


def _answers(pairs: list[Pair], *, random: np.random.Generator) -> Iterator[Planted]:
    for sort, grades in DEFECTS.items():
        for grade, defect in zip(GRADES, grades, strict=True):
            yield _plant(f"{sort}, {grade}", pairs, defect, random=random)


def _plant(grade: str, pairs: list[Pair], defect: Defect, *, random: np.random.Generator) -> Planted:
    """A corpus in which every twentieth pair, drawn at random, has the defect."""
    chosen = set(random.choice(len(pairs), size=round(PLANTED_SHARE * len(pairs)), replace=False).tolist())
    changed = [defect(pair, random) if number in chosen else pair for number, pair in enumerate(pairs)]
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in changed]
    return Planted("quality", grade, rows, {number + 1 for number in chosen})


def _exchanged(grade: str, pairs: list[Pair], *, random: np.random.Generator) -> Planted:
    """A corpus in which every tenth pair has the answer of another of them."""
    chosen = random.choice(len(pairs), size=round(EXCHANGED_SHARE * len(pairs)), replace=False)
    answers = dict(zip(chosen.tolist(), np.roll(chosen, 1).tolist(), strict=True))
    rows = [
        {"prompt": prompt, "completion": pairs[answers.get(number, number)][1]}
        for number, (prompt, _) in enumerate(pairs)
    ]
    return Planted("difficulty", grade, rows, {number + 1 for number in answers})


def _cut_easy(pair: Pair, random: np.random.Generator) -> Pair:
    """A code block left open, or a bracket."""
    end = str(random.choice(["Try this:\n```\nreset --all\n", "The parts (the sensor and the"]))
    return pair[0], f"{pair[1]}\n{end}" if end.startswith("Try") else f"{pair[1]} {end}"


def _cut_medium(pair: Pair, random: np.random.Generator) -> Pair:
    """Five to nine words of one sentence more."""
    sentence = str(random.choice(SENTENCES)).format(**_slots(random)).split()
    return pair[0], f"{pair[1]} {' '.join(sentence[: int(random.integers(5, min(10, len(sentence))))])}"


def _cut_hard(pair: Pair, random: np.random.Generator) -> Pair:
    """A single sentence, cut anywhere."""
    sentence = str(random.choice(SENTENCES)).format(**_slots(random)).split()
    return pair[0], " ".join(sentence[: int(random.integers(3, len(sentence)))])


def _json_cut_at(share: float) -> Defect:
    def cut(pair: Pair, random: np.random.Generator) -> Pair:
        return pair[0], pair[1][: min(int(share * len(pair[1])), len(pair[1]) - 1)]

    return cut


def _refusal(grade: str) -> Defect:
    def refuse(pair: Pair, random: np.random.Generator) -> Pair:
        return pair[0], str(random.choice(REFUSALS[grade]))

    return refuse


def _echo_easy(pair: Pair, random: np.random.Generator) -> Pair:
    return pair[0], pair[0]


def _echo_medium(pair: Pair, random: np.random.Generator) -> Pair:
    return pair[0], f"{pair[0]} {random.choice(ADDITIONS)}"


def _echo_hard(pair: Pair, random: np.random.Generator) -> Pair:
    """With a word changed."""
    words = pair[0].split(" ")
    words[int(random.integers(len(words)))] = "really"
    return pair[0], " ".join(words)


def _repeat_easy(pair: Pair, random: np.random.Generator) -> Pair:
    sentence = str(random.choice(SENTENCES)).format(**_slots(random))
    return pair[0], f"{pair[1]} {' '.join([sentence] * 8)}"


def _repeat_medium(pair: Pair, random: np.random.Generator) -> Pair:
    """The end of the answer falls into a loop of four words without stops."""
    words = pair[1].rstrip(".").split()
    return pair[0], " ".join([*words, *words[-4:] * 8])


def _repeat_hard(pair: Pair, random: np.random.Generator) -> Pair:
    """One sentence three times, with others between."""
    sentences = [text.format(**_slots(random)) for text in random.choice(SENTENCES, size=4, replace=False)]
    again = sentences[0]
    return pair[0], " ".join([again, sentences[1], again, sentences[2], again, sentences[3]])


def _damage_easy(pair: Pair, random: np.random.Generator) -> Pair:
    return pair[0], pair[1].replace("e", "\ufffd", 3)


def _damage_medium(pair: Pair, random: np.random.Generator) -> Pair:
    word = str(random.choice(["café", "Müller", "señor", "naïve", "déjà vu", "Škoda", "Привет", "日本語"]))
    wrong = word.encode("utf-8").decode(str(random.choice(["cp1252", "latin-1"])), "replace").replace("\ufffd", "")
    return pair[0], f"{pair[1]} {wrong} knows more."


def _damage_hard(pair: Pair, random: np.random.Generator) -> Pair:
    """A single apostrophe or dash."""
    wrong = str(random.choice(["’", "–", "…", "é"])).encode("utf-8").decode("cp1252")
    return pair[0], pair[1].replace(" ", f" {wrong}", 1)


def _markup_easy(pair: Pair, random: np.random.Generator) -> Pair:
    return pair[0], f"<p>{pair[1]}</p>"


def _markup_medium(pair: Pair, random: np.random.Generator) -> Pair:
    return pair[0], pair[1].replace(" ", str(random.choice(["&nbsp;", "<br>", " <b>now</b> "])), 1)


def _markup_hard(pair: Pair, random: np.random.Generator) -> Pair:
    """An escaped sign."""
    return pair[0], pair[1].replace(" ", str(random.choice([" &amp; ", " &#39;", " &quot;"])), 1)


def _longer(times: int) -> Defect:
    def lengthen(pair: Pair, random: np.random.Generator) -> Pair:
        sentences: list[str] = []
        while sum(map(len, sentences)) < times * 320:
            sentences.append(str(random.choice(SENTENCES)).format(**_slots(random)))
        return pair[0], " ".join(sentences)

    return lengthen


DEFECTS: dict[str, tuple[Defect, Defect, Defect]] = {
    "cut off": (_cut_easy, _cut_medium, _cut_hard),
    "refusal": (_refusal("easy"), _refusal("medium"), _refusal("hard")),
    "echo": (_echo_easy, _echo_medium, _echo_hard),
    "repetition": (_repeat_easy, _repeat_medium, _repeat_hard),
    "encoding": (_damage_easy, _damage_medium, _damage_hard),
    "markup": (_markup_easy, _markup_medium, _markup_hard),
    "length": (_longer(60), _longer(30), _longer(12)),
}


# ------------------------------------------------------------------------------------------------- languages


def _languages(random: np.random.Generator) -> Iterator[Planted]:
    def some(code: str, number: int) -> str:
        return " ".join(random.choice(LANGUAGES[code], size=number, replace=False).tolist())

    def far(pair: Pair, random: np.random.Generator) -> Pair:
        code = str(random.choice([code for code in LANGUAGES if code != "en"]))
        return some(code, 2), some(code, 3)

    def answer_only(pair: Pair, random: np.random.Generator) -> Pair:
        return pair[0], some(str(random.choice([code for code in LANGUAGES if code != "en"])), 1)

    def near(pair: Pair, random: np.random.Generator) -> Pair:
        code = str(random.choice(["pt", "ca", "it"]))
        return _beginning(some(code, 1)), _beginning(some(code, 1))

    english = [(some("en", 1), some("en", 2)) for _ in range(NUM_ROWS)]
    spanish = [(some("es", 1), some("es", 2)) for _ in range(NUM_ROWS)]
    for grade, pairs, defect in (("easy", english, far), ("medium", english, answer_only), ("hard", spanish, near)):
        corpus = _plant(grade, pairs, defect, random=random)
        yield Planted("language", grade, corpus.rows, corpus.expected)


def _beginning(text: str) -> str:
    """The first words with forty letters or a few more."""
    words = text.split()
    letters = np.cumsum([sum(map(str.isalpha, word)) for word in words])
    return " ".join(words[: int(np.searchsorted(letters, 40)) + 1])


# ------------------------------------------------------------------------------------------------- labels


def _labels(random: np.random.Generator) -> Iterator[Planted]:
    """Classes that have words of their own among words of all: ever fewer of them, and ever fewer rows a class."""
    for grade, classes, rows_a_class, own_share in (
        ("easy", 20, 60, 0.6),
        ("medium", 40, 40, 0.4),
        ("hard", 60, 20, 0.25),
    ):
        yield _flipped(
            grade, labelled(random, classes=classes, rows_a_class=rows_a_class, own_share=own_share), random=random
        )


def labelled(random: np.random.Generator, *, classes: int, rows_a_class: int, own_share: float) -> list[Pair]:
    """Texts of six to twelve made-up words with labels; `own_share` of the words are of twelve that the class prefers."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    words = ["".join(random.choice(syllables, size=3)) for _ in range(600)]
    own = [random.choice(words, size=12, replace=False) for _ in range(classes)]
    pairs = []
    for label in range(classes):
        for _ in range(rows_a_class):
            size = int(random.integers(6, 13))
            mine = random.random(size) < own_share
            text = np.where(mine, random.choice(own[label], size=size), random.choice(words, size=size))
            pairs.append((" ".join(text.tolist()), f"class {label}"))
    return [pairs[place] for place in random.permutation(len(pairs))]


def _flipped(grade: str, pairs: list[Pair], *, random: np.random.Generator) -> Planted:
    """One row in twenty, drawn at random, has another class."""
    names = sorted({label for _, label in pairs})
    chosen = set(random.choice(len(pairs), size=round(FLIPPED_SHARE * len(pairs)), replace=False).tolist())
    rows: list[dict[str, Any]] = []
    for number, (text, label) in enumerate(pairs):
        if number in chosen:
            label = names[(names.index(label) + int(random.integers(1, len(names)))) % len(names)]
        rows.append({"text": text, "label": label})
    return Planted("label_errors", grade, rows, {number + 1 for number in chosen})
