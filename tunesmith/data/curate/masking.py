"""Rows without their personal data and secrets: a placeholder for each, the same one for the same value in a row.

    Call Jane on +1-415-555-0199 or write to jane@example.com   ->   Call Jane on [PHONE_1] or write to [EMAIL_1]

Values have one number a row, so an answer that repeats what the question held still does, and two rows share nothing.
"""

from dataclasses import replace
from typing import Any

from tunesmith.data.curate.personal import findings
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
}


class Masker:
    """The placeholders of one row; `num_masked` counts what was replaced."""

    def __init__(self) -> None:
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
            numbers = self._numbers.setdefault(sort, {})
            number = numbers.setdefault(text[start:end], len(numbers) + 1)
            parts += [text[last:start], f"[{PLACEHOLDERS[sort]}_{number}]"]
            last = end
            self.num_masked += 1
        return "".join([*parts, text[last:]])

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


def masked(example: Example) -> tuple[Example, int]:
    """The row with placeholders, and how many there are. Labels, tools and columns stay."""
    masker = Masker()
    found = replace(
        example,
        messages=tuple(masker.message(message) for message in example.messages),
        text=None if example.text is None else masker.text(example.text),
        words=tuple(masker.text(word) for word in example.words),
    )
    return (found, masker.num_masked) if masker.num_masked else (example, 0)
