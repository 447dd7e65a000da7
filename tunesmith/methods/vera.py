"""VeRA: random projections that all layers share, and two learned vectors a layer (Kopiczko et al. 2024, eq. 2).

    h = W0 x + b * (B (d * (A x))),      A [r, I] and B [O, r] random and frozen, d = 0.1 and b = 0 at the start

Layers of different sizes take the first rows and columns of one pair of projections, as in PEFT. The projections are saved
with the vectors, so a file needs nothing but itself.

Shapes: I and O inputs and outputs of a layer, R the rank.
"""

from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from tunesmith.methods.base import Adapter, Inserted, Targets, inserted, linear_layers, linear_shape
from tunesmith.models.load import Model


class VeraLinear(Inserted):
    """A linear layer with an update along shared random directions."""

    saved: ClassVar[dict[str, str]] = {"vera_lambda_d": "vera_lambda_d", "vera_lambda_b": "vera_lambda_b"}

    def __init__(self, base: nn.Module, *, start: float, shared: tuple[Tensor, Tensor]):
        super().__init__(base)
        self.num_in, self.num_out, self.transposed = linear_shape(base)
        self.shared = shared  # not a buffer: every layer holds the same two tensors
        self.vera_lambda_d = nn.Parameter(torch.full((len(shared[0]),), start))
        self.vera_lambda_b = nn.Parameter(torch.zeros(self.num_out))

    def forward(self, x: Tensor) -> Tensor:
        """W0 x + b * (B (d * (A x)))."""
        out: Tensor = self.base(x)
        if not self.enabled:
            return out
        a_RI, b_OR = self._projections(x.dtype)
        inner = nn.functional.linear(x, a_RI) * self.vera_lambda_d.to(x.dtype)
        return out + nn.functional.linear(inner, b_OR) * self.vera_lambda_b.to(x.dtype)

    def _projections(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        a_RI, b_OR = self.shared
        return a_RI[:, : self.num_in].to(dtype), b_OR[: self.num_out].to(dtype)

    def fold(self) -> None:
        """W0 + (b * B) (d * A)."""
        weight = cast(Tensor, self.base.weight)
        wide = torch.promote_types(weight.dtype, torch.float32)
        a_RI, b_OR = self._projections(wide)
        delta = (self.vera_lambda_b.to(wide)[:, None] * b_OR) @ (self.vera_lambda_d.to(wide)[:, None] * a_RI)
        weight.copy_((weight.to(wide) + (delta.T if self.transposed else delta)).to(weight.dtype))


class Vera(Adapter):
    """Two learned vectors a layer around random projections that all layers share."""

    kind: Literal["vera"] = "vera"
    summary: ClassVar[str] = "two learned vectors a layer around shared random projections"
    learning_rate: ClassVar[float] = 5e-3
    peft_type: ClassVar[str | None] = "VERA"
    rank: int = Field(default=256, ge=1, description="rows of the shared projection")
    start: float = Field(default=0.1, description="d at the start")
    targets: Targets = "all-linear"

    def places(self, model: Model) -> list[str]:
        """The target layers."""
        return linear_layers(model, targets=self.targets)

    def insert(self, base: nn.Module, *, name: str, model: Model, generator: torch.Generator) -> Inserted:
        """The vectors; the first layer draws the projections for all."""
        before = [layer for layer in inserted(model).values() if isinstance(layer, VeraLinear)]
        shared = before[0].shared if before else self._drawn(model, generator=generator)
        return VeraLinear(base, start=self.start, shared=shared)

    def _drawn(self, model: Model, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A and B as large as the largest layer needs: kaiming_uniform, as in the paper's code and PEFT."""
        shapes = [linear_shape(model.causal.get_submodule(name)) for name in self.places(model)]
        a_RI = torch.empty(self.rank, max(shape[0] for shape in shapes))
        b_OR = torch.empty(max(shape[1] for shape in shapes), self.rank)
        for projection in (a_RI, b_OR):
            bound = (6 / projection.shape[1]) ** 0.5
            projection.uniform_(-bound, bound, generator=generator)
        return a_RI.to(model.device), b_OR.to(model.device)

    def shared_tensors(self, model: Model) -> dict[str, Tensor]:
        """The projections."""
        first = next(layer for layer in inserted(model).values() if isinstance(layer, VeraLinear))
        return {"base_model.vera_A": first.shared[0], "base_model.vera_B": first.shared[1]}

    def config(self, model: Model, *, layers: dict[str, Inserted]) -> dict[str, Any]:
        """PEFT's VeraConfig."""
        return {
            "r": self.rank,
            "d_initial": self.start,
            "save_projection": True,
            "bias": "none",
            "fan_in_fan_out": any(cast(VeraLinear, layer).transposed for layer in layers.values()),
            "target_modules": sorted(layers),
        }
