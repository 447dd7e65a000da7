"""Rows without their personal data and secrets: a placeholder for each, the same one for the same value in a row.

Names of persons are those that are given (curate/names.py); all else is found here, by its shape.

    Call Jane on +1-415-555-0199 or write to jane@example.com   ->   Call Jane on [PHONE_1] or write to [EMAIL_1]

Values have one number a row, so an answer that repeats what the question held still does, and two rows share nothing.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from tunesmith.data.curate.personal import A_NAME, findings
from tunesmith.data.types import Example, Message

PLACEHOLDERS = {
    "an e-mail address": "EMAIL",
    "a phone number": "PHONE",
    "a bank account number": "IBAN",
    "a card number": "CARD",
    "a social security number": "SSN",
    "an IP address": "IP",
    "an access key": "KEY",
    "a password": "PASSWORD",
    A_NAME: "NAME",
}
LETTER = "[0-9A-Za-zÀ-ԯḀ-῿]"  # of scripts that set words apart: no name ends before one


class Masker:
    """The placeholders of one row with these names of persons; `num_masked` counts what was replaced."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        self._names = re.compile(f"(?<!{LETTER})(?:{longest_first})(?!{LETTER})") if longest_first else None
        self._numbers: dict[str, dict[str, int]] = {}
        self.num_masked = 0

    @property
    def sorts(self) -> list[str]:
        """What was replaced, as in PLACEHOLDERS, each sort once."""
        return list(self._numbers)

    def text(self, text: str) -> str:
        """The text with placeholders."""
        parts, last = [], 0
        for start, end, sort in findings(text):
            parts += [self._without_names(text[last:start]), self._placeholder(text[start:end], sort=sort)]
            last = end
        return "".join([*parts, self._without_names(text[last:])])

    def _without_names(self, text: str) -> str:
        return text if self._names is None else self._names.sub(lambda m: self._placeholder(m[0], sort=A_NAME), text)

    def _placeholder(self, value: str, *, sort: str) -> str:
        numbers = self._numbers.setdefault(sort, {})
        self.num_masked += 1
        return f"[{PLACEHOLDERS[sort]}_{numbers.setdefault(value, len(numbers) + 1)}]"

    def value(self, value: Any) -> Any:
        """JSON with placeholders in its texts."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {key: self.value(item) for key, item in value.items()}
        return [self.value(item) for item in value] if isinstance(value, list) else value

    def message(self, message: Message) -> Message:
        """A turn with placeholders, in its tool calls too."""
        return replace(message, content=self.text(message.content), extra=self.value(message.extra))


def masked(example: Example, *, names: Iterable[str] = ()) -> tuple[Example, int]:
    """The row with placeholders, for these names too, and how many there are. Labels, tools and columns stay."""
    masker = Masker(names)
    found = replace(
        example,
        messages=tuple(masker.message(message) for message in example.messages),
        text=None if example.text is None else masker.text(example.text),
        words=tuple(masker.text(word) for word in example.words),
    )
    return (found, masker.num_masked) if masker.num_masked else (example, 0)
