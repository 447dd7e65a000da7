"""Layer-wise tuning: some blocks of the base move and the others stay.

    rate(block d below the top) = rate * depth_factor^d                (Howard and Ruder 2018, section 3.2, discriminative)
    block d is frozen until share d / n * unfreeze_by of the run       (section 3.3, gradual unfreezing)

Ours unfreezes by the share of the run and not by epochs, and leaves input embeddings alone. With only the last blocks
trained the backward pass ends below them.
"""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from tunesmith.errors import RecipeError
from tunesmith.methods.base import Subset
from tunesmith.models.extended import new_rows
from tunesmith.models.load import Model


class Layers(Subset):
    """Some of the base's blocks, or only their norms or biases."""

    kind: Literal["layers"] = "layers"
    summary: ClassVar[str] = "some of the base's blocks, or only their norms or biases"
    learning_rate: ClassVar[float] = 1e-4
    last: int | None = Field(default=None, ge=1, description="the last n blocks")
    first: int | None = Field(default=None, ge=1, description="the first n blocks")
    blocks: tuple[int, ...] | None = Field(default=None, min_length=1, description="these blocks, counted from 0")
    only: Literal["all", "norms", "biases"] = Field(default="all", description="what of them moves")
    head: bool = Field(default=False, description="the vocabulary head and the norm before it too")
    depth_factor: float = Field(default=1.0, gt=0, le=1, description="learning rate of a block over that of the next")
    unfreeze_by: float | None = Field(
        default=None, gt=0, le=1, description="unfreeze from the top, one block at a time, up to this share of the run"
    )

    @model_validator(mode="after")
    def _one_choice(self) -> "Layers":
        if sum(value is not None for value in (self.last, self.first, self.blocks)) > 1:
            raise ValueError("last, first and blocks each say which blocks; give one of them")
        if 1 in (self.last, self.first, len(self.blocks or ())):
            idle = {"depth_factor": self.depth_factor != 1, "unfreeze_by": self.unfreeze_by is not None}
            if names := [name for name, given in idle.items() if given]:
                raise ValueError(f"{names[0]} has no effect on a single block")
        return self

    def chosen(self, model: Model) -> list[str]:
        """Parameters of the chosen blocks. RecipeError where a block or what is asked of it is not there."""
        names = [name for block in self._blocks(model) for name in self._of_block(model, block)]
        if not names:
            raise RecipeError(f"the chosen blocks of '{model.name}' have no {self.only}", hint="use only: norms or all")
        if self.head:
            inside = tuple(f"{name}." for name in _block_names(model))
            outside = [n for n, p in model.causal.named_parameters() if not n.startswith(inside)]
            others = {*model.input_tables(), *new_rows(model).values()}  # new rows are trained and saved anyway
            names += [n for n in outside if model.causal.get_parameter(n) not in others]
        return names

    def _blocks(self, model: Model) -> list[int]:
        count = len(model.layers)
        for name, value in (("last", self.last), ("first", self.first)):
            if value is not None and value > count:
                raise RecipeError(f"method.{name} is {value} and the base has {count} blocks", hint="use fewer")
        if self.blocks is not None and max(self.blocks) >= count:
            raise RecipeError(
                f"method.blocks names block {max(self.blocks)} and the base has {count}, from 0", hint="name others"
            )
        if self.last is not None:
            return list(range(count - self.last, count))
        return list(range(self.first)) if self.first is not None else sorted(set(self.blocks or range(count)))

    def _of_block(self, model: Model, block: int) -> list[str]:
        prefix = f"{_block_names(model)[block]}."
        names = [name for name, _ in model.causal.named_parameters() if name.startswith(prefix)]
        norms = {name for name in names if "norm" in name.lower() or ".ln_" in name}
        kept = {"all": names, "norms": norms, "biases": [n for n in names if n.endswith("bias")]}[self.only]
        return [name for name in names if name in set(kept)]

    def rate_factors(self, model: Model) -> dict[str, float]:
        """Lower blocks move more slowly."""
        blocks = self._blocks(model)
        return {
            name: self.depth_factor ** (len(blocks) - 1 - place)
            for place, block in enumerate(blocks)
            for name in self._of_block(model, block)
            if self.depth_factor != 1
        }

    def at_step(self, model: Model, *, share: float) -> None:
        """Blocks whose time has not come take no gradient."""
        if self.unfreeze_by is None:
            return
        blocks = self._blocks(model)
        for depth, block in enumerate(reversed(blocks)):
            due = share >= depth / len(blocks) * self.unfreeze_by
            for name in self._of_block(model, block):
                model.causal.get_parameter(name).requires_grad_(due)


def _block_names(model: Model) -> list[str]:
    """The blocks' names, first to last."""
    names = {id(module): name for name, module in model.causal.named_modules()}
    return [names[id(block)] for block in model.layers]
