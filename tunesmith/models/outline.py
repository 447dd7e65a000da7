"""A model's shapes without its numbers: what a pass keeps in memory, found without computing it.

`load_model(base, device="meta")` gives a model whose tensors have no bytes. `outlined` makes them stand for tensors of a CPU
(torch's FakeTensor), so that the code that trains runs as it is: every operation says only what shape it would give, and
`Tally` adds up what is alive. Architecture, method, precision and checkpointing are thereby counted as they are, where a
formula for each would only come near.

    peak = max over operations of the sum of bytes of all tensors that are alive then
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers.pytorch_utils import Conv1D

from tunesmith.models.load import Model
from tunesmith.models.quantised import Quantisation

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default}
BYTES_A_WEIGHT = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}  # with the scales of blocks, and theirs
BYTES_AN_OUTPUT = {"nf4": 0, "int8": 4}


class Tally(TorchDispatchMode):
    """Adds up the bytes of all tensors that are alive, by the `part` of the work that made them.

    `peak` has each part's bytes at the moment when there were most in all; `products` are the shapes of matrix products
    in bf16, each once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = "activations"
        self.alive: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.products: set[tuple[tuple[int, ...], ...]] = set()
        self._seen: set[int] = set()

    @property
    def num_bytes(self) -> int:
        """Alive now."""
        return sum(self.alive.values())

    def enter(self, part: str) -> None:
        """Tensors that are made from here on belong to this part."""
        self.part = part

    def blocks_done(self) -> None:
        """What follows the last block of a forward pass is the readout's."""
        if self.part == "activations":
            self.part = "readout"

    def count(self, tensor: Tensor) -> None:
        """Enter a tensor, unless it shares its storage with one that is in."""
        storage = tensor.untyped_storage()
        key, size, part = storage._cdata, storage.nbytes(), self.part
        if key in self._seen:
            return
        self._seen.add(key)
        self.alive[part] += size
        if self.num_bytes > sum(self.peak.values()):
            self.peak = self.alive.copy()
        weakref.finalize(storage, self._gone, key, size, part)

    def _gone(self, key: int, size: int, part: str) -> None:
        self._seen.discard(key)
        self.alive[part] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute (shapes alone, under FakeTensorMode) and enter what came out; a number that is read is zero."""
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 0.0 if args[0].is_floating_point() else 0
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.count, out)
        if func in PRODUCTS and args[0].dtype == torch.bfloat16:
            self.products.add(tuple(tuple(a.shape) for a in args if isinstance(a, Tensor)))
        return out


@contextlib.contextmanager
def outlined(models: Sequence[Model]) -> Iterator[Tally]:
    """Inside the block, models on the device `meta` pass for models on a CPU, and what they would keep is tallied."""
    mode, made = FakeTensorMode(allow_non_fake_inputs=True), dict[int, Tensor]()

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            fake: Tensor = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            made[id(tensor)] = fake
        return made[id(tensor)]

    tally = Tally()
    tally.part = "weights"
    for model in models:
        for module in [*model.causal.modules(), *([] if model.outputs is None else [model.outputs])]:
            for held in (module._parameters, module._buffers, vars(module)):
                for name, value in list(held.items()):
                    if isinstance(value, Tensor | tuple):
                        held[name] = tree_map_only(Tensor, stand_in, value)
                        tree_map_only(Tensor, tally.count, held[name])
    tally.part = "activations"
    with mode, tally:
        yield tally


def after_blocks(model: Model, *, tell: Callable[[], None]) -> Any:
    """Call `tell` whenever the last block is done; the handle that is returned has `remove`."""
    return model.layers[-1].register_forward_hook(lambda module, inputs, output: tell())


def stored_bytes(model: Model, *, kind: Quantisation) -> tuple[int, int]:
    """Of the linear layers that `quantise` would store in few bits: what that saves, and the largest one restored."""
    base = [m for n, m in model.causal.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not model.head]
    sizes = [
        (m.weight.numel(), m.weight.element_size(), m.nf if isinstance(m, Conv1D) else m.out_features) for m in base
    ]
    kept = sum(numel * BYTES_A_WEIGHT[kind] + outputs * BYTES_AN_OUTPUT[kind] for numel, _, outputs in sizes)
    return int(sum(numel * width for numel, width, _ in sizes) - kept), max(numel * width for numel, width, _ in sizes)


def operations(model: Model, *, recomputed: bool) -> tuple[float, float, float]:
    """Floating-point operations of a computed token (to train, and forward alone) and of a target.

    A matrix costs 2 operations a weight forward, 2 for the gradient of its input, unless nothing below it moves, and 2 for
    its own gradient where it moves; `recomputed` blocks are computed forward twice.
    """
    forward = training = 0.0
    moving = any(p.requires_grad for p in model.input_tables()) or model.num_virtual_tokens > 0
    for block in model.layers:
        moving = moving or any(p.requires_grad for p in block.parameters())
        for weight in (p for p in block.parameters() if p.ndim >= 2):
            forward += 2 * weight.numel()
            training += weight.numel() * (2 + 2 * moving + 2 * weight.requires_grad + 2 * (recomputed and moving))
    head = model.head
    if model.outputs is not None or head is None:
        return training, forward, 0.0
    return training, forward, head.weight.numel() * (8.0 if head.weight.requires_grad else 4.0)
