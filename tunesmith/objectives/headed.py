"""Objectives with a head: numbers read off the hidden states of a text, instead of a next token.

    output_k = w_k . h,    h the hidden state of the last token (a decoder), or their mean or the first (an encoder)

Without a head of its own (`num_outputs` 0) an objective has its outputs from the words of the model (label_words.py). The
head is linear, starts at zero and is trained in full beside any method. What its outputs mean is calibrated on the
validation rows once training is over, and saved with it.

Shapes: B rows, S sequences, K outputs, N tokens that are read.
"""

from abc import abstractmethod
from collections.abc import Sequence as Many
from dataclasses import replace
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tunesmith.data.answers import Answer, Floats
from tunesmith.data.pack import Pack
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example, Label, Sequence
from tunesmith.errors import DataError, RecipeError
from tunesmith.objectives.base import Objective, Readout, row_error

Calibration = dict[str, float]


class Headed(Objective):
    """Base of the objectives that answer with more than a text: by the outputs of a head of their own, or of words."""

    pooling: Literal["last", "mean", "first"] | None = Field(
        default=None, description="which hidden state is read; by default the last token's, of an encoder the mean"
    )
    head_rate_factor: float = Field(
        default=10.0, gt=0, description="the head's learning rate over the method's: it starts from nothing"
    )
    metrics: ClassVar[tuple[str, ...]] = ()  # the first one decides the verdict
    baselines: ClassVar[tuple[str, ...]] = ()  # what needs no model

    def rate_factors(self) -> dict[str, float]:
        """The head's."""
        return {"outputs.weight": self.head_rate_factor}

    def for_model(self, *, encoder: bool) -> Self:
        """`pooling` filled in. The first token of a decoder sees nothing but itself."""
        if self.pooling == "first" and not encoder:
            raise RecipeError(
                "objective.pooling: the first token of a decoder sees nothing of the text",
                hint="use pooling: last or mean",
            )
        return self.model_copy(update={"pooling": self.pooling or ("mean" if encoder else "last")})

    def sequences(self, examples: list[Example], *, template: ChatTemplate, max_tokens: int) -> list[list[Sequence]]:
        """What is read of each row, with what is to be learned of it."""
        read = self.read(examples, template=template)
        values = [np.asarray(self.values(example), dtype=np.float32) for example in examples]
        return [[replace(s, values=v) for s in unit] for unit, v in zip(read, values, strict=True)]

    def read(self, examples: list[Example], *, template: ChatTemplate) -> list[list[Sequence]]:
        """What is read of each row: the text between begin and end, or the prompt as its chat template renders it."""
        found = inputs(examples, template=template)
        return [[Sequence(tokens_T, self._marks(len(tokens_T)), values=np.zeros(0, np.float32))] for tokens_T in found]

    def read_texts(self, examples: list[Example], *, template: ChatTemplate) -> list[Sequence]:
        """As `read`."""
        return [sequence for unit in self.read(examples, template=template) for sequence in unit]

    def _marks(self, num_tokens: int) -> np.ndarray:
        assert self.pooling is not None, "for_model fills it in"
        weight_T = np.full(num_tokens, float(self.pooling == "mean"), dtype=np.float32)
        weight_T[{"last": -1, "first": 0, "mean": 0}[self.pooling]] = 1
        return weight_T

    def pooled(self, readout: Readout) -> Tensor:
        """Outputs [S, K] of each sequence: the mean over its tokens that are read, which is the mean state's output."""
        output_NK, sequence_N = readout.value, readout.sequence_N
        sum_SK = output_NK.new_zeros(readout.num_sequences, output_NK.shape[1]).index_add(0, sequence_N, output_NK)
        count_S = sequence_N.new_zeros(readout.num_sequences).index_add_(0, sequence_N, torch.ones_like(sequence_N))
        return sum_SK / count_S[:, None].to(sum_SK.dtype)

    def by_row(self, readout: Readout, pack: Pack) -> tuple[Tensor, np.ndarray]:
        """Outputs [M, K] as `predictions` reads them, and the number of the row of each: here one a sequence."""
        return self.pooled(readout), pack.rows_S

    @abstractmethod
    def values(self, example: Example) -> Many[float]:
        """What is to be learned of a row, as numbers. DataError where the row does not say it."""

    @abstractmethod
    def calibrated(self, output_BK: Floats, values: list[np.ndarray]) -> Calibration:
        """What held-out outputs and values say about how outputs are to be read."""

    @abstractmethod
    def predictions(self, output_BK: Floats, *, calibration: Calibration, counts: np.ndarray) -> Answer:
        """How outputs are to be read; `counts` [B] says how many of them each row has."""

    def row_weight(self, values: np.ndarray) -> float:
        """How much a row counts."""
        return 1.0

    def count(self, pack: Pack) -> float:
        """The rows' weights."""
        return float(sum(self.row_weight(values) for values in known(pack)))


def known(pack: Pack) -> list[np.ndarray]:
    """The values of each sequence of a pack; of choices those of each row, in the order of the rows' numbers."""
    values = [v for v in pack.values_S if v is not None]
    assert len(values) == len(pack.values_S), "every sequence of an objective with a head has values"
    if pack.choice_S is None:
        return values
    return [values[first] for first in np.unique(pack.rows_S, return_index=True)[1]]


def inputs(examples: list[Example], *, template: ChatTemplate) -> list[np.ndarray]:
    """Token ids [T] of what is read of each row.

    A base without a chat template, such as an encoder, reads what was said as one plain text.
    """
    tokenizer = template.tokenizer
    plain = [_plain_text(example, template=template) for example in examples]
    texts = iter(tokenizer.encode_text([text for text in plain if text is not None]))
    found = []
    for example, text in zip(examples, plain, strict=True):
        if text is not None:
            ids = [*tokenizer.begin_ids, *next(texts), *tokenizer.end_ids]
        elif example.messages:
            ids = template.prompt(list(example.asked[0]), tools=example.tools).ids
        else:
            raise no_text(example)
        found.append(np.array(ids, dtype=np.int32))
    return found


def no_text(example: Example) -> DataError:
    """The error of a row that holds neither a text nor a conversation."""
    return row_error(
        example,
        f"a row of the form '{example.form}' has no text",
        hint="use objective: token_classification, or map columns with data.mapping: {text: COLUMN, label: COLUMN}",
    )


def _plain_text(example: Example, *, template: ChatTemplate) -> str | None:
    if example.text is not None or not (template.plain and example.messages):
        return example.text
    return "\n".join(message.content for message in example.asked[0])


def label_of(example: Example) -> Label:
    """What a row says of its text: its label, or the last assistant turn. DataError where it says nothing."""
    if example.label is not None:
        return example.label
    if example.messages:
        return example.asked[1].content.strip()
    raise row_error(
        example,
        "the row has a text and no label",
        hint="name the column: data.mapping: {text: COLUMN, label: COLUMN}",
    )
