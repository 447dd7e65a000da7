"""Several adapters on one base: the base is in memory once, and one adapter at a time stands in it, or none.

An adapter is loaded as if it were alone and taken out again: its modules are kept aside, and those that it replaced are back
in their places. To use it is to put the very same modules in, so the logits are those of the adapter alone, to the bit, and
nothing of another one is left. An adapter that is not in use costs its own memory and no time.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from tunesmith.errors import NotFoundError, RecipeError
from tunesmith.methods.base import Inserted, Method, inserted, replace
from tunesmith.models.load import Model
from tunesmith.models.virtual import NAME, VirtualTokens


@dataclass(frozen=True)
class Loaded:
    """An adapter kept aside: what takes the place of which modules, and its virtual tokens where it has some."""

    method: Method
    layers: dict[str, Inserted]
    virtual: VirtualTokens | None


def check_switchable(method: Method, *, run: str) -> None:
    """RecipeError by name where a method leaves no base in full precision beside its adapter."""
    if not method.keeps_base:
        raise RecipeError(
            f"{run} was tuned by method '{method.kind_name}', which changes the base's own weights",
            hint="load it alone: api.load",
        )
    if method.stored_in is not None:
        raise RecipeError(
            f"{run} was tuned beside a base in few bits ({method.stored_in}), which no other adapter fits",
            hint="load it alone: api.load",
        )


@dataclass
class Several:
    """Adapters by name on one loaded base, none of them in use at first."""

    model: Model
    adapters: dict[str, Loaded] = field(default_factory=dict)
    active: str | None = None

    def load(self, method: Method, *, name: str, folder: Path) -> None:
        """Read the adapter that `method` saved in `folder`. Raises RecipeError, ModelError; the base stays as it was."""
        assert name not in self.adapters, f"there is an adapter {name!r} already"
        check_switchable(method, run=name)
        with self.using(None):
            try:
                method.load(self.model, folder=folder)
                self.model.causal.to(self.model.device).eval()
            except BaseException:
                _take_out(self.model, inserted(self.model), self.model.virtual_tokens)
                raise
            loaded = Loaded(method, inserted(self.model), self.model.virtual_tokens)
            _take_out(self.model, loaded.layers, loaded.virtual)
        self.adapters[name] = loaded

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[Model]:
        """Inside the block the model is the base with the adapter `name`, or the base alone; then what it was before.

        Raises NotFoundError for an unknown name. The adapters share one model: one block at a time, or one in another.
        """
        if name is not None and name not in self.adapters:
            raise NotFoundError(
                f"no adapter {name!r} is loaded; there are {', '.join(self.adapters) or 'none'}",
                hint="name one of them",
            )
        before = self.active
        self._switch(name)
        try:
            yield self.model
        finally:
            self._switch(before)

    def _switch(self, name: str | None) -> None:
        if self.active is not None:
            old = self.adapters[self.active]
            _take_out(self.model, old.layers, old.virtual)
        self.active = name
        if name is not None:
            new = self.adapters[name]
            for place, layer in new.layers.items():
                replace(self.model.causal, place, layer)
            if new.virtual is not None:
                self.model.causal.add_module(NAME, new.virtual)


def _take_out(model: Model, layers: dict[str, Inserted], virtual: nn.Module | None) -> None:
    """The replaced modules back into their places."""
    for place, layer in layers.items():
        replace(model.causal, place, layer.base)
    if virtual is not None:
        delattr(model.causal, NAME)
