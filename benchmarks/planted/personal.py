"""Tickets with personal data and secrets, in usual and in odd spellings, and with numbers that are neither."""

from collections.abc import Iterator

import numpy as np

from planted import Planted
from planted.sentences import SENTENCES, SLOTS

VALUES = {
    "easy": [
        "jane.doe@example.com", "+1-415-555-0199", "(202) 555-0143", "DE89 3704 0044 0532 0130 00",
        "4111 1111 1111 1111", "078-05-1120", "203.0.113.7", "sk-abcdefghijklmnopqrstuvwx", "password: hunter2hunter",
    ],
    "medium": [
        "JANE+spam@mail.example.co.uk", "020 7946 0958", "GB82WEST12345698765432", "5500-0000-0000-0004",
        "2001:db8:85a3::8a2e:370:7334", "ghp_0123456789abcdefghijABCDEFGHIJ012345", "api_key='Zx81qqTT90pl'",
        "AKIAIOSFODNN7EXAMPLE", "+49 30 901820 14",
    ],
    "hard": [
        "jane dot doe at example dot com", "my number is four one five, 555 0199", "0041-44-668-18-00", "374245455400126",
        "the pin is 4711", "secret: correct horse battery staple", "NL91ABNA0417164300", "Jane Doe, 12 Elm Street",
    ],
}  # fmt: skip
HARMLESS = [
    "order 4711-0815-2230", "version 10.2.14.3", "12:30:45 on 2026-01-31", "part 078-0511-20", "ISBN 978-3-16-148410-0",
    "error 0x80070057", "1,234,567.89 EUR", "room 12.3.1", "ticket #4155550199", "@channel please read",
    "the password was reset", "200 555 units",
]  # fmt: skip


def planted(random: np.random.Generator) -> Iterator[Planted]:
    """Every third row holds a value, the others a number or nothing."""
    for grade, values in VALUES.items():
        rows, expected = [], set()
        for number in range(300):
            text = str(random.choice(SENTENCES)).format(**{name: random.choice(words) for name, words in SLOTS.items()})
            if number % 3 == 0:
                text = f"{text} It is {values[number // 3 % len(values)]}."
                expected.add(number + 1)
            elif number % 3 == 1:
                text = f"{text} See {HARMLESS[number // 3 % len(HARMLESS)]}."
            rows.append({"prompt": text, "completion": "Thank you, we will look into it."})
        yield Planted("personal", grade, rows, expected)
