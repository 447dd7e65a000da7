"""Virtual tokens: the root node of every pack, so that each sequence stands below them and sees them.

They are computed like tokens. What they are made of is either an input embedding for each (prompt tuning, p-tuning) or keys
and values for each in every layer (prefix tuning), which take the place of those that the layer computed.

Shapes: P virtual tokens, D hidden, L layers, K key/value heads, E head dimension.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

NAME = "virtual_tokens"  # of the module inside the transformers model


class Virtual(NamedTuple):
    """What virtual tokens are made of: `embeddings_PD`, or `key_values_L2KPE`."""

    num_tokens: int
    embeddings_PD: Tensor | None = None
    key_values_L2KPE: Tensor | None = None

    def embed(self, token_1TD: Tensor) -> Tensor:
        """Input embeddings of a pack whose first P places are the virtual tokens'."""
        if self.embeddings_PD is None:
            return token_1TD
        return torch.cat([self.embeddings_PD.to(token_1TD.dtype)[None], token_1TD[:, self.num_tokens :]], dim=1)

    def attend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [1, K, T, E] of a layer with those of the virtual tokens in their first P places."""
        if self.key_values_L2KPE is None:
            return key, value
        own_2KPE = self.key_values_L2KPE[layer].to(value.dtype)
        key = torch.cat([own_2KPE[0][None], key[:, :, self.num_tokens :].to(value.dtype)], dim=2)
        return key, torch.cat([own_2KPE[1][None], value[:, :, self.num_tokens :]], dim=2)


class VirtualTokens(nn.Module):
    """Makes virtual tokens of its parameters; `enabled` is whether the model sees them."""

    enabled = True

    def __init__(self, num_tokens: int):
        super().__init__()
        self.num_tokens = num_tokens

    def forward(self) -> Virtual:
        """Called once a pack."""
        raise NotImplementedError


class Watched:
    """The attention of a pack, which keeps every layer's keys and values [1, K, T, E]."""

    def __init__(self, attention: Any):
        self.attention = attention
        self.input_ids, self.position_ids, self.virtual = attention.input_ids, attention.position_ids, attention.virtual
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Tensor:
        """query [1, H, T, E], key and value [1, K, T, E] -> [1, T, H, E]."""
        self.layers[module.layer_idx] = (key, value)
        return self.attention.attend(module, query, key, value, **keywords)
