"""Made-up text, and ways to change it."""

from collections.abc import Callable

import numpy as np

SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
VOCABULARY = np.array(
    sorted({"".join(parts) for parts in np.random.default_rng(0).choice(SYLLABLES, (12_000, 3)).tolist()})
)
SENTENCE_WORDS = 9

Change = Callable[[np.random.Generator, list[str]], list[str]]


def some_words(random: np.random.Generator, num_words: int) -> list[str]:
    """Words of a vocabulary of 12,000 in sentences: a capital at the beginning, a full stop at the end."""
    words = random.choice(VOCABULARY, num_words).tolist()
    for start in range(0, num_words, SENTENCE_WORDS):
        last = min(start + SENTENCE_WORDS, num_words) - 1
        words[start], words[last] = words[start].capitalize(), f"{words[last]}."
    return words


def as_they_are(random: np.random.Generator, words: list[str]) -> list[str]:
    """No change."""
    return list(words)


def case_and_punctuation(random: np.random.Generator, words: list[str]) -> list[str]:
    """Capitals, commas and full stops elsewhere."""
    return [word.upper().rstrip(".") + ("," if random.random() < 0.2 else "") for word in words]


def words_changed(share: float) -> Change:
    """That share of the words replaced, one at least."""

    def change(random: np.random.Generator, words: list[str]) -> list[str]:
        changed = list(words)
        for place in random.choice(len(words), max(1, round(share * len(words))), replace=False):
            changed[place] = str(random.choice(VOCABULARY))
        return changed

    return change


def sentences_reordered(random: np.random.Generator, words: list[str]) -> list[str]:
    """The same sentences in another order."""
    sentences = [words[start : start + SENTENCE_WORDS] for start in range(0, len(words), SENTENCE_WORDS)]
    order = np.roll(np.arange(len(sentences)), 1)
    return [word for number in order for word in sentences[number]]


def beginning(share: float) -> Change:
    """That share of it, from the beginning."""
    return lambda random, words: words[: round(share * len(words))]
