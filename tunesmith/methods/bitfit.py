"""BitFit: only the base's biases are trained (Ben Zaken et al. 2022, section 3).

    y = W x + b,      b trained, W frozen

Many decoders (Llama, Qwen3, Gemma) have no biases and are refused; `method: {kind: layers, only: norms}` is the nearest
thing there.
"""

from typing import ClassVar, Literal

from tunesmith.errors import RecipeError
from tunesmith.methods.base import Subset
from tunesmith.models.load import Model


class Bitfit(Subset):
    """The base's own biases."""

    kind: Literal["bitfit"] = "bitfit"
    summary: ClassVar[str] = "the base's own biases"
    learning_rate: ClassVar[float] = 1e-3

    def chosen(self, model: Model) -> list[str]:
        """Every bias. RecipeError where there is none."""
        names = [name for name, _ in model.causal.named_parameters() if name.endswith("bias")]
        if not names:
            raise RecipeError(
                f"method 'bitfit' trains biases and '{model.name}' has none",
                hint="use method: {kind: layers, only: norms} or method: lora",
            )
        return names
