"""Answers of an encoder-decoder under way: the sources are read once, then every call computes one token a row.

All rows of a batch have written the same number of tokens, so their own keys and values are one tensor without gaps. Those
of the sources stand in slots; sources of like length meet in one batch (generate/scheduler.py), so few slots stay empty,
and an empty one is seen by nobody.

Shapes: B rows, E packed tokens of the encoder, H heads, D head dimension, S slots for a source, C slots for an answer.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tunesmith.models.encoder_decoder import decode, distance_bias, encode
from tunesmith.models.load import Model

FIRST_SLOTS = 16


class PairKeyValues:
    """Keys and values of a batch, layer by layer: of its sources, and of what was written so far.

    `max_length` is how many tokens the decoder reads at most, the one that every answer begins with included.
    """

    def __init__(self, model: Model, sources: Sequence[Sequence[int]], *, max_length: int):
        self.model, self.device, self.max_length = model, model.device, max_length
        self.lengths = [len(source) for source in sources]
        ids = torch.tensor([token for source in sources for token in source], device=self.device)
        self.encoder_1ED = encode(model.causal, ids[None], lengths=self.lengths)
        lengths_B = torch.tensor(self.lengths, device=self.device)
        self.slot_BS = torch.arange(max(self.lengths), device=self.device) < lengths_B[:, None]
        self.sources: dict[int, tuple[Tensor, Tensor]] = {}
        self.written: dict[int, tuple[Tensor, Tensor]] = {}
        self.num_written = 0

    def start(self) -> "PairStep":
        """The first call, which reads the sources too."""
        return self.step(torch.full((len(self.lengths),), self.model.start_id, device=self.device))

    def step(self, tokens_B: Tensor) -> "PairStep":
        """One more token for every row -> the attention of the call that computes them."""
        self.num_written += 1
        return PairStep(self, tokens_B)

    def source(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, D] of the sources; key and value [1, H, E, D] are read at the first call alone."""
        if layer not in self.sources:
            self.sources[layer] = self._slots(key), self._slots(value)
        return self.sources[layer]

    def _slots(self, packed: Tensor) -> Tensor:
        # zeros: a slot that no row sees has weight zero, and zero times what uninitialised memory holds may be NaN
        rows, slots = self.slot_BS.shape
        found = packed.new_zeros(rows, slots, packed.shape[1], packed.shape[3])
        found[self.slot_BS] = packed[0].transpose(0, 1)
        return found.transpose(1, 2).contiguous()

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one key and value a row, [1, H, B, D] -> all that were written, [B, H, C, D]."""
        new = key[0].transpose(0, 1), value[0].transpose(0, 1)
        stored = self.written.get(layer)
        if stored is None or self.num_written > stored[0].shape[2]:
            slots = min(self.max_length, max(FIRST_SLOTS, 2 * self.num_written))
            grown = [x.new_empty(x.shape[0], x.shape[1], slots, x.shape[2]) for x in new]
            for wide, narrow in zip(grown, stored or (), strict=False):
                wide[:, :, : self.num_written - 1] = narrow[:, :, : self.num_written - 1]
            self.written[layer] = stored = grown[0], grown[1]
        for slots_BHCD, x in zip(stored, new, strict=True):
            slots_BHCD[:, :, self.num_written - 1] = x
        return stored[0][:, :, : self.num_written], stored[1][:, :, : self.num_written]

    def keep(self, order: list[int]) -> None:
        """Keep the rows `order`, in that order; only those that change their place are copied."""
        self.lengths = [self.lengths[old] for old in order]
        moved = [new for new, old in enumerate(order) if new != old]
        to, source = (torch.tensor(x, dtype=torch.long, device=self.device) for x in (moved, [order[n] for n in moved]))

        def kept(rows: Tensor) -> Tensor:
            if moved:
                rows[to] = rows[source]
            return rows[: len(order)]

        self.slot_BS = kept(self.slot_BS)
        for stored in (self.sources, self.written):
            for layer, (key, value) in stored.items():
                stored[layer] = kept(key), kept(value)


class PairStep:
    """The attention of a call that computes one token a row, against its source and all that it has written."""

    virtual = None

    def __init__(self, cache: PairKeyValues, tokens_B: Tensor):
        self.cache, self.input_ids = cache, tokens_B[None]
        decoder = cache.model.causal.decoder
        bias_HR = distance_bias(decoder, longest=cache.num_written, both_ways=False)
        self.bias_HC = bias_HR[:, : cache.num_written]  # distances up to 0

    def hidden(self, causal: Any) -> Tensor:
        """Hidden states [B, D] before the vocabulary head."""
        encoder_1ED = self.cache.encoder_1ED
        if self.cache.num_written > 1:
            encoder_1ED = encoder_1ED[:, :1]  # its keys and values are there; transformers projects at least one token
        return decode(causal, self.input_ids, attention=self, encoder_1ED=encoder_1ED)

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, **_: Any) -> Tensor:
        """query [1, H, B, D] -> [1, B, H, D]."""
        if module.is_causal:
            keys, values = self.cache.append(module.layer_idx, key, value)
            mask = self.bias_HC[None, :, None].to(query.dtype)
        else:
            keys, values = self.cache.source(module.layer_idx, key, value)
            mask = self.cache.slot_BS[:, None, None]
        query_BH1D = query[0].transpose(0, 1)[:, :, None]
        out = torch.nn.functional.scaled_dot_product_attention(query_BH1D, keys, values, attn_mask=mask, scale=scaling)
        return out[:, :, 0][None]
