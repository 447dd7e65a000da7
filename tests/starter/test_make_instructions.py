import itertools
import json
import lzma
import random
import re
from pathlib import Path

import fact_skills
import pytest
import word_skills
from make_instructions import MOST_CHARACTERS, SKILLS, TALKS, WAYS, make_rows
from material import Material, load_material, plain_sentences
from prepare_corpus import SEPARATOR, is_validation
from wording import listed

SUBJECTS = ["The old man", "My sister", "A small dog", "The captain", "Our teacher", "The young queen"]
VERBS = ["walked slowly to", "looked quietly at", "dreamt of", "had never seen", "wrote about", "ran away from"]
OBJECTS = ["the long river", "a white house", "the silent garden", "her new letter", "an empty road", "the market"]


def invented_document(number: int) -> str:
    """Paragraphs of plain sentences, some of them questions."""
    chooser = random.Random(number)
    paragraphs = [
        " ".join(
            f"{chooser.choice(SUBJECTS)} {chooser.choice(VERBS)} {chooser.choice(OBJECTS)}{chooser.choice('...?!')}"
            for _ in range(8)
        )
        for _ in range(3)
    ]
    return "\n\n".join(paragraphs)


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prose")
    documents = [invented_document(number) for number in range(60)]
    files = {
        "literature-00": documents,
        "technical-01": ["Attribution is wanted for this one sentence."],
        "heldout": ["Nobody may ever copy this one sentence."],
    }
    for name, texts in files.items():
        (folder / f"{name}.txt.xz").write_bytes(lzma.compress(SEPARATOR.join(texts).encode("utf-8")))
    return folder


@pytest.fixture(scope="module")
def material(prose: Path) -> Material:
    drawn = load_material(prose, chooser=random.Random(0))
    return Material(
        sentences=drawn.sentences,
        passages=drawn.passages,
        words=list(dict.fromkeys([*drawn.words, *listed("one two three four five six seven stone cloud lamp paper")])),
    )


def test_material_is_drawn_from_free_training_documents_only(prose: Path, material: Material):
    kept = [invented_document(number) for number in range(60) if not is_validation(invented_document(number))]
    assert {sentence for text in kept for part in text.split("\n\n") for sentence in plain_sentences(part)} == set(
        material.sentences
    )
    assert all("this one sentence" not in text for text in material.sentences + material.passages)
    assert all(200 <= len(passage) <= 900 for passage in material.passages)


def test_plain_sentences_stand_alone():
    paragraph = (
        "The house stood by the sea. Then Mr. Brown went to the old town. It is so. In 1848 it all began again. "
        'The murder was never solved by anyone. Did you ever see the sea? Well, said the man, "come in."'
    )
    assert plain_sentences(paragraph) == ["The house stood by the sea.", "Did you ever see the sea?"]


def test_rows_are_valid_different_and_repeatable(material: Material):
    rows = list(itertools.islice(make_rows(material, seed=3), 1500))
    assert rows == list(itertools.islice(make_rows(material, seed=3), 1500))
    assert rows[:20] != list(itertools.islice(make_rows(material, seed=4), 20))
    assert len({json.dumps(row) for row in rows}) == len(rows)
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert turns
        for message in row["messages"]:
            assert message["content"].strip(), row
            assert not re.search(r"<[a-z_]+>|<\|", message["content"]), row
        assert all(
            message["content"] == message["content"].strip()
            for message in row["messages"]
            if message["role"] == "assistant"
        )
        assert sum(len(message["content"]) for message in row["messages"]) <= MOST_CHARACTERS
    text = json.dumps(rows)
    assert "Triage" not in text
    assert '\\"desk\\"' not in text


@pytest.mark.parametrize("maker", SKILLS, ids=lambda maker: maker.__name__)
def test_each_skill_is_shown_in_each_way(maker, material: Material):
    for seed, way in itertools.product(range(30), WAYS):
        chooser = random.Random(seed)
        skill = maker(chooser, material)
        assert skill.instruction == skill.instruction.strip()
        assert not set("{}|<>") & set(skill.instruction), skill.instruction
        for role, content in way(skill, chooser=chooser):
            assert role in ("system", "user", "assistant")
            assert content.strip()


@pytest.mark.parametrize("maker", TALKS, ids=lambda maker: maker.__name__)
def test_each_talk_ends_with_an_answer(maker, material: Material):
    for seed in range(60):
        turns = maker(random.Random(seed), material)
        assert turns[-1][0] == "assistant"
        assert all(content.strip() and not set("{}|<>") & set(content) for _, content in turns), turns


def drawn(maker, material: Material, *, count: int = 200):
    """(instruction, text, answer) of many skills of one kind."""
    for seed in range(count):
        skill = maker(random.Random(seed), material)
        yield (skill.instruction, *skill.draw())


def test_answers_of_word_skills_are_right(material: Material):
    for instruction, text, answer in drawn(word_skills.calculate, material):
        one, sign, other = text.split()
        expected = {"+": int(one) + int(other), "-": int(one) - int(other), "*": int(one) * int(other)}[sign]
        assert int(answer) == expected, instruction
    for instruction, text, answer in drawn(word_skills.extreme_number, material):
        numbers = [int(number) for number in re.findall(r"\d+", text)]
        largest = re.search(r"largest|biggest|highest|greatest", instruction)
        assert int(answer) == (max(numbers) if largest else min(numbers))
    for instruction, text, answer in drawn(word_skills.compare_numbers, material):
        one, other = (int(number) for number in re.findall(r"\d+", text))
        bigger = re.search(r"larger|bigger|greater|more", instruction) is not None
        assert answer == ("yes" if (one > other) == bigger else "no")
    for instruction, text, answer in drawn(word_skills.pick_word, material):
        words = [word.strip(".?!,") for word in text.split()]
        place = {"first": 0, "second": 1, "third": 2, "fourth": 3, "last": -1}
        assert answer == next(words[at] for name, at in place.items() if f" {name}" in instruction)
    for instruction, text, answer in drawn(word_skills.neighbour_word, material):
        *words, bracketed = text.split()
        at = words.index(bracketed.strip("()"))
        assert answer == words[at + (1 if "after" in instruction else -1)]


def test_answers_of_fact_skills_are_in_the_text(material: Material):
    for maker in (fact_skills.extract_fact, fact_skills.look_up, fact_skills.member_of_list):
        for _, text, answer in drawn(maker, material):
            assert answer in json.loads(f"[{json.dumps(text)}]")[0]
    for instruction, text, answer in drawn(fact_skills.extract_json, material):
        for key, value in json.loads(answer).items():
            assert key in instruction
            assert value in text
    for instruction, text, answer in drawn(fact_skills.judge_json, material):
        labels = json.loads(answer)
        assert labels.pop("tone") in instruction
        assert all(value in text for value in labels.values())
    for instruction, text, answer in drawn(fact_skills.convert_record, material):
        record, lines = (answer, text) if answer.startswith("{") else (text, answer)
        assert "\n".join(f"{key}: {value}" for key, value in json.loads(record).items()) == lines, instruction
