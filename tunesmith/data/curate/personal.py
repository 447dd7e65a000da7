"""Personal data and secrets: found by their shape, and by their check digits where they have some.

Names have no shape, and are found where there is a model for them (curate/names.py). Only the sort of a finding is named,
never its value: a report must not spread what it warns of. Most text holds nothing of the kind, so each pattern begins with
the rarest sign of its sort, and is bounded: the time is linear.
"""

import ipaddress
import re
from collections.abc import Iterator
from typing import NamedTuple

from tunesmith.data.curate.names import BATCH_ROWS, Names, with_names
from tunesmith.data.ledger import Problem
from tunesmith.data.types import Example

EMAIL = re.compile(r"@(?<=[\w%+-]@)(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
NUMBER = re.compile(r"[+(\d][\d().+ -]{6,}")  # phone, card and social security numbers, and addresses, are such runs
PHONE = re.compile(
    r"(?<![\w+.-])(?<!\d )(?:"
    r"\+\d{1,3}[ .-]?\(?\d{1,4}\)?(?:[ .-]?\d{2,4}){2,4}"  # +1-415-555-0199
    r"|\(\d{2,4}\) ?\d{3,4}[ .-]\d{3,4}"  # (202) 555-0143
    r"|\d{3}[ .-]\d{3}[ .-]\d{4}"  # 202-555-0143
    r"|0\d{2,4}[ -]\d{3,4}[ -]\d{3,4}"  # 020 7946 0958
    r")(?![\w-]| \d)"
)
CARD = re.compile(r"(?<![\w.-])(?:\d[ -]?){12,18}\d(?![\w-])")
CARD_PREFIX = re.compile(r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]|2[2-7])\d{14}|3[47]\d{13}|6\d{15}")
SOCIAL_SECURITY = re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])")
IP4 = re.compile(  # versions, sections and numbers of enzymes have four parts too
    r"(?<![\w.§])(?i:(?<!\bversion )(?<!\bversion: )(?<!\bversions )(?<!\brelease )(?<!\bfirmware )(?<!\bEC ))"
    r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}(?!\.?\w)"
)
IP6_MIDDLE = re.compile(r":[0-9A-Fa-f]{0,4}:")
IP6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{1,4}(?::{1,2}[0-9A-Fa-f]{1,4}){2,7}(?![\w:])")
IBAN = re.compile(r"[A-Z](?<!\w.)[A-Z]\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
KEY = re.compile(
    r"sk-(?<!\w...)[\w-]{20}|AKIA[A-Z0-9]{16}\b|ASIA[A-Z0-9]{16}\b|gh[pousr]_\w{36}|glpat-[\w-]{20}|hf_\w{30}"
    r"|xox[abprs]-[\w-]{10}|AIza[\w-]{35}|eyJ[\w-]{10,2000}\.eyJ[\w-]{10}|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----"
)
PASSWORD = re.compile(
    r"(?:password|passwd|pwd|api[_-]?key|secret[_-]?key|access[_-]?token)[\"']?\s{0,3}[:=]\s{0,3}"
    r"(?P<value>\"[^\"\s]{8,200}\"|'[^'\s]{8,200}'|(?=\S{0,30}\d)[^\s\"'(){}<>\[\]]{8,200})",
    re.IGNORECASE,
)
PASSWORD_WORDS = ("password", "passwd", "pwd", "key", "token")
BEFORE_AT = re.compile(r"[\w.+%'-]{1,64}\Z")
AFTER_KEY = re.compile(r"[\w.+/=-]*")
END_OF_KEY = re.compile(r"-----END [A-Z ]{0,30}PRIVATE KEY-----")
MAX_KEY_CHARACTERS = 20_000
LOCAL_ADDRESSES = {"0.0.0.0", "127.0.0.1", "255.255.255.255"}
A_NAME = "a name"  # the sort of what has no shape


class Personal:
    """Tells of rows with personal data or secrets, by their sorts; of names, where there is a model for them."""

    name = "personal"

    def __init__(self, names: Names | None = None):
        self._names = names
        self._rows: list[Example] = []

    def look(self, example: Example) -> Iterator[Problem]:
        """What the row alone says, or what a batch of rows does: a model reads several at once."""
        self._rows.append(example)
        if self._names is None or len(self._rows) == BATCH_ROWS:
            yield from self.finish()

    def finish(self) -> Iterator[Problem]:
        """What the last rows say."""
        rows, self._rows = self._rows, []
        for example, names in with_names(rows, names=self._names):
            yield from self._problems(example, sorts=[A_NAME] if names else [])

    def _problems(self, example: Example, *, sorts: list[str]) -> Iterator[Problem]:
        text = example.all_text
        for kind, found in (("personal_data", [*find_personal(text), *sorts]), ("secret", find_secrets(text))):
            if found:
                message = f"{' and '.join(found)} in the text would be learned"
                hint = "data.personal: mask puts placeholders in their place"
                yield Problem(kind, "warning", *example.origin, message=message, hint=hint)


def find_personal(text: str) -> list[str]:
    """The sorts of personal data in a text, for a sentence: `an e-mail address`, `a phone number`, ..."""
    found = set()
    if "@" in text and EMAIL.search(text):
        found.add("an e-mail address")
    for run in NUMBER.finditer(text):
        found |= _find_in_number(text, start=run.start(), end=min(run.end() + 2, len(text)))
    if any(is_iban(match[0]) for match in IBAN.finditer(text)):
        found.add("a bank account number")
    for middle in IP6_MIDDLE.finditer(text):
        start = max(middle.start() - 4, 0)
        if any(_is_address(match[0]) for match in IP6.finditer(text, start, middle.end() + 40)):
            found.add("an IP address")
            break
    return sorted(found)


def _find_in_number(text: str, *, start: int, end: int) -> set[str]:
    """What a run of digits and their separators is; what stands around it decides, so it is matched in place."""
    found = set()
    if PHONE.search(text, start, end):
        found.add("a phone number")
    if any(is_card(match[0]) for match in CARD.finditer(text, start, end)):
        found.add("a card number")
    if SOCIAL_SECURITY.search(text, start, end):
        found.add("a social security number")
    if any(_is_address(match[0]) for match in IP4.finditer(text, start, end)):
        found.add("an IP address")
    return found


def find_secrets(text: str) -> list[str]:
    """The sorts of secrets in a text: `an access key`, `a password`."""
    found = ["an access key"] if KEY.search(text) else []
    if _talks_of_passwords(text) and PASSWORD.search(text):
        found.append("a password")
    return found


def _talks_of_passwords(text: str) -> bool:
    lower = text.lower()
    return any(word in lower for word in PASSWORD_WORDS)


class Finding(NamedTuple):
    """What stands at text[start:end]: one of the sorts of `find_personal` and `find_secrets`."""

    start: int
    end: int
    sort: str


def findings(text: str) -> list[Finding]:
    """Everything that `find_personal` and `find_secrets` tell of, in order and without overlaps."""
    found = [*_addresses(text), *_accounts(text), *_secrets(text)]
    for run in NUMBER.finditer(text):
        found += _numbers(text, start=run.start(), end=min(run.end() + 2, len(text)))
    apart: list[Finding] = []
    for finding in sorted(found):
        if apart and finding.start < apart[-1].end:
            apart[-1] = apart[-1]._replace(end=max(apart[-1].end, finding.end))
        else:
            apart.append(finding)
    return apart


def _addresses(text: str) -> Iterator[Finding]:
    for match in EMAIL.finditer(text) if "@" in text else ():
        before = BEFORE_AT.search(text, max(0, match.start() - 64), match.start())
        yield Finding(before.start() if before else match.start(), match.end(), "an e-mail address")
    for middle in IP6_MIDDLE.finditer(text):
        for match in IP6.finditer(text, max(middle.start() - 4, 0), middle.end() + 40):
            if _is_address(match[0]):
                yield Finding(*match.span(), "an IP address")


def _accounts(text: str) -> Iterator[Finding]:
    for match in IBAN.finditer(text):
        if is_iban(match[0]):
            yield Finding(*match.span(), "a bank account number")


def _numbers(text: str, *, start: int, end: int) -> Iterator[Finding]:
    for match in PHONE.finditer(text, start, end):
        yield Finding(*match.span(), "a phone number")
    for match in CARD.finditer(text, start, end):
        if is_card(match[0]):
            yield Finding(*match.span(), "a card number")
    for match in SOCIAL_SECURITY.finditer(text, start, end):
        yield Finding(*match.span(), "a social security number")
    for match in IP4.finditer(text, start, end):
        if _is_address(match[0]):
            yield Finding(*match.span(), "an IP address")


def _secrets(text: str) -> Iterator[Finding]:
    for match in KEY.finditer(text):
        rest = AFTER_KEY.match(text, match.end())
        whole = END_OF_KEY.search(text, match.end(), match.end() + MAX_KEY_CHARACTERS) if match[0][0] == "-" else rest
        yield Finding(match.start(), whole.end() if whole else match.end(), "an access key")
    for match in PASSWORD.finditer(text) if _talks_of_passwords(text) else ():
        yield Finding(*match.span("value"), "a password")


def is_iban(text: str) -> bool:
    """Whether the check digits are right (ISO 13616: the rearranged number is 1 modulo 97)."""
    compact = text.replace(" ", "")
    if not 15 <= len(compact) <= 34:
        return False
    return int("".join(str(int(character, 36)) for character in compact[4:] + compact[:4])) % 97 == 1


def is_card(text: str) -> bool:
    """Whether it begins as a card does, has a card's length, and the Luhn sum is right."""
    digits = re.sub(r"[ -]", "", text)
    if not CARD_PREFIX.fullmatch(digits):
        return False
    doubled = [int(digit) * (1 + index % 2) for index, digit in enumerate(reversed(digits))]
    return sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return text not in LOCAL_ADDRESSES
