"""Invented facts: records of keys and values, and sentences and questions about them."""

import random
from collections.abc import Callable

from material import JOBS, MONTHS, NAMES, PETS, SURNAMES, TOWNS
from wording import expand


def draw_code(chooser: random.Random) -> str:
    """A code such as KX-4821, 90417 or tm72."""
    letters = "".join(chooser.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=chooser.randint(1, 3)))
    digits = str(chooser.randint(10, 99999))
    return chooser.choice([f"{letters}-{digits}", digits, f"{letters}{digits}", f"{letters.lower()}{digits[:2]}"])


FACTS: dict[str, Callable[[random.Random], str]] = {
    "name": lambda c: f"{c.choice(NAMES)} {c.choice(SURNAMES)}",
    "town": lambda c: c.choice(TOWNS),
    "job": lambda c: c.choice(JOBS),
    "age": lambda c: str(c.randint(18, 90)),
    "pet": lambda c: c.choice(PETS),
    "date": lambda c: f"{c.randint(1, 28)} {c.choice(MONTHS)} {c.randint(1900, 2030)}",
    "amount": lambda c: f"{c.choice('$$$€£')}{c.randint(2, 900)}{c.choice(['', '.50', '.99'])}",
    "code": draw_code,
    "phone": lambda c: f"555 {c.randint(1000, 9999)}",
    "email": lambda c: f"{c.choice(NAMES).lower()}@{c.choice(SURNAMES).lower()}.example",
}
FACT_SENTENCES: dict[str, list[str]] = {
    "town": ["{They live|The house is} in %.", "{The letter|The parcel} went to %.", "{Our office|The shop} is in %."],
    "job": [
        "{The work|The trade} is that of a %.",
        "{They need|We met} a % {there|yesterday}.",
        "{Trained|Known} as a %.",
    ],
    "age": ["{The age is|Age:} %.", "{Now|Already} % years old.", "{They turned|Turned} % {in spring|last week}."],
    "pet": ["{The|A} % {sleeps by the fire|came along}.", "{There is a|They keep a} % {too|in the yard}."],
    "date": ["{It happened|They met|It begins} on %.", "{The date is|Date:} %.", "{The meeting|The fair} is on %."],
    "amount": ["{They paid|It cost|The price was} %.", "{The bill|The ticket} came to %.", "% {was paid|is owed}."],
    "code": ["{The code|The key|The reference} is %.", "{Please quote|Ask for} number %.", "{Keep|Note} the code %."],
    "phone": ["{Call|Ring|Phone} %.", "{The number|The telephone number} is %."],
    "email": ["{Write to|Mail} %.", "{The address is|Answers go to} %."],
    "name": [
        "{The guest|The visitor|The owner} is %.",
        "{I spoke to|We met|Ask for} %.",
        "% {wrote|came|called}{| today}.",
    ],
}
FACT_QUESTIONS = {
    "name": "{Who is it about|What is the name|Which person is named}",
    "town": "{Which town is named|What is the town|Which place is named}",
    "job": "{What is the job|Which trade is named}",
    "age": "{What is the age|How old is the person}",
    "pet": "{Which animal is named|What is the pet}",
    "date": "{What is the date|Which date is given|When is it}",
    "amount": "{What is the amount|How much money is it|What is the sum}",
    "code": "{What is the code|Which code is given|What is the reference}",
    "phone": "{What is the phone number|Which number should be called}",
    "email": "{What is the e-mail address|Which address is given}",
}


def draw_record(chooser: random.Random, *, keys: list[str]) -> dict[str, str]:
    """Invented values for the keys."""
    return {key: FACTS[key](chooser) for key in keys}


def tell_record(record: dict[str, str], *, chooser: random.Random) -> str:
    """Sentences that say what the record says, in any order."""
    sentences = [
        expand(chooser.choice(FACT_SENTENCES[key]), chooser=chooser).replace("%", record[key]) for key in record
    ]
    chooser.shuffle(sentences)
    return " ".join(sentences)
