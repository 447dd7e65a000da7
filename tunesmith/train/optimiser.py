"""Optimisers, and the learning rate as a function of the step."""

import math
from typing import Any

import torch
from torch import Tensor

from tunesmith.train.parallel import is_divided, part_like
from tunesmith.train.settings import TrainSettings


def learning_rate(step: int, *, peak: float, num_steps: int, settings: TrainSettings) -> float:
    """Learning rate of optimiser step `step` (from 0): linear warm-up, then peak (f + (1 - f) s(t)), t from 0 to 1.

    f is `final_share`. cosine: s = (1 + cos(pi t)) / 2 (Loshchilov and Hutter 2016, eq. 5); linear: s = 1 - t.
    """
    warmup = settings.warmup if settings.warmup >= 1 else settings.warmup * num_steps
    warmup = min(math.ceil(warmup), max(0, num_steps - 1))
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    t = (step - warmup) / max(1, num_steps - warmup)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * t)), "linear": 1 - t, "constant": 1.0}[settings.schedule]
    return peak * (settings.final_share + (1 - settings.final_share) * shape)


class Optimiser:
    """AdamW (fused), or Muon for matrices and AdamW for the rest; state as named tensors.

    AdamW: Loshchilov and Hutter 2017, algorithm 2. Muon: Jordan et al. 2024, with the update's size matched to AdamW's
    (Liu et al. 2025, eq. 4) so that one learning rate serves both. Embeddings and the head are not matrices in its sense.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        *,
        settings: TrainSettings,
        not_matrices: set[Tensor],
        rate_factors: dict[str, float] | None = None,
    ):
        self.parameters = parameters
        factor_of = {id(p): (rate_factors or {}).get(name, 1.0) for name, p in parameters.items()}
        matrices = [p for p in parameters.values() if p.ndim == 2 and p not in not_matrices]
        muon = matrices if settings.optimiser == "muon" else []
        chosen = {id(p) for p in muon}
        rest = [p for p in parameters.values() if id(p) not in chosen]
        self.optimisers: list[torch.optim.Optimizer] = []
        if rest:
            decay = _groups([p for p in rest if p.ndim >= 2], factor_of, weight_decay=settings.weight_decay)
            groups = decay + _groups([p for p in rest if p.ndim < 2], factor_of, weight_decay=0.0)
            self.optimisers.append(torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), fused=True))
        if muon:
            groups = _groups(muon, factor_of, weight_decay=settings.weight_decay)
            self.optimisers.append(torch.optim.Muon(groups, lr=0.0, adjust_lr_fn="match_rms_adamw"))

    def step(self, *, learning_rate: float) -> None:
        """One update with this learning rate."""
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * group["rate_factor"]
            optimiser.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """All state by `<parameter name>/<state name>`."""
        found = {}
        for optimiser in self.optimisers:
            for name, parameter in self.parameters.items():
                for key, value in optimiser.state.get(parameter, {}).items():
                    found[f"{name}/{key}"] = value
        return found

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        owner = {id(p): o for o in self.optimisers for g in o.param_groups for p in g["params"]}
        for full_name, value in tensors.items():
            name, _, key = full_name.rpartition("/")
            parameter = self.parameters[name]
            owner[id(parameter)].state[parameter][key] = part_like(parameter, value).clone()


def _groups(parameters: list[Tensor], factor_of: dict[int, float], *, weight_decay: float) -> list[dict[str, Any]]:
    """One group for each factor on the learning rate; parameters that are divided among processes have their own."""
    by_factor: dict[tuple[float, bool], list[Tensor]] = {}
    for parameter in parameters:
        by_factor.setdefault((factor_of[id(parameter)], is_divided(parameter)), []).append(parameter)
    return [{"params": p, "weight_decay": weight_decay, "rate_factor": f} for (f, _), p in by_factor.items()]
