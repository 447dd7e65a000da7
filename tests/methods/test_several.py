"""Several adapters on one base: each as if it were alone, and no trace of it afterwards."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tunesmith.data.pack import Pack
from tunesmith.errors import ModelError, NotFoundError, RecipeError
from tunesmith.generate.runner import Generator
from tunesmith.generate.sampling import Sampling
from tunesmith.methods import Method
from tunesmith.methods.adapters import Adapters
from tunesmith.methods.base import trainable
from tunesmith.methods.bitfit import Bitfit
from tunesmith.methods.full import Full
from tunesmith.methods.ia3 import Ia3
from tunesmith.methods.layers import Layers
from tunesmith.methods.lora import Lora, Qlora
from tunesmith.methods.p_tuning import PTuning
from tunesmith.methods.prefix import Prefix
from tunesmith.methods.prompt import Prompt
from tunesmith.methods.several import Several
from tunesmith.methods.vera import Vera
from tunesmith.models.load import Model

BuildModel = Callable[..., Model]
METHODS: dict[str, Method] = {
    "lora": Lora(rank=4),
    "lora, other layers": Lora(rank=2, alpha=1.0, targets=("q_proj", "down_proj")),
    "dora": Lora(rank=2, dora=True),
    "pissa": Lora(rank=2, init="pissa"),
    "prefix": Prefix(num_tokens=3),
    "prompt": Prompt(num_tokens=4),
    "p_tuning": PTuning(num_tokens=2, width=8),
    "adapters": Adapters(reduction=4),
    "houlsby": Adapters(reduction=4, placement="houlsby"),
    "ia3": Ia3(),
    "vera": Vera(rank=8),
}


def build(build_model: BuildModel) -> Model:
    model = build_model("llama", dtype=torch.float32)
    model.causal.eval()
    return model


def hidden(model: Model, pack: Pack) -> Tensor:
    with torch.no_grad():
        return model.hidden(model.attention(pack))


@pytest.fixture(scope="module")
def folders(build_model: BuildModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved adapter of every method, moved from where it starts."""
    found = {}
    for seed, (name, method) in enumerate(METHODS.items()):
        model = build(build_model)
        method.apply(model, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in trainable(model).values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        found[name] = tmp_path_factory.mktemp("adapter")
        method.save(model, folder=found[name])
    return found


@pytest.fixture(scope="module")
def several(build_model: BuildModel, folders: dict[str, Path]) -> Several:
    """All of them on one base."""
    made = Several(build(build_model))
    for name, method in METHODS.items():
        made.load(method, name=name, folder=folders[name])
    return made


@pytest.fixture(scope="module")
def base(build_model: BuildModel, tree_pack: Pack) -> Tensor:
    return hidden(build(build_model), tree_pack)


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_in_use_is_the_adapter_alone_to_the_bit(
    build_model: BuildModel, several: Several, folders: dict[str, Path], base: Tensor, tree_pack: Pack, name: str
) -> None:
    alone = build(build_model)
    METHODS[name].load(alone, folder=folders[name])
    alone.causal.eval()
    with several.using(name) as model:
        assert torch.equal(hidden(model, tree_pack), hidden(alone, tree_pack))
        prompts, drawn = [[*range(20, 40)], [5, 6]], Sampling(max_tokens=5, temperature=1.0, seed=1)
        ours, theirs = (Generator(m, stop_ids=[]).generate(prompts, sampling=drawn) for m in (model, alone))
        assert [c.tokens for c in ours] == [c.tokens for c in theirs]
        with several.adapters[name].method.disabled(model):
            assert torch.equal(hidden(model, tree_pack), base)
        assert model.room_tokens == alone.room_tokens
    assert torch.equal(hidden(several.model, tree_pack), base)


def test_nothing_of_any_adapter_is_left(
    build_model: BuildModel, several: Several, base: Tensor, tree_pack: Pack
) -> None:
    fresh = build(build_model)
    for name in METHODS:
        with several.using(name):
            assert several.active == name
    assert several.active is None
    assert torch.equal(hidden(several.model, tree_pack), base)
    assert [n for n, _ in several.model.causal.named_modules()] == [n for n, _ in fresh.causal.named_modules()]
    ours, theirs = several.model.causal.state_dict(), fresh.causal.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_base_is_in_memory_once(several: Several) -> None:
    own = {id(p) for p in several.model.causal.parameters()}
    for name in METHODS:
        with several.using(name) as model:
            assert own <= {id(p) for p in model.causal.parameters()}


def test_blocks_may_stand_in_one_another_and_end_by_an_error(several: Several, base: Tensor, tree_pack: Pack) -> None:
    with several.using("lora") as model:
        expected = hidden(model, tree_pack)
        with several.using("prefix"):
            assert not torch.equal(hidden(model, tree_pack), expected)
            with several.using(None):
                assert torch.equal(hidden(model, tree_pack), base)
        assert torch.equal(hidden(model, tree_pack), expected)
        with pytest.raises(ZeroDivisionError), several.using("vera"):
            _ = 1 // 0
        assert torch.equal(hidden(model, tree_pack), expected)
    assert torch.equal(hidden(several.model, tree_pack), base)


def test_one_more_may_be_loaded_while_another_is_in_use(
    build_model: BuildModel, folders: dict[str, Path], tree_pack: Pack
) -> None:
    several = Several(build(build_model))
    several.load(METHODS["lora"], name="lora", folder=folders["lora"])
    with several.using("lora") as model:
        expected = hidden(model, tree_pack)
        several.load(METHODS["ia3"], name="ia3", folder=folders["ia3"])
        assert torch.equal(hidden(model, tree_pack), expected)


def test_an_unknown_adapter_is_refused_with_those_there_are(several: Several) -> None:
    with (
        pytest.raises(NotFoundError, match=r"no adapter 'lore' is loaded; there are lora, ") as error,
        several.using("lore"),
    ):
        pass
    assert error.value.hint


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Full(), "'full'"),
        (Layers(), "'layers'"),
        (Bitfit(), "'bitfit'"),
        (Qlora(), "nf4"),
        (Ia3(quantise="int8"), "int8"),
    ],
    ids=repr,
)
def test_what_changes_the_base_is_refused_by_name(
    build_model: BuildModel, tmp_path: Path, method: Method, message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        Several(build(build_model)).load(method, name="tickets", folder=tmp_path)
    assert "tickets" in str(error.value)
    assert error.value.hint


def test_an_adapter_that_cannot_be_read_leaves_the_base_as_it_was(
    build_model: BuildModel, several: Several, folders: dict[str, Path], base: Tensor, tree_pack: Pack
) -> None:
    for method, folder in ((Lora(rank=3), "lora"), (Prefix(num_tokens=7), "prefix"), (Lora(rank=4), "ia3")):
        with pytest.raises(ModelError):
            several.load(method, name="broken", folder=folders[folder])
        assert "broken" not in several.adapters
        assert torch.equal(hidden(several.model, tree_pack), base)
