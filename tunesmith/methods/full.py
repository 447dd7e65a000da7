"""Full fine-tuning: every parameter moves.

    theta <- theta - lr * AdamW(d loss / d theta)        for all theta of the base

The strongest and the most expensive method, and the one that forgets most. The result is a whole model.
"""

from pathlib import Path
from typing import ClassVar, Literal

from tunesmith.errors import ModelError
from tunesmith.methods.base import Method, freeze
from tunesmith.models.load import Model, load_model


class Full(Method):
    """Every parameter moves."""

    kind: Literal["full"] = "full"
    summary: ClassVar[str] = "every parameter moves"
    learning_rate: ClassVar[float] = 5e-5
    saves_model: ClassVar[bool] = True
    keeps_base: ClassVar[bool] = False

    def apply(self, model: Model, *, seed: int) -> None:
        """Mark every parameter."""
        for parameter in model.causal.parameters():
            parameter.requires_grad_(True)

    def merge(self, model: Model) -> None:
        """Nothing was inserted."""

    def save(self, model: Model, *, folder: Path) -> None:
        """The whole model in the transformers layout."""
        model.save(folder)

    def load(self, model: Model, *, folder: Path) -> None:
        """Replace the base's weights by those in `folder`."""
        saved = load_model(str(folder)).causal.state_dict()
        own = model.causal.state_dict()
        if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in own.items()}:
            raise ModelError("the saved weights do not fit the base", file=folder, hint="use the run's own base")
        model.causal.load_state_dict(saved)
        freeze(model)
