"""LoRA: a low-rank update beside frozen weights (Hu et al. 2021, eq. 3).

    h = W0 x + s B A x,      A [r, in] random, B [out, r] zero at the start,      s = alpha / r

With `rank_stabilised`, s = alpha / sqrt(r) (Kalajdzievski 2023, eq. 3), which keeps the update's size as r grows. With
`dora`, the size of each output's weights is a parameter of its own (Liu et al. 2024, eq. 5; the norm takes no gradient,
section 4.3), and dropout is on the update alone:

    h = m / ||W0 + s B A|| (W0 x + s B A x)

`init: pissa` begins at the principal singular values (Meng et al. 2024, eq. 2-4). Its frozen half stays beside the base
here instead of being taken from its weights, so the base is never changed: h = W0 x + s (B A - B0 A0) x, which is saved as
plain LoRA of twice the rank. `b_rate_factor` gives B a higher learning rate than A (LoRA+, Hayou et al. 2024, section 4).
Saved in PEFT's format, so other servers load it. Ours adapts all linear layers but the vocabulary head unless told
otherwise ("LoRA Without Regret", Schulman et al. 2025; QLoRA, Dettmers et al. 2023, section 4).

Shapes: T tokens, I and O inputs and outputs of a layer, R the rank.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from tunesmith.errors import ModelError, RecipeError
from tunesmith.methods.base import Adapter, Inserted, Targets, linear_layers, linear_shape, linear_weight
from tunesmith.models.load import Model
from tunesmith.models.quantised import Quantisation

FULL_SVD_SIDE = 1024  # above it the singular vectors are found by random projection (Halko et al. 2011)


class _AddLowRank(torch.autograd.Function):
    """out + s (x A^T) B^T, added in place: two small products and no further pass over the output.

    out [..., D_out], x [..., D_in], A [r, D_in], B [D_out, r]; computed in the dtype of `out`.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1]).to(out.dtype)
        down_TR = x_TI @ a_RI.to(out.dtype).T
        out.view(-1, out.shape[-1]).addmm_(down_TR, b_OR.to(out.dtype).T, alpha=scaling)
        ctx.mark_dirty(out)
        ctx.save_for_backward(x_TI, down_TR, a_RI, b_OR)
        ctx.scaling, ctx.shape, ctx.dtype = scaling, x.shape, x.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, down_TR, a_RI, b_OR = ctx.saved_tensors
        grad_TO = gradients[0].reshape(-1, b_OR.shape[0])
        grad_down_TR = (grad_TO @ b_OR.to(grad_TO.dtype)).mul_(ctx.scaling)
        grad_a = (grad_down_TR.T @ x_TI).to(a_RI.dtype) if ctx.needs_input_grad[2] else None
        grad_b = (grad_TO.T @ down_TR).mul_(ctx.scaling).to(b_OR.dtype) if ctx.needs_input_grad[3] else None
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = (grad_down_TR @ a_RI.to(grad_TO.dtype)).view(ctx.shape).to(ctx.dtype)
        return gradients[0], grad_x, grad_a, grad_b, None


class LoraLinear(Inserted):
    """A frozen linear layer with a low-rank update beside it."""

    def __init__(self, base: nn.Module, *, rank: int, scaling: float, dropout: float, generator: torch.Generator):
        super().__init__(base)
        num_in, num_out, self.transposed = linear_shape(base)
        self.scaling = scaling
        bound = 1 / math.sqrt(num_in)  # kaiming_uniform(a=sqrt(5)), as the paper's code and PEFT have it
        self.lora_A = nn.Parameter(torch.empty(rank, num_in).uniform_(-bound, bound, generator=generator))
        self.lora_B = nn.Parameter(torch.zeros(num_out, rank))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """W0 x + s B A dropout(x)."""
        out = self.base(x)
        if not self.enabled:
            return out
        a_RI, b_OR = self.factors()
        return _AddLowRank.apply(out, self.dropout(x), a_RI, b_OR, self.scaling)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the update s B A."""
        return self.lora_A, self.lora_B

    def tensors(self) -> dict[str, Tensor]:
        """PEFT's names."""
        a_RI, b_OR = self.factors()
        return {"lora_A.weight": a_RI, "lora_B.weight": b_OR}

    def delta(self) -> Tensor:
        """The update in the base weight's own layout, float32 or wider."""
        a_RI, b_OR = self.factors()
        delta = self.scaling * (b_OR @ a_RI)
        return delta.T if self.transposed else delta

    def folded(self) -> Tensor:
        """The weight that computes all of it, float32 or wider."""
        weight = linear_weight(self.base)
        wide = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(wide) + self.delta().to(wide)

    def fold(self) -> None:
        """W0 + s B A, summed in float32 and stored in the base's dtype."""
        weight = cast(Tensor, self.base.weight)
        weight.copy_(self.folded().to(weight.dtype))


class PissaLinear(LoraLinear):
    """Begins at the r largest singular values of the weight, and keeps where it began as a frozen half."""

    def __init__(self, base: nn.Module, *, rank: int, scaling: float, dropout: float, generator: torch.Generator):
        super().__init__(base, rank=rank, scaling=scaling, dropout=dropout, generator=generator)
        weight = linear_weight(base).detach()
        weight_OI = weight.T if self.transposed else weight
        u_OR, s_R, v_RI = principal(weight_OI.to(torch.promote_types(weight.dtype, torch.float32)), rank=rank)
        root_R = s_R.sqrt()
        self.lora_A.data.copy_(root_R[:, None] * v_RI)
        self.lora_B.data.copy_(u_OR * root_R / scaling)
        self.register_buffer("start_A", self.lora_A.detach().clone(), persistent=False)
        self.register_buffer("start_B", self.lora_B.detach().clone(), persistent=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        """[A; A0] and [B, -B0]."""
        start_a, start_b = cast(Tensor, self.start_A), cast(Tensor, self.start_B)
        return torch.cat([self.lora_A, start_a]), torch.cat([self.lora_B, -start_b], dim=1)


class DoraLinear(LoraLinear):
    """The update moves the direction of each output's weights, a magnitude their size."""

    def __init__(self, base: nn.Module, *, rank: int, scaling: float, dropout: float, generator: torch.Generator):
        super().__init__(base, rank=rank, scaling=scaling, dropout=dropout, generator=generator)
        self.lora_magnitude_vector = nn.Parameter(self._norm().detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """f (W0 x + s B A dropout(x)) + bias, f = m / ||W0 + s B A||."""
        out = self.base(x)
        if not self.enabled:
            return out
        factor_O = self._factor().to(out.dtype)
        bias_O = cast(Tensor | None, self.base.bias)
        a_RI, b_OR = self.factors()
        moved = _AddLowRank.apply(out, self.dropout(x), a_RI, b_OR, self.scaling) * factor_O
        return moved if bias_O is None else moved + bias_O * (1 - factor_O)

    def tensors(self) -> dict[str, Tensor]:
        """PEFT's names."""
        return super().tensors() | {"lora_magnitude_vector": self.lora_magnitude_vector}

    def folded(self) -> Tensor:
        """f (W0 + s B A)."""
        factor_O = self._factor()
        return super().folded() * (factor_O if self.transposed else factor_O[:, None])

    def _factor(self) -> Tensor:
        return self.lora_magnitude_vector / self._norm().to(self.lora_magnitude_vector.dtype)

    @torch.no_grad()
    def _norm(self) -> Tensor:
        """||W0 + s B A|| of each output's weights, float32 or wider."""
        weight = super().folded()
        return torch.linalg.vector_norm(weight, dim=0 if self.transposed else 1)


def principal(weight_OI: Tensor, *, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular values and their vectors: U [O, R], S [R], V^T [R, I]."""
    if min(weight_OI.shape) <= FULL_SVD_SIDE:
        u, s, vt = torch.linalg.svd(weight_OI, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(weight_OI, q=min(rank + 16, *weight_OI.shape), niter=16)
    return u[:, :rank], s[:rank], v[:, :rank].T


class Lora(Adapter):
    """A low-rank update beside frozen weights."""

    kind: Literal["lora"] = "lora"
    summary: ClassVar[str] = "a low-rank update beside frozen weights"
    learning_rate: ClassVar[float] = 5e-4
    peft_type: ClassVar[str | None] = "LORA"
    peft_new_rows: ClassVar[bool] = True
    rank: int = Field(default=16, ge=1, description="r, the rank of the update")
    ranks: dict[str, int] = Field(default={}, description="other ranks by layer name, such as {q_proj: 8}")
    alpha: float | None = Field(
        default=None, gt=0, le=1e6, description="the update is scaled by alpha / rank; 2 * rank by default"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the update's input while training")
    rank_stabilised: bool = Field(default=False, description="scale by alpha / sqrt(rank)")
    dora: bool = Field(default=False, description="a magnitude of its own for each output (DoRA)")
    init: Literal["kaiming", "gaussian", "pissa"] = Field(
        default="kaiming", description="how A begins, B being zero; pissa: both at the principal singular values"
    )
    b_rate_factor: float = Field(default=1.0, gt=0, description="B's learning rate over A's (LoRA+ has 16)")
    targets: Targets = "all-linear"

    @model_validator(mode="after")
    def _one_of_them(self) -> "Lora":
        if self.dora and self.init == "pissa":
            raise ValueError("dora and init: pissa both change where the update begins; choose one")
        if self.init == "pissa" and self.rank_stabilised:
            raise ValueError("init: pissa begins at the same weights whatever the scaling; leave out rank_stabilised")
        if any(rank < 1 for rank in self.ranks.values()):
            raise ValueError("a rank in ranks is below 1")
        return self

    def rank_of(self, name: str) -> int:
        """The rank of the layer called `name`."""
        found = [key for key in self.ranks if name == key or name.endswith("." + key)]
        return self.ranks[max(found, key=len)] if found else self.rank

    def alpha_of(self, rank: int) -> float:
        """Alpha of a layer of this rank."""
        return 2 * rank if self.alpha is None else self.alpha

    def scaling(self, rank: int) -> float:
        """s in the formula."""
        return self.alpha_of(rank) / (math.sqrt(rank) if self.rank_stabilised else rank)

    def places(self, model: Model) -> list[str]:
        """The target layers. RecipeError where a rank is too high or names no layer."""
        names = linear_layers(model, targets=self.targets)
        for key in self.ranks:
            if not any(name == key or name.endswith("." + key) for name in names):
                raise RecipeError(f"method.ranks: no adapted layer is called {key!r}", hint="see method.targets")
        for name in names:
            smallest = min(linear_shape(model.causal.get_submodule(name))[:2])
            widest = smallest // 2 if self.init == "pissa" else smallest
            if self.rank_of(name) > widest:
                raise RecipeError(
                    f"method.rank is {self.rank_of(name)} and {name} is only {smallest} wide: a higher rank "
                    + ("has no effect" if widest == smallest else "than half of that is not saved by init: pissa"),
                    hint=f"use a rank of {widest} or less",
                )
        return names

    def insert(self, base: nn.Module, *, name: str, model: Model, generator: torch.Generator) -> Inserted:
        """A low-rank update beside the layer."""
        rank = self.rank_of(name)
        kind = DoraLinear if self.dora else PissaLinear if self.init == "pissa" else LoraLinear
        layer = kind(base, rank=rank, scaling=self.scaling(rank), dropout=self.dropout, generator=generator)
        if self.init == "gaussian":
            with torch.no_grad():
                layer.lora_A.normal_(std=1 / rank, generator=generator)  # as the paper's text and PEFT have it
        return layer

    def rate_factors(self, model: Model) -> dict[str, float]:
        """B moves faster than A where `b_rate_factor` says so."""
        names = [name for name, _ in model.causal.named_parameters() if name.endswith("lora_B")]
        return dict.fromkeys(names, self.b_rate_factor) if self.b_rate_factor != 1 else {}

    def saved_as(self) -> "Lora":
        """The plain LoRA that a file of ours holds: PiSSA's frozen half doubles its rank at the same scaling."""
        if self.init != "pissa":
            return self
        twice = {name: 2 * rank for name, rank in self.ranks.items()}
        alpha = None if self.alpha is None else 2 * self.alpha
        return self.model_copy(update={"rank": 2 * self.rank, "ranks": twice, "alpha": alpha, "init": "kaiming"})

    def config(self, model: Model, *, layers: dict[str, Inserted]) -> dict[str, Any]:
        """PEFT's LoraConfig."""
        saved = self.saved_as()
        other = {name: saved.rank_of(name) for name in layers if saved.rank_of(name) != saved.rank}
        return {
            "r": saved.rank,
            "lora_alpha": saved.alpha_of(saved.rank),
            "rank_pattern": other,
            "alpha_pattern": {name: saved.alpha_of(rank) for name, rank in other.items()},
            "use_rslora": self.rank_stabilised,
            "use_dora": self.dora,
            "lora_dropout": self.dropout,
            "bias": "none",
            "fan_in_fan_out": any(cast(LoraLinear, layer).transposed for layer in layers.values()),
            "target_modules": sorted(layers),
        }

    def load(self, model: Model, *, folder: Path) -> None:
        """Read an adapter written here or by PEFT."""
        saved = self.saved_as()
        if saved is not self:
            return saved.load(model, folder=folder)
        super().load(model, folder=folder)


PLAIN_KEYS = {
    "peft_type", "task_type", "base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "peft_version",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "fan_in_fan_out", "target_modules", "init_lora_weights",
    "rank_pattern", "alpha_pattern", "use_dora",
    "layers_pattern", "megatron_core", "runtime_config", "qalora_group_size",
}  # fmt: skip


def from_peft(folder: Path) -> Lora:
    """The method that PEFT's adapter_config.json describes; ModelError for what is not plain LoRA."""
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"adapter_config.json cannot be read: {error}", file=path, hint="restore the file") from error
    if not isinstance(config, dict):
        raise ModelError("adapter_config.json holds no object", file=path, hint="restore the file")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    odd = [key for key, value in config.items() if key not in PLAIN_KEYS and value]
    plain = all(isinstance(r, int) and re.fullmatch(r"[\w.]+", str(name)) for name, r in ranks.items())
    odd += [] if plain else ["rank_pattern"]
    twice = config.get("lora_alpha") == 2 * config.get("r", 0) and alphas == {n: 2 * r for n, r in ranks.items()}
    odd += ["alpha_pattern"] if alphas and not twice else []
    wanted: dict[str, tuple[Any, ...]] = {"peft_type": ("LORA",), "bias": ("none", None)}
    wanted["init_lora_weights"] = (True, False, "gaussian", None)  # others change the base's own weights
    odd += [key for key, values in wanted.items() if config.get(key) not in values]
    if odd:
        raise ModelError(
            f"this adapter sets {odd[0]} to {config.get(odd[0])!r}, which is not plain LoRA",
            file=path,
            hint="load it with PEFT and merge it",
        )
    targets = config.get("target_modules")
    if not (targets == "all-linear" or (isinstance(targets, list) and all(isinstance(t, str) for t in targets))):
        raise ModelError(
            f"target_modules is {targets!r}, no list of layers", file=path, hint="name the layers one by one"
        )
    try:
        return Lora(
            rank=config["r"],
            ranks=ranks,
            alpha=None if twice else config["lora_alpha"],
            dora=config.get("use_dora", False),
            dropout=config.get("lora_dropout", 0.0),
            rank_stabilised=config.get("use_rslora", False),
            targets="all-linear" if targets == "all-linear" else tuple(sorted(targets)),
        )
    except (KeyError, ValidationError) as error:
        raise ModelError(f"adapter_config.json makes no sense: {error}", file=path, hint="restore the file") from error


class Qlora(Lora):
    """A low-rank update beside a base in 4 bits (Dettmers et al. 2023, eq. 5-6)."""

    kind: Literal["qlora"] = "qlora"  # type: ignore[assignment]
    summary: ClassVar[str] = "a low-rank update beside a base in 4 bits"
    quantise: Quantisation = Field(  # type: ignore[assignment]
        default="nf4", description="store the base's matrices in 4 bits (nf4, by bitsandbytes) or 8 (int8)"
    )
