"""What an objective is: what is trained on, and a loss as (sum, count).

The count is known from the data before the forward pass. The loop adds it up over micro-batches and processes and
divides once, so the loss does not depend on how rows were batched, packed, accumulated or sharded.

Shapes: N targets, S sequences.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from tunesmith.data.pack import Pack
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example, Sequence


@dataclass(frozen=True)
class Readout:
    """What an objective reads of the model: log-probabilities at the targets of a pack, and where they belong."""

    logprob_N: Tensor
    weight_N: Tensor
    sequence_N: Tensor
    num_sequences: int


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

    @abstractmethod
    def sequences(self, examples: list[Example], *, template: ChatTemplate, max_tokens: int) -> list[list[Sequence]]:
        """For each example, what is read and trained. Raises TemplateError or DataError naming the row."""

    def units(self, sequences: list[Sequence]) -> list[list[Sequence]]:
        """How the sequences of one example are shuffled and counted as rows of a step: together."""
        return [sequences]

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

    def mean(self, name: str) -> float:
        """The one division."""
        return self.sums[name] / self.counts[name]


def cross_entropy(readout: Readout, pack: Pack, *, count: float) -> Loss:
    """Weighted negative log-likelihood of the targets: sum_n -w_n logprob_n over sum_n w_n."""
    return Loss(torch.sum(-readout.logprob_N * readout.weight_N), count, {})
