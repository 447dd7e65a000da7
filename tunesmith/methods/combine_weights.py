"""Whole weights combined: what K runs changed of one base's weights becomes one change, tensor by tensor.

    dW_k = W_k - W_0            of a run that tuned the weights themselves: full, layers, bitfit
    dW_k = s_k B_k A_k          of a LoRA run
    W    = W_0 + dW             dW of the dW_k, one way or another, as in methods/combine.py

This is what task arithmetic (Ilharco et al. 2023, section 2), TIES (Yadav et al. 2023, section 3.2) and DARE (Yu et al.
2024, eq. 1-3) were published for; ours trims within each tensor. A tensor that a run left alone has no change there, and one
that no run moved stays the base's. Differences are taken and added in float64 and rounded once to the dtype that the base
was loaded in, so a single run with weight 1 comes back to the bit.

Nothing is whole in memory: the new model begins as the base's file, and its tensors are replaced there, a part of one at a
time. TIES alone looks at all of a tensor's change at once, of one run after the other.

Shapes: K runs, R rows of a tensor, C columns: all that stands behind a tensor's first axis.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tunesmith.errors import ModelError
from tunesmith.methods.base import linear_layers, linear_shape
from tunesmith.methods.combine import DRAWN, Factors, Way, dropped, joined, largest, not_finite
from tunesmith.models.load import Model

PART_NUMBERS = 1 << 20  # of a tensor that are combined at a time, each run's in float64: 8 MiB
HINT = "restore its files"


class Tensors:
    """The tensors of a folder's safetensors files, read as they are asked for. ModelError where they cannot be."""

    def __init__(self, folder: Path):
        self.file_of: dict[str, Path] = {}
        self._opened: dict[Path, Any] = {}  # by file; the library's type is not public
        for path in sorted(folder.glob("*.safetensors")):
            try:
                self._opened[path] = safe_open(str(path), framework="pt")
            except (OSError, SafetensorError) as error:
                raise ModelError(f"the weights cannot be read: {error}", file=path, hint=HINT) from error
            self.file_of |= dict.fromkeys(self._opened[path].keys(), path)
        if not self.file_of:
            raise ModelError("no .safetensors weights here", file=folder, hint=HINT)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return tuple(self._slice(name).get_shape())

    def rows(self, name: str, rows: slice) -> Tensor:
        """A part [R, C] of one tensor."""
        part: Tensor = self._slice(name)[rows]
        return part.reshape(len(part), -1)

    def write(self, name: str, part_RC: Tensor, *, rows: slice) -> None:
        """Put `part_RC` in the place of rows of a tensor, in its file."""
        path = self.file_of[name]
        with path.open("r+b") as file:
            size = int.from_bytes(file.read(8), "little")
            begin = json.loads(file.read(size))[name]["data_offsets"][0]
            width = part_RC.shape[1] * part_RC.element_size()
            file.seek(8 + size + begin + rows.start * width)
            file.write(part_RC.contiguous().view(torch.uint8).numpy().data)

    def _slice(self, name: str) -> Any:
        return self._opened[self.file_of[name]].get_slice(name)


class Change(Protocol):
    """What a run changed of the base's weights."""

    @property
    def names(self) -> Collection[str]:
        """The tensors it may have moved."""

    @property
    def whole(self) -> bool:
        """Whether these must be all that the base has."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one of them."""

    def delta(self, name: str, *, rows: slice, base_RC: Tensor) -> Tensor:
        """A part of dW [R, C] in float64."""


@dataclass(frozen=True)
class OwnWeights:
    """Weights that were tuned themselves: dW = W - W_0. `whole`: all of the model's, or else those that moved."""

    weights: Tensors
    whole: bool

    @property
    def names(self) -> Collection[str]:
        """Those of the files."""
        return self.weights.file_of.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """As the file has it."""
        return self.weights.shape(name)

    def delta(self, name: str, *, rows: slice, base_RC: Tensor) -> Tensor:
        """W - W_0."""
        return self.weights.rows(name, rows).double() - base_RC.double()


@dataclass(frozen=True)
class LowRank:
    """A LoRA adapter's updates by layer: dW = B A, or its transpose where the base stores [I, O]."""

    updates: Mapping[str, Factors]
    transposed: frozenset[str]
    whole: ClassVar[bool] = False

    @property
    def names(self) -> Collection[str]:
        """The layers' weights."""
        return {f"{layer}.weight" for layer in self.updates}

    def shape(self, name: str) -> tuple[int, ...]:
        """As the base stores it."""
        left, right = self._factors(name)
        return len(left), right.shape[1]

    def delta(self, name: str, *, rows: slice, base_RC: Tensor) -> Tensor:
        """B A."""
        left, right = self._factors(name)
        return left[rows].double() @ right.double()

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        layer = name.removesuffix(".weight")
        a_RI, b_OR = self.updates[layer]
        return (a_RI.T, b_OR.T) if layer in self.transposed else (b_OR, a_RI)


@dataclass(frozen=True)
class Moved:
    """How many tensors a combination changed, and how many numbers they hold."""

    tensors: int
    numbers: int


def transposed_layers(model: Model) -> frozenset[str]:
    """The linear layers whose weights are stored as [I, O]."""
    names = linear_layers(model, targets="all-linear")
    return frozenset(name for name in names if linear_shape(model.causal.get_submodule(name))[2])


def combine_weights(
    folder: Path, changes: Mapping[str, Change], *, how: Way, weights: Sequence[float], density: float, seed: int = 0
) -> Moved:
    """Add the combined change to the base that was saved in `folder`; `changes` by run, `weights` in the same order.

    Raises ModelError where a run's tensors are not the base's or not finite; the folder is of no use then.
    """
    combining = _Combining(
        base=Tensors(folder),
        changes=changes,
        how=how,
        weights=weights,
        density=density,
        generator=torch.Generator().manual_seed(seed),
    )
    for run in changes:
        combining.check_fits(run)
    moved = [name for name in sorted(combining.base.file_of) if combining.replace(name)]
    return Moved(len(moved), sum(math.prod(combining.base.shape(name)) for name in moved))


@dataclass(frozen=True, kw_only=True)
class _Combining:
    """One base's tensors, and what is done to each."""

    base: Tensors
    changes: Mapping[str, Change]
    how: Way
    weights: Sequence[float]
    density: float
    generator: torch.Generator

    def check_fits(self, run: str) -> None:
        """ModelError unless a run's tensors are the base's."""
        change, known = self.changes[run], self.base.file_of
        odd = set(change.names) - set(known) | (set(known) - set(change.names) if change.whole else set())
        odd |= {name for name in change.names if name in known and change.shape(name) != self.base.shape(name)}
        if odd:
            raise ModelError(
                f"{run} and its base do not have the same {min(odd)} in their files",
                hint="combine runs of method: full or lora, and restore their files",
            )

    def replace(self, name: str) -> bool:
        """Put the combined tensor in the place of the base's. Returns whether it is another one."""
        moving = [run for run, change in self.changes.items() if name in change.names]
        kept = {run: self._kept(run, name) for run in moving} if self.how == "ties" else {}
        shape, moved = self.base.shape(name), False
        for rows in _parts(shape) if moving else ():
            base_RC = self.base.rows(name, rows)
            votes = []
            for run, weight in zip(self.changes, self.weights, strict=True):
                delta_RC = torch.zeros(base_RC.shape, dtype=torch.float64)
                if run in moving:
                    delta_RC = self._delta(run, name, rows=rows, base_RC=base_RC)
                if self.how in DRAWN:
                    delta_RC = dropped(delta_RC, density=self.density, generator=self.generator)
                votes.append(weight * (delta_RC * kept[run][rows] if run in kept else delta_RC))
            delta_RC = joined(votes, how=self.how, weights=self.weights)
            if delta_RC.any():
                moved = True
                self.base.write(name, (base_RC.double() + delta_RC).to(base_RC.dtype), rows=rows)
        return moved

    def _kept(self, run: str, name: str) -> Tensor:
        """What TIES keeps of a run's change, [R, C] bool."""
        shape = self.base.shape(name)
        delta_RC = torch.empty(shape[0], math.prod(shape[1:]), dtype=torch.float64)
        for rows in _parts(shape):
            delta_RC[rows] = self._delta(run, name, rows=rows, base_RC=self.base.rows(name, rows))
        return largest(delta_RC, density=self.density)

    def _delta(self, run: str, name: str, *, rows: slice, base_RC: Tensor) -> Tensor:
        delta_RC = self.changes[run].delta(name, rows=rows, base_RC=base_RC)
        if not delta_RC.isfinite().all():
            raise not_finite(run, name)
        return delta_RC


def _parts(shape: tuple[int, ...]) -> list[slice]:
    """The rows of a tensor, so many at a time as PART_NUMBERS says."""
    step = max(1, PART_NUMBERS // max(1, math.prod(shape[1:])))
    return [slice(start, start + step) for start in range(0, shape[0], step)]
