"""What a tuning method is: which parameters move. Freezing, counting, merging, saving and loading exist here once.

A method changes a loaded model in place: it puts modules in the place of the base's (`Adapter`), marks some of the base's
own parameters (`Subset`), or stands virtual tokens before every sequence (methods/virtual.py). All that moves is then found
by `requires_grad`, so the optimiser, checkpoints and counts need to know nothing of methods.
"""

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import ModelError, RecipeError
from tunesmith.models.extended import new_rows, token_indices
from tunesmith.models.load import Model
from tunesmith.models.quantised import Quantisation, QuantisedLinear, quantise, restore

PREFIX = "base_model.model."  # how PEFT names the base inside an adapter


class Method(BaseModel, ABC):
    """Base of all methods: a frozen pydantic model with its knobs."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    summary: ClassVar[str] = ""
    learning_rate: ClassVar[float] = 1e-4  # the vetted default when the recipe gives none
    saves_model: ClassVar[bool] = False  # the result is a whole model and no adapter
    keeps_base: ClassVar[bool] = True  # `disabled` gives the base back
    merges: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = None  # its name in PEFT, None where PEFT does not have it
    peft_new_rows: ClassVar[bool] = False  # PEFT keeps rows of new tokens beside it

    @property
    def kind_name(self) -> str:
        """What recipes call it."""
        return str(self.model_dump(include={"kind"})["kind"])

    @property
    def stored_in(self) -> Quantisation | None:
        """In how many bits the frozen base is stored; None as it came."""
        return None

    @property
    def num_virtual_tokens(self) -> int:
        """How many tokens of the context it takes for itself."""
        return 0

    @abstractmethod
    def apply(self, model: Model, *, seed: int) -> None:
        """Insert modules and mark what is trained; everything else is frozen before. Deterministic by `seed`."""

    @contextlib.contextmanager
    def disabled(self, model: Model) -> Iterator[None]:
        """Inside the block the model computes what its base computes. ModelError where the base is gone."""
        raise ModelError(f"method '{self.kind_name}' keeps no base to go back to", hint="load the base")
        yield

    def merge(self, model: Model) -> None:
        """Fold what was inserted into the base weights and take it out: a plain model of the same shape."""
        raise ModelError(
            f"method '{self.kind_name}' cannot be merged into the weights", hint="export the adapter: --format peft"
        )

    @abstractmethod
    def save(self, model: Model, *, folder: Path) -> None:
        """Write the tuned result: an adapter in PEFT's format where PEFT has the method, or a whole model."""

    @abstractmethod
    def load(self, model: Model, *, folder: Path) -> None:
        """Apply the method to a fresh base and read back what `save` wrote. Nothing is trainable afterwards."""

    def rate_factors(self, model: Model) -> dict[str, float]:
        """Factors on the learning rate by parameter name, where they are not 1."""
        return {}

    def at_step(self, model: Model, *, share: float) -> None:
        """Called before each optimiser step with the share of the run that is done."""


def freeze(model: Model) -> None:
    """Nothing moves until a method says so."""
    for parameter in model.causal.parameters():
        parameter.requires_grad_(False)


def trainable(model: Model) -> dict[str, Tensor]:
    """What moves, by name, in a fixed order; tied parameters once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def num_trainable(model: Model) -> int:
    """How many numbers move."""
    return sum(p.numel() for p in trainable(model).values())


def save_tensors(tensors: dict[str, Tensor], *, path: Path) -> None:
    """Write tensors as safetensors, contiguous and on the CPU."""
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, str(path), metadata={"format": "pt"})


def set_trainable_dtype(model: Model, *, frozen: torch.dtype) -> None:
    """Frozen floating-point weights in `frozen`, whatever moves in float32, and a vector beside one that moves too."""
    for module in model.causal.modules():
        own = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        moves = any(p.requires_grad for p in own)
        for parameter in own:
            wide = parameter.requires_grad or (moves and parameter.ndim == 1)
            parameter.data = parameter.data.to(torch.float32 if wide else frozen)


# ------------------------------------------------------------------------------- modules in the place of the base's own


class Inserted(nn.Module):
    """A module in the place of one of the base's, which it holds as `base`; disabled, it computes only that.

    `saved` names the parameters that are trained and saved, with the name that a file has for each.
    """

    saved: ClassVar[dict[str, str]] = {}

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, self.enabled = base, True

    @property
    def weight(self) -> Any:
        """The base's: some blocks (T5's) look at it for its dtype."""
        return self.base.weight

    def tensors(self) -> dict[str, Tensor]:
        """What is saved, by its name in a file."""
        return {theirs: self.get_parameter(ours) for ours, theirs in self.saved.items()}

    def fold(self) -> None:
        """Change the base's weights so that it alone computes what both do now."""
        raise NotImplementedError


class Frozen(Method):
    """A method that trains nothing of the base's own, so that the base may be stored in few bits."""

    quantise: Quantisation | None = Field(
        default=None, description="store the base's matrices in 4 bits (nf4, by bitsandbytes) or 8 (int8)"
    )

    @property
    def stored_in(self) -> Quantisation | None:
        """What the recipe says."""
        return self.quantise

    def freeze(self, model: Model) -> None:
        """Nothing moves, and the base is stored as it shall be."""
        freeze(model)
        if self.quantise is not None:
            quantise(model, self.quantise)


class Adapter(Frozen):
    """A method that puts a module in the place of some of the base's, and trains those alone."""

    @abstractmethod
    def places(self, model: Model) -> list[str]:
        """Names of the modules to replace, sorted."""

    @abstractmethod
    def insert(self, base: nn.Module, *, name: str, model: Model, generator: torch.Generator) -> Inserted:
        """What takes the place of `base`."""

    @abstractmethod
    def config(self, model: Model, *, layers: dict[str, Inserted]) -> dict[str, Any]:
        """What adapter_config.json says beyond the base's name."""

    def apply(self, model: Model, *, seed: int) -> None:
        """Only what is inserted is trained."""
        names = self.places(model)
        self.freeze(model)
        generator = torch.Generator().manual_seed(seed)
        for name in names:
            base = model.causal.get_submodule(name)
            replace(model.causal, name, self.insert(base, name=name, model=model, generator=generator).to(model.device))

    @contextlib.contextmanager
    def disabled(self, model: Model) -> Iterator[None]:
        """The base, as it was."""
        layers = inserted(model).values()
        for layer in layers:
            layer.enabled = False
        try:
            yield
        finally:
            for layer in layers:
                layer.enabled = True

    def merge(self, model: Model) -> None:
        """Each module folds itself into what it replaced; of a quantised base, into the weights it was trained against."""
        if not self.merges:
            return super().merge(model)
        with torch.no_grad():
            for name, layer in inserted(model).items():
                if isinstance(layer.base, QuantisedLinear):
                    layer.base = layer.base.plain()
                layer.fold()
                replace(model.causal, name, layer.base)
            restore(model)

    def save(self, model: Model, *, folder: Path) -> None:
        """adapter_config.json and adapter_model.safetensors."""
        config = self.config(model, layers=inserted(model))
        save_adapter(self, model, folder=folder, tensors=self._tensors(model), config=config)

    def _tensors(self, model: Model) -> dict[str, Tensor]:
        layers = inserted(model).items()
        own = {f"{PREFIX}{name}.{key}": tensor for name, layer in layers for key, tensor in layer.tensors().items()}
        return own | self.shared_tensors(model)

    def shared_tensors(self, model: Model) -> dict[str, Tensor]:
        """What is saved besides each module's own, by its name in the file."""
        return {}

    def load(self, model: Model, *, folder: Path) -> None:
        """Read an adapter written here, or by PEFT where it has the method."""
        tensors = load_adapter(folder)
        self.apply(model, seed=0)
        copy_tensors(tensors, self._tensors(model), model=model, folder=folder)
        freeze(model)


def inserted(model: Model) -> dict[str, Inserted]:
    """Everything that an adapter put in, by name."""
    return dict(sorted((n, m) for n, m in model.causal.named_modules() if isinstance(m, Inserted)))


def replace(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the submodule `name` is."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def save_adapter(
    method: Method, model: Model, *, folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]
) -> None:
    """The two files of an adapter, as PEFT names them; rows of new tokens are part of it."""
    save_tensors(tensors | _new_rows(model), path=folder / "adapter_model.safetensors")
    indices = token_indices(model)
    common = {
        "peft_type": method.peft_type or f"TUNESMITH_{method.kind_name.upper()}",
        "task_type": _task_type(model),
        "base_model_name_or_path": model.name,
        "inference_mode": True,
    } | ({"trainable_token_indices": indices} if indices else {})
    (folder / "adapter_config.json").write_text(json.dumps(common | config, indent=1) + "\n", "utf-8")


def _task_type(model: Model) -> str:
    """Which of its classes PEFT puts around the base."""
    if model.is_encoder:
        return "FEATURE_EXTRACTION"
    return "SEQ_2_SEQ_LM" if model.is_encoder_decoder else "CAUSAL_LM"


def load_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter; ModelError where they cannot be read."""
    try:
        return load_file(str(folder / "adapter_model.safetensors"))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the adapter cannot be read: {error}", file=folder, hint="restore its files") from error


def _new_rows(model: Model) -> dict[str, Tensor]:
    return {f"{PREFIX}{name}": row for name, row in new_rows(model).items()}


def copy_tensors(tensors: dict[str, Tensor], own: dict[str, Tensor], *, model: Model, folder: Path) -> None:
    """Copy saved tensors into a model's own, and rows of new tokens into its; ModelError unless names and shapes fit."""
    own = own | _new_rows(model)
    if odd := sorted(set(tensors) ^ set(own)):
        raise ModelError(
            f"the adapter does not fit this base: {odd[0]}", file=folder, hint="use the base it was made for"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            if tensors[name].shape != tensor.shape:
                raise ModelError(
                    f"the adapter does not fit: {name} has {tuple(tensors[name].shape)} where "
                    f"{tuple(tensor.shape)} is needed",
                    file=folder,
                    hint="use the base and the settings it was made with",
                )
            tensor.copy_(tensors[name])


def _targets(value: Any) -> Any:
    """One name stands for a list of one; no name for none is meant."""
    if isinstance(value, str) and value != "all-linear":
        return (value,)
    if isinstance(value, list | tuple) and not value:
        raise ValueError("targets names no layer; leave it out for all of them")
    return value


Targets = Annotated[
    Literal["all-linear"] | tuple[str, ...],
    BeforeValidator(_targets),
    Field(description="names of the layers to adapt, such as q_proj; all but the head by default"),
]


def linear_layers(model: Model, *, targets: "Literal['all-linear'] | tuple[str, ...]") -> list[str]:
    """Names of the linear layers that `targets` means; the vocabulary head is none of them. RecipeError if unknown."""
    layers = {n: m for n, m in model.causal.named_modules() if isinstance(m, nn.Linear | Conv1D | QuantisedLinear)}
    inner = sorted(n for n, m in layers.items() if m is not model.head)
    if targets == "all-linear":
        return inner
    unknown = [t for t in targets if not any(n == t or n.endswith("." + t) for n in inner)]
    if unknown:
        known = ", ".join(sorted({n.rpartition(".")[2] for n in inner}))
        raise RecipeError(
            f"method.targets: no layer is called {unknown[0]!r}; this base has {known}", hint="name some of these"
        )
    return [n for n in inner if any(n == t or n.endswith("." + t) for t in targets)]


def linear_shape(layer: nn.Module) -> tuple[int, int, bool]:
    """(D_in, D_out, whether the weight is stored as [D_in, D_out]) of a linear layer."""
    if isinstance(layer, QuantisedLinear):
        return layer.in_features, layer.out_features, layer.transposed
    rows, columns = cast(Tensor, layer.weight).shape
    return (rows, columns, True) if isinstance(layer, Conv1D) else (columns, rows, False)


def linear_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as it is stored, restored where it is quantised."""
    if isinstance(layer, QuantisedLinear):
        weight_OI = layer.restored(layer.dtype)
        return weight_OI.T if layer.transposed else weight_OI
    return cast(Tensor, layer.weight)


# -------------------------------------------------------------------------------------- some of the base's own weights


class Subset(Method):
    """A method that trains some of the base's own parameters and saves those alone."""

    keeps_base: ClassVar[bool] = False

    @abstractmethod
    def chosen(self, model: Model) -> list[str]:
        """Names of the parameters that are trained."""

    def apply(self, model: Model, *, seed: int) -> None:
        """Mark what was chosen."""
        freeze(model)
        for name in self.chosen(model):
            model.causal.get_parameter(name).requires_grad_(True)

    def merge(self, model: Model) -> None:
        """Nothing was inserted."""

    def save(self, model: Model, *, folder: Path) -> None:
        """The chosen parameters by their names in the base."""
        tensors: dict[str, Tensor] = {name: model.causal.get_parameter(name) for name in self.chosen(model)}
        save_adapter(self, model, folder=folder, tensors=tensors, config=self.model_dump(mode="json"))

    def load(self, model: Model, *, folder: Path) -> None:
        """Put the saved parameters in the place of the base's."""
        tensors = load_adapter(folder)
        own: dict[str, Tensor] = {name: model.causal.get_parameter(name) for name in self.chosen(model)}
        copy_tensors(tensors, own, model=model, folder=folder)
        freeze(model)
