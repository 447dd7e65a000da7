"""What a tuning method is: which parameters move. Freezing, counting, saving and loading exist here once.

A method changes a loaded model in place: it inserts modules or marks parameters as trainable. All that moves is then
found by `requires_grad`, so the optimiser, checkpoints and counts need to know nothing of methods.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save_file
from torch import Tensor

from tunesmith.errors import ModelError
from tunesmith.models.load import Model


class Method(BaseModel, ABC):
    """Base of all methods: a frozen pydantic model with its knobs."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    summary: ClassVar[str] = ""
    learning_rate: ClassVar[float] = 1e-4  # the vetted default when the recipe gives none

    @abstractmethod
    def apply(self, model: Model, *, seed: int) -> None:
        """Insert modules and mark what is trained; everything else is frozen before. Deterministic by `seed`."""

    @contextlib.contextmanager
    def disabled(self, model: Model) -> Iterator[None]:
        """Inside the block the model computes what its base computes. ModelError where the base is gone (`full`)."""
        raise ModelError(f"method '{type(self).__name__.lower()}' keeps no base to go back to", hint="load the base")
        yield

    @abstractmethod
    def merge(self, model: Model) -> None:
        """Fold what was inserted into the base weights and take it out: a plain model of the same shape."""

    @abstractmethod
    def save(self, model: Model, *, folder: Path) -> None:
        """Write the tuned result: an adapter in PEFT's format, or a whole model."""

    @abstractmethod
    def load(self, model: Model, *, folder: Path) -> None:
        """Apply the method to a fresh base and read back what `save` wrote. Nothing is trainable afterwards."""


def freeze(model: Model) -> None:
    """Nothing moves until a method says so."""
    for parameter in model.causal.parameters():
        parameter.requires_grad_(False)


def trainable(model: Model) -> dict[str, Tensor]:
    """What moves, by name, in a fixed order; tied parameters once."""
    return {name: p for name, p in model.causal.named_parameters() if p.requires_grad}


def num_trainable(model: Model) -> int:
    """How many numbers move."""
    return sum(p.numel() for p in trainable(model).values())


def save_tensors(tensors: dict[str, Tensor], *, path: Path) -> None:
    """Write tensors as safetensors, contiguous and on the CPU."""
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, str(path), metadata={"format": "pt"})


def set_trainable_dtype(model: Model, *, frozen: torch.dtype) -> None:
    """Frozen floating-point weights in `frozen`, whatever moves in float32."""
    for parameter in model.causal.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else frozen)
