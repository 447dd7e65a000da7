"""Patterns for texts in many wordings, shared by the programs that make the starter model's data.

In a pattern, `{a|b|c}` stands for one of its alternatives (they nest, and one may be empty) and `<name>` for a slot.
A slot that is a text is a pattern itself and is put in before the choices are made; a slot that is a function gives a
value that is put in afterwards, as it is.

    expand("{Hi|Hello}, I paid <amount> {|twice}.", chooser=random.Random(0), slots={"amount": lambda chooser: "$5"})
"""

import random
import re
from collections.abc import Callable, Mapping

Slots = Mapping[str, str | Callable[[random.Random], str]]

INNERMOST_CHOICE = re.compile(r"\{([^{}]*)\}")
SLOT = re.compile(r"<([a-z_]+)>")


def expand(pattern: str, *, chooser: random.Random, slots: Slots | None = None) -> str:
    """One wording of `pattern`; KeyError for a slot that `slots` does not have."""
    slots = slots or {}
    for name, value in slots.items():
        if isinstance(value, str):
            pattern = pattern.replace(f"<{name}>", value)
    while choice := INNERMOST_CHOICE.search(pattern):
        pattern = pattern[: choice.start()] + chooser.choice(choice[1].split("|")) + pattern[choice.end() :]
    assert not set("{|}") & set(pattern), f"a brace is missing: {pattern}"

    def value_of(slot: re.Match[str]) -> str:
        value = slots[slot[1]]
        return value if isinstance(value, str) else value(chooser)

    return SLOT.sub(value_of, pattern)


def with_typo(text: str, *, chooser: random.Random) -> str:
    """`text` with one slip of the keyboard inside one of its longer lower-case words: a letter lost or two swapped."""
    words = list(re.finditer(r"[a-z]{5,}", text))
    if not words:
        return text
    word = chooser.choice(words)
    at = word.start() + chooser.randrange(1, len(word[0]) - 2)
    slip = chooser.choice([text[at + 1], text[at + 1] + text[at]])
    return text[:at] + slip + text[at + 2 :]


def listed(words: str) -> list[str]:
    """The words of a list written as one text."""
    return words.split()


def pairs(words: str) -> dict[str, str]:
    """`hot/cold big/small` as a dictionary."""
    return dict(pair.split("/") for pair in words.split())
