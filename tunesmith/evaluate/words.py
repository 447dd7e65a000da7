"""Words in what is asked: which groups a row's prompt names, and the same prompt with words swapped.

Words are whole words, whatever their case. What is searched are the turns before the answer without the system prompt, which
all rows share, or the plain text.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from tunesmith.data.types import Example
from tunesmith.errors import DataError, NotFoundError


def read_groups(path: str) -> dict[str, re.Pattern[str]]:
    """The words of each group, as a pattern, from a YAML or JSON file: a mapping of names to lists of words.

    Raises NotFoundError where there is no such file, DataError where it holds something else.
    """
    found = _read(path)
    if not isinstance(found, dict) or len(found) < 2 or not all(_are_words(words) for words in found.values()):
        raise DataError(
            "this is no mapping of two groups or more to lists of words",
            file=path,
            hint="write, for example, {women: [she, her], men: [he, his]}; words such as yes and no in quotes",
        )
    return {str(name): whole_words(words) for name, words in found.items()}


def read_swaps(path: str) -> dict[str, str]:
    """What each word, in lower case, is swapped for, from a YAML or JSON file: a list of pairs. Errors as `read_groups`."""
    found = _read(path)
    if not isinstance(found, list) or not found or not all(_are_words(pair) and len(pair) == 2 for pair in found):
        raise DataError(
            "this is no list of pairs of words",
            file=path,
            hint="write, for example, [[he, she], [Mary, John]]; words such as yes and no in quotes",
        )
    swaps: dict[str, str] = {}
    for pair in found:
        for word, other in (pair, pair[::-1]):
            if word.lower() in swaps:
                raise DataError(f"the word '{word}' stands here twice", file=path, hint="give each word one other")
            swaps[word.lower()] = other
    return swaps


def _read(path: str) -> Any:
    try:
        return yaml.safe_load(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise NotFoundError("there is no such file", file=path, hint="give a YAML or JSON file of words") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"it cannot be read: {error}", file=path, hint="give a YAML or JSON file of words") from error


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(word, str) and word.strip() for word in value)


def whole_words(words: Iterable[str]) -> re.Pattern[str]:
    """What finds any of the words; of two that begin alike, the longer."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)


def asked_text(example: Example) -> str:
    """What is searched of a row."""
    if not example.messages:
        return example.plain_text or ""
    return "\n".join(message.content for message in example.asked[0] if message.role != "system")


def swapped(example: Example, *, swaps: dict[str, str]) -> Example | None:
    """The row with every word of `swaps` in its prompt replaced by the other; None where there is none."""
    pattern = whole_words(swaps)
    if pattern.search(asked_text(example)) is None:
        return None

    def text_of(text: str) -> str:
        return pattern.sub(lambda match: _in_case_of(match[0], word=swaps[match[0].lower()]), text)

    if not example.messages:
        return replace(example, text=text_of(example.plain_text or ""))
    num_asked = len(example.asked[0])
    messages = tuple(
        replace(message, content=text_of(message.content))
        if place < num_asked and message.role != "system"
        else message
        for place, message in enumerate(example.messages)
    )
    return replace(example, messages=messages)


def _in_case_of(found: str, *, word: str) -> str:
    """`word` in capitals, or with a capital first letter, where `found` is."""
    if len(found) > 1 and found.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if found[:1].isupper() else word
