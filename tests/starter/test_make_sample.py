import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from make_sample import DESKS, LEVELS, MOST_ALIKE, STEPS, SYSTEM, draw_tickets, make_rows, shingles, similarity
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "tunesmith" / "starter" / "sample"


def read_rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (SAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


ROWS = {name: read_rows(name) for name in ("train", "test")}


def tickets(name: str) -> list[str]:
    return [row["messages"][1]["content"] for row in ROWS[name]]


def answers(name: str) -> list[str]:
    return [row["messages"][2]["content"] for row in ROWS[name]]


def test_the_committed_files_are_what_the_generator_makes():
    train, test = make_rows()
    assert ROWS["train"] == train
    assert ROWS["test"] == test


@pytest.mark.parametrize("name", ["train", "test"])
def test_each_row_is_a_valid_conversation_with_a_compact_json_answer(name: str):
    for row in ROWS[name]:
        assert list(row) == ["messages"]
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        assert row["messages"][0]["content"] == SYSTEM
        ticket, answer = (message["content"] for message in row["messages"][1:])
        assert ticket == ticket.strip()
        assert not set("{}<>|") & set(ticket), ticket
        labels = json.loads(answer)
        assert list(labels) == ["desk", "level", "step"]
        assert labels["desk"] in DESKS
        assert labels["level"] in LEVELS
        assert labels["step"] in STEPS
        assert answer == json.dumps(labels, separators=(",", ":"))


def test_sizes_and_balance():
    assert (len(ROWS["train"]), len(ROWS["test"])) == (432, 144)
    assert set(Counter(answers("train")).values()) == {6}
    assert set(Counter(answers("test")).values()) == {2}
    assert len(set(answers("train"))) == len(set(answers("test"))) == 72


def test_phrasings_that_meet_in_a_test_ticket_never_meet_in_training():
    train, test = ({pair for ticket in tickets for pair in ticket.pairs} for tickets in draw_tickets(seed=0))
    assert test
    assert not train & test


def test_every_test_phrasing_was_seen_in_training():
    train, test = (
        {phrasing for ticket in tickets for phrasing in ticket.phrasings} for tickets in draw_tickets(seed=0)
    )
    assert test <= train


def test_no_two_tickets_are_nearly_alike():
    pieces = [shingles(ticket.lower()) for ticket in tickets("train") + tickets("test")]
    assert max(similarity(one, other) for one, other in itertools.combinations(pieces, 2)) <= MOST_ALIKE


def test_rows_are_short():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes" / "starter" / "tokenizer")
    for row in ROWS["train"] + ROWS["test"]:
        assert len(tokenizer.apply_chat_template(row["messages"])["input_ids"]) < 120


def test_another_seed_gives_other_tickets_of_the_same_form():
    train, test = make_rows(seed=1)
    assert (len(train), len(test)) == (432, 144)
    assert len({row["messages"][1]["content"] for row in train} & set(tickets("train"))) < 5
