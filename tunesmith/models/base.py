"""Which base models there are and which are refused, without loading one (and without torch).

No code comes from data: a folder's `config.json` is read as JSON, and a configuration that asks for code of its own
(`auto_map`) or a model type that is not on the list below is refused before transformers sees it.
"""

import datetime
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tunesmith.data.pairs import PairTemplate
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import ModelError, NotFoundError
from tunesmith.storage import sha256_file

STARTER = Path(__file__).resolve().parent.parent / "starter" / "model"

# Model types whose layers mix tokens by attention alone and call the attention interface with what the rule needs.
SUPPORTED = {
    "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi3", "smollm3",
}  # fmt: skip


# Model types in which every token sees the whole text; such a base has no next token to predict.
ENCODERS = {"bert", "roberta", "xlm-roberta", "distilbert", "electra", "modernbert"}
POOLED = {"bert", "roberta", "xlm-roberta"}  # with a layer for a next-sentence head, which is left out
AFTER_PADDING = {"roberta", "xlm-roberta"}  # their first position is the one behind the padding token's number
# Model types with an encoder that reads a text and a decoder that writes another.
ENCODER_DECODERS = {"t5", "mt5"}
SOURCE_TOKENS = 512  # that T5 was pre-trained on; its positions are relative and know no end


class NewBase(BaseModel):
    """A model made from a configuration, with random weights: the start of pre-training."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    config: str = Field(description="path of a config.json")
    tokenizer: str = Field(description="folder with tokenizer.json and tokenizer_config.json")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the initial weights")


def resolve_base(name: str) -> Path:
    """The local folder of a base: `starter`, a folder, or a hub name (downloaded into the hub's own cache)."""
    return _local_folder(name) or _download(name)


def _local_folder(name: str) -> Path | None:
    """The folder that a base's name means; None for a hub name. NotFoundError where it can be neither."""
    if name == "starter":
        return STARTER
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return path
    if os.path.exists(path):
        raise ModelError("a base must be a folder or a hub name, and this is a file", file=path, hint="name its folder")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise NotFoundError(f"no base model at '{name}'", hint="use 'starter', a folder, or a hub name owner/model")
    return None


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json"]
    patterns += ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError as error:
        raise NotFoundError(f"'{name}' is no valid hub name: {error}", hint="use owner/model") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise NotFoundError(
            f"the model hub does not give '{name}': {str(error).splitlines()[0]}",
            hint="check the name and the connection, or download the model elsewhere and give its folder as base",
        ) from error


def check_config(config: dict[str, Any], *, file: Path) -> None:
    """Refuse configurations that carry code or that no rule here covers; raises ModelError."""
    if "auto_map" in config:
        raise ModelError(
            "config.json carries 'auto_map': it asks for code from the model's folder, which is never run",
            file=file,
            hint="use a model that transformers supports itself",
        )
    kind = config.get("model_type")
    known = SUPPORTED | ENCODERS | ENCODER_DECODERS
    if not isinstance(kind, str) or kind not in known:
        raise ModelError(
            f"model type {kind!r} is not supported; supported are {', '.join(sorted(known))}",
            file=file,
            hint="choose another base",
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "dynamic" in str(rope) or "longrope" in str(rope):
        raise ModelError(
            "its rotary positions depend on the longest row in a batch, so a row's loss would depend on its neighbours",
            file=file,
            hint="choose a base with another rope_type",
        )
    if kind in ENCODERS and config.get("is_decoder"):
        raise ModelError(
            f"this {kind} was made a decoder ('is_decoder'), which no rule here covers",
            file=file,
            hint="choose another base",
        )
    if config.get("use_bidirectional_attention"):
        raise ModelError(
            "its attention looks ahead: it is an encoder and generates no text", file=file, hint="choose another base"
        )
    if config.get("quantization_config"):
        raise ModelError("the weights are quantised already", file=file, hint="use the unquantised model as base")


def read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        hint = "name a model's folder"
        raise ModelError("no config.json here, so this is no model", file=path.parent, hint=hint) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise ModelError(f"config.json cannot be read: {error}", file=path, hint="restore the file") from error
    if not isinstance(config, dict):
        raise ModelError("config.json holds no object", file=path, hint="restore the file")
    check_config(config, file=path)
    return config


def config_path(base: "str | NewBase") -> Path:
    """Where the configuration of a base stands."""
    return Path(base.config) if isinstance(base, NewBase) else resolve_base(base) / "config.json"


def model_type_of(base: "str | NewBase") -> str:
    """The model type that a base's configuration names."""
    return str(read_config(config_path(base))["model_type"])


def known_model_type(name: str) -> str | None:
    """As `model_type_of`, without a download; None for a hub name that is not in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if (folder := _local_folder(name)) is not None:
        return str(read_config(folder / "config.json")["model_type"])
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError as error:
        raise NotFoundError(f"'{name}' is no valid hub name: {error}", hint="use owner/model") from error
    return str(read_config(Path(cached))["model_type"]) if isinstance(cached, str) else None


def context_tokens(folder: Path) -> int:
    """The longest row that is taken unasked; ModelError where the folder holds no usable model."""
    return longest_unasked(read_config(folder / "config.json"))


def longest_unasked(config: dict[str, Any]) -> int:
    """The longest row unless `data.max_tokens` says otherwise: the context, or what T5 was pre-trained on."""
    if config.get("model_type") in ENCODER_DECODERS:
        return int(config.get("n_positions") or SOURCE_TOKENS)
    return context_of(config)


def context_of(config: dict[str, Any]) -> int:
    """The longest sequence that the model can read: what its configuration names, or no end where positions are relative."""
    if config.get("model_type") in ENCODER_DECODERS:
        return 1 << 30
    limits = (config.get("max_position_embeddings"), config.get("n_positions"))
    return next((int(limit) - first_position(config) for limit in limits if limit), 1 << 30)


def template_for(
    tokenizer: Tokenizer, *, config: dict[str, Any], source: str | None = None, today: datetime.date | None = None
) -> ChatTemplate:
    """What makes ids of conversations for a base: one sequence, or a source and a target for an encoder-decoder."""
    if config.get("model_type") not in ENCODER_DECODERS:
        return ChatTemplate(tokenizer, source=source, today=today)
    return PairTemplate(tokenizer, start_id=start_token(config), source=source, today=today)


def start_token(config: dict[str, Any]) -> int:
    """What the decoder of an encoder-decoder begins with: what the configuration names, or padding, as T5 has it."""
    start = config.get("decoder_start_token_id")
    return int((config.get("pad_token_id") or 0) if start is None else start)


def first_position(config: dict[str, Any]) -> int:
    """The position id of a text's first token."""
    return int(config.get("pad_token_id") or 0) + 1 if config.get("model_type") in AFTER_PADDING else 0


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each of a model's files, by name."""
    paths = (path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".json", ".jinja"))
    return {path.name: sha256_file(path) for path in paths}


def listed_files(base: str) -> tuple[str, ...]:
    """A line for each of a model's files, with its SHA-256; `base` as `resolve_base`."""
    return tuple(f"{base}/{name} {digest}" for name, digest in file_digests(resolve_base(base)).items())


def digest_files(digests: dict[str, str]) -> str:
    """SHA-256 over the names and bytes of a model's files."""
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in digests.items()).encode()).hexdigest()
