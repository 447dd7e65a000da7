"""What prompt tuning, p-tuning and prefix tuning have in common: learned virtual tokens before every sequence.

They begin as real tokens: those of `text`, repeated to the length that is asked for, or tokens drawn from the vocabulary.
Beginning at real words' activations is what makes a prefix work with few rows (Li and Liang 2021, section 7.4; Lester et
al. 2021, section 3.2). What computes them while training (an MLP, an LSTM) is left behind when they are saved: a file
holds the virtual tokens themselves, in PEFT's format.

Shapes: P virtual tokens, D hidden.
"""

import contextlib
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tunesmith.errors import RecipeError
from tunesmith.methods.base import Frozen, copy_tensors, freeze, load_adapter, save_adapter
from tunesmith.models.load import Model
from tunesmith.models.virtual import NAME, VirtualTokens

SAVED = "prompt_embeddings"  # PEFT's name for the one tensor


class VirtualTokenMethod(Frozen):
    """A method whose parameters make virtual tokens."""

    merges: ClassVar[bool] = False
    num_tokens: int = Field(default=20, ge=1, le=4096, description="virtual tokens before every sequence")
    text: str | None = Field(
        default=None, min_length=1, description="what they begin as; tokens drawn from the vocabulary by default"
    )

    @property
    def num_virtual_tokens(self) -> int:
        """They take as many tokens of the context."""
        return self.num_tokens

    @abstractmethod
    def make(self, model: Model, *, start_P: Tensor, generator: torch.Generator) -> VirtualTokens:
        """The module that makes them, beginning at the tokens `start_P` (on the CPU)."""

    @abstractmethod
    def table(self, module: VirtualTokens) -> Tensor:
        """What is saved: [P, ...]."""

    @abstractmethod
    def fixed(self, model: Model, *, table: Tensor) -> VirtualTokens:
        """A module that holds a saved table."""

    def apply(self, model: Model, *, seed: int) -> None:
        """Only what makes the virtual tokens is trained."""
        if model.is_encoder_decoder:
            raise RecipeError(
                f"method '{self.kind_name}' puts tokens before one sequence, and an encoder-decoder has two",
                hint="use method: lora, ia3 or adapters",
            )
        if self.num_tokens >= model.context_tokens:
            raise RecipeError(
                f"method.num_tokens is {self.num_tokens} and the base's context has {model.context_tokens} tokens",
                hint="use fewer virtual tokens",
            )
        self.freeze(model)
        generator = torch.Generator().manual_seed(seed)
        start_P = self._start(model, generator=generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self.make(model, start_P=start_P, generator=generator)
        model.causal.add_module(NAME, module.to(model.device))

    def _start(self, model: Model, *, generator: torch.Generator) -> Tensor:
        if self.text is None:
            return torch.randint(model.tokenizer.num_tokens, (self.num_tokens,), generator=generator)
        ids = torch.tensor(model.tokenizer.encode_text([self.text])[0])
        return ids.repeat(-(-self.num_tokens // len(ids)))[: self.num_tokens]

    @contextlib.contextmanager
    def disabled(self, model: Model) -> Iterator[None]:
        """Without the virtual tokens the model is the base."""
        module = model.virtual_tokens
        assert module is not None
        module.enabled = False
        try:
            yield
        finally:
            module.enabled = True

    def save(self, model: Model, *, folder: Path) -> None:
        """PEFT's two files."""
        module = model.virtual_tokens
        assert module is not None
        shape = model.causal.config
        config: dict[str, Any] = {
            "num_virtual_tokens": self.num_tokens,
            "token_dim": shape.hidden_size,
            "num_transformer_submodules": 1,
            "num_attention_heads": shape.num_attention_heads,
            "num_layers": len(model.layers),
        }
        with torch.no_grad():
            table = self.table(module)
        save_adapter(self, model, folder=folder, tensors={SAVED: table}, config=config | self.config(model))

    def config(self, model: Model) -> dict[str, Any]:
        """What adapter_config.json says beyond what all of them have."""
        return {}

    def load(self, model: Model, *, folder: Path) -> None:
        """The virtual tokens themselves."""
        tensors = load_adapter(folder)
        self.apply(model, seed=0)
        module = model.virtual_tokens
        assert module is not None
        with torch.no_grad():
            table = self.table(module).clone()
        copy_tensors(tensors, {SAVED: table}, model=model, folder=folder)
        model.causal.add_module(NAME, self.fixed(model, table=table).to(model.device))
        freeze(model)
