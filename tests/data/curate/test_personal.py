"""Personal data and secrets by their shape; what only looks alike is left alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.curate.personal import find_personal, find_secrets, is_card, is_iban


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
