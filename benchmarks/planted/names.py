"""Tickets with names of persons, from plain to hard ones, and with words in capitals that are no persons.

What a tagger learns from (`tagger_rows.py`) has none of these names and none of these sentences.
"""

from collections.abc import Iterator

import numpy as np

from planted import Planted
from planted.sentences import SENTENCES, SLOTS

NAMES = {
    "easy": [
        "Anna Müller", "James Whitfield", "Sophie Lambert", "Robert Hayes", "Laura Schneider", "Thomas Becker",
        "Emily Carter", "Peter Novotny", "Claire Dubois", "David Ferguson", "Julia Hoffmann", "Michael Barnes",
    ],
    "medium": [
        "müller", "whitfield", "lambert", "hayes", "schneider", "becker", "dubois", "ferguson", "hoffmann", "barnes",
    ],
    "hard": [
        "Nguyễn Thị Hoa", "Oluwaseun Adeyemi", "Priya Raghunathan", "Takeshi Yamamoto", "Siobhán Ó Briain", "Mark", "Rose",
        "Grace", "Will Young", "Summer Hunt", "Þórunn Jónsdóttir", "Abdulrahman al-Sharif", "J. P. Mbeki", "May Bishop",
    ],
}  # fmt: skip
SAID = {
    "easy": [
        "{sentence} I talked to {name} about it last week.",
        "My contact at your company is {name}. {sentence}",
        "{sentence} The order was placed by {name}, who is on holiday.",
    ],
    "medium": [
        "{sentence} please ask mr {name} when he is back",
        "frau {name} has the papers. {sentence}",
        "{sentence} i think {name} signed for the parcel",
    ],
    "hard": [
        "{sentence}\n\nKind regards\n{name}",
        "{name} says it is broken. {sentence}",
        "{sentence} cc: {name}, accounting",
        "{sentence}\n--\n{name}\nHead of purchasing",
    ],
}
HARMLESS = [
    "See page nine of the Atlas manual.", "We are based in Hamburg and Lyon.", "It is the Falcon 300 by Siemens.",
    "Mark the box with a cross.", "The price rose in May.", "I will wait until Summer.", "Please hunt for the cause.",
    "The Rose Garden branch is closed.", "Our account is with Barclays.", "It runs on Windows and on Linux.",
    "By the grace of luck it still works.", "THIS IS URGENT.", "Amazon delivered it on Friday.", "Is the young plant safe?",
]  # fmt: skip


def planted(random: np.random.Generator) -> Iterator[Planted]:
    """Every third row holds a name, the next one something harmless."""
    for grade, names in NAMES.items():
        rows, expected = [], set()
        for number in range(300):
            filled = {slot: random.choice(words) for slot, words in SLOTS.items()}
            text = str(random.choice(SENTENCES)).format(**filled)
            if number % 3 == 0:
                text = str(random.choice(SAID[grade])).format(sentence=text, name=names[number // 3 % len(names)])
                expected.add(number + 1)
            elif number % 3 == 1:
                text = f"{text} {HARMLESS[number // 3 % len(HARMLESS)]}"
            rows.append({"prompt": text, "completion": "Thank you, we will look into it."})
        yield Planted("personal", f"names, {grade}", rows, expected)
