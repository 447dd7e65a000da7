"""Log-probabilities of the targets, without ever holding a T x V tensor.

    logprob_n = z_n[y_n] - logsumexp_v z_n[v],    z_n = softcap(scale * (W h_n + b))

Only the N target positions go through the vocabulary head, a chunk at a time. The forward pass also keeps
d logprob_n / d h_n, an [N, D] tensor, so the backward pass needs no second look at the vocabulary unless the head itself
is trained. Memory is one chunk of logits whatever N is. The idea of never holding the logits is that of "Cut Your Losses"
(Wijmans et al. 2024); ours hands out log-probabilities instead of a loss, so every objective can use it.

Shapes: T packed tokens, N targets, D hidden, V vocabulary, C one chunk of targets.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tunesmith.models.extended import ExtendedHead

CHUNK_BYTES = 8 << 20
MIN_CHUNK = 128  # targets: fewer would spend their time reading a large head from memory again and again


class _TokenLogprobs(torch.autograd.Function):
    """The vocabulary is one block of rows, or two: the base's own and those of new tokens, with ids behind them.

    The normaliser of each target is kept, so a block's gradient needs the logits of that block alone.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, target_N: Tensor, softcap: float | None, *blocks: Tensor | None) -> Tensor:
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        logprob_N = hidden_ND.new_empty(len(target_N), dtype=wide)
        lse_N = torch.empty_like(logprob_N)
        weights = [weight for weight in blocks[::2] if weight is not None]
        biases, sizes = blocks[1::2], [len(weight) for weight in weights]
        wants_hidden = ctx.needs_input_grad[0]
        slope_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        for rows in _chunks(len(target_N), sum(sizes)):
            logits_CV, cap_CV = _all_logits(hidden_ND[rows], weights, biases, softcap)
            logprob_N[rows] = logits_CV.gather(1, target_N[rows, None])[:, 0]
            most_C = logits_CV.amax(-1)
            exponential_CV = logits_CV.sub_(most_C[:, None]).exp_()
            total_C = exponential_CV.sum(-1)
            lse_N[rows] = most_C + total_C.log()
            logprob_N[rows] -= lse_N[rows]
            if slope_ND is not None:
                slope_CV = _marked(exponential_CV.mul_(-1 / total_C[:, None]), target_N[rows], cap_CV)
                first, *others = zip(slope_CV.split(sizes, dim=1), weights, strict=True)
                torch.mm(first[0].to(first[1].dtype), first[1], out=slope_ND[rows])
                for part_CV, weight in others:
                    slope_ND[rows].addmm_(part_CV.to(weight.dtype), weight)
        ctx.softcap, ctx.sizes = softcap, sizes
        ctx.save_for_backward(hidden_ND, target_N, lse_N, slope_ND, *blocks)
        return logprob_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, target_N, lse_N, slope_ND, *blocks = ctx.saved_tensors
        grad_N = gradients[0]
        grad_hidden = None if slope_ND is None else slope_ND * grad_N[:, None].to(slope_ND.dtype)
        found: list[Tensor | None] = []
        start = 0
        for number, size in enumerate(ctx.sizes):
            weight, bias = blocks[2 * number : 2 * number + 2]
            wants = ctx.needs_input_grad[3 + 2 * number : 5 + 2 * number]
            grad_weight = torch.zeros_like(weight) if wants[0] else None
            grad_bias = torch.zeros_like(bias) if wants[1] else None
            for rows in _chunks(len(target_N), size) if any(wants) else ():
                logits_CV, cap_CV = _logits(hidden_ND[rows], weight, bias, ctx.softcap)
                slope_CV = logits_CV.sub_(lse_N[rows, None]).exp_().neg_()
                slope_CV = _marked(slope_CV, target_N[rows] - start, cap_CV)
                slope_CV *= grad_N[rows, None]
                if grad_bias is not None:
                    grad_bias += slope_CV.sum(0).to(grad_bias.dtype)
                if grad_weight is not None:
                    grad_weight.addmm_(slope_CV.to(hidden_ND.dtype).T, hidden_ND[rows])
            found += [grad_weight, grad_bias]
            start += size
        return grad_hidden, None, None, *found


def _chunks(num_targets: int, num_vocabulary: int) -> list[slice]:
    """Slices of targets whose logits fill CHUNK_BYTES in float32, or of MIN_CHUNK."""
    size = max(MIN_CHUNK, CHUNK_BYTES // (4 * num_vocabulary))
    return [slice(i, min(i + size, num_targets)) for i in range(0, num_targets, size)]


def _logits(
    hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Logits in at least float32, and d logit / d score where a soft cap bends them."""
    scores_CV = hidden_CD @ weight_VD.T
    scores_CV = scores_CV.to(torch.promote_types(scores_CV.dtype, torch.float32))
    if bias_V is not None:
        scores_CV += bias_V
    if softcap is None:
        return scores_CV, None
    tanh_CV = torch.tanh(scores_CV / softcap)
    return softcap * tanh_CV, 1 - tanh_CV**2


def _all_logits(
    hidden_CD: Tensor, weights: list[Tensor], biases: Sequence[Tensor | None], softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """As `_logits`, of all blocks side by side."""
    blocks = [_logits(hidden_CD, weight, bias, softcap) for weight, bias in zip(weights, biases, strict=True)]
    if len(blocks) == 1:
        return blocks[0]
    caps = [cap for _, cap in blocks if cap is not None]
    return torch.cat([logits for logits, _ in blocks], dim=1), torch.cat(caps, dim=1) if caps else None


def _marked(slope_CV: Tensor, target_C: Tensor, cap_CV: Tensor | None) -> Tensor:
    """d logprob / d score = onehot - softmax, in place of - softmax. A target outside the block marks nothing."""
    last = slope_CV.shape[1] - 1
    inside_C = (target_C >= 0) & (target_C <= last)
    slope_CV.scatter_add_(1, target_C.clamp(0, last)[:, None], inside_C[:, None].to(slope_CV.dtype))
    return slope_CV if cap_CV is None else slope_CV.mul_(cap_CV)


def _blocks(head: torch.nn.Linear) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weight and bias of each block of the vocabulary's rows."""
    if isinstance(head, ExtendedHead):
        weight_OD, bias_O = head.old()
        return [weight_OD, head.new_rows], [bias_O, head.new_biases]
    return [head.weight], [head.bias]


def target_logprobs(
    hidden_TD: Tensor, *, head: torch.nn.Linear, source_N: Tensor, target_N: Tensor, softcap: float | None = None
) -> Tensor:
    """Log-probability of each target token given the hidden state before it.

    hidden_TD; `source_N` indexes T, `target_N` are token ids; `head` is the vocabulary projection [V, D].
    Returns logprob_N in float32 (float64 for float64 input). Gradients reach hidden, and the head if it is trained.
    """
    hidden_ND = hidden_TD.index_select(0, source_N)
    weights, biases = _blocks(head)
    dtype = head.weight.dtype
    if torch.is_autocast_enabled(hidden_TD.device.type):
        dtype = torch.get_autocast_dtype(hidden_TD.device.type)
    blocks = [part for w, b in zip(weights, biases, strict=True) for part in (w.to(dtype), b)]
    with torch.autocast(hidden_TD.device.type, enabled=False):
        return _TokenLogprobs.apply(hidden_ND.to(dtype), target_N, softcap, *blocks)


def target_divergences(
    hidden_ND: Tensor,
    *,
    head: torch.nn.Linear,
    softcap: float | None,
    teacher_ND: Tensor,
    teacher_head: torch.nn.Linear,
    teacher_softcap: float | None,
    temperature: float,
    reverse: bool,
) -> Tensor:
    """How far each target's distribution is from the teacher's, [N] in nats, a chunk of targets at a time.

    KL(teacher || model), or the other way round where `reverse`; both at `temperature`, over the tokens that both know. The
    logits of a chunk are computed again in the backward pass.
    """

    def chunk(hidden_CD: Tensor, teacher_CD: Tensor) -> Tensor:
        with torch.autocast(hidden_CD.device.type, enabled=False):
            ours = head_logits(hidden_CD, head=head, softcap=softcap)
            theirs = head_logits(teacher_CD, head=teacher_head, softcap=teacher_softcap)
        known = min(ours.shape[1], theirs.shape[1])  # one table may be padded further than the other
        model_CV = (ours[:, :known] / temperature).log_softmax(-1)
        teacher_CV = (theirs[:, :known] / temperature).log_softmax(-1)
        first, second = (model_CV, teacher_CV) if reverse else (teacher_CV, model_CV)
        return (first.exp() * (first - second)).sum(-1)

    rows = _chunks(len(hidden_ND), head.out_features)
    parts = [checkpoint(chunk, hidden_ND[r], teacher_ND[r], use_reentrant=False) for r in rows]
    return torch.cat(parts) if parts else hidden_ND.new_zeros(0)


def target_scores(
    hidden_ND: Tensor, *, head: torch.nn.Linear, target_N: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Log-probability [N] of each target and whether no other token is likelier [N], without gradients."""
    logprobs, likeliest = [hidden_ND.new_zeros(0)], [target_N.new_zeros(0, dtype=torch.bool)]
    for rows in _chunks(len(target_N), head.out_features):
        logits_CV = head_logits(hidden_ND[rows], head=head, softcap=softcap)
        target_C = target_N[rows].long()
        logprobs.append(logits_CV.log_softmax(-1).gather(1, target_C[:, None])[:, 0])
        likeliest.append(logits_CV.argmax(-1) == target_C)
    return torch.cat(logprobs), torch.cat(likeliest)


def head_logits(hidden_ND: Tensor, *, head: torch.nn.Linear, softcap: float | None = None) -> Tensor:
    """Logits [N, V] in float32 of a few positions, for generation."""
    weights, biases = _blocks(head)
    dtype = head.weight.dtype
    return _all_logits(hidden_ND.to(dtype), [weight.to(dtype) for weight in weights], biases, softcap=softcap)[0]
