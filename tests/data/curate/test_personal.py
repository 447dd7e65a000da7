"""Personal data and secrets by their shape; what only looks alike is left alone."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.curate.masking import Masker, masked
from tunesmith.data.curate.personal import find_personal, find_secrets, findings, is_card, is_iban
from tunesmith.data.types import Example, Message, Origin


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("write to jane.doe@example.com.", "e-mail"),
        ("JOHN_SMITH+news@mail.example.org", "e-mail"),
        ("call (202) 555-0143 after six", "phone"),
        ("+1-415-555-0199", "phone"),
        ("020 7946 0958", "phone"),
        ("202-555-0143", "phone"),
        ("DE89 3704 0044 0532 0130 00", "bank"),
        ("GB82WEST12345698765432", "bank"),
        ("card 4111 1111 1111 1111.", "card"),
        ("3782-822463-10005", "card"),
        ("000-12-3456", "social security"),
        ("at 192.0.2.44.", "IP"),
        ("2001:db8::1 answers", "IP"),
        ("the diversion 192.0.2.44 answers", "IP"),
    ],
)
def test_personal_data(text, word):
    assert any(word in sort for sort in find_personal(text))


@pytest.mark.parametrize(
    "text",
    [
        "Order 5550199 has 12 parts at 3.50 each; see section 4.1.1.",
        "The handle @example_user is no address",
        "purchase 113542617735902",
        "4111 1111 1111 1112",
        "DE89 3704 0044 0532 0130 01",
        "version 1.2.3.4.5 of 2024-05-06 12:30:45",
        "300.1.2.3 and 127.0.0.1",
        "since Version 10.2.14.3, version: 9.1.0.2 or release 8.0.1.1 of v1.2.3.4",
        "pectinesterase (EC 3.1.1.11), as §15.12.2.7 says",
        "std::vector<a::b> x",
        "3.14159265358979 and 1,000,000",
        "",
    ],
)
def test_look_alikes(text):
    assert find_personal(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "sk-EXAMPLE0000000000000000000000000000000000000000",
        "aws_access_key_id = AKIAIOSFODNN7EXAMPLE",
        'DB_PASSWORD="correct-horse-battery-staple-example"',
        "-----BEGIN RSA PRIVATE KEY-----",
        "api_key: 0123456789abcdef",
    ],
)
def test_secrets(text):
    assert find_secrets(text)


@pytest.mark.parametrize(
    "text", ["the password is wrong", "password = input()", "risk-taking-is-good-for-everybody", ""]
)
def test_talk_of_secrets(text):
    assert find_secrets(text) == []


@given(st.integers(0, 10**15 - 1))
def test_a_wrong_digit_breaks_a_card_number(number):
    body = f"4{number:015d}"[:-1]
    valid = [digit for digit in "0123456789" if is_card(body + digit)]
    assert len(valid) == 1


def test_check_digits_of_accounts():
    assert is_iban("GB82 WEST 1234 5698 7654 32")
    assert not is_iban("GB28 WEST 1234 5698 7654 32")


def test_long_runs_take_linear_time():
    """A quadratic pattern would not end here."""
    for unit in ("a.", "1-", "1 ", "::1", "a@a.", "password=", "AB12 ", "eyJa"):
        text = unit * (200_000 // len(unit))
        find_personal(text)
        find_secrets(text)


PIECES = [
    "jane.doe@example.com", "O'Brien+x@mail.example.org", "(202) 555-0143", "+1-415-555-0199", "020 7946 0958",
    "DE89 3704 0044 0532 0130 00", "4111 1111 1111 1111", "000-12-3456", "192.0.2.44", "2001:db8::1",
    "sk-EXAMPLE0000000000000000000000000000000000000000", "AKIAIOSFODNN7EXAMPLE", 'password="correct-horse-battery"',
    "Api_Key: 0123456789abcdef",
    "-----BEGIN RSA PRIVATE KEY-----\nabc\ndef\n-----END RSA PRIVATE KEY-----",
]  # fmt: skip


@given(st.lists(st.one_of(st.sampled_from(PIECES), st.sampled_from(["word", "12", "İ", ""])), max_size=8))
def test_nothing_is_left_behind_a_mask_and_nothing_else_changes(pieces):
    text = "; ".join(pieces)
    found = findings(text)
    assert {f.sort for f in found} == {*find_personal(text), *find_secrets(text)}
    masked = Masker().text(text)
    assert find_personal(masked) == find_secrets(masked) == []
    kept, last = "", 0
    for start, end, _ in found:
        kept, last = kept + text[last:start], end
    assert re.sub(r"\[[A-Z]+_\d+\]", "", masked) == kept + text[last:]


@given(st.text(alphabet="ab@.:-+()0123456789 DEsk_/", max_size=60))
def test_findings_are_those_that_are_told_of(text):
    found = findings(text)
    assert all(a.end <= b.start for a, b in pairwise(found))
    assert bool(found) == bool([*find_personal(text), *find_secrets(text)])


@pytest.mark.parametrize("piece", PIECES)
def test_the_whole_of_a_piece_is_replaced(piece):
    masked = Masker().text(f"before {piece} after")
    assert re.fullmatch(r"before (password=|Api_Key: )?\[[A-Z]+_1\] after", masked), masked


def test_a_value_has_one_placeholder_in_all_turns_of_a_row():
    call = {"tool_calls": [{"function": {"name": "mail", "arguments": '{"to": "b@example.com"}'}}]}
    row = Example(
        Origin("rows", 1), "chat",
        (Message("user", "Mail a@example.com and b@example.com"), Message("assistant", "To b@example.com", 0.5, call)),
    )  # fmt: skip
    found, number = masked(row)
    assert number == 4
    assert [m.content for m in found.messages] == ["Mail [EMAIL_1] and [EMAIL_2]", "To [EMAIL_2]"]
    assert found.messages[1].weight == 0.5
    assert found.messages[1].extra["tool_calls"][0]["function"]["arguments"] == '{"to": "[EMAIL_2]"}'
    plain = Example(Origin("rows", 2), "text", text="nothing here")
    assert masked(plain) == (plain, 0)
