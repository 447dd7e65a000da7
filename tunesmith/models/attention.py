"""The one visibility rule, as attention.

    token i sees token j   <=>   j <= i < end[j]          (and position[i] - position[j] < window, where a layer has one)

A model is called with `pack=PackAttention(...)`; transformers hands the keyword on to the attention function that is
registered here, and no model is patched. On a CPU the rule is a composition of flash-attention calls over the nodes of
the tree: each node attends causally to itself, and all that stands below a node attends to it in one dense call. The
pieces are merged by their log-sum-exp, and each piece's backward pass is given the merged output and log-sum-exp, which
makes the gradients exact (Ring Attention, Liu et al. 2023, uses the same identity across devices):

    out = sum_p exp(lse_p - lse) out_p,   lse = log sum_p exp(lse_p)

On a GPU the rule is a FlexAttention block mask. In an encoder, whose packs share nothing, a token sees its whole text:

    token i sees token j   <=>   i < end[j] and j < end[i]

Shapes: T packed tokens, H query heads, K key/value heads, D head dimension.
"""

import inspect
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from tunesmith.data.pack import Pack
from tunesmith.models.virtual import Virtual

NAME = "tunesmith"
HALF = (torch.bfloat16, torch.float16)
HIDDEN_SCORE = -1e30  # finite, so that a query that sees nothing of a piece gives it weight zero and not NaN

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Attends(Protocol):
    """What a model call carries as `pack`: it computes attention for every layer.

    `virtual` are the virtual tokens in the first places of this call, None where there are none.
    """

    virtual: Virtual | None

    def attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D]."""


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
) -> tuple[Tensor, None]:
    """The function that transformers calls in every attention layer."""
    pack: Attends | None = keywords.get("pack")
    assert pack is not None, "a model with the attention 'tunesmith' must be called with pack="
    assert not keywords.get("dropout"), "attention dropout is off in every model that models/load.py returns"
    assert keywords.get("s_aux") is None, "attention sinks are refused in models/load.py"
    if pack.virtual is not None:
        key, value = pack.virtual.attend(module.layer_idx, key, value)  # type: ignore[arg-type]
    scaling = keywords.get("scaling")
    out = pack.attend(
        module,
        query,
        key,
        value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        sliding_window=keywords.get("sliding_window"),
        softcap=keywords.get("softcap"),
    )
    return out, None


def register() -> None:
    """Make `attn_implementation="tunesmith"` known to transformers."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, lambda *arguments, **keywords: None)


register()


def leave_out_of_graphs() -> None:
    """From here on torch.compile leaves attention out: its pieces differ from pack to pack, and so would the graphs."""
    AttentionInterface.register(NAME, torch.compiler.disable(_attention, reason="the rule is another in every pack"))


class Piece:
    """Queries [q0, q1) against keys [k0, k1): a node's own, causal or not, or those above, of what is below a node."""

    __slots__ = ("causal", "k0", "k1", "own", "q0", "q1")

    def __init__(self, q0: int, q1: int, k0: int, k1: int, *, own: bool, causal: bool):
        self.q0, self.q1, self.k0, self.k1, self.own, self.causal = q0, q1, k0, k1, own, causal


class PackAttention:
    """The rule for one pack. Build once a pack and pass as `pack=` to the model."""

    def __init__(
        self,
        pack: Pack,
        *,
        device: torch.device,
        virtual: Virtual | None = None,
        both_ways: bool = False,
        first_position: int = 0,
    ):
        if virtual is not None:
            pack = pack.below(virtual.num_tokens)
        self.pack, self.device, self.virtual, self.both_ways = pack, device, virtual, both_ways
        self.input_ids = torch.from_numpy(pack.tokens_T)[None].to(device)
        self.position_T = torch.from_numpy(pack.position_T).to(device)
        self.position_ids = self.position_T[None] + first_position
        self.end_T = torch.from_numpy(pack.end_T).to(device)
        self.depth = int(pack.position_T.max()) + 1 if len(pack.position_T) else 0
        nodes = pack.nodes
        below = [n for n in nodes if n.end > n.stop]
        assert not (both_ways and below), "an encoder's texts share nothing"
        self.shares = bool(below)
        self.pieces = [Piece(n.start, n.stop, n.start, n.stop, own=True, causal=not both_ways) for n in nodes]
        self.pieces += [Piece(n.stop, n.end, n.start, n.stop, own=False, causal=False) for n in below]
        self._masks: dict[Any, Any] = {}

    def attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D]."""
        window = sliding_window if sliding_window is not None and sliding_window < self.depth else None
        query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves the rotated ones wider
        if self.device.type == "cuda":
            if softcap is None and not self.shares and value.dtype in HALF and (flash := _varlen_flash()) is not None:
                return self._varlen(flash, query, key, value, scaling=scaling, window=window)
            return self._flex(query, key, value, scaling=scaling, window=window, softcap=softcap)
        if softcap is not None:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
            return self._softcapped(query, key, value, scaling=scaling, window=window, softcap=softcap)
        return _TreeAttention.apply(query, key, value, self, scaling, window)

    def mask(self, piece: Piece, *, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Additive mask [q, k] of a piece under a sliding window, None where the window hides nothing of it."""
        if window is None:
            return None
        name = (piece.q0, piece.k0, window, dtype)
        if name not in self._masks:
            query_T = self.pack.position_T[piece.q0 : piece.q1, None]
            key_T = self.pack.position_T[None, piece.k0 : piece.k1]
            hidden = np.abs(query_T - key_T) >= window
            if not hidden.any():
                self._masks[name] = None
            else:
                if piece.causal:
                    hidden = hidden | (key_T > query_T)
                self._masks[name] = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(
                    torch.from_numpy(hidden), HIDDEN_SCORE
                )
        return self._masks[name]

    def visible(self, *, window: int | None) -> Tensor:
        """The rule as a [T, T] boolean matrix; for tests and for kernels without a better way."""
        index_T = torch.arange(len(self.end_T), device=self.device)
        first_TT = index_T[None] < self.end_T[:, None] if self.both_ways else index_T[None] <= index_T[:, None]
        seen_TT = first_TT & (index_T[:, None] < self.end_T[None])
        if window is not None:
            seen_TT &= (self.position_T[:, None] - self.position_T[None]).abs() < window
        return seen_TT

    def _softcapped(
        self, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, window: int | None, softcap: float
    ) -> Tensor:
        """Scores bounded by tanh (Gemma 2) fit no flash kernel: plain operations, one head at a time."""
        seen_TT = self.visible(window=window)
        out = []
        for head in range(query.shape[1]):
            scores_TT = softcap * torch.tanh(query[0, head] @ key[0, head].T * (scaling / softcap))
            scores_TT = scores_TT.float() if scores_TT.dtype in (torch.bfloat16, torch.float16) else scores_TT
            weights_TT = scores_TT.masked_fill(~seen_TT, float("-inf")).softmax(-1).to(value.dtype)
            out.append(weights_TT @ value[0, head])
        return torch.stack(out, dim=1)[None]

    def _varlen(
        self, flash: Any, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, window: int | None
    ) -> Tensor:
        """Flash attention over texts that stand one behind the other and share nothing."""
        if "texts" not in self._masks:
            starts = [node.start for node in self.pack.nodes] + [len(self.end_T)]
            longest = max(node.stop - node.start for node in self.pack.nodes)
            self._masks["texts"] = (torch.tensor(starts, dtype=torch.int32, device=self.device), longest)
        starts, longest = self._masks["texts"]
        before = -1 if window is None else window - 1  # tokens to the left, all for -1
        out: Tensor = flash(
            *(part[0].transpose(0, 1) for part in (query, key, value)),
            starts,
            starts,
            longest,
            longest,
            scale=scaling,
            window_size=(before, before if self.both_ways else 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out[None]

    def _flex(
        self, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """FlexAttention with the rule as a block mask, which is built once a pack and window."""
        from torch.nn.attention.flex_attention import create_block_mask

        if window not in self._masks:
            length = query.shape[2]
            self._masks[window] = create_block_mask(
                self.mask_mod(window=window), None, None, length, length, device=self.device
            )

        cap = 0.0 if softcap is None else softcap

        def score_mod(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return cap * torch.tanh(score / cap)

        out = _compiled_flex()(
            query,
            key,
            value,
            score_mod=None if softcap is None else score_mod,
            block_mask=self._masks[window],
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.transpose(1, 2)

    def mask_mod(self, *, window: int | None) -> Any:
        """The rule as FlexAttention wants it: (batch, head, q, k) -> visible."""
        end_T, position_T, both_ways = self.end_T, self.position_T, self.both_ways

        def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = (k < end_T[q] if both_ways else k <= q) & (q < end_T[k])
            return seen if window is None else seen & ((position_T[q] - position_T[k]).abs() < window)

        return visible


@cache
def _varlen_flash() -> Any | None:
    """torch's flash attention for texts of different lengths, None where it or the GPU cannot do what is needed."""
    from torch.nn.attention.varlen import varlen_attn

    knows = {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)
    return varlen_attn if knows and torch.cuda.get_device_capability() >= (8, 0) else None


@cache
def _compiled_flex() -> Any:
    """FlexAttention compiled once for dynamic lengths."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _wide(*tensors: Tensor) -> list[Tensor]:
    """In float32 at least: the CPU's flash backward is 1.5 to 5 times slower in bf16 than with the conversions."""
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


class _TreeAttention(torch.autograd.Function):
    """Flash attention over the pieces of a tree, merged by log-sum-exp.

    query [1, H, T, D], key and value [1, K, T, D] with H a multiple of K -> [1, T, H, D].
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, pack: PackAttention, scaling: float, window: int | None
    ) -> Tensor:
        wide_query, wide_key, wide_value = _wide(query, key, value)
        _, heads, length, dimension = query.shape
        out = wide_query.new_empty(1, length, heads, dimension).transpose(1, 2)  # laid out as the model reads it
        lse = wide_query.new_empty(1, heads, length)
        for piece in pack.pieces:  # a node's own come first and cover every token once
            rows, columns = slice(piece.q0, piece.q1), slice(piece.k0, piece.k1)
            mask = pack.mask(piece, window=window, dtype=wide_query.dtype)
            part, part_lse = _flash(
                wide_query[:, :, rows],
                wide_key[:, :, columns],
                wide_value[:, :, columns],
                0.0,
                piece.causal and mask is None,
                attn_mask=None if mask is None else mask[None, None],
                scale=scaling,
            )
            if piece.own:
                out[:, :, rows], lse[:, :, rows] = part, part_lse
            else:
                before = lse[:, :, rows]
                both = torch.logaddexp(before, part_lse)
                out[:, :, rows] *= (before - both).exp_()[..., None]
                out[:, :, rows] += part.mul_((part_lse - both).exp_()[..., None])
                lse[:, :, rows] = both
        narrow = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, narrow, lse)
        ctx.pack, ctx.scaling, ctx.window = pack, scaling, window
        return narrow.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *narrow, lse = ctx.saved_tensors
        dtype = narrow[0].dtype
        query, key, value, out, grad_out = _wide(*narrow, gradients[0].transpose(1, 2))
        dq, dk, dv = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for piece in ctx.pack.pieces:
            rows, columns = slice(piece.q0, piece.q1), slice(piece.k0, piece.k1)
            mask = ctx.pack.mask(piece, window=ctx.window, dtype=query.dtype)
            part_q, part_k, part_v = _flash_backward(
                grad_out[:, :, rows],
                query[:, :, rows],
                key[:, :, columns],
                value[:, :, columns],
                out[:, :, rows],
                lse[:, :, rows],
                0.0,
                piece.causal and mask is None,
                attn_mask=None if mask is None else mask[None, None],
                scale=ctx.scaling,
            )
            dq[:, :, rows] += part_q
            dk[:, :, columns] += part_k
            dv[:, :, columns] += part_v
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), None, None, None
