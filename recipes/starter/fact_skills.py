"""Small tasks with one right answer over kinds of things, records of facts, and sentences that tell them."""

import json
import random

from facts import FACT_QUESTIONS, FACT_SENTENCES, FACTS, draw_record, tell_record
from material import CATEGORIES, DAYS, NAMES, TONES, TOPICS, TOWNS, Material
from word_skills import Skill
from wording import Slots, expand

PEOPLE_AND_PLACES: Slots = {
    "name": lambda chooser: chooser.choice(NAMES),
    "town": lambda chooser: chooser.choice(TOWNS),
    "day": lambda chooser: chooser.choice(DAYS),
}


# ------------------------------------------------------------------------------------------ choosing and classifying


def member_of_list(chooser: random.Random, material: Material) -> Skill:
    category = chooser.choice(list(CATEGORIES))
    pattern = "{Which|Which one|Which of these|Which of the words} {is of the kind|belongs to|goes with} <category>"

    def draw() -> tuple[str, str]:
        answer = chooser.choice(CATEGORIES[category])
        others = chooser.sample([name for name in CATEGORIES if name != category], chooser.randint(1, 3))
        words = [answer, *(chooser.choice(CATEGORIES[name]) for name in others)]
        chooser.shuffle(words)
        return ", ".join(words), answer

    return Skill(expand(pattern, chooser=chooser, slots={"category": category}), draw)


def classify_word(chooser: random.Random, material: Material) -> Skill:
    categories = chooser.sample(list(CATEGORIES), chooser.randint(2, 4))
    listed = f"{', '.join(categories[:-1])} or {categories[-1]}"
    pattern = "{Is this <listed>|What is this: <listed>|Choose the {kind|group}: <listed>|Name the group (<listed>)}"
    instruction = expand(pattern, chooser=chooser, slots={"listed": listed})
    return Skill(instruction, lambda: draw_member(chooser, categories=categories))


def draw_member(chooser: random.Random, *, categories: list[str]) -> tuple[str, str]:
    """A word of one of the categories, and that category."""
    category = chooser.choice(categories)
    return chooser.choice(CATEGORIES[category]), category


def classify_by_description(chooser: random.Random, material: Material) -> Skill:
    """Labels of no meaning, defined in the instruction."""
    categories = chooser.sample(list(CATEGORIES), 2)
    names = chooser.choice([("A", "B"), ("1", "2"), ("yes", "no"), tuple(chooser.sample(material.words, 2))])
    pattern = (
        "{{Say|Write|Answer} <a> for <one> and <b> for <other>|If it belongs to <one>, {say|write|answer} <a>; if it "
        "belongs to <other>, <b>|{Labels|Classes}: <a> = <one>, <b> = <other>. {Give|Choose} the label}"
    )
    slots: Slots = {"one": categories[0], "other": categories[1], "a": names[0], "b": names[1]}

    def draw() -> tuple[str, str]:
        word, category = draw_member(chooser, categories=categories)
        return word, dict(zip(categories, names, strict=True))[category]

    return Skill(expand(pattern, chooser=chooser, slots=slots), draw)


def classify_sentence(chooser: random.Random, material: Material) -> Skill:
    sentences, name = chooser.choice([(TONES, "{tone|mood|feeling}"), (TOPICS, "{topic|subject}")])
    labels = chooser.sample(list(sentences), min(len(sentences), chooser.randint(2, 4)))
    pattern = "{What is|Name|Choose|Decide on} the <kind>: <labels>"
    slots: Slots = {"kind": name, "labels": ", ".join(labels)}

    def draw() -> tuple[str, str]:
        label = chooser.choice(labels)
        return expand(chooser.choice(sentences[label]), chooser=chooser, slots=PEOPLE_AND_PLACES), label

    return Skill(expand(pattern, chooser=chooser, slots=slots), draw)


def classify_form(chooser: random.Random, material: Material) -> Skill:
    labels = chooser.choice([("question", "statement"), ("Q", "S"), ("ask", "tell")])
    pattern = (
        "{Say <asks> for a question and <tells> for {a statement|anything else}|Is this a question or a statement "
        "(<asks> or <tells>)|{Answer|Write} <asks> if it asks something, otherwise <tells>}"
    )
    slots: Slots = {"asks": labels[0], "tells": labels[1]}
    questions = [sentence for sentence in material.sentences[:4000] if sentence.endswith("?")]
    statements = [sentence for sentence in material.sentences[:4000] if sentence.endswith(".")]

    def draw() -> tuple[str, str]:
        asks = chooser.random() < 0.5
        return chooser.choice(questions if asks else statements), labels[0] if asks else labels[1]

    return Skill(expand(pattern, chooser=chooser, slots=slots), draw)


# ------------------------------------------------------------------------------------------------ facts and records


def extract_fact(chooser: random.Random, material: Material) -> Skill:
    key = chooser.choice(list(FACTS))
    pattern = "{<question>|{Extract|Find|Copy|Give|Pull out} {only |}the <key>{| from the text}}"
    filler = key not in ("name", "town") and chooser.random() < 0.5  # a filler sentence may name people and places

    def draw() -> tuple[str, str]:
        others = chooser.sample([other for other in FACTS if other != key], chooser.randint(0, 3))
        record = draw_record(chooser, keys=[key, *others])
        text = tell_record(record, chooser=chooser)
        return (f"{chooser.choice(material.sentences)} {text}" if filler else text), record[key]

    slots: Slots = {"question": FACT_QUESTIONS[key], "key": key}
    return Skill(expand(pattern, chooser=chooser, slots=slots), draw)


def extract_json(chooser: random.Random, material: Material) -> Skill:
    keys = chooser.sample(list(FACTS), chooser.randint(1, 4))
    pattern = (
        "{{Answer|Reply} {in|with} JSON with {the keys|keys} <keys>|{Extract|Give|Return} <keys> as {JSON|a JSON "
        "object}|{Turn|Make} the text into JSON ({keys|fields}: <keys>)|{JSON|As JSON}, please, with <keys>}"
    )
    separators = chooser.choice([(",", ":"), (", ", ": ")])

    def draw() -> tuple[str, str]:
        others = chooser.sample([other for other in FACTS if other not in keys], chooser.randint(0, 1))
        record = draw_record(chooser, keys=[*keys, *others])
        answer = {key: record[key] for key in keys}
        return tell_record(record, chooser=chooser), json.dumps(answer, separators=separators, ensure_ascii=False)

    return Skill(expand(pattern, chooser=chooser, slots={"keys": ", ".join(keys)}), draw)


def judge_json(chooser: random.Random, material: Material) -> Skill:
    """JSON that holds a judgement of the text, its tone, and some facts out of it."""
    keys = ["tone", *chooser.sample(["job", "age", "code", "amount", "phone", "email"], chooser.randint(1, 2))]
    chooser.shuffle(keys)
    pattern = (
        "{{Answer|Reply} {in|with} JSON: <keys>|{Read|Judge} the text and {answer|reply} in JSON ({keys|fields}: "
        "<keys>)}. {The tone is|Tone:} <tones>"
    )
    slots: Slots = {"keys": ", ".join(keys), "tones": ", ".join(TONES)}

    def draw() -> tuple[str, str]:
        record = draw_record(chooser, keys=[key for key in keys if key != "tone"])
        tone = chooser.choice(list(TONES))
        parts = [
            expand(chooser.choice(TONES[tone]), chooser=chooser, slots=PEOPLE_AND_PLACES),
            tell_record(record, chooser=chooser),
        ]
        chooser.shuffle(parts)
        answer = {key: tone if key == "tone" else record[key] for key in keys}
        return " ".join(parts), json.dumps(answer, separators=(",", ":"), ensure_ascii=False)

    return Skill(expand(pattern, chooser=chooser, slots=slots), draw)


def look_up(chooser: random.Random, material: Material) -> Skill:
    """The value of a key in a record written as lines, JSON or a list."""
    key = chooser.choice(list(FACTS))
    pattern = "{What is the <key>|{Give|Read|Look up} the <key>|What {stands|is written} {under|at} <key>}"

    def draw() -> tuple[str, str]:
        others = chooser.sample([other for other in FACTS if other != key], chooser.randint(1, 4))
        keys = [key, *others]
        chooser.shuffle(keys)
        record = draw_record(chooser, keys=keys)
        lines = "\n".join(f"{name}: {value}" for name, value in record.items())
        listed = "; ".join(f"{name} = {value}" for name, value in record.items())
        return chooser.choice([lines, json.dumps(record, ensure_ascii=False), listed]), record[key]

    return Skill(expand(pattern, chooser=chooser, slots={"key": key}), draw)


def convert_record(chooser: random.Random, material: Material) -> Skill:
    to_json = chooser.random() < 0.6
    pattern = (
        "{{Write|Give|Return} {this|these lines|the lines} as {JSON|a JSON object}|Convert {this|the lines} to JSON}"
        if to_json
        else "{{Write|Give} {this|the JSON|the object} as lines of key and value|Turn {this|the JSON} into lines}"
    )

    def draw() -> tuple[str, str]:
        record = draw_record(chooser, keys=chooser.sample(list(FACTS), chooser.randint(2, 4)))
        lines = "\n".join(f"{name}: {value}" for name, value in record.items())
        text = json.dumps(record, ensure_ascii=False)
        return (lines, text) if to_json else (text, lines)

    return Skill(expand(pattern, chooser=chooser), draw)


def fill_template(chooser: random.Random, material: Material) -> Skill:
    keys = chooser.sample(list(FACTS), chooser.randint(1, 3))
    parts = [expand(chooser.choice(FACT_SENTENCES[key]), chooser=chooser).replace("%", f"[{key}]") for key in keys]
    template = " ".join(parts)
    lead = expand(
        "{Fill in the template|Fill in the gaps|Complete the form|Put the values into this text}", chooser=chooser
    )

    def draw() -> tuple[str, str]:
        record = draw_record(chooser, keys=keys)
        filled = template
        for key, value in record.items():
            filled = filled.replace(f"[{key}]", value)
        return "; ".join(f"{key}: {value}" for key, value in record.items()), filled

    return Skill(f'{lead} "{template}"', draw)
