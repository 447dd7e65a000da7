"""Small tasks with one right answer over words, sentences and numbers.

A skill is a wording of an instruction, and texts with answers. Settings such as "the third word" are drawn once a
skill, so one instruction fits all the texts drawn from it; that is what lets a row show a skill once, by examples only,
or over several turns.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from material import DAYS, MONTHS, NUMBER_WORDS, OPPOSITES, PASTS, PLURALS, Material
from wording import Slots, expand

ORDINALS = ["first", "second", "third", "fourth", "fifth"]


@dataclass(frozen=True)
class Skill:
    """`instruction`: one wording, without a mark at its end. `draw()`: a new text and its answer."""

    instruction: str
    draw: Callable[[], tuple[str, str]]


SkillMaker = Callable[[random.Random, Material], Skill]


# ---------------------------------------------------------------------------------------------------- drawing texts


def draw_words(chooser: random.Random, material: Material, *, low: int, high: int) -> list[str]:
    """Different common words, between `low` and `high` of them."""
    return chooser.sample(material.words, chooser.randint(low, high))


def draw_text(chooser: random.Random, material: Material) -> str:
    """A sentence mostly, otherwise a row of unrelated words, which can be copied only by looking."""
    if chooser.random() < 0.6:
        return chooser.choice(material.sentences)
    return " ".join(draw_words(chooser, material, low=3, high=8))


def bare_words(text: str) -> list[str]:
    """The words of a text without the marks around them."""
    return [word for word in (piece.strip(".,;:!?'\"") for piece in text.split()) if word]


def over_text(
    pattern: str,
    *,
    chooser: random.Random,
    material: Material,
    answer: Callable[[str], str],
    slots: Slots | None = None,
) -> Skill:
    """A skill whose answer is a function of one text."""

    def draw() -> tuple[str, str]:
        text = draw_text(chooser, material)
        return text, answer(text)

    return Skill(expand(pattern, chooser=chooser, slots=slots), draw)


# ------------------------------------------------------------------------------------------------- copying and editing


def repeat(chooser: random.Random, material: Material) -> Skill:
    pattern = (
        "{{Repeat|Copy|Echo|Write down} {this|the text|the words|the following|what follows}{| exactly| word for word}|"
        "{Say|Write} {this|the same} {again|back to me}|Give {this|the text} back {unchanged|as it is}}"
    )
    return over_text(pattern, chooser=chooser, material=material, answer=str)


def change_case(chooser: random.Random, material: Material) -> Skill:
    change, style = chooser.choice(
        [
            (str.upper, "{capital letters|capitals|upper case|upper-case letters|block letters}"),
            (str.lower, "{small letters|lower case|lower-case letters}"),
        ]
    )
    pattern = (
        "{{Write|Put|Rewrite|Give} {this|the text|the following} in <style>|{Change|Convert|Turn} {this|the text} "
        "{to|into} <style>|Use only <style>{| for this text}}"
    )
    return over_text(pattern, chooser=chooser, material=material, answer=change, slots={"style": style})


def reverse_words(chooser: random.Random, material: Material) -> Skill:
    pattern = (
        "{{Reverse|Turn round} the order of the words|{Write|Give|Say} the words {in reverse order|backwards|from last "
        "to first}|{Put|List} the last word first and the first word last{|, and so on}}"
    )

    def draw() -> tuple[str, str]:
        words = draw_words(chooser, material, low=2, high=6)
        return " ".join(words), " ".join(reversed(words))

    return Skill(expand(pattern, chooser=chooser), draw)


def count_words(chooser: random.Random, material: Material) -> Skill:
    pattern = (
        "{How many words are {there|in this|in the text}|{Count|Tell me the number of} {the|all} words{| in this}}"
    )

    def draw() -> tuple[str, str]:
        words = draw_words(chooser, material, low=1, high=9)
        return " ".join(words), str(len(words))

    return Skill(expand(pattern, chooser=chooser), draw)


def pick_word(chooser: random.Random, material: Material) -> Skill:
    place = chooser.choice([0, 0, 1, 2, 3, -1, -1])
    pattern = (
        "{What is the <place> word{| here| of this| in the text}|{Give|Write|Tell me|Give me|Find|Name} the <place> "
        "word{| of this| of the text| in this}{| and nothing else}|Which word {comes|stands} <place>}"
    )
    slots: Slots = {"place": "last" if place < 0 else ORDINALS[place]}

    def draw() -> tuple[str, str]:
        text = draw_text(chooser, material)
        while len(bare_words(text)) < 4:
            text = draw_text(chooser, material)
        return text, bare_words(text)[place]

    return Skill(expand(pattern, chooser=chooser, slots=slots), draw)


def neighbour_word(chooser: random.Random, material: Material) -> Skill:
    step, side = chooser.choice([(1, "{after|right after|next after}"), (-1, "{before|right before|just before}")])
    pattern = "{Which|What} word {comes|stands|is} <side> the {word in brackets|bracketed word}"

    def draw() -> tuple[str, str]:
        words = draw_words(chooser, material, low=4, high=9)
        at = chooser.randrange(1, len(words) - 1)
        return f"{' '.join(words)} ({words[at]})", words[at + step]

    return Skill(expand(pattern, chooser=chooser, slots={"side": side}), draw)


def replace_word(chooser: random.Random, material: Material) -> Skill:
    new = chooser.choice(material.words)
    place, name = chooser.choice([(0, "first"), (-1, "last"), (1, "second")])
    pattern = (
        '{Replace the <place> word {by|with} "<new>"|Put "<new>" {in place of|instead of} the <place> word|'
        'Write the words with "<new>" as the <place> one}'
    )

    def draw() -> tuple[str, str]:
        words = draw_words(chooser, material, low=3, high=6)
        changed = list(words)
        changed[place] = new
        return " ".join(words), " ".join(changed)

    return Skill(expand(pattern, chooser=chooser, slots={"place": name, "new": new}), draw)


def remove_or_add(chooser: random.Random, material: Material) -> Skill:
    new = chooser.choice(material.words)
    pattern, change = chooser.choice(
        [
            ("{Leave out|Remove|Delete|Drop} the first word", lambda words: words[1:]),
            ("{Leave out|Remove|Delete|Drop} the last word", lambda words: words[:-1]),
            ('{Add|Append|Put} the word "<new>" at the end', lambda words: [*words, new]),
            ('{Add|Put|Write} the word "<new>" {in front|at the beginning|first}', lambda words: [new, *words]),
            ("{Write|Say|Give} {every|each} word twice", lambda words: [word for word in words for _ in range(2)]),
            ("{Keep|Give|Write} {only|just} the first two words", lambda words: words[:2]),
            ("{Keep|Give|Write} {only|just} the last two words", lambda words: words[-2:]),
        ]
    )

    def draw() -> tuple[str, str]:
        words = draw_words(chooser, material, low=3, high=6)
        return " ".join(words), " ".join(change(words))

    return Skill(expand(pattern, chooser=chooser, slots={"new": new}), draw)


def relayout(chooser: random.Random, material: Material) -> Skill:
    pattern, layout = chooser.choice(
        [
            ("{Write|Put|List} {each|every} word on {its own line|a line of its own}", "\n".join),
            ("{Put|Write} {a comma|commas} between the words", ", ".join),
            ("{Join|Connect} the words {with|by} {hyphens|dashes}", "-".join),
            ("{Join|Connect} the words {with|by} underscores", "_".join),
            (
                "{Make|Write} a {bullet list|list with dashes} of the words",
                lambda words: "\n".join(f"- {word}" for word in words),
            ),
            (
                "{Number|Write a numbered list of} the words",
                lambda words: "\n".join(f"{number}. {word}" for number, word in enumerate(words, start=1)),
            ),
            ("{Write|Give|Return} the words as a JSON {list|array}", json.dumps),
            ("{Put|Set} {each|every} word in quotes", lambda words: " ".join(f'"{word}"' for word in words)),
        ]
    )

    def draw() -> tuple[str, str]:
        words = draw_words(chooser, material, low=2, high=6)
        return " ".join(words), layout(words)

    return Skill(expand(pattern, chooser=chooser), draw)


def letters(chooser: random.Random, material: Material) -> Skill:
    pattern, answer = chooser.choice(
        [
            ("{Spell|Spell out} the word{| letter by letter}", lambda word: " ".join(word)),
            ("{Spell|Write} the word with {hyphens|dashes} between the letters", "-".join),
            ("{What|Which} is the first letter{| of the word}", lambda word: word[0]),
            ("{What|Which} is the last letter{| of the word}", lambda word: word[-1]),
            ("How many letters {are in the word|does the word have}", lambda word: str(len(word))),
            ("{Begin the word with|Write the word with} a capital{| letter}", str.capitalize),
        ]
    )

    def draw() -> tuple[str, str]:
        word = chooser.choice(material.words)
        return word, answer(word)

    return Skill(expand(pattern, chooser=chooser), draw)


def contains_word(chooser: random.Random, material: Material) -> Skill:
    pattern = (
        "{Is the word in brackets {one of the words|in the list} before it|Does the word in brackets {occur|appear} "
        "before{| the brackets}|Say yes if the word in brackets {occurs|appears} among the others, otherwise no}"
    )

    def draw() -> tuple[str, str]:
        words = draw_words(chooser, material, low=4, high=9)
        inside = chooser.random() < 0.5
        target = chooser.choice(words[1:]) if inside else words.pop()
        return f"{' '.join(words)} ({target})", "yes" if inside else "no"

    return Skill(expand(pattern, chooser=chooser), draw)


# ------------------------------------------------------------------------------------------------ numbers and order


def sort_numbers(chooser: random.Random, material: Material) -> Skill:
    pattern, down = chooser.choice(
        [
            ("{Sort|Order|Put} the numbers {from small to large|in rising order|smallest first}", False),
            ("{Sort|Order|Put} the numbers {from large to small|in falling order|largest first}", True),
        ]
    )

    def draw() -> tuple[str, str]:
        numbers = chooser.sample(range(100), chooser.randint(2, 5))
        return " ".join(map(str, numbers)), " ".join(map(str, sorted(numbers, reverse=down)))

    return Skill(expand(pattern, chooser=chooser), draw)


def sort_words(chooser: random.Random, material: Material) -> Skill:
    pattern = "{Sort|Order|Put} the words {alphabetically|by the alphabet|from A to Z|in alphabetical order}"

    def draw() -> tuple[str, str]:
        words = draw_words(chooser, material, low=2, high=4)
        return ", ".join(words), ", ".join(sorted(words))

    return Skill(expand(pattern, chooser=chooser), draw)


def extreme_number(chooser: random.Random, material: Material) -> Skill:
    choose, name = chooser.choice([(max, "{largest|biggest|highest|greatest}"), (min, "{smallest|lowest|least}")])
    pattern = "{{Which|What} is the <extreme> number|{Find|Name|Give|Pick} the <extreme> number{| of these}}"

    def draw() -> tuple[str, str]:
        numbers = chooser.sample(range(chooser.choice([20, 100, 1000])), chooser.randint(2, 5))
        return chooser.choice([", ", " "]).join(map(str, numbers)), str(choose(numbers))

    return Skill(expand(pattern, chooser=chooser, slots={"extreme": name}), draw)


def calculate(chooser: random.Random, material: Material) -> Skill:
    kind = chooser.choice("++-*")
    pattern = "{Work out|Calculate|Compute|Solve|Give the result of|Do this sum}{| and give only the number}"

    def draw() -> tuple[str, str]:
        one, other = sorted(chooser.choices(range(chooser.choice([10, 20, 50])), k=2), reverse=True)
        if kind == "*":
            one, other = chooser.randint(0, 10), chooser.randint(0, 10)
        sign, result = {"+": ("+", one + other), "-": ("-", one - other), "*": ("*", one * other)}[kind]
        return f"{one} {sign} {other}", str(result)

    return Skill(expand(pattern, chooser=chooser), draw)


def compare_numbers(chooser: random.Random, material: Material) -> Skill:
    more = chooser.random() < 0.5
    relation = "{larger|bigger|greater|more}" if more else "{smaller|less|lower}"
    pattern = "Is the first number <relation> than the second{| one}{|, yes or no}"

    def draw() -> tuple[str, str]:
        one, other = chooser.sample(range(100), 2)
        return f"{one}{chooser.choice([' and', ','])} {other}", "yes" if (one > other) == more else "no"

    return Skill(expand(pattern, chooser=chooser, slots={"relation": relation}), draw)


def from_table(pattern: str, *, chooser: random.Random, table: dict[str, str]) -> Skill:
    """A skill that knows a small table by heart."""
    return Skill(expand(pattern, chooser=chooser), lambda: chooser.choice(list(table.items())))


def number_words(chooser: random.Random, material: Material) -> Skill:
    digits = {str(number): word for number, word in enumerate(NUMBER_WORDS)}
    if chooser.random() < 0.5:
        return from_table("Write the number {as a word|in letters|in words}", chooser=chooser, table=digits)
    words = {word: digit for digit, word in digits.items()}
    return from_table("Write the number {as a figure|in figures|in digits}", chooser=chooser, table=words)


def what_follows(chooser: random.Random, material: Material) -> Skill:
    series = chooser.choice([DAYS, MONTHS])
    pattern, step = chooser.choice(
        [
            ("{Which|What} {comes after|follows} {this|it}", 1),
            ("{Which|What} {comes before|stands before} {this|it}", -1),
        ]
    )
    table = {item: series[(at + step) % len(series)] for at, item in enumerate(series)}
    return from_table(pattern, chooser=chooser, table=table)


def word_knowledge(chooser: random.Random, material: Material) -> Skill:
    pattern, table = chooser.choice(
        [
            ("{What is|Give|Write|Tell me} the opposite{| of this word| of the word}", OPPOSITES),
            ("{What is|Give|Write} the plural{| of this word| of the noun}", PLURALS),
            ("{What is|Give|Write} the {past|past tense}{| of this verb| of the word}", PASTS),
        ]
    )
    return from_table(pattern, chooser=chooser, table=table)
