"""What is looked up, before the questions that are trained on, as when the tuned model is asked (`data.look_up`).

In a share of the training rows stands what is most like the question, in the rest other passages or rows alone, drawn at
random, so that the model learns to use what helps and to ignore what does not (RAFT; Zhang et al. 2024, arXiv 2403.10131,
section 3). Which rows and what is drawn is a function of the prompt. A row is never shown to itself, nor to another with
the same prompt. Held-out rows have what is found, as they will be asked.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from tunesmith.data.retrieval import Lookup, Passage, look_up_passages, look_up_rows, read_passages
from tunesmith.data.settings import LookUpSettings
from tunesmith.data.split import is_helped
from tunesmith.data.types import Example, Message
from tunesmith.errors import DataError


class LookedUp:
    """Rows with passages of a folder, or with other rows, before their questions: as many as asked for and as `fits` allows.

    `rows` are those that may be shown, where `settings` names no documents; `plain`: the base has no chat template.
    NotFoundError and DataError as `read_passages`.
    """

    def __init__(
        self, settings: LookUpSettings, *, rows: Iterable[Example], plain: bool, fits: Callable[[Example], bool]
    ):
        def asked_fits(messages: list[Message], example: Example) -> bool:
            return fits(_asking(example, messages))

        self.share = settings.share
        self._places: dict[str, list[int]] = {}  # of rows, by the key of what they ask
        self._lookup: Lookup[Example] | Lookup[Passage]
        if settings.documents is not None:
            passages = read_passages(Path(settings.documents))
            self._lookup, self._what = look_up_passages(passages, count=settings.passages, fits=asked_fits), "passages"
        else:
            found = look_up_rows(rows, plain=plain, count=settings.passages, fits=asked_fits)
            for place, row in enumerate(found.items):
                self._places.setdefault(row.prompt_key, []).append(place)
            self._lookup, self._what = found, "rows"

    def before(self, example: Example, *, is_trained: bool) -> tuple[Example, str]:
        """The row with what was found, or with others, before its last question, and which of both.

        DataError where it holds no question.
        """
        if not example.messages:
            raise DataError(
                f"data.look_up puts {self._what} before questions, and this row is plain text",
                file=example.origin.file,
                line=example.origin.line,
                hint="leave data.look_up out, or map columns with data.mapping: {prompt: COLUMN, completion: COLUMN}",
            )
        own = self._places.get(example.prompt_key, []) if is_trained else []
        places, reason = self._lookup.nearest(example, without=own), f"with {self._what} found"
        if is_trained and not is_helped(example.prompt_key, share=self.share):
            places, reason = self._others(example, without=[*own, *places]), f"with other {self._what}"
        messages, num_shown = self._lookup.put(example, places=places)
        return _asking(example, messages), reason if num_shown else f"without {self._what}"

    def _others(self, example: Example, *, without: list[int]) -> list[int]:
        """Places drawn at random from the others."""
        random = np.random.default_rng(int(example.prompt_key, 16))
        num_items, count = len(self._lookup.items), self._lookup.count
        drawn = random.choice(num_items, size=min(num_items, count + len(without)), replace=False)
        return [int(place) for place in drawn if place not in without][:count]


def _asking(example: Example, messages: list[Message]) -> Example:
    """The row with these messages before its last answer."""
    return replace(example, messages=(*messages, example.asked[1]))
