"""Prefix tuning: learned keys and values in every layer, before every sequence (Li and Liang 2021, eq. 2-3).

    attention(q, [K_prefix; K], [V_prefix; V]),      [K_prefix; V_prefix] = start + MLP(E)  with `reparameterise`

They begin at the keys and values that the base computes for real tokens, so a prefix of some text is that prompt at the
start. Ours differs in two ways: the MLP is added to that start with its last layer zero (the paper's begins at random, and
its real-word start is only for the direct form), and the prefix is a root node of the pack.

Shapes: P virtual tokens, L layers, K key/value heads, E head dimension, W the MLP's width.
"""

from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tunesmith.data.pack import build_pack
from tunesmith.data.types import Sequence
from tunesmith.errors import ModelError
from tunesmith.methods.virtual import VirtualTokenMethod
from tunesmith.models.load import Model
from tunesmith.models.virtual import Virtual, VirtualTokens, Watched

WIDTH = 512


class KeyValueTable(VirtualTokens):
    """Keys and values themselves."""

    def __init__(self, start_L2KPE: Tensor):
        super().__init__(start_L2KPE.shape[3])
        self.key_values_L2KPE = nn.Parameter(start_L2KPE)

    def forward(self) -> Virtual:
        """The table."""
        return Virtual(self.num_tokens, key_values_L2KPE=self.key_values_L2KPE)


class KeyValueEncoder(VirtualTokens):
    """Keys and values as a fixed start and what an MLP makes of trained inputs."""

    def __init__(self, start_L2KPE: Tensor, *, width: int):
        self_shape = start_L2KPE.shape
        super().__init__(self_shape[3])
        self.register_buffer("start_L2KPE", start_L2KPE)
        self.inputs_PW = nn.Parameter(torch.randn(self_shape[3], width))
        last = nn.Linear(width, start_L2KPE.numel() // self_shape[3])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.Tanh(), last)

    def forward(self) -> Virtual:
        """The start, moved."""
        start_L2KPE = cast(Tensor, self.start_L2KPE)
        moved = _from_rows(self.mlp(self.inputs_PW), shape=start_L2KPE.shape)
        return Virtual(self.num_tokens, key_values_L2KPE=start_L2KPE + moved)


def _rows(key_values_L2KPE: Tensor) -> Tensor:
    """PEFT's layout: [P, L * 2 * K * E]."""
    return key_values_L2KPE.permute(3, 0, 1, 2, 4).flatten(1)


def _from_rows(rows: Tensor, *, shape: torch.Size) -> Tensor:
    """The other way."""
    layers, two, heads, tokens, dimension = shape
    return rows.view(tokens, layers, two, heads, dimension).permute(1, 2, 3, 0, 4)


class Prefix(VirtualTokenMethod):
    """Learned keys and values in every layer."""

    kind: Literal["prefix"] = "prefix"
    summary: ClassVar[str] = "learned keys and values in every layer"
    learning_rate: ClassVar[float] = 5e-3
    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    reparameterise: bool = Field(default=False, description="compute them by an MLP while training")
    width: int = Field(default=WIDTH, ge=1, description="of the MLP")

    @model_validator(mode="after")
    def _width_of_something(self) -> "Prefix":
        if self.width != WIDTH and not self.reparameterise:
            raise ValueError("width has no effect without reparameterise: true")
        return self

    def make(self, model: Model, *, start_P: Tensor, generator: torch.Generator) -> VirtualTokens:
        """A table, or an MLP, that begins at real tokens' keys and values."""
        start = _key_values(model, tokens_P=start_P)
        return KeyValueEncoder(start, width=self.width) if self.reparameterise else KeyValueTable(start)

    def table(self, module: VirtualTokens) -> Tensor:
        """The keys and values as PEFT lays them out."""
        found = module().key_values_L2KPE
        assert found is not None
        return _rows(found)

    def fixed(self, model: Model, *, table: Tensor) -> VirtualTokens:
        """The keys and values themselves."""
        module = model.virtual_tokens
        assert module is not None
        found = module().key_values_L2KPE
        assert found is not None
        return KeyValueTable(_from_rows(table, shape=found.shape).contiguous())

    def config(self, model: Model) -> dict[str, Any]:
        """PEFT counts the key/value heads where there are fewer of them."""
        module = model.virtual_tokens
        assert module is not None
        found = module().key_values_L2KPE
        assert found is not None
        heads, width = found.shape[2], found.shape[2] * found.shape[4]
        return {"token_dim": width, "num_attention_heads": heads, "prefix_projection": False}


def _key_values(model: Model, *, tokens_P: Tensor) -> Tensor:
    """The keys and values of every layer for these tokens: [L, 2, K, P, E], float32 at least."""
    length = len(tokens_P)
    if model.device.type == "meta":  # shapes alone
        shape = model.causal.config
        heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
        dimension = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
        return torch.empty(len(model.layers), 2, heads, length, dimension, device="meta")
    ids = tokens_P.numpy().astype(np.int32)
    watched = Watched(model.attention(build_pack([Sequence(ids, np.zeros(length, np.float32))])))
    with torch.no_grad():
        model.hidden(watched)
    layers = [torch.cat(watched.layers[index]) for index in sorted(watched.layers)]
    if len({layer.shape for layer in layers}) != 1:
        raise ModelError(
            "the layers of this base have keys of different shapes, which prefix tuning does not support",
            hint="use method: lora or prompt",
        )
    stacked = torch.stack(layers)
    return stacked.to(torch.promote_types(stacked.dtype, torch.float32))
