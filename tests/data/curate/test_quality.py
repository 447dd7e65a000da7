"""Answers that would teach bad habits, and their near misses."""

import pytest

from tunesmith.data.curate.base import quoted
from tunesmith.data.curate.quality import (
    Quality,
    cut_off,
    echo,
    encoding_damage,
    is_finished,
    leftover_markup,
    refusal,
    repetition,
)
from tunesmith.data.types import Example, Message, Origin

QUESTION = "Could you tell me how to replace the battery of the sensor in my garden?"
REPLY = "Open the lid of the sensor first. Then take the old battery out and put the new one in."


def example(answer, prompt=QUESTION, line=1):
    return Example(Origin("rows.jsonl", line), "chat", (Message("user", prompt), Message("assistant", answer)))


def check(examples):
    quality = Quality()
    problems = [problem for each in examples for problem in quality.look(each)]
    return problems + list(quality.finish())


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("Run this:\n```sh\nmake", True),
        ("Run this:\n```sh\nmake\n```", False),
        ("Say ```make``` and then ```make test```.", False),
        ('{"desk": "vault", "step": "ph', True),
        ('{"desk": "vault", "step":', True),
        ('{"desk": "vault", "step": "phone"', True),
        ('{"desk": "vault", "done": tru', True),
        ('{"desk": "vault", "step": "phone"}', False),
        ("{{Name}}, thank you for writing.", False),
        ("[Verse 1] A song begins", False),
        ("{'a': 1}", False),
        ("[" * 100_000, False),
        ("The parts are in the box (the sensor and", True),
        ("The parts are in the box (the sensor and the cable)", False),
        ("The interval is [0, 1)", False),
        ("That is sad :(", False),
        ("x = foo(a, b", True),
        ("He wrote (as is usual.", False),
    ],
)
def test_what_is_opened_and_not_closed(answer, found):
    assert (cut_off(answer) is not None) == found


@pytest.mark.parametrize(
    ("answer", "finished"),
    [
        (REPLY, True),
        (f"{REPLY} After that you can close", False),
        (f"{REPLY} After that you can close the", False),
        ("The best of all is the", False),
        ("The capital is the city of Paris", None),  # a single sentence without a stop is how many write
        (f"{REPLY}\n\nBest regards,\nYour Garden Team", None),
        (f'{REPLY} As "they say in the garden" - Joan Miller', None),
        (f"{REPLY} Try it and write to us! #garden", None),
        ("1. Open the lid of the sensor.\n2. Take the old battery out.\n3. Put the new battery into", False),
        ("1. Open the lid\n2. Take the old battery out\n3. Put the new battery back in its", False),
        ("1. Open the lid of the sensor\n2. Take the old battery out\n3. Put the new battery back", None),
        ("The sun goes down\nand all is still\nMy heart. It sleeps\nbehind the hill of dreams tonight", None),
        ("def f(x):\n    return the_sum_of(x) and more of it", None),
        ("First open it. Then see the page at https://example.com/garden", None),
        ("打开盖子。 然后取出旧电池。", None),
    ],
)
def test_sentences_that_end(answer, finished):
    assert is_finished(answer) is finished


def test_unfinished_answers_are_told_unless_the_file_is_written_so():
    unfinished = f"{REPLY} After that you can close"
    few = check([example(unfinished if line == 7 else REPLY, line=line) for line in range(1, 31)])
    assert [(problem.kind, problem.file, problem.line) for problem in few] == [("quality", "rows.jsonl", 7)]
    assert "in the middle of a sentence" in few[0].message
    assert few[0].hint
    assert check([example(unfinished if line % 2 else REPLY, line=line) for line in range(1, 31)]) == []


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but as an AI language model I cannot assist with that request.",
        "I'm sorry, but I can't assist with that request.",
        "As an AI language model, I do not have feelings.",
        "Sure, as a large language model I cannot know.",
        "I cannot help with that.",
        "I am just an AI and own no garden.",
        "Unfortunately, I’m not able to answer questions about orders.",
        "I must respectfully decline.",
        "Replacing it would go against my guidelines.",
    ],
)
def test_refusals(answer):
    found = refusal(answer)
    assert found is not None
    assert "refuses" in found[0]


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry to hear that your sensor is broken. Open its lid first.",
        "I'm sorry, but I can't find an order with this number. Which one do you mean?",
        "Unfortunately, I was away on Monday. Here is the answer.",
        "An AI is a program that learns from data.",
        "As an airline we cannot carry it.",
        "I cannot wait to see your garden!",
        "You cannot help with that.",
    ],
)
def test_what_only_sounds_like_a_refusal(answer):
    assert refusal(answer) is None


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (QUESTION, True),
        (QUESTION.upper() + " Yes!", True),
        (f"You ask: {QUESTION}", True),
        (QUESTION.replace("replace", "change"), True),
        (f"{QUESTION} {REPLY}", False),
        ("You can replace the battery of the sensor in your garden yourself.", False),
        (REPLY, False),
    ],
)
def test_answers_that_repeat_the_question(answer, found):
    assert (echo(QUESTION, answer=answer) is not None) == found


def test_short_questions_may_be_repeated():
    assert echo("Really?", answer="Really?") is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("I think " + "very " * 12 + "well of it.", True),
        ("It is so " + "on and " * 12 + "on.", True),
        (REPLY + " Please call us on Monday." * 4, True),
        ("\n".join(["Close the lid again", "wait a minute"] * 6), True),
        (" ".join(f"{REPLY} Number {number}." for number in range(2)), False),
        ("No, no, no! It is very, very good.", False),
        ("\n".join(f"Step {number}: take out screw number {number}" for number in range(12)), False),
        ("```\n" + "x = x + 1\n" * 20 + "```\nThis adds.", False),
        ("| a | b |\n" * 20, False),
        ("0 0 0 0 0 0 0 0 0 0 0 0", False),
        ("请打开盖子并取出旧电池再放入新的。" * 8, True),
        ("请打开盖子并取出旧电池。再放入新的电池。等一分钟。然后关上盖子。最后再看一次读数是否正确。", False),
    ],
)
def test_repetition(text, found):
    assert (repetition(text) is not None) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("caf\ufffd", True),
        ("café".encode().decode("latin-1"), True),
        ("don’t".encode().decode("cp1252"), True),
        ("Привет".encode().decode("latin-1"), True),
        ("Čapek".encode().decode("cp1252"), True),
        ("日本語".encode().decode("latin-1"), True),
        ("😀".encode().decode("latin-1"), True),
        ("café, naïve, Müller, SÃO PAULO, coração, Ångström, “SMÅ” – Å… «SPAÑ»", False),
        ("« voilà\xa0» dit-il… “café…” à", False),
        ("Привет, 日本語, 😀, 12 °C, £5", False),
        ("plain", False),
    ],
)
def test_damaged_encoding(text, found):
    assert (encoding_damage(text) is not None) == found


@pytest.mark.parametrize(
    ("answer", "tag"),
    [
        ("<p>Open the lid.</p>", "<p>"),
        ("Open the lid.<br/>Close it.", "<br/>"),
        ("It&nbsp;works", "&nbsp;"),
        ("Is 3 < 4 && 5 > 4? R&D; says so", ""),
        ("Write `<p>` for a paragraph </p>", ""),
        ("Dear <name>, open the lid", ""),
    ],
)
def test_leftover_markup(answer, tag):
    assert leftover_markup(answer) == tag


def test_markup_is_no_defect_where_it_is_asked_for_or_usual():
    tagged = f"<p>{REPLY}</p>"
    assert [p.line for p in check([example(tagged if n == 3 else REPLY, line=n) for n in range(1, 31)])] == [3]
    asked = [example(tagged, prompt="How do I write this in HTML?", line=1)]
    assert check(asked + [example(REPLY, line=line) for line in range(2, 31)]) == []
    assert check([example(tagged, line=line) for line in range(1, 31)]) == []


def test_lengths_far_out():
    replies = [REPLY + " It is done now, I think." * (line % 3) for line in range(1, 101)]
    assert check([example(reply, line=line) for line, reply in enumerate(replies, start=1)]) == []
    replies[41] = " ".join(f"Step {n} is to turn screw {n}." for n in range(200))
    replies[70] = "Ok"
    problems = check([example(reply, line=line) for line, reply in enumerate(replies, start=1)])
    assert [(p.line, "long" in p.message, "short" in p.message) for p in problems] == [
        (42, True, False),
        (71, False, True),
    ]
    assert (
        check([example(reply, line=line) for line, reply in enumerate(replies[30:45], start=1)]) == []
    )  # too few rows


def test_messages_quote_little_and_name_each_finding_once():
    first = Message("user", QUESTION), Message("assistant", "I cannot help with that. " + "word " * 500)
    turns = Example(Origin("rows.jsonl", 5), "chat", first * 2)
    problems = check([turns])
    assert len(problems) == 2
    assert all(problem.origin == Origin("rows.jsonl", 5) and problem.severity == "warning" for problem in problems)
    assert all(len(problem.message) < 150 for problem in problems)


def test_quotations_hold_no_personal_data():
    answers = [REPLY] * 30
    answers[4] = f"{REPLY} If that is not enough please write to jane.doe@example.com and"
    (problem,) = check([example(answer, line=line) for line, answer in enumerate(answers, start=1)])
    assert "[EMAIL_1] and" in problem.message
    assert "doe" not in problem.message
    assert len(quoted("word " * 100)) == len(quoted("word " * 100, end=True)) == 62  # 60 and the quotation marks


def test_turns_that_are_not_trained_are_not_judged():
    silent = Message("user", QUESTION), Message("assistant", "I cannot help with that.", weight=0)
    kept = Message("user", QUESTION), Message("assistant", REPLY)
    assert check([Example(Origin("rows.jsonl", 1), "chat", silent + kept)]) == []


def test_plain_text_is_read_for_repetition_and_damage_and_labelled_text_for_damage():
    text = "I saw " + "many " * 20 + "caf\ufffd"
    plain = check([Example(Origin("a.txt", 1), "text", text=text)])
    assert len(plain) == 2
    labelled = check([Example(Origin("a.txt", 1), "labelled", text=text, label="x")])
    assert [problem.message.split()[0] for problem in labelled] == ["U+FFFD"]
