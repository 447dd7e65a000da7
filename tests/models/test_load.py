"""Loading a base: what is refused, that nothing in a folder is run, and that what is loaded is what was saved."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tunesmith.data.pack import Pack
from tunesmith.errors import ModelError, NotFoundError, TunesmithError
from tunesmith.models.load import Model, NewBase, load_model
from tunesmith.objectives.instruction import Instruction
from tunesmith.train.passes import forward

BuildModel = Callable[..., Model]


@pytest.fixture(scope="module")
def saved(build_model: BuildModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved toy Llama. Tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("llama")
    build_model("llama", dtype=torch.float32).save(folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def refused(folder: Path | str, kind: type[TunesmithError], message: str) -> TunesmithError:
    with pytest.raises(kind, match=message) as error:
        load_model(str(folder))
    assert error.value.hint
    return error.value


# What is loaded is what was saved


def test_a_saved_model_comes_back(architecture: str, build_model: BuildModel, tmp_path: Path, tree_pack: Pack) -> None:
    model = build_model(architecture, dtype=torch.float32)
    model.save(tmp_path / "model")
    again = load_model(str(tmp_path / "model"))
    before, after = model.causal.state_dict(), again.causal.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert again.tokenizer.digest == model.tokenizer.digest
    assert again.context_tokens == 128
    a, b = (forward(m, tree_pack, objective=Instruction()).sum for m in (model, again))
    assert torch.equal(a, b)


def test_plain_transformers_loads_what_is_saved(saved: Path, tree_pack: Pack) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    ours = load_model(str(saved)).causal.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert AutoTokenizer.from_pretrained(saved).chat_template is not None


def test_weights_are_loaded_in_the_type_asked_for(saved: Path) -> None:
    model = load_model(str(saved), dtype=torch.bfloat16)
    assert {p.dtype for p in model.causal.parameters()} == {torch.bfloat16}


def test_dropout_is_off_in_every_architecture(architecture: str, build_model: BuildModel, tree_pack: Pack) -> None:
    names = ("attention_dropout", "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop")
    model = build_model(architecture, dtype=torch.float32, **dict.fromkeys(names, 0.5))
    model.causal.train()
    losses = [forward(model, tree_pack, objective=Instruction()).sum for _ in range(2)]
    assert torch.equal(*losses)
    assert all(m.p == 0 for m in model.causal.modules() if isinstance(m, torch.nn.Dropout))


def test_dropout_that_the_configuration_leaves_to_a_default_is_off_too(build_model: BuildModel, tmp_path: Path) -> None:
    """GPT-2's dropouts are 0.1 where config.json says nothing of them."""
    build_model("gpt2", dtype=torch.float32).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    left_out = {name: value for name, value in config.items() if not name.endswith(("pdrop", "dropout"))}
    (tmp_path / "config.json").write_text(json.dumps(left_out), "utf-8")
    new = load_model(NewBase(config=str(tmp_path / "config.json"), tokenizer=str(tmp_path)))
    for model in (load_model(str(tmp_path)), new):
        dropouts = [module.p for module in model.causal.modules() if isinstance(module, torch.nn.Dropout)]
        assert dropouts
        assert not any(dropouts)


def test_the_digest_follows_every_byte(copied: Path) -> None:
    digests = {load_model(str(copied)).digest}
    change_config(copied, max_position_embeddings=64)
    digests.add(load_model(str(copied)).digest)
    weights = load_file(str(copied / "model.safetensors"))
    weights["model.norm.weight"][0] += 1
    save_file(weights, str(copied / "model.safetensors"), metadata={"format": "pt"})
    digests.add(load_model(str(copied)).digest)
    assert len(digests) == 3
    assert load_model(str(copied)).digest in digests


def test_a_new_base_depends_on_its_seed_alone(saved: Path) -> None:
    def made(seed: int) -> Model:
        return load_model(NewBase(config=str(saved / "config.json"), tokenizer=str(saved), seed=seed))

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = made(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = made(3), made(4)
    weights = [m.causal.get_input_embeddings().weight for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert first.digest == again.digest != other.digest


# No code from data


def test_a_configuration_that_asks_for_code_is_refused_before_transformers_sees_it(
    copied: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "it ran"
    (copied / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: ...\n", "utf-8")
    names = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    change_config(copied, auto_map=names, model_type="own", hidden_size="not even a number")
    assert "auto_map" in str(refused(copied, ModelError, "never run"))
    assert not marker.exists()
    change_config(copied, auto_map={})
    refused(copied, ModelError, "auto_map")


class Bomb:
    """Unpickling this writes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_pickled_weights_are_refused_and_never_opened(copied: Path, tmp_path: Path) -> None:
    marker = tmp_path / "it ran"
    with (copied / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Bomb(marker), file)
    load_model(str(copied))  # beside safetensors it is not looked at
    (copied / "model.safetensors").unlink()
    assert "safetensors" in refused(copied, ModelError, "safetensors").hint
    assert not marker.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported; supported are bert, distilbert, electra, gemma2"),
        ({"model_type": None}, "not supported"),
        ({"model_type": ["llama"]}, "not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"model_type": "bert", "is_decoder": True}, "made a decoder"),
    ],
)
def test_configurations_that_no_rule_covers_are_refused(copied: Path, changes: dict[str, Any], message: str) -> None:
    change_config(copied, **changes)
    assert refused(copied, ModelError, message).file == str(copied / "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "large"},
        {"hidden_size": 33},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"num_hidden_layers": -1},
        {"rope_parameters": {"rope_type": "unheard of"}},
        {"hidden_act": "unheard of"},
        {"vocab_size": None},
    ],
    ids=str,
)
def test_configurations_that_make_no_sense_are_refused(copied: Path, changes: dict[str, Any]) -> None:
    change_config(copied, **changes)
    refused(copied, ModelError, "")


def test_a_model_that_sees_what_comes_after_is_refused(build_model: BuildModel) -> None:
    with pytest.raises(ModelError, match="looks ahead"):
        build_model("gemma3_text", use_bidirectional_attention=True)


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_longest_row_are_refused(copied: Path, key: str, kind: str) -> None:
    """A row's loss would depend on the rows packed beside it."""
    config = json.loads((copied / "config.json").read_text("utf-8"))
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 8.0}
    content = {k: v for k, v in config.items() if k != "rope_parameters"} | {key: rope}
    (copied / "config.json").write_text(json.dumps(content), "utf-8")
    refused(copied, ModelError, "longest row")


# What is missing or damaged


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, r"no config\.json"), ("{", "cannot be read"), ("[]", "no object"), ("\udcff", "cannot be read")],
    ids=["absent", "cut off", "a list", "no UTF-8"],
)
def test_a_broken_configuration_is_named(copied: Path, content: str | None, message: str) -> None:
    path = copied / "config.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    refused(copied, ModelError, message)


def test_a_folder_without_a_tokenizer_is_refused(copied: Path) -> None:
    (copied / "tokenizer.json").unlink()
    refused(copied, ModelError, r"no tokenizer\.json")


def test_a_tokenizer_larger_than_the_model_is_refused(copied: Path) -> None:
    weights = load_file(str(copied / "model.safetensors"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:200].clone()
    save_file(weights, str(copied / "model.safetensors"), metadata={"format": "pt"})
    change_config(copied, vocab_size=200)
    assert "only 200" in str(refused(copied, ModelError, "the tokenizer has 262 tokens"))


def test_damaged_weights_are_refused(copied: Path) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(copied, ModelError, "cannot be loaded")


def test_weights_of_another_shape_are_refused(copied: Path) -> None:
    change_config(copied, intermediate_size=64)
    refused(copied, ModelError, "")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_missing_weight_is_refused_and_not_made_up(copied: Path, name: str) -> None:
    weights = load_file(str(copied / "model.safetensors"))
    del weights[name]
    save_file(weights, str(copied / "model.safetensors"), metadata={"format": "pt"})
    assert name in str(refused(copied, ModelError, ""))


def test_a_weight_too_many_is_refused_and_not_left_out(copied: Path) -> None:
    weights = load_file(str(copied / "model.safetensors"))
    weights["model.layers.2.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"].clone()
    save_file(weights, str(copied / "model.safetensors"), metadata={"format": "pt"})
    assert "layers.2" in str(refused(copied, ModelError, ""))


# Names


@pytest.mark.parametrize("name", ["no-such-model", "a/b/c", "./nowhere", "/nowhere/at/all"])
def test_names_of_nothing_are_not_found(name: str) -> None:
    assert "owner/model" in refused(name, NotFoundError, "no base model").hint


def test_a_file_is_no_base(copied: Path) -> None:
    refused(copied / "model.safetensors", ModelError, "this is a file")


@pytest.mark.parametrize("name", ["owner/no-such-model", "owner/..", "-/x"])
def test_a_hub_that_cannot_be_reached_is_said_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens at the discard port
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    error = refused(name, NotFoundError, name.replace(".", r"\."))
    assert "owner/model" in error.hint or "folder" in error.hint
