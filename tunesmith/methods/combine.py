"""Adapters combined: the weight changes dW_k of K LoRA adapters of one base become one change, and that one adapter again.

    linear       dW = sum_k w_k dW_k                                        task arithmetic, Ilharco et al. 2023, section 2
    ties         t_k = the `density` largest of w_k dW_k, the rest 0        TIES, Yadav et al. 2023, section 3.2: trim,
                 s = sgn(sum_k t_k)                                         elect the sign of each number,
                 dW = (sum_k |w_k|) sum_{sgn t_k = s} t_k / sum_{sgn t_k = s} |w_k|      and average those that agree
    dare_linear  dW_k <- m_k dW_k / density, m_k ~ Bernoulli(density)       DARE, Yu et al. 2024, eq. 1-3: drop, rescale,
    dare_ties    the same, then elect and average as in TIES                then `linear` or `ties` without its trimming

Equal weights 1/K give an average. Where all changes agree in sign and nothing is trimmed, `ties` is `linear`; with equal
weights it is the paper's with lambda = sum_k w_k. Trimming is within each matrix; the paper's is over all of them at once.

Each dW_k = s_k B_k A_k with the adapter's own rank and scaling, so ranks, `alpha` and `rank_stabilised` may differ. A
weighted sum is exact with the ranks side by side: A = [A_1; A_2; ...], B = [w_1 s_1 B_1, w_2 s_2 B_2, ...]. Everything else,
and a sum for which a `rank` is asked, becomes an adapter by its `rank` largest singular values, which no other matrix of
that rank comes closer to (Eckart and Young 1936; above 1,024 wide they are found by random projection, to that one's
accuracy). What it loses is measured: |dW - B A| / |dW| in the Frobenius norm over all layers.

PEFT's `linear`, `ties` and `dare_*` work on A and B apart, so their product holds mixed terms B_j A_k that no adapter had;
its `cat` and `*_svd` are on dW, as here.

Shapes: K adapters, I and O inputs and outputs of a layer, R the rank.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tunesmith.errors import ModelError, RecipeError
from tunesmith.methods.base import PREFIX, Method, Subset
from tunesmith.methods.full import Full
from tunesmith.methods.lora import Lora, principal

Way = Literal["linear", "ties", "dare_linear", "dare_ties"]
WAYS: tuple[Way, ...] = ("linear", "ties", "dare_linear", "dare_ties")
DENSITY = 0.5  # of the ways that thin a change out, where none is given
DRAWN: tuple[Way, ...] = ("dare_linear", "dare_ties")
ELECTED: tuple[Way, ...] = ("ties", "dare_ties")
SAVED_SCALING = 2.0  # of a Lora whose alpha is left out, at every rank; a power of two, so dividing by it is exact
LAYER_END = ".lora_A.weight"


class Factors(NamedTuple):
    """A weight change dW = B A, its scaling inside B."""

    a_RI: Tensor
    b_OR: Tensor

    @property
    def rank(self) -> int:
        """R."""
        return len(self.a_RI)

    def dense(self) -> Tensor:
        """dW [O, I]."""
        return self.b_OR @ self.a_RI


@dataclass(frozen=True)
class Combined:
    """One adapter made of several: its method, its tensors by their names in a file, and what the rank cost.

    `lost` is |dW - B A| / |dW| in the Frobenius norm over all layers; 0.0 where nothing was cut off.
    """

    method: Lora
    tensors: dict[str, Tensor]
    lost: float


# ------------------------------------------------------------------------------------------------- of dense changes


def trimmed(delta: Tensor, *, density: float) -> Tensor:
    """The largest numbers of `delta`, a share `density` of them and at least one; the others zero."""
    return delta * largest(delta, density=density)


def largest(delta: Tensor, *, density: float) -> Tensor:
    """Which numbers `trimmed` keeps, as bool in the shape of `delta`."""
    keep = max(1, round(density * delta.numel()))
    kept = delta.abs().flatten().topk(keep, sorted=False).indices
    mask = torch.zeros(delta.numel(), dtype=torch.bool, device=delta.device).index_fill_(0, kept, True)
    return mask.view(delta.shape)


def dropped(delta: Tensor, *, density: float, generator: torch.Generator) -> Tensor:
    """Each number kept with probability `density` and then divided by it, so that its mean stays what it was."""
    mask = torch.bernoulli(torch.full(delta.shape, density), generator=generator)
    return delta * mask.to(delta) / density


def elected(votes_KOI: Tensor, *, weights: Sequence[float]) -> Tensor:
    """The weighted changes of each number averaged over those that have the sign of their sum; 0 where that is 0.

    `votes_KOI` are w_k dW_k; the result stands for all of them, so it is as large as their sum where all agree.
    """
    sizes_K = torch.tensor([abs(weight) for weight in weights], dtype=votes_KOI.dtype)
    sign_OI = votes_KOI.sum(0).sign()
    agrees_KOI = (votes_KOI.sign() == sign_OI) & (sign_OI != 0)
    share_OI = (agrees_KOI * sizes_K[:, None, None]).sum(0)
    total_OI = (votes_KOI * agrees_KOI).sum(0)
    return torch.where(share_OI > 0, sizes_K.sum() * total_OI / share_OI.clamp(min=sizes_K.min()), total_OI)


def combined_delta(
    deltas: Sequence[Tensor], *, how: Way, weights: Sequence[float], density: float, generator: torch.Generator
) -> Tensor:
    """One change [O, I] of several of the same shape, as the module's formulas say; `generator` draws what DARE drops."""
    if how in DRAWN:
        deltas = [dropped(delta, density=density, generator=generator) for delta in deltas]
    votes = [weight * delta for weight, delta in zip(weights, deltas, strict=True)]
    if how == "ties":
        votes = [trimmed(vote, density=density) for vote in votes]
    return joined(votes, how=how, weights=weights)


def joined(votes: Sequence[Tensor], *, how: Way, weights: Sequence[float]) -> Tensor:
    """Weighted changes [O, I], thinned out already, as one: their sum, or the average of those that agree in sign."""
    votes_KOI = torch.stack(list(votes))
    return elected(votes_KOI, weights=weights) if how in ELECTED else votes_KOI.sum(0)


# --------------------------------------------------------------------------------------------------- of low ranks


def side_by_side(updates: Sequence[Factors], *, weights: Sequence[float]) -> Factors:
    """sum_k w_k dW_k, exactly: the ranks one after the other."""
    a_RI = torch.cat([update.a_RI for update in updates])
    b_OR = torch.cat([weight * update.b_OR for weight, update in zip(weights, updates, strict=True)], dim=1)
    return Factors(a_RI, b_OR)


def truncated(delta: Tensor, *, rank: int) -> Factors:
    """The nearest change of rank `rank` to `delta` [O, I]; the singular values are split evenly between A and B."""
    u_OR, s_R, v_RI = principal(delta, rank=rank)
    root_R = s_R.sqrt()
    return Factors(root_R[:, None] * v_RI, u_OR * root_R)


def narrowed(update: Factors, *, rank: int) -> Factors:
    """As `truncated` of B A, by singular values of a matrix that is only R wide: B = Q_b R_b, A^T = Q_a R_a."""
    q_b, r_b = torch.linalg.qr(update.b_OR)
    q_a, r_a = torch.linalg.qr(update.a_RI.T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root_R = s[:rank].sqrt()
    return Factors(root_R[:, None] * (vt[:rank] @ q_a.T), q_b @ u[:, :rank] * root_R)


# ------------------------------------------------------------------------------------------------------ of adapters


def check_combinable(method: Method, *, run: str) -> Lora | Full | Subset:
    """The method if its result is a change of the weights of a base in full precision; RecipeError by name if not."""
    if isinstance(method, Full | Subset):
        return method
    if not isinstance(method, Lora):
        raise RecipeError(
            f"{run} was tuned by method '{method.kind_name}', and only changes of the base's weights are combined",
            hint="combine runs of method: lora, full, layers or bitfit, or switch between adapters: api.load_several",
        )
    if method.stored_in is not None:
        raise RecipeError(
            f"{run} was tuned beside a base in few bits ({method.stored_in}), and its change fits no other base",
            hint="combine runs on the base as it came: method: lora without quantise",
        )
    if method.dora:
        raise RecipeError(
            f"{run} is a DoRA adapter: it rescales the base's own weights, so its change is no product of low rank",
            hint="combine runs without dora, or switch between adapters: api.load_several",
        )
    return method


def updates_of(tensors: Mapping[str, Tensor], *, method: Lora, run: str) -> dict[str, Factors]:
    """The change of each layer, by the layer's name, in float32 at least; ModelError for what is no LoRA adapter."""
    saved = method.saved_as()
    found: dict[str, Factors] = {}
    for name in sorted(tensors):
        if not name.endswith(LAYER_END):
            continue
        layer = name.removeprefix(PREFIX).removesuffix(LAYER_END)
        a_RI, b_OR = tensors[name], tensors.get(name.replace("lora_A", "lora_B"))
        if b_OR is None or a_RI.ndim != 2 or b_OR.ndim != 2 or b_OR.shape[1] != len(a_RI):
            raise ModelError(f"the adapter of {run} has no whole update of {layer}", hint="restore its files")
        if not (a_RI.isfinite().all() and b_OR.isfinite().all()):
            raise not_finite(run, layer)
        wide = torch.promote_types(a_RI.dtype, torch.float32)
        found[layer] = Factors(a_RI.to(wide), saved.scaling(len(a_RI)) * b_OR.to(wide))
    if not found or len(tensors) != 2 * len(found):
        raise ModelError(f"the adapter of {run} holds other than plain LoRA's tensors", hint="restore its files")
    return found


def not_finite(run: str, name: str) -> ModelError:
    """For a change that holds infinities or no numbers."""
    return ModelError(f"the change of {run} holds numbers in {name} that are not finite", hint="tune it again")


def combine_adapters(
    adapters: Mapping[str, dict[str, Factors]],
    *,
    how: Way,
    weights: Sequence[float],
    density: float = DENSITY,
    rank: int | None = None,
    seed: int = 0,
) -> Combined:
    """One adapter of several, given by name as `updates_of` has them; `weights` in the same order.

    A layer that an adapter leaves alone has no change there. `rank` None: the sum of the ranks for `linear`, the largest
    of the inputs' otherwise. Raises RecipeError for a rank that no layer can have, ModelError where shapes differ.
    """
    names = sorted({layer for updates in adapters.values() for layer in updates})
    _check_shapes(adapters)
    _check_rank(rank, adapters=adapters, how=how)
    most = max(update.rank for updates in adapters.values() for update in updates.values())
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, Factors] = {}
    lost = total = 0.0
    for name in names:
        here = [updates.get(name) for updates in adapters.values()]
        there = [(update, weight) for update, weight in zip(here, weights, strict=True) if update is not None]
        widest = _widest(there[0][0])
        if how == "linear":
            exact = side_by_side([update for update, _ in there], weights=[weight for _, weight in there])
            wanted = min(exact.rank if rank is None else rank, exact.rank, widest)
            layers[name] = exact if wanted == exact.rank else narrowed(exact, rank=wanted)
            if wanted == min(exact.rank, widest):
                continue  # B A to rounding, so that there is nothing to measure
            delta = exact.dense()
        else:
            none = torch.zeros_like(there[0][0].dense())
            deltas = [none if update is None else update.dense() for update in here]
            delta = combined_delta(deltas, how=how, weights=weights, density=density, generator=generator)
            layers[name] = truncated(delta, rank=min(most if rank is None else rank, widest))
        lost += float((delta - layers[name].dense()).double().square().sum())
        total += float(delta.double().square().sum())
    return Combined(_method(layers), _tensors(layers), math.sqrt(lost / total) if total else 0.0)


def _widest(update: Factors) -> int:
    """The highest rank that a layer of this shape can have."""
    return min(update.a_RI.shape[1], len(update.b_OR))


def _check_shapes(adapters: Mapping[str, dict[str, Factors]]) -> None:
    seen: dict[str, tuple[str, tuple[int, int]]] = {}
    for run, updates in adapters.items():
        for layer, update in updates.items():
            shape = (len(update.b_OR), update.a_RI.shape[1])
            first, known = seen.setdefault(layer, (run, shape))
            if known != shape:
                raise ModelError(
                    f"{layer} is {shape[0]} x {shape[1]} for {run} and {known[0]} x {known[1]} for {first}",
                    hint="combine adapters of one base",
                )


def _check_rank(rank: int | None, *, adapters: Mapping[str, dict[str, Factors]], how: Way) -> None:
    """RecipeError where no layer's change has, or can have, as high a rank."""
    if rank is None:
        return
    highest = 0
    for name in {layer for updates in adapters.values() for layer in updates}:
        here = [updates[name] for updates in adapters.values() if name in updates]
        summed = sum(update.rank for update in here)
        highest = max(highest, min(_widest(here[0]), summed if how == "linear" else _widest(here[0])))
    if not 1 <= rank <= highest:
        what = "the ranks side by side" if how == "linear" else "the widest layer"
        raise RecipeError(
            f"rank is {rank}; allowed are 1 to {highest} ({what})", hint=f"use a rank of {highest} or less, or none"
        )


def _method(layers: dict[str, Factors]) -> Lora:
    """The LoRA that holds these updates: the commonest rank as `rank`, others by layer."""
    ranks = [update.rank for update in layers.values()]
    common = max(sorted(set(ranks)), key=ranks.count)
    other = {name: update.rank for name, update in layers.items() if update.rank != common}
    return Lora(rank=common, ranks=other, targets=tuple(sorted(layers)))


def _tensors(layers: dict[str, Factors]) -> dict[str, Tensor]:
    """As a file of ours has them."""
    tensors: dict[str, Tensor] = {}
    for name, update in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = update.a_RI
        tensors[f"{PREFIX}{name}.lora_B.weight"] = update.b_OR / SAVED_SCALING
    return tensors
