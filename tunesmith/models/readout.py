"""Log-probabilities of the targets, without ever holding a T x V tensor.

    logprob_n = z_n[y_n] - logsumexp_v z_n[v],    z_n = softcap(scale * (W h_n + b))

Only the N target positions go through the vocabulary head, a chunk at a time. The forward pass also keeps
d logprob_n / d h_n, an [N, D] tensor, so the backward pass needs no second look at the vocabulary unless the head itself
is trained. Memory is one chunk of logits whatever N is. The idea of never holding the logits is that of "Cut Your Losses"
(Wijmans et al. 2024); ours hands out log-probabilities instead of a loss, so every objective can use it.

Shapes: T packed tokens, N targets, D hidden, V vocabulary, C one chunk of targets.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 8 << 20
MIN_CHUNK = 128  # targets: fewer would spend their time reading a large head from memory again and again


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, softcap: float | None
    ) -> Tensor:
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        logprob_N = hidden_ND.new_empty(len(target_N), dtype=wide)
        wants_hidden = ctx.needs_input_grad[0]
        slope_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        for rows in _chunks(len(target_N), weight_VD.shape[0]):
            logits_CV, cap_CV = _logits(hidden_ND[rows], weight_VD, bias_V, softcap)
            lse_C = logits_CV.logsumexp(-1)
            logprob_N[rows] = logits_CV.gather(1, target_N[rows, None])[:, 0] - lse_C
            if slope_ND is not None:
                slope_CV = _slope(logits_CV, lse_C, target_N[rows], cap_CV)
                torch.mm(slope_CV.to(weight_VD.dtype), weight_VD, out=slope_ND[rows])
        ctx.softcap = softcap
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N, slope_ND)
        return logprob_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, target_N, slope_ND = ctx.saved_tensors
        grad_N = gradients[0]
        grad_hidden = None if slope_ND is None else slope_ND * grad_N[:, None].to(slope_ND.dtype)
        grad_weight = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias_V) if bias_V is not None and ctx.needs_input_grad[2] else None
        if grad_weight is not None or grad_bias is not None:
            for rows in _chunks(len(target_N), weight_VD.shape[0]):
                logits_CV, cap_CV = _logits(hidden_ND[rows], weight_VD, bias_V, ctx.softcap)
                slope_CV = _slope(logits_CV, logits_CV.logsumexp(-1), target_N[rows], cap_CV)
                slope_CV *= grad_N[rows, None]
                if grad_bias is not None:
                    grad_bias += slope_CV.sum(0).to(grad_bias.dtype)
                if grad_weight is not None:
                    grad_weight.addmm_(slope_CV.to(hidden_ND.dtype).T, hidden_ND[rows])
        return grad_hidden, grad_weight, grad_bias, None, None


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


def _slope(logits_CV: Tensor, lse_C: Tensor, target_C: Tensor, cap_CV: Tensor | None) -> Tensor:
    """d logprob / d score: onehot - softmax, in place of the logits."""
    slope_CV = logits_CV.sub_(lse_C[:, None]).exp_().neg_()
    slope_CV[torch.arange(len(target_C), device=target_C.device), target_C] += 1
    return slope_CV if cap_CV is None else slope_CV.mul_(cap_CV)


def target_logprobs(
    hidden_TD: Tensor, *, head: torch.nn.Linear, source_N: Tensor, target_N: Tensor, softcap: float | None = None
) -> Tensor:
    """Log-probability of each target token given the hidden state before it.

    hidden_TD; `source_N` indexes T, `target_N` are token ids; `head` is the vocabulary projection [V, D].
    Returns logprob_N in float32 (float64 for float64 input). Gradients reach hidden, and the head if it is trained.
    """
    hidden_ND = hidden_TD.index_select(0, source_N)
    weight_VD, bias_V = head.weight, head.bias
    if torch.is_autocast_enabled(hidden_TD.device.type):
        dtype = torch.get_autocast_dtype(hidden_TD.device.type)
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
    else:
        hidden_ND = hidden_ND.to(weight_VD.dtype)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        return _TokenLogprobs.apply(hidden_ND, weight_VD, bias_V, target_N, softcap)


def head_logits(hidden_ND: Tensor, *, head: torch.nn.Linear, softcap: float | None = None) -> Tensor:
    """Logits [N, V] in float32 of a few positions, for generation."""
    logits_NV, _ = _logits(hidden_ND.to(head.weight.dtype), head.weight, head.bias, softcap)
    return logits_NV
