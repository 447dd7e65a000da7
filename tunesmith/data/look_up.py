"""Passages before the questions that are trained on, as they stand there when the tuned model is asked (`data.look_up`).

In a share of the training rows stand the passages most like the question, in the rest others alone, drawn at random, so
that the model learns to use what helps and to ignore what does not (RAFT; Zhang et al. 2024, arXiv 2403.10131, section 3).
Which rows and which passages is a function of the prompt, so that rows that are added change nothing for others. Held-out
rows have what is found, as they will be asked.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from tunesmith.data.retrieval import PassageLookup, read_passages
from tunesmith.data.settings import LookUpSettings
from tunesmith.data.split import is_helped
from tunesmith.data.types import Example, Message
from tunesmith.errors import DataError


class Passages:
    """The passages of a folder, and rows with them: as many as are asked for and as `fits` allows.

    NotFoundError and DataError as `read_passages`.
    """

    def __init__(self, settings: LookUpSettings, *, fits: Callable[[Example], bool]):
        self.settings = settings
        self._lookup = PassageLookup(
            read_passages(Path(settings.documents)),
            count=settings.passages,
            fits=lambda messages, example: fits(_asking(example, messages)),
        )

    def shown(self, example: Example, *, is_trained: bool) -> tuple[Example, str]:
        """The row with passages before its last question, and which. DataError where it holds no question."""
        if not example.messages:
            raise DataError(
                "data.look_up puts passages before questions, and this row is plain text",
                file=example.origin.file,
                line=example.origin.line,
                hint="leave data.look_up out, or map columns with data.mapping: {prompt: COLUMN, completion: COLUMN}",
            )
        places, reason = self._lookup.nearest(example), "with passages found"
        if is_trained and not is_helped(example.prompt_key, share=self.settings.share):
            places, reason = self._others(example, found=places), "with other passages"
        passages = self._lookup.fitting(example, places)
        shown = _asking(example, self._lookup.before(example, passages))
        return shown, reason if passages else "without passages"

    def _others(self, example: Example, *, found: list[int]) -> list[int]:
        """Places of passages drawn at random from those that were not found."""
        random = np.random.default_rng(int(example.prompt_key, 16))
        num_passages, count = len(self._lookup.passages), self.settings.passages
        drawn = random.choice(num_passages, size=min(num_passages, count + len(found)), replace=False)
        return [int(place) for place in drawn if place not in found][:count]


def _asking(example: Example, messages: list[Message]) -> Example:
    """The row with these messages before its last answer."""
    return replace(example, messages=(*messages, example.asked[1]))
