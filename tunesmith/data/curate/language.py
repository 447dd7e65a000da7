"""Rows in another language than the file's main ones, and answers in another language than their prompts.

The language of a text is py3langid's (a naive Bayes classifier over byte n-grams, Lui and Baldwin 2012, with
probabilities made comparable across lengths), of its first 300 characters without code, addresses and placeholders.
Of 16,000 pieces of English prose with 30 letters, at a probability of 0.8, none was taken for another language
(benchmarks/thresholds.py). With 20 none was either, but languages that are near each other were not tried so short. A
language that more than 5 % of the rows have, or a pair of languages of prompt and answer (a translation), is the file's
own. Memory is 11 bytes a row.
"""

import functools
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from tunesmith.data.curate.base import Places, answers
from tunesmith.data.ledger import Problem
from tunesmith.data.types import Example
from tunesmith.errors import MissingExtraError

MIN_LETTERS = 30
MIN_PROBABILITY = 0.8
MAIN_SHARE, MIN_MAIN_ROWS = 0.05, 3
MAX_CHARACTERS = 300
UNKNOWN = 255

NOT_PROSE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]{1,200}`|https?://\S+|\{\{?[^{}\n]{1,80}\}\}?|<[^<>\n]{1,80}>"
    r"|^[^\n]{0,400}(?:[=;{}\\_|]|\w\(\w*\))[^\n]*$",  # a line of code
    re.DOTALL | re.MULTILINE,
)

LANGUAGES = {
    "af": "Afrikaans", "ar": "Arabic", "az": "Azerbaijani", "be": "Belarusian", "bg": "Bulgarian", "bn": "Bengali",
    "bs": "Bosnian", "ca": "Catalan", "cs": "Czech", "cy": "Welsh", "da": "Danish", "de": "German", "el": "Greek",
    "en": "English", "es": "Spanish", "et": "Estonian", "eu": "Basque", "fa": "Persian", "fi": "Finnish",
    "fr": "French", "ga": "Irish", "gl": "Galician", "gu": "Gujarati", "he": "Hebrew", "hi": "Hindi",
    "hr": "Croatian", "hu": "Hungarian", "hy": "Armenian", "id": "Indonesian", "is": "Icelandic", "it": "Italian",
    "ja": "Japanese", "ka": "Georgian", "kk": "Kazakh", "ko": "Korean", "la": "Latin", "lt": "Lithuanian",
    "lv": "Latvian", "mk": "Macedonian", "ml": "Malayalam", "mr": "Marathi", "ms": "Malay", "nl": "Dutch",
    "no": "Norwegian", "pa": "Punjabi", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian",
    "sk": "Slovak", "sl": "Slovenian", "sq": "Albanian", "sr": "Serbian", "sv": "Swedish", "sw": "Swahili",
    "ta": "Tamil", "te": "Telugu", "th": "Thai", "tl": "Tagalog", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu",
    "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip
"""The languages told apart: those with many speakers or texts; a rarer one is taken for the nearest of them."""
CODES = list(LANGUAGES)
ASKS_FOR_LANGUAGE = re.compile(
    rf"\b(?:{'|'.join(LANGUAGES.values())}|translat\w*|languages?|übersetz\w*|tradu\w+|vertaal\w*|traduz\w*)\b|перев|翻[译訳譯]|번역",
    re.IGNORECASE,
)


@functools.cache
def _identifier() -> Any:
    """The classifier of languages, which takes most of a second to load: once a process."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise MissingExtraError(
            f"the check of languages needs py3langid, which cannot be imported: {error}",
            hint="pip install 'tunesmith[curate]'",
        ) from error
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(CODES)
    # The weights of the chosen languages, in the layout and precision that they are read in for every text.
    identifier.nb_ptc = np.ascontiguousarray(identifier.nb_ptc, np.float32)
    return identifier


class Language:
    """Rows and answers in a language that the file hardly has. Raises MissingExtraError without py3langid.

    min_letters, min_probability: a text with less has no language; main_share: a language of more rows is the file's own.
    """

    name = "language"

    def __init__(
        self,
        *,
        min_letters: int = MIN_LETTERS,
        min_probability: float = MIN_PROBABILITY,
        main_share: float = MAIN_SHARE,
    ) -> None:
        self.min_letters, self.min_probability, self.main_share = min_letters, min_probability, main_share
        self._identifier = _identifier()
        self._places = Places()
        self._asked, self._answered = array("B"), array("B")  # numbers in CODES
        self._may_differ = array("B")  # whether the prompt asks for another language

    def look(self, example: Example) -> Iterator[Problem]:
        """Note the languages; a row alone says nothing."""
        prompt, answer = [(example.plain_text or "", ""), *answers(example)][-1]
        self._places.add(example.origin)
        self._asked.append(self._language(prompt))
        self._answered.append(self._language(answer))
        self._may_differ.append(bool(ASKS_FOR_LANGUAGE.search(prompt)))
        yield from ()

    def finish(self) -> Iterator[Problem]:
        """Answers in another language than their prompt, and rows in another than the file's main ones."""
        pairs = Counter(zip(self._asked, self._answered, strict=True))
        num_both = sum(number for pair, number in pairs.items() if UNKNOWN not in pair)
        languages = self._counts()
        del languages[UNKNOWN]
        least = max(self.main_share * languages.total(), MIN_MAIN_ROWS)
        main = {number for place, (number, rows) in enumerate(languages.most_common()) if rows > least or not place}
        names = " and ".join(LANGUAGES[CODES[number]] for number in sorted(main))
        for row, pair in enumerate(zip(self._asked, self._answered, strict=True)):
            if UNKNOWN not in pair and pair[0] != pair[1]:
                if not self._may_differ[row] and pairs[pair] <= max(self.main_share * num_both, MIN_MAIN_ROWS):
                    asked, answered = (LANGUAGES[CODES[number]] for number in pair)
                    message = f"the prompt is in {asked}, the answer in {answered}"
                    yield self._problem(row, message=message, hint="answer in the language of the prompt")
            elif (number := self._row_language(*pair)) != UNKNOWN and number not in main and not self._may_differ[row]:
                message = f"the row is in {LANGUAGES[CODES[number]]}, the file in {names}"
                yield self._problem(row, message=message, hint="see whether it belongs here")

    def counts(self) -> dict[str, int]:
        """The rows in each language, the most frequent first; `unknown` are those that say too little."""
        return {"unknown" if n == UNKNOWN else LANGUAGES[CODES[n]]: rows for n, rows in self._counts().most_common()}

    def _counts(self) -> Counter[int]:
        return Counter(self._row_language(*pair) for pair in zip(self._asked, self._answered, strict=True))

    def _row_language(self, asked: int, answered: int) -> int:
        return asked if answered == UNKNOWN else answered

    def _language(self, text: str) -> int:
        """The number of the text's language in CODES; UNKNOWN where it is short or not certain."""
        prose = NOT_PROSE.sub(" ", text[: 4 * MAX_CHARACTERS])[:MAX_CHARACTERS]
        if sum(map(str.isalpha, prose)) < self.min_letters:
            return UNKNOWN
        code, probability = self._identifier.classify(prose)
        return CODES.index(code) if probability >= self.min_probability else UNKNOWN

    def _problem(self, row: int, *, message: str, hint: str) -> Problem:
        return Problem("language", "warning", *self._places[row], message=message, hint=hint)
