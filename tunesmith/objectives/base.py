"""What an objective is: what is trained on, and a loss as (sum, count).

An objective reads log-probabilities at its targets, or the outputs of a head of its own at the tokens that are read
(objectives/headed.py). The count is known from the data before the forward pass. The loop adds it up over micro-batches
and processes and divides once, so the loss does not depend on how rows were batched, packed, accumulated or sharded.

Shapes: N targets, S sequences, K outputs of a head.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from tunesmith.data.pack import Pack
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example, Sequence
from tunesmith.errors import DataError, RecipeError

Reads = Literal["logprobs", "outputs", "hidden", "divergences"]


@dataclass(frozen=True)
class Readout:
    """What an objective reads of the model, and where it belongs.

    `value` is logprob_N, the log-probabilities at the targets of a pack; or output_NK, the head's outputs, or hidden_ND,
    hidden states, at the tokens that are read. `divergence_N` is how far the targets' distributions are from a teacher's.
    """

    value: Tensor
    weight_N: Tensor
    sequence_N: Tensor
    num_sequences: int
    divergence_N: Tensor | None = None

    @classmethod
    def of(cls, value: Tensor, pack: Pack, *, divergence_N: Tensor | None = None) -> "Readout":
        """What was read at the sources of a pack."""
        weight_N = torch.from_numpy(pack.weight_N).to(value.device, value.dtype)
        sequence_N = torch.from_numpy(pack.sequence_N).to(value.device)
        return cls(value, weight_N, sequence_N, len(pack.rows_S), divergence_N)


@dataclass(frozen=True)
class Loss:
    """`sum` is differentiable; `metrics` are further (sum, count) pairs."""

    sum: Tensor
    count: float
    metrics: dict[str, tuple[float, float]]


class Objective(BaseModel, ABC):
    """Base of all objectives: a frozen pydantic model with its knobs."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    summary: ClassVar[str] = ""
    whole_units: ClassVar[bool] = False  # the sequences of a unit are read together, so they stay in one pack
    idle: ClassVar[tuple[str, ...]] = ()  # settings of the class above that it has no use for, and refuses
    replays: ClassVar[bool] = False  # general texts and conversations can be trained on beside the rows of the task
    reads_source: ClassVar[bool] = False  # an encoder reads the prompt and a decoder writes the answer

    @property
    def kind_name(self) -> str:
        """What recipes call it."""
        return str(self.model_dump(include={"kind"})["kind"])

    @property
    def reads(self) -> Reads:
        """What `loss` is given: log-probabilities of the targets, the head's outputs, hidden states, or how far the
        distribution of each target is from a teacher's."""
        return "outputs" if self.num_outputs else "logprobs"

    @property
    def num_outputs(self) -> int:
        """K, the outputs of its head; 0 for none: it reads log-probabilities."""
        return 0

    def for_model(self, *, encoder: bool) -> Self:
        """The objective with what depends on the kind of base filled in. RecipeError where the two do not go together."""
        if encoder:
            raise RecipeError(
                f"objective '{self.kind_name}' predicts the next token, and this base is an encoder",
                hint="use objective: classification, regression, token_classification or contrastive, or another base",
            )
        return self

    def check_base(self, *, encoder_decoder: bool) -> None:
        """RecipeError where an encoder-decoder is needed and the base is none, or the other way round."""
        if self.reads_source and not encoder_decoder:
            raise RecipeError(
                f"objective '{self.kind_name}' needs an encoder-decoder, and this base is none",
                hint="use objective: instruction, or a base of the T5 family",
            )
        if encoder_decoder and not self.reads_source:
            raise RecipeError(
                f"objective '{self.kind_name}' does not work on an encoder-decoder, and this base is one",
                hint="use objective: seq2seq, or another base",
            )

    def fitted(self, examples: Iterable[tuple[Example, bool]]) -> Self:
        """The objective with what it takes from the data filled in: labels, scales.

        `examples` are all rows that may be used, each with whether it is trained on.
        """
        return self

    @property
    def num_new_tokens(self) -> int:
        """How many tokens the tokenizer gains before anything is prepared."""
        return 0

    @abstractmethod
    def sequences(self, examples: list[Example], *, template: ChatTemplate, max_tokens: int) -> list[list[Sequence]]:
        """For each example, what is read and trained. Raises TemplateError or DataError naming the row."""

    def read_texts(self, examples: list[Example], *, template: ChatTemplate) -> list[Sequence]:
        """What is read of plain texts, for the token contract; nothing where conversations alone are read."""
        return []

    @property
    def teacher_base(self) -> str | None:
        """The model whose distributions are learned, None where there is none."""
        return None

    @property
    def divergence_options(self) -> dict[str, Any]:
        """How the distance from a teacher is measured, where there is one."""
        return {}

    def rate_factors(self) -> dict[str, float]:
        """Factors on the learning rate of parameters of its own, by name."""
        return {}

    def general_sequences(
        self, examples: list[Example], *, template: ChatTemplate, max_tokens: int
    ) -> list[list[Sequence]]:
        """For each general row, a text or a conversation, what is read and trained; for objectives that replay."""
        raise NotImplementedError(f"{self.kind_name} does not replay")

    def cut(self, sequences: list[Sequence], *, num_tokens: int) -> list[Sequence]:
        """The beginnings of a row's sequences, some too long, where the recipe allows to truncate."""
        return [sequence.cut(num_tokens) for sequence in sequences]

    def units(self, sequences: list[Sequence]) -> list[list[Sequence]]:
        """How the sequences of one example are shuffled and counted as rows of a step: together."""
        return [sequences]

    def groups(self, values: Iterable[np.ndarray]) -> np.ndarray | None:
        """Rows [G, M] that are learned from together, in the place of single ones, from their values; None for single."""
        return None

    def count(self, pack: Pack) -> float:
        """What the pack adds to the divisor, known before the forward pass."""
        return float(pack.weight_N.sum(dtype="float64"))

    @abstractmethod
    def loss(self, readout: Readout, pack: Pack) -> Loss:
        """The pack's share of the sum. Pure."""


@dataclass
class Totals:
    """Adds up (sum, count) pairs by name, over micro-batches, in float64."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, *, sum: float, count: float) -> None:
        """Add one pair."""
        self.sums[name] = self.sums.get(name, 0.0) + sum
        self.counts[name] = self.counts.get(name, 0.0) + count

    @classmethod
    def of(cls, parts: "list[Totals]") -> "Totals":
        """Several added up."""
        found = cls()
        for part in parts:
            for name in part.sums:
                found.add(name, sum=part.sums[name], count=part.counts[name])
        return found

    def mean(self, name: str) -> float:
        """The one division."""
        return self.sums[name] / self.counts[name]


def row_error(example: Example, message: str, *, hint: str) -> DataError:
    """A DataError at the row's place."""
    return DataError(message, file=example.origin.file, line=example.origin.line, hint=hint)


def cross_entropy(readout: Readout, pack: Pack, *, count: float) -> Loss:
    """Weighted negative log-likelihood of the targets: sum_n -w_n logprob_n over sum_n w_n."""
    return Loss(torch.sum(-readout.value * readout.weight_N), count, {})
