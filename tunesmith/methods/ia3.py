"""(IA)3: keys, values and the feed-forward's inner activations, each scaled by a learned vector (Liu et al. 2022, eq. 1).

    l_k * (W_k x),      l_v * (W_v x),      W_2 (l_ff * f(W_1 x)),      all l = 1 at the start

Ours is the paper's; where a base computes queries, keys and values in one layer, the whole of it is scaled, as in PEFT.
On BERT PEFT's default scales the input of attention's last layer as well; ours keeps to the three of the paper.
"""

from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from tunesmith.errors import RecipeError
from tunesmith.methods.base import Adapter, Inserted, linear_layers, linear_shape
from tunesmith.models.load import Model

OUTPUTS = (
    "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn",
    "attention.self.key", "attention.self.value", "k_lin", "v_lin", "Wqkv",
    "SelfAttention.k", "SelfAttention.v", "EncDecAttention.k", "EncDecAttention.v",
)  # layers whose output is scaled  # fmt: skip
INPUTS = (
    "down_proj", "dense_4h_to_h", "mlp.c_proj", "mlp.Wo", "fc2", "ffn.lin2", "output.dense", "DenseReluDense.wo",
)  # layers whose input is scaled  # fmt: skip
NEITHER = ("attention.output.dense",)  # called like the end of BERT's feed-forward, and none


class Scaled(Inserted):
    """A linear layer whose output, or input, is multiplied by a learned vector."""

    saved: ClassVar[dict[str, str]] = {"ia3_l": "ia3_l"}

    def __init__(self, base: nn.Module, *, scales_input: bool):
        super().__init__(base)
        num_in, num_out, _ = linear_shape(base)
        self.scales_input = scales_input
        self.ia3_l = nn.Parameter(torch.ones(1, num_in) if scales_input else torch.ones(num_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        """W (l * x) + b, or l * (W x + b)."""
        if not self.enabled:
            return cast(Tensor, self.base(x))
        if self.scales_input:
            return cast(Tensor, self.base(x * self.ia3_l.flatten().to(x.dtype)))
        out = self.base(x)
        return out * self.ia3_l.flatten().to(out.dtype)

    def fold(self) -> None:
        """The scale into the weight."""
        weight, bias = cast(Tensor, self.base.weight), cast(Tensor | None, self.base.bias)
        scale = self.ia3_l.T if linear_shape(self.base)[2] else self.ia3_l
        weight.copy_((weight.to(torch.promote_types(weight.dtype, torch.float32)) * scale).to(weight.dtype))
        if bias is not None and not self.scales_input:
            bias.copy_((bias.float() if bias.dtype.itemsize < 4 else bias) * self.ia3_l.flatten())


class Ia3(Adapter):
    """Keys, values and inner activations, each scaled by a learned vector."""

    kind: Literal["ia3"] = "ia3"
    summary: ClassVar[str] = "keys, values and inner activations, each scaled by a learned vector"
    learning_rate: ClassVar[float] = 5e-3
    peft_type: ClassVar[str | None] = "IA3"
    outputs: tuple[str, ...] | None = Field(
        default=None, description="layers whose output is scaled; keys and values by default"
    )
    inputs: tuple[str, ...] | None = Field(
        default=None, description="layers whose input is scaled; the feed-forward's last by default"
    )

    def places(self, model: Model) -> list[str]:
        """The layers that are scaled. RecipeError where there are none."""
        outputs, inputs = self._outputs(model), self._inputs(model)
        if both := sorted(set(outputs) & set(inputs)):
            raise RecipeError(f"{both[0]} is in method.outputs and in method.inputs", hint="name it in one of them")
        return sorted(outputs + inputs)

    def _outputs(self, model: Model) -> list[str]:
        return linear_layers(model, targets=self.outputs) if self.outputs is not None else _known(model, OUTPUTS)

    def _inputs(self, model: Model) -> list[str]:
        return linear_layers(model, targets=self.inputs) if self.inputs is not None else _known(model, INPUTS)

    def insert(self, base: nn.Module, *, name: str, model: Model, generator: torch.Generator) -> Inserted:
        """A vector of ones."""
        return Scaled(base, scales_input=_is(name, INPUTS) if self.inputs is None else _named(name, self.inputs))

    def config(self, model: Model, *, layers: dict[str, Inserted]) -> dict[str, Any]:
        """PEFT's IA3Config."""
        inputs = [name for name, layer in layers.items() if cast(Scaled, layer).scales_input]
        transposed = any(linear_shape(layer.base)[2] for layer in layers.values())
        return {"target_modules": sorted(layers), "feedforward_modules": inputs, "fan_in_fan_out": transposed}


def _named(name: str, suffixes: tuple[str, ...]) -> bool:
    return any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)


def _is(name: str, suffixes: tuple[str, ...]) -> bool:
    return _named(name, suffixes) and not _named(name, NEITHER)


def _known(model: Model, suffixes: tuple[str, ...]) -> list[str]:
    found = [name for name in linear_layers(model, targets="all-linear") if _is(name, suffixes)]
    if not found and suffixes is OUTPUTS:
        raise RecipeError(
            "method 'ia3' does not know which layers of this base compute keys and values",
            hint="name them in method.outputs",
        )
    return found
