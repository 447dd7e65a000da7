"""Frozen matrices in 4 or 8 bits, turned back into numbers wherever they are used.

    nf4:   w ~ scale_b code[q],   scale_b of blocks of 64 itself in 8 bits       (Dettmers et al. 2023, section 3: NF4,
                                                                                  double quantisation; by bitsandbytes)
    int8:  w ~ scale_o q / 127,   scale_o the largest of an output's weights     (vector-wise, as in Dettmers et al. 2022,
                                                                                  eq. 1, but without its mixed product)

Products are computed in the input's precision with the restored weights, forward and backward; the restored matrix lives no
longer than the product. The vocabulary head, embeddings, norms and fused experts stay as they are.

Shapes: I and O inputs and outputs of a layer.
"""

import logging
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import RecipeError

if TYPE_CHECKING:
    from tunesmith.models.load import Model

Quantisation = Literal["nf4", "int8"]


class QuantisedLinear(nn.Module):
    """A linear layer whose weight [O, I] is stored in few bits; it takes no gradient."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, *, transposed: bool):
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.dtype, self.transposed = weight_OI.dtype, transposed
        self.bias = None if bias_O is None else nn.Parameter(bias_O.detach().clone(), requires_grad=False)
        self.weight = None  # some blocks (T5's) look at a layer's weight for its dtype

    def restored(self, dtype: torch.dtype) -> Tensor:
        """The weight [O, I] that all computation sees."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out: Tensor = _Product.apply(x, self)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def plain(self) -> nn.Module:
        """An ordinary layer with the restored weight, of the class and in the dtype that the base had."""
        weight_OI = self.restored(self.dtype)
        layer: nn.Module
        if self.transposed:
            layer = Conv1D(self.out_features, self.in_features)
            layer.weight = nn.Parameter(weight_OI.T.contiguous(), requires_grad=False)
        else:
            with torch.device("meta"):
                layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
            layer.weight = nn.Parameter(weight_OI, requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return layer


class _Product(torch.autograd.Function):
    """x W^T without keeping the restored W between forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        with torch.autocast(x.device.type, enabled=False):
            return x @ layer.restored(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return gradients[0] @ ctx.layer.restored(gradients[0].dtype), None


class Int8Linear(QuantisedLinear):
    """A byte a weight and a scale an output."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, *, transposed: bool):
        super().__init__(weight_OI, bias_O, transposed=transposed)
        wide = weight_OI.detach().to(torch.promote_types(weight_OI.dtype, torch.float32))
        scale_O1 = wide.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("codes", (wide / scale_O1).round().to(torch.int8))
        self.register_buffer("scale", scale_O1)

    def restored(self, dtype: torch.dtype) -> Tensor:
        """scale q."""
        scale = cast(Tensor, self.scale)
        return (cast(Tensor, self.codes).to(scale.dtype) * scale).to(dtype)


class Nf4Linear(QuantisedLinear):
    """Half a byte a weight, and a byte for the scale of 64 of them."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, *, transposed: bool):
        super().__init__(weight_OI, bias_O, transposed=transposed)
        functional = _bitsandbytes()
        codes, state = functional.quantize_4bit(
            weight_OI.detach().float().contiguous(), quant_type="nf4", compress_statistics=True
        )
        self.state = state
        self.register_buffer("codes", codes)

    def restored(self, dtype: torch.dtype) -> Tensor:
        """scale code[q]."""
        found: Tensor = _bitsandbytes().dequantize_4bit(cast(Tensor, self.codes), self.state)
        return found.to(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "Nf4Linear":
        super()._apply(fn, recurse)
        self.state.to(cast(Tensor, self.codes).device)
        return self


KINDS: dict[str, type[QuantisedLinear]] = {"nf4": Nf4Linear, "int8": Int8Linear}


def _bitsandbytes() -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of faster products, which are not used here
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise RecipeError(
            "quantise: nf4 needs bitsandbytes, which is not installed", hint="pip install 'tunesmith[qlora]'"
        ) from error
    return functional


def check_installed(kind: Quantisation | None) -> None:
    """RecipeError where a library is missing."""
    if kind == "nf4":
        _bitsandbytes()


def quantise(model: "Model", kind: Quantisation) -> None:
    """Store the weight of every linear layer but the vocabulary head in few bits."""
    for name, layer in list(model.causal.named_modules()):
        if isinstance(layer, nn.Linear | Conv1D) and layer is not model.head:
            transposed = isinstance(layer, Conv1D)
            weight_OI = layer.weight.T if transposed else layer.weight
            _put(model, name, KINDS[kind](weight_OI, layer.bias, transposed=transposed))


def restore(model: "Model") -> None:
    """Ordinary layers again, with the weights that were computed with."""
    for name, layer in list(model.causal.named_modules()):
        if isinstance(layer, QuantisedLinear):
            _put(model, name, layer.plain())


def _put(model: "Model", name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.causal.get_submodule(parent), leaf, module)
