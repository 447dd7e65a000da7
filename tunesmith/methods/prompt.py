"""Prompt tuning: learned input embeddings before every sequence (Lester et al. 2021, section 2).

    p(y | [P; X]),      P [P, D] trained, everything else frozen

Ours differs in that the virtual tokens are one root node of the pack: they are computed once for all its rows.

Shapes: P virtual tokens, D hidden.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from tunesmith.methods.virtual import VirtualTokenMethod
from tunesmith.models.load import Model
from tunesmith.models.virtual import Virtual, VirtualTokens


class EmbeddingTable(VirtualTokens):
    """Virtual tokens that are their own embeddings."""

    def __init__(self, embeddings_PD: Tensor):
        super().__init__(len(embeddings_PD))
        self.embeddings_PD = nn.Parameter(embeddings_PD)

    def forward(self) -> Virtual:
        """The table."""
        return Virtual(self.num_tokens, embeddings_PD=self.embeddings_PD)


def embeddings(model: Model, *, tokens_P: Tensor) -> Tensor:
    """The base's input embeddings of tokens, float32 at least."""
    with torch.no_grad():
        found: Tensor = model.causal.get_input_embeddings()(tokens_P.to(model.device))
    return found.to(torch.promote_types(found.dtype, torch.float32), copy=True)


class Prompt(VirtualTokenMethod):
    """Learned input embeddings before every sequence."""

    kind: Literal["prompt"] = "prompt"
    summary: ClassVar[str] = "learned input embeddings before every sequence"
    learning_rate: ClassVar[float] = 3e-2
    peft_type: ClassVar[str | None] = "PROMPT_TUNING"

    def make(self, model: Model, *, start_P: Tensor, generator: torch.Generator) -> VirtualTokens:
        """A table that begins at real tokens' embeddings."""
        return EmbeddingTable(embeddings(model, tokens_P=start_P))

    def table(self, module: VirtualTokens) -> Tensor:
        """The embeddings [P, D]."""
        found = module().embeddings_PD
        assert found is not None
        return found

    def fixed(self, model: Model, *, table: Tensor) -> VirtualTokens:
        """The same kind of table."""
        return EmbeddingTable(table)
