"""Toys that every room's tests share: tiny random models of every kind of architecture, and a byte-level tokenizer.

Everything is made on the fly in a temporary folder, so no test needs a network or a file from elsewhere.
"""

import copy
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.data.pack import Pack, build_pack
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.tokens import TokenStore, TokenWriter
from tunesmith.data.types import Origin, Sequence
from tunesmith.models.base import POOLED
from tunesmith.models.load import Model, NewBase, load_model

# One thread here and in every child: sums are added in the same order, so bits can be compared across processes.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
VOCABULARY = 264  # 256 bytes, the special tokens, and two that the tokenizer does not know
WINDOW_TOKENS = 6
CHAT_TEMPLATE = (
    "<|begin|>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
WINDOWED = {"sliding_window": WINDOW_TOKENS, "layer_types": ["sliding_attention", "full_attention"]}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "mistral": COMMON | {"sliding_window": WINDOW_TOKENS},
    "qwen2": COMMON | WINDOWED | {"use_sliding_window": True},
    "qwen3": COMMON,
    "qwen3_moe": COMMON | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gemma2": COMMON | WINDOWED | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0},
    "gemma3_text": COMMON | WINDOWED,
    "gpt2": {
        "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "bos_token_id": 1,
        "eos_token_id": 2, "scale_attn_by_inverse_layer_idx": True, "attn_pdrop": 0.1, "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
    },
    "gpt_neox": {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}
    | {"hidden_dropout": 0.1, "attention_dropout": 0.1, "head_dim": None},
    "phi3": COMMON | {"sliding_window": WINDOW_TOKENS, "resid_pdrop": 0.1},
    "smollm3": COMMON | {"num_hidden_layers": 3, "no_rope_layer_interval": 2},
}  # fmt: skip
ARCHITECTURES = tuple(CONFIGS)
ENCODER_SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "[OTHER]")
BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "type_vocab_size": 2, "pad_token_id": 0,
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
}  # fmt: skip
ROBERTA = BERT | {"max_position_embeddings": 70, "type_vocab_size": 1, "pad_token_id": 5}
ENCODER_CONFIGS: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA | {"pad_token_id": 0, "max_position_embeddings": 65},
    "distilbert": {
        "vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4,
        "max_position_embeddings": 64, "pad_token_id": 0, "dropout": 0.1, "attention_dropout": 0.1,
    },
    "electra": BERT | {"embedding_size": 16},
    "modernbert": {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 64, "local_attention": WINDOW_TOKENS,
        "global_attn_every_n_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 2,
        "eos_token_id": 2, "embedding_dropout": 0.1, "mlp_dropout": 0.1, "attention_dropout": 0.1,
    },
}  # fmt: skip
ENCODER_ARCHITECTURES = tuple(ENCODER_CONFIGS)
PAIRS: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "pad_token_id": 0,
    "decoder_start_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
PAIR_CONFIGS: dict[str, dict[str, Any]] = {  # encoder-decoders
    "t5": PAIRS,
    "t5_gated": PAIRS | {"model_type": "t5", "feed_forward_proj": "gated-gelu", "num_decoder_layers": 3},
    "mt5": PAIRS | {"feed_forward_proj": "gated-gelu"},
}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """One architecture after the other; `@pytest.mark.parametrize("architecture", [...])` chooses some."""
    return request.param


def byte_backend(special: tuple[str, ...], *, plain_added: tuple[str, ...] = ()) -> Backend:
    """One token a byte; the special tokens come first. `plain_added` are added tokens that are not special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = {name: index for index, name in enumerate([*special, *alphabet])}
    backend = Backend(models.BPE(vocab=names, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in plain_added])
    return backend


@pytest.fixture(scope="session")
def make_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_tokenizer_folder(backend or special tokens, template=..., bos=..., eos=..., pad=...)`.

    The folder is one that both tunesmith and transformers load.
    """

    def make(
        backend: Backend | tuple[str, ...],
        *,
        template: str | None = None,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
    ) -> Path:
        folder = tmp_path_factory.mktemp("tokenizer")
        (byte_backend(backend) if isinstance(backend, tuple) else backend).save(str(folder / "tokenizer.json"))
        names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= {name: value for name, value in names.items() if value is not None}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
        if template is not None:
            (folder / "chat_template.jinja").write_text(template, "utf-8")
        return folder

    return make


@pytest.fixture(scope="session")
def toy_tokenizer_folder(make_tokenizer_folder: Callable[..., Path]) -> Path:
    """Bytes, six special tokens and a chat template."""
    return make_tokenizer_folder(SPECIAL, template=CHAT_TEMPLATE, bos="<|begin|>", eos="<|end|>", pad="<|pad|>")


@pytest.fixture(scope="session")
def toy_tokenizer(toy_tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(toy_tokenizer_folder)


@pytest.fixture(scope="session")
def encoder_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes between [CLS] and [SEP], as a tokenizer made for BERT has it: no begin or end of text, no chat template."""
    folder = tmp_path_factory.mktemp("encoder-tokenizer")
    backend = byte_backend(ENCODER_SPECIAL)
    marks = [(name, ENCODER_SPECIAL.index(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    backend.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | names
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


class _NoNarrowing(TorchDispatchMode):
    """float64 stays float64, where transformers' norms and softmaxes would round to float32."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64:
            kwargs["dtype"] = torch.float64 if kwargs.get("dtype") == torch.float32 else kwargs.get("dtype")
        return function(*args, **kwargs)


@pytest.fixture
def exact() -> Iterator[None]:
    """Inside the test, float64 models compute in float64 throughout."""
    with _NoNarrowing():
        yield


BuildModel = Callable[..., Model]


@pytest.fixture(scope="session")
def build_model(
    toy_tokenizer_folder: Path, encoder_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> BuildModel:
    """`build_model(architecture, dtype=..., **config)`: a fresh random model, the same one every time.

    Every parameter is moved off its initial value, so that zero biases and unit norms hide no mistake.
    """
    folder = tmp_path_factory.mktemp("configs")

    def build(architecture: str, *, dtype: torch.dtype = torch.float64, **config: Any) -> Model:
        path = folder / f"{architecture}-{os.getpid()}.json"  # processes of one test build theirs at once
        made = (CONFIGS | ENCODER_CONFIGS | PAIR_CONFIGS)[architecture]
        path.write_text(json.dumps({"model_type": architecture} | made | config), "utf-8")
        tokenizer = encoder_tokenizer_folder if architecture in ENCODER_CONFIGS else toy_tokenizer_folder
        model = load_model(NewBase(config=str(path), tokenizer=str(tokenizer), seed=5), dtype=dtype)
        if architecture == "qwen3_moe":
            model.causal.set_experts_implementation("eager")  # the default one has no float64
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.causal.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += (0.15 * noise).to(parameter.dtype)
        return model

    return build


@pytest.fixture(scope="session")
def eager_twin() -> Callable[[Model], Any]:
    """`eager_twin(model)`: transformers' own model with its own eager attention and the same weights."""
    from transformers import AutoModel, AutoModelForCausalLM

    def build(model: Model) -> Any:
        config = copy.deepcopy(model.causal.config)
        classes = AutoModel if model.is_encoder else AutoModelForCausalLM
        plain = {"add_pooling_layer": False} if config.model_type in POOLED else {}
        twin = classes.from_config(config, attn_implementation="eager", dtype=model.causal.dtype, **plain)
        twin.load_state_dict(model.causal.state_dict())
        assert twin.config._attn_implementation == "eager"
        return twin.eval()

    return build


def make_sequence(tokens: Any, *, first_trained: int = 1, weight: float = 1.0, row: int = 0) -> Sequence:
    """A sequence whose tokens from `first_trained` on are trained with `weight`."""
    tokens_T = np.array(tokens, dtype=np.int32)
    weight_T = np.zeros(len(tokens_T), dtype=np.float32)
    weight_T[max(1, first_trained) :] = weight
    return Sequence(tokens_T, weight_T, row)


@pytest.fixture(scope="session")
def sequence() -> Callable[..., Sequence]:
    return make_sequence


@pytest.fixture(scope="session")
def tree_rows() -> list[Sequence]:
    """Rows whose prefix tree has every shape: nested branches, a strict prefix, a duplicate, and rows that stand apart.

    Longer than WINDOW_TOKENS, of different weights, some trained on the shared part as well.
    """
    random = np.random.default_rng(11)

    def some(count: int) -> list[int]:
        return random.integers(6, 262, count).tolist()

    root, branch = some(14), some(7)
    rows = [
        root + some(5),
        root + branch + some(3),
        root + branch + some(8),
        root + branch,  # begins the two before
        root + some(1),
        some(11),
        some(2),
        some(19),
    ]
    rows.append(rows[1])
    trained, weights = [15, 5, 1, 18, 14, 1, 1, 10, 5], [1.0, 0.5, 1.0, 2.0, 1.0, 1.0, 3.0, 0.25, 1.0]
    return [
        make_sequence(tokens, first_trained=first, weight=weight, row=row)
        for row, (tokens, first, weight) in enumerate(zip(rows, trained, weights, strict=True))
    ]


@pytest.fixture(scope="session")
def pair_rows() -> list[Sequence]:
    """Sources and targets of all lengths: equal ones, one token, one source twice, weights that differ."""
    random = np.random.default_rng(13)
    rows = []
    for row, (read, written) in enumerate([(5, 3), (40, 20), (5, 9), (17, 4), (1, 1), (17, 0), (23, 2)]):
        made = make_sequence([0, *random.integers(6, 262, written), 2], weight=(1.0, 0.5, 2.0)[row % 3], row=row)
        rows.append(replace(made, encoder_T=random.integers(6, 262, read).astype(np.int32)))
    rows.append(replace(make_sequence([0, 9, 10, 2], row=7), encoder_T=rows[1].encoder_T))
    return rows


@pytest.fixture(scope="session")
def pair_twin() -> Callable[[Model], Any]:
    """`pair_twin(model)`: transformers' own encoder-decoder with its own eager attention and the same weights."""
    from transformers import AutoModelForSeq2SeqLM

    def build(model: Model) -> Any:
        config = copy.deepcopy(model.causal.config)
        twin = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager", dtype=model.causal.dtype)
        twin.load_state_dict(model.causal.state_dict())
        assert twin.encoder.config._attn_implementation == "eager"
        return twin.eval()

    return build


@pytest.fixture(scope="session")
def tree_pack(tree_rows: list[Sequence]) -> Pack:
    """`tree_rows` with every shared prefix of two tokens and more stored once."""
    pack = build_pack(tree_rows, min_shared=2)
    assert len(pack.tokens_T) < 0.6 * pack.num_row_tokens
    return pack


@pytest.fixture(scope="session")
def flat_pack(tree_rows: list[Sequence]) -> Pack:
    """`tree_rows` with nothing shared."""
    pack = build_pack(tree_rows, min_shared=1 << 30)
    assert len(pack.tokens_T) == pack.num_row_tokens
    return pack


@pytest.fixture(scope="session")
def token_store() -> Callable[..., TokenStore]:
    """`token_store(units, folder=...)`: units (lists of sequences) on disk; unit i is line i + 1 of `toy.jsonl`."""

    def build(units: list[list[Sequence]], *, folder: Path) -> TokenStore:
        writer = TokenWriter(folder)
        for line, unit in enumerate(units, start=1):
            writer.add(unit, origin=Origin("toy.jsonl", line))
        writer.close()
        return TokenStore(folder)

    return build


class Heard:
    """An observer that remembers what it was told."""

    def __init__(self) -> None:
        self.starts: list[tuple[int, int]] = []
        self.steps: list[dict[str, Any]] = []
        self.validations: list[dict[str, Any]] = []
        self.messages: list[str] = []

    def start(self, *, num_steps: int, step: int) -> None:
        self.starts.append((num_steps, step))

    def step(self, record: dict[str, Any]) -> None:
        self.steps.append(record)

    def validation(self, record: dict[str, Any]) -> None:
        self.validations.append(record)

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture
def heard() -> Heard:
    return Heard()
