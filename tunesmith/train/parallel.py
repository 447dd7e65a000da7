"""Several processes train one model: `torchrun --nproc-per-node N -m tunesmith train RECIPE`, on one machine or on many.

Each process takes its share of the rows of a step. Counts, losses and gradients are added up over all of them and the loop
divides once by the whole count, so N processes take the step that one would take, to the rounding of a sum.

    data    every process holds the whole model; gradients are summed once a step
    fsdp    the blocks' weights, gradients and optimiser state are divided among the processes, and a block is put together
            while it computes (ZeRO stage 3, Rajbhandari et al. 2020; PyTorch's FSDP2). What is in no block (embeddings,
            the last norm, heads, virtual tokens) stays whole everywhere

There is no launcher here and nothing to configure: torchrun's environment says how many there are. Only the first process
writes; all read the same workspace.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tunesmith.errors import ElsewhereError, RecipeError, TunesmithError
from tunesmith.models.load import Model
from tunesmith.train.settings import TrainSettings

BUCKET_NUMBERS = 1 << 24  # gradients are sent in pieces of this size: 64 MiB of float32


@dataclass(frozen=True)
class Processes:
    """How many processes train together, and which of them this is; `divides`: the blocks are divided among them."""

    count: int = 1
    rank: int = 0
    local_rank: int = 0  # on its machine
    divides: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this process writes, and speaks for all."""
        return self.rank == 0

    def share(self, units: "list[int] | range") -> list[int]:
        """The units that are this process's."""
        return list(units[self.rank :: self.count])

    # ------------------------------------------------------------------------------------------- what all must know

    def sums(self, values: list[float]) -> list[float]:
        """Each value added up over all processes, in float64."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def most(self, values: list[int]) -> list[int]:
        """Each value's largest over all processes."""
        return [int(value) for value in self._reduced(values, dist.ReduceOp.MAX)]

    def _reduced(self, values: Any, how: Any) -> list[float]:
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=how)
        found: list[float] = tensor.tolist()
        return found

    def gathered(self, value: Any) -> list[Any]:
        """What each process has for a value that JSON could hold, in the order of the processes."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def first(self, work: Callable[[], Any]) -> Any:
        """What `work` gives the first process, which alone does it; its error is everyone's."""
        return self.gathered(self._together(work if self.is_first else None))[0]

    def first_before_others(self, work: Callable[[], Any]) -> Any:
        """What `work` gives each process; one of each machine does it before the others, who find what it left on disk."""
        leads = self.local_rank == 0
        done = self._together(work if leads else None)
        return done if leads else work()

    def _together(self, work: Callable[[], Any] | None) -> Any:
        """Do the work, if there is any here, and go on when all have done theirs; ElsewhereError where one could not."""
        done, error = None, None
        try:
            done = work() if work is not None else None
        except TunesmithError as caught:
            error = caught
        failed = self.most([int(error is not None)])
        if error is not None:
            raise error
        if failed[0]:
            raise ElsewhereError("another process stopped with an error", hint="its own message says which")
        return done

    # --------------------------------------------------------------------------------------------------- the gradients

    def sum_gradients(self, parameters: dict[str, Tensor]) -> None:
        """Add the gradients of whole parameters up over all processes; those of divided ones are, already."""
        if self.count == 1:
            return
        whole = [p for p in parameters.values() if not is_divided(p)]
        somewhere = self.most([int(p.grad is not None) for p in whole])
        reached = [p for p, some in zip(whole, somewhere, strict=True) if some]
        for parameter in reached:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets(reached):
            gradients = [p.grad for p in bucket if p.grad is not None]
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def divide(self, model: Model) -> None:
        """Divide the blocks among the processes, where that is asked for. RecipeError for an encoder-decoder."""
        if not self.divides:
            return
        if model.is_encoder_decoder:
            raise RecipeError(
                "train.parallel: fsdp does not divide an encoder-decoder", hint="use train.parallel: data"
            )
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(model.device.type, (self.count,))
        blocks = list(model.layers)
        for block in blocks:
            fully_shard(block, mesh=mesh)
        divided = {id(p) for block in blocks for p in block.parameters()}
        root = model.causal.base_model
        fully_shard(root, mesh=mesh, ignored_params={p for p in root.parameters() if id(p) not in divided})
        for module in (root, *blocks):  # gradients are summed, in every backend: the loop divides
            module.set_gradient_divide_factor(1.0)  # type: ignore[attr-defined]
            module.set_force_sum_reduction_for_comms(True)  # type: ignore[attr-defined]

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor, on the CPU of the first process; the others help and need not look at it."""
        if not is_divided(tensor):
            return tensor
        full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
        return full.cpu() if self.is_first else full.new_empty(0)


ALONE = Processes()


def is_divided(tensor: Tensor) -> bool:
    """Whether each process holds a part of it."""
    if not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def part_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor as the parameter is: itself, or the part of it that this process holds."""
    tensor = tensor.to(parameter.device)
    if not is_divided(parameter) or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)  # type: ignore[attr-defined]


def clip_gradients(parameters: dict[str, Tensor], *, limit: float | None) -> float:
    """The norm of all gradients together, which are made smaller where it is above the limit."""
    moved = [p for p in parameters.values() if p.grad is not None]
    norm = gradient_norm(moved)
    if limit is not None:
        for some in ([p for p in moved if not is_divided(p)], [p for p in moved if is_divided(p)]):
            torch.nn.utils.clip_grads_with_norm_(some, limit, norm)
    return float(norm)


def gradient_norm(parameters: list[Tensor]) -> Tensor:
    """The norm of the gradients of these parameters, divided ones among them."""
    whole = [p.grad for p in parameters if p.grad is not None and not is_divided(p)]
    norm = torch.nn.utils.get_total_norm(whole)
    parts = [p.grad for p in parameters if p.grad is not None and is_divided(p)]
    if not parts:
        return norm
    of_parts: Any = torch.nn.utils.get_total_norm(parts)
    return torch.hypot(norm, of_parts.full_tensor().to(norm.device))


def _buckets(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one dtype and device together, up to BUCKET_NUMBERS at a time."""
    by_kind: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        by_kind.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for some in by_kind.values():
        bucket: list[Tensor] = []
        for parameter in some:
            if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET_NUMBERS:
                yield bucket
                bucket = []
            bucket.append(parameter)
        yield bucket


@contextlib.contextmanager
def launched(settings: TrainSettings) -> Iterator[Processes]:
    """The processes that torchrun started, joined for the length of the block; ALONE where it started one or none."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or "RANK" not in os.environ:
        yield ALONE
        return
    divides = settings.parallel == "fsdp"
    if divides and settings.optimiser == "muon":
        raise RecipeError(
            "train.optimiser: muon needs whole matrices, and train.parallel: fsdp divides them",
            hint="use train.parallel: data, or optimiser: adamw",
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if settings.device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Processes(count, int(os.environ["RANK"]), local_rank, divides)
    finally:
        dist.destroy_process_group()
