"""The starter model's instruction rows: small tasks in many wordings, which teach it to answer in turns and to stop.

    python recipes/starter/make_instructions.py --prose DIR --out FILE [--rows 20000] [--seed 0]

A row is a conversation in the OpenAI chat format. Most rows are one skill (`word_skills.py`, `fact_skills.py`) shown in
one of several ways: the instruction before or after the text, in the system prompt, by examples, over several turns, or
under a rule of the system prompt for how answers look. The others are the conversations of `talk.py`. Sentences and
words are drawn from the public-domain and permissively licensed part of the prose corpus; all else is invented.
The same seed and corpus give the same file.
"""

import argparse
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import fact_skills
import talk
import word_skills
from material import Material, load_material
from talk import TalkMaker, Turns
from word_skills import Skill, SkillMaker
from wording import expand

MOST_CHARACTERS = 4_200  # of a row: about 1,500 tokens

# Each with its share of the rows.
SKILLS: dict[SkillMaker, float] = {
    word_skills.repeat: 7,
    word_skills.change_case: 4,
    word_skills.reverse_words: 3,
    word_skills.count_words: 2,
    word_skills.pick_word: 6,
    word_skills.neighbour_word: 3,
    word_skills.replace_word: 3,
    word_skills.remove_or_add: 4,
    word_skills.relayout: 4,
    word_skills.letters: 3,
    word_skills.contains_word: 2,
    word_skills.sort_numbers: 2,
    word_skills.sort_words: 1,
    word_skills.extreme_number: 3,
    word_skills.calculate: 3,
    word_skills.compare_numbers: 2,
    word_skills.number_words: 1,
    word_skills.what_follows: 1,
    word_skills.word_knowledge: 3,
    fact_skills.member_of_list: 3,
    fact_skills.classify_word: 3,
    fact_skills.classify_by_description: 4,
    fact_skills.classify_sentence: 5,
    fact_skills.classify_form: 3,
    fact_skills.extract_fact: 9,
    fact_skills.extract_json: 8,
    fact_skills.judge_json: 4,
    fact_skills.look_up: 5,
    fact_skills.convert_record: 3,
    fact_skills.fill_template: 4,
}
TALKS: dict[TalkMaker, float] = {
    talk.small_talk: 5,
    talk.role_of_system: 2,
    talk.remember: 3,
    talk.continue_text: 8,
    talk.ask_passage: 8,
    talk.missing_word: 3,
    talk.complete_quote: 4,
    talk.look_up_list: 4,
    talk.house_labels: 5,
}
TALK_SHARE = 0.28


def closed(instruction: str) -> str:
    """An instruction with the mark at its end that it asks for."""
    asks = instruction.startswith(("What", "Which", "How", "Who", "Is ", "Does ", "When", "Where"))
    return instruction + ("?" if asks and ":" not in instruction else ".")


def with_text(instruction: str, *, text: str, chooser: random.Random) -> str:
    """One user message that holds the instruction and the text."""
    mark = closed(instruction)
    layouts = [
        f"{instruction}: {text}",
        f"{mark}\n\n{text}",
        f"{mark}\n{text}",
        f"{text}\n\n{mark}",
        f'{mark} "{text}"',
        f"{mark}\n\nText: {text}",
        f"Text: {text}\n\n{mark}",
        f"Please {instruction[0].lower()}{instruction[1:]}: {text}" if mark.endswith(".") else f"{mark} {text}",
    ]
    return chooser.choice(layouts)


def shown_plainly(skill: Skill, *, chooser: random.Random) -> Turns:
    text, answer = skill.draw()
    return [("user", with_text(skill.instruction, text=text, chooser=chooser)), ("assistant", answer)]


def shown_by_system(skill: Skill, *, chooser: random.Random) -> Turns:
    """The instruction is the system prompt; the user sends texts only."""
    prefix = chooser.choice(["", "", "You are an assistant. ", "For each message: ", "Task: "])
    turns: Turns = [("system", prefix + closed(skill.instruction))]
    for _ in range(chooser.choice([1, 1, 2, 3])):
        text, answer = skill.draw()
        turns += [("user", text), ("assistant", answer)]
    return turns


def shown_by_examples(skill: Skill, *, chooser: random.Random) -> Turns:
    """Examples, with or without the instruction, and a last text without its answer."""
    count = chooser.choice([1, 2, 3, 3, 4, 5, 8, 24])
    before, between, after = chooser.choice(
        [
            ("Input: ", "\nOutput: ", "\n\n"),
            ("", " -> ", "\n"),
            ("", " => ", "\n"),
            ("Q: ", "\nA: ", "\n\n"),
            ("Text: ", "\nAnswer: ", "\n\n"),
            ("", "\n= ", "\n\n"),
        ]
    )
    examples = [skill.draw() for _ in range(count)]
    text, answer = skill.draw()
    shown = "".join(f"{before}{text}{between}{answer}{after}" for text, answer in examples)
    query = f"{shown}{before}{text}{between}".rstrip()
    lead = closed(skill.instruction) + "\n\n" if chooser.random() < 0.5 else ""
    return [("user", lead + query), ("assistant", answer)]


def shown_over_turns(skill: Skill, *, chooser: random.Random) -> Turns:
    """The instruction once, then further texts that mean the same again."""
    turns = shown_plainly(skill, chooser=chooser)
    for _ in range(chooser.randint(1, 3)):
        text, answer = skill.draw()
        again = expand("{And|Now|The same for|And now|Next|And this|Again}", chooser=chooser)
        turns += [("user", f"{again}: {text}"), ("assistant", answer)]
    return turns


def shown_under_rule(skill: Skill, *, chooser: random.Random) -> Turns:
    """A system prompt that says how every answer looks."""
    word = chooser.choice(["Done", "Over", "Thanks", "End", "Good luck"])
    rules: list[tuple[str, Callable[[str], str]]] = [
        ("{Answer|Write|Reply} in {capital letters|capitals|upper case}{| only}.", str.upper),
        ("{Answer|Write|Reply} in {small letters|lower case}{| only}.", str.lower),
        ("{Put|Set} {every answer|your answers|each answer} in quotes.", '"{}"'.format),
        (f"{{End|Close}} {{every|each}} answer with the word {word}.", f"{{}} {word}".format),
        ("{Begin|Start} {every|each} answer with Answer:", "Answer: {}".format),
        (
            "{Answer|Reply} {with|in} JSON with the key answer.",
            lambda text: json.dumps({"answer": text}, ensure_ascii=False),
        ),
        ("{Answer|Reply} {with|in} JSON: result.", lambda text: json.dumps({"result": text}, ensure_ascii=False)),
        ("{Put|Write} {the|each|every} answer {between|in} brackets.", "({})".format),
        ("{You are a helpful assistant|Be brief|Answer only what is asked|Give only the answer}.", str),
    ]
    rule, look = chooser.choice(rules)
    system = expand(rule, chooser=chooser)
    return [("system", system)] + [
        (role, look(content) if role == "assistant" else content)
        for role, content in chooser.choice([shown_plainly, shown_plainly, shown_over_turns])(skill, chooser=chooser)
    ]


WAYS = {shown_plainly: 40, shown_by_system: 18, shown_by_examples: 16, shown_over_turns: 12, shown_under_rule: 14}


def pick(shares: Mapping[Callable, float], *, chooser: random.Random) -> Callable:
    """One of the keys, by its share."""
    return chooser.choices(list(shares), weights=list(shares.values()))[0]


def draw_turns(material: Material, *, chooser: random.Random) -> Turns:
    """One conversation."""
    if chooser.random() < TALK_SHARE:
        return pick(TALKS, chooser=chooser)(chooser, material)
    skill = pick(SKILLS, chooser=chooser)(chooser, material)
    return pick(WAYS, chooser=chooser)(skill, chooser=chooser)


def make_rows(material: Material, *, seed: int = 0) -> Iterator[dict]:
    """Endless different rows; too long ones are left out."""
    chooser = random.Random(seed)
    seen: set[str] = set()
    while True:
        turns = draw_turns(material, chooser=chooser)
        text = json.dumps(turns)
        if text in seen or sum(len(content) for _, content in turns) > MOST_CHARACTERS:
            continue
        seen.add(text)
        yield {"messages": [{"role": role, "content": content} for role, content in turns]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prose", type=Path, required=True, help="folder with the *.txt.xz files")
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file to write")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    material = load_material(arguments.prose, chooser=random.Random(arguments.seed))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", encoding="utf-8", newline="\n") as file:
        for row in itertools.islice(make_rows(material, seed=arguments.seed), arguments.rows):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{arguments.out}: {arguments.rows:,} rows")


if __name__ == "__main__":
    main()
