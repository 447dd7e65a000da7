"""LoRA: a low-rank update beside frozen weights (Hu et al. 2021, eq. 3).

    h = W0 x + s B A x,      A [r, in] random, B [out, r] zero at the start,      s = alpha / r

With `rank_stabilised`, s = alpha / sqrt(r) (Kalajdzievski 2023, eq. 3), which keeps the update's size as r grows. Saved
in PEFT's format, so other servers load it. Ours adapts all linear layers but the vocabulary head unless told otherwise
("LoRA Without Regret", Schulman et al. 2025; QLoRA, Dettmers et al. 2023, section 4).

Shapes: D_in, D_out of a layer; r the rank.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import BeforeValidator, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import ModelError, RecipeError
from tunesmith.methods.base import Method, freeze, save_tensors
from tunesmith.models.load import Model

PREFIX = "base_model.model."  # how PEFT names the base inside an adapter


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


class LoraLinear(nn.Module):
    """A frozen linear layer with a low-rank update beside it."""

    def __init__(self, base: nn.Module, *, rank: int, scaling: float, dropout: float, generator: torch.Generator):
        super().__init__()
        transposed = isinstance(base, Conv1D)
        weight = cast(Tensor, base.weight)
        rows, columns = weight.shape
        num_out, num_in = (columns, rows) if transposed else (rows, columns)
        self.base, self.transposed, self.scaling, self.enabled = base, transposed, scaling, True
        bound = 1 / math.sqrt(num_in)  # kaiming_uniform(a=sqrt(5)), as the paper's code and PEFT have it
        start = torch.empty(rank, num_in).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(start.to(weight.device))
        self.lora_B = nn.Parameter(torch.zeros(num_out, rank, device=weight.device))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """W0 x + s B A dropout(x)."""
        out = self.base(x)
        if not self.enabled:
            return out
        return _AddLowRank.apply(out, self.dropout(x), self.lora_A, self.lora_B, self.scaling)

    def delta(self) -> Tensor:
        """The update in the base weight's own layout, float32 or wider."""
        delta = self.scaling * (self.lora_B @ self.lora_A)
        return delta.T if self.transposed else delta


def _targets(value: Any) -> Any:
    """One name stands for a list of one; no name for none is meant."""
    if isinstance(value, str) and value != "all-linear":
        return (value,)
    if isinstance(value, list | tuple) and not value:
        raise ValueError("targets names no layer; leave it out for all of them")
    return value


class Lora(Method):
    """A low-rank update beside frozen weights."""

    kind: Literal["lora"] = "lora"
    summary: ClassVar[str] = "a low-rank update beside frozen weights"
    learning_rate: ClassVar[float] = 5e-4
    rank: int = Field(default=16, ge=1, description="r, the rank of the update")
    alpha: float | None = Field(
        default=None, gt=0, le=1e6, description="the update is scaled by alpha / rank; 2 * rank by default"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the update's input while training")
    rank_stabilised: bool = Field(default=False, description="scale by alpha / sqrt(rank)")
    targets: Annotated[Literal["all-linear"] | tuple[str, ...], BeforeValidator(_targets)] = Field(
        default="all-linear", description="names of the layers to adapt, such as q_proj; all but the head by default"
    )

    @property
    def scaling(self) -> float:
        """s in the formula."""
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def apply(self, model: Model, *, seed: int) -> None:
        """Put an update beside every target layer; only updates are trained."""
        freeze(model)
        generator = torch.Generator().manual_seed(seed)
        for name in self._target_names(model):
            layer = model.causal.get_submodule(name)
            smallest = min(cast(Tensor, layer.weight).shape)
            if self.rank > smallest:
                raise RecipeError(
                    f"method.rank is {self.rank} and {name} is only {smallest} wide: a higher rank has no effect",
                    hint=f"use a rank of {smallest} or less",
                )
            lora = LoraLinear(layer, rank=self.rank, scaling=self.scaling, dropout=self.dropout, generator=generator)
            _replace(model.causal, name, lora)

    def _target_names(self, model: Model) -> list[str]:
        layers = {n: m for n, m in model.causal.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        inner = {n: m for n, m in layers.items() if m is not model.head}
        if self.targets == "all-linear":
            return sorted(inner)
        unknown = [t for t in self.targets if not any(n == t or n.endswith("." + t) for n in inner)]
        if unknown:
            known = ", ".join(sorted({n.rpartition(".")[2] for n in inner}))
            raise RecipeError(
                f"method.targets: no layer is called {unknown[0]!r}; this base has {known}", hint="name some of these"
            )
        return sorted(n for n in inner if any(n == t or n.endswith("." + t) for t in self.targets))

    @contextlib.contextmanager
    def disabled(self, model: Model) -> Iterator[None]:
        """The base, as it was."""
        layers = [m for m in model.causal.modules() if isinstance(m, LoraLinear)]
        for layer in layers:
            layer.enabled = False
        try:
            yield
        finally:
            for layer in layers:
                layer.enabled = True

    def merge(self, model: Model) -> None:
        """W0 + s B A, summed in float32 and stored in the base's dtype."""
        with torch.no_grad():
            for name, layer in _lora_layers(model):
                weight = cast(Tensor, layer.base.weight)
                wide = torch.promote_types(weight.dtype, torch.float32)
                weight.copy_((weight.to(wide) + layer.delta().to(wide)).to(weight.dtype))
                _replace(model.causal, name, layer.base)

    def save(self, model: Model, *, folder: Path) -> None:
        """PEFT's two files: adapter_config.json and adapter_model.safetensors."""
        tensors: dict[str, Tensor] = {}
        layers = _lora_layers(model)
        for name, layer in layers:
            tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A
            tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B
        save_tensors(tensors, path=folder / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": model.name,
            "r": self.rank,
            "lora_alpha": 2 * self.rank if self.alpha is None else self.alpha,
            "use_rslora": self.rank_stabilised,
            "lora_dropout": self.dropout,
            "bias": "none",
            "fan_in_fan_out": any(layer.transposed for _, layer in layers),
            "target_modules": sorted({name for name, _ in layers}),
            "inference_mode": True,
        }
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")

    def load(self, model: Model, *, folder: Path) -> None:
        """Read an adapter written here or by PEFT."""
        try:
            tensors = load_file(str(folder / "adapter_model.safetensors"))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"the adapter cannot be read: {error}", file=folder, hint="restore its files") from error
        self.apply(model, seed=0)
        expected = {f"{PREFIX}{name}.lora_{half}.weight" for name, _ in _lora_layers(model) for half in "AB"}
        if expected != set(tensors):
            odd = sorted(expected ^ set(tensors))[0]
            raise ModelError(
                f"the adapter does not fit this base: {odd}", file=folder, hint="use the base it was made for"
            )
        with torch.no_grad():
            for name, layer in _lora_layers(model):
                for half, own in (("A", layer.lora_A), ("B", layer.lora_B)):
                    saved = tensors[f"{PREFIX}{name}.lora_{half}.weight"]
                    if saved.shape != own.shape:
                        raise ModelError(
                            f"the adapter does not fit: {name} has {tuple(saved.shape)} where {tuple(own.shape)} is needed",
                            file=folder,
                            hint="use the base and the rank it was made with",
                        )
                    own.copy_(saved)
        freeze(model)


PLAIN_KEYS = {
    "peft_type", "task_type", "base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "peft_version",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "fan_in_fan_out", "target_modules", "init_lora_weights",
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
    odd = [key for key, value in config.items() if key not in PLAIN_KEYS and value]
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
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0),
            rank_stabilised=config.get("use_rslora", False),
            targets="all-linear" if targets == "all-linear" else tuple(sorted(targets)),
        )
    except (KeyError, ValidationError) as error:
        raise ModelError(f"adapter_config.json makes no sense: {error}", file=path, hint="restore the file") from error


def _lora_layers(model: Model) -> list[tuple[str, LoraLinear]]:
    return sorted((n, m) for n, m in model.causal.named_modules() if isinstance(m, LoraLinear))


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
