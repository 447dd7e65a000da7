"""Continued pre-training on plain text: every token is predicted from what stands before it.

    loss = sum_t -log p(x_t | x_<t)  /  number of tokens predicted              (Bengio et al. 2003, eq. 1)

A text longer than the context becomes windows that overlap by one token, so each of its tokens is a target exactly once
and none is cut away. Texts never see each other, however they are packed.

`new_tokens` extends the tokenizer for these texts first (data/extend.py), which a new language or domain needs: fewer tokens
a word are fewer steps to compute, and more text in a context.
"""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from tunesmith.data.pack import Pack
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example, Sequence
from tunesmith.objectives.base import Loss, Objective, Readout, cross_entropy, row_error


class Causal(Objective):
    """Continued pre-training on raw text."""

    kind: Literal["causal"] = "causal"
    summary: ClassVar[str] = "continued pre-training on raw text"
    replays: ClassVar[bool] = True
    new_tokens: int | None = Field(
        default=None,
        ge=0,
        le=1_000_000,
        description="extend the tokenizer by this many tokens learned from the training rows; null or 0: it stays",
    )

    @property
    def num_new_tokens(self) -> int:
        """What the recipe says."""
        return self.new_tokens or 0

    def sequences(self, examples: list[Example], *, template: ChatTemplate, max_tokens: int) -> list[list[Sequence]]:
        """Windows of at most `max_tokens` tokens: begin-of-text, the text, end-of-text."""
        for example in examples:
            if example.text is None or example.label is not None:
                raise row_error(
                    example,
                    f"objective 'causal' trains on plain text and this row is of the form '{example.form}'",
                    hint="use objective: classification to learn its label, or data.form: text"
                    if example.label is not None
                    else "use objective: instruction, or map a column to text with data.mapping: {text: COLUMN}",
                )
        return [
            [
                _window(tokens_T[start : start + max_tokens])
                for start in range(0, max(1, len(tokens_T) - 1), max_tokens - 1)
            ]
            for tokens_T in _tokens(examples, template=template)
        ]

    def general_sequences(
        self, examples: list[Example], *, template: ChatTemplate, max_tokens: int
    ) -> list[list[Sequence]]:
        """Texts as windows, conversations as they are rendered; a row of one kind."""
        if examples[0].text is None:
            return template.sequences(examples)
        return self.sequences(examples, template=template, max_tokens=max_tokens)

    def read_texts(self, examples: list[Example], *, template: ChatTemplate) -> list[Sequence]:
        """Each text in one window."""
        return [_window(tokens_T) for tokens_T in _tokens(examples, template=template)]

    def units(self, sequences: list[Sequence]) -> list[list[Sequence]]:
        """Each window is a row of its own, so a long text does not fill a whole step."""
        return [[sequence] for sequence in sequences]

    def loss(self, readout: Readout, pack: Pack) -> Loss:
        """Negative log-likelihood."""
        return cross_entropy(readout, pack, count=self.count(pack))


def _tokens(examples: list[Example], *, template: ChatTemplate) -> list[np.ndarray]:
    """Ids [T] of each text between begin and end."""
    tokenizer = template.tokenizer
    texts = tokenizer.encode_text([example.text or "" for example in examples])
    return [np.array([*tokenizer.begin_ids, *ids, tokenizer.eos_id], dtype=np.int32) for ids in texts]


def _window(tokens_T: np.ndarray) -> Sequence:
    """All tokens but the first are predicted."""
    weight_T = np.ones(len(tokens_T), dtype=np.float32)
    weight_T[0] = 0
    return Sequence(tokens_T, weight_T)
