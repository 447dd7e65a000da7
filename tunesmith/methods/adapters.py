"""Bottleneck adapters: a small network after a block's parts (Houlsby et al. 2019, section 2; Pfeiffer et al. 2021).

    y = h + W_up f(W_down h),      W_down [D / reduction, D], W_up zero at the start

`houlsby` has one after attention and one after the feed-forward, `pfeiffer` after the feed-forward alone; both stand before
the residual sum, and so before BERT's LayerNorm (Houlsby et al., figure 2). `parallel` reads what the feed-forward reads
instead of what it gives (He et al. 2022, table 1): y = FF(x) + s W_up f(W_down x). Ours begins at the base exactly; the
papers begin near it. PEFT does not have these; the file is in our own names.

Shapes: D hidden, W the bottleneck's width.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tunesmith.errors import RecipeError
from tunesmith.methods.base import Adapter, Inserted
from tunesmith.models.load import Model

# Names within a block.
FEED_FORWARD = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "layer.1.DenseReluDense", "layer.2.DenseReluDense")
FEED_FORWARD_OUT = ("output.dense",)  # the last layer of a feed-forward that is no one module (BERT)
ATTENTION_OUT = (
    "self_attn.o_proj", "self_attn.out_proj", "attn.c_proj", "attn.Wo", "attention.dense", "attention.output.dense",
    "attention.out_lin", "layer.0.SelfAttention.o", "layer.1.EncDecAttention.o",
)  # fmt: skip
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class Bottleneck(Inserted):
    """A module, with a small network after it or beside it."""

    saved: ClassVar[dict[str, str]] = {
        f"{half}_{kind}": f"adapter_{half}.{kind}" for half in ("down", "up") for kind in ("weight", "bias")
    }

    def __init__(self, base: nn.Module, *, hidden: int, width: int, method: "Adapters", generator: torch.Generator):
        super().__init__(base)
        self.parallel, self.scaling = method.parallel, method.scaling
        self.down_weight = nn.Parameter(torch.randn(width, hidden, generator=generator) * hidden**-0.5)
        self.down_bias = nn.Parameter(torch.zeros(width))
        self.up_weight = nn.Parameter(torch.zeros(hidden, width))
        self.up_bias = nn.Parameter(torch.zeros(hidden))
        self.activation = ACTIVATIONS[method.activation]()

    def forward(self, x: Tensor) -> Tensor:
        """base(x) + s W_up f(W_down h), where h is base(x), or x when parallel."""
        out: Tensor = self.base(x)
        if not self.enabled:
            return out
        read = x if self.parallel else out
        inner = self.activation(
            nn.functional.linear(read, self.down_weight.to(read.dtype), self.down_bias.to(read.dtype))
        )
        moved = nn.functional.linear(inner, self.up_weight.to(inner.dtype), self.up_bias.to(inner.dtype))
        return out + self.scaling * moved


class Adapters(Adapter):
    """Small bottleneck networks between the base's layers."""

    kind: Literal["adapters"] = "adapters"
    summary: ClassVar[str] = "small bottleneck networks between the base's layers"
    learning_rate: ClassVar[float] = 1e-3
    merges: ClassVar[bool] = False
    placement: Literal["houlsby", "pfeiffer"] = Field(
        default="pfeiffer", description="after attention and feed-forward, or after the feed-forward alone"
    )
    reduction: int = Field(default=16, ge=1, description="the hidden size over the bottleneck's width")
    parallel: bool = Field(default=False, description="beside the feed-forward instead of after it")
    scaling: float = Field(default=1.0, gt=0, description="s in the formula")
    activation: Literal["relu", "gelu", "silu"] = Field(default="relu", description="f in the formula")

    @model_validator(mode="after")
    def _parallel_is_one(self) -> "Adapters":
        if self.parallel and self.placement == "houlsby":
            raise ValueError("parallel adapters stand beside the feed-forward alone: leave out placement: houlsby")
        return self

    def places(self, model: Model) -> list[str]:
        """The feed-forwards, and attention's last layers. RecipeError where they are not found or too narrow."""
        after = FEED_FORWARD + FEED_FORWARD_OUT
        if self.parallel and all(_parts(model, leaves=after)) and not all(_parts(model, leaves=FEED_FORWARD)):
            raise RecipeError(
                f"the feed-forward of '{model.name}' is several modules, and no one of them to stand beside",
                hint="leave out method.parallel",
            )
        parts = _parts(model, leaves=after)
        if self.placement == "houlsby":
            parts += _parts(model, leaves=ATTENTION_OUT)
        if not all(parts):
            raise RecipeError(
                f"method 'adapters' does not know where the parts of '{model.name}' are", hint="use method: lora"
            )
        if self.reduction > model.hidden_size:
            raise RecipeError(
                f"method.reduction is {self.reduction} and the base's hidden size {model.hidden_size}", hint="use less"
            )
        return sorted(name for part in parts for name in part)

    def insert(self, base: nn.Module, *, name: str, model: Model, generator: torch.Generator) -> Inserted:
        """A bottleneck that adds nothing yet."""
        width = model.hidden_size // self.reduction
        return Bottleneck(base, hidden=model.hidden_size, width=width, method=self, generator=generator)

    def config(self, model: Model, *, layers: dict[str, Inserted]) -> dict[str, Any]:
        """The knobs."""
        return self.model_dump(mode="json")


def _parts(model: Model, *, leaves: tuple[str, ...]) -> list[list[str]]:
    """Which of `leaves` each block has, by their whole names."""
    blocks = {id(block) for block in model.layers}
    names = [name for name, module in model.causal.named_modules() if id(module) in blocks]
    return [[f"{name}.{leaf}" for leaf in leaves if _has(model, f"{name}.{leaf}")] for name in names]


def _has(model: Model, name: str) -> bool:
    try:
        model.causal.get_submodule(name)
    except AttributeError:
        return False
    return True
