"""Load a base model safely, or make a new one from a configuration.

What is refused is in `models/base.py`; weights are read from safetensors alone, and `trust_remote_code` is never on.
"""

import contextlib
import hashlib
import json
import logging
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor

from tunesmith.data.pack import Pack
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import ModelError
from tunesmith.models.base import NewBase, context_of, digest_folder, read_config, resolve_base
from tunesmith.models.quantised import QuantisedLinear
from tunesmith.models.readout import target_logprobs
from tunesmith.models.virtual import NAME, Virtual, VirtualTokens

DROPOUTS = (
    "attention_dropout", "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "resid_dropout",
    "summary_first_dropout",
)  # fmt: skip


LOADING_ERRORS = (
    OSError, ValueError, LookupError, RuntimeError, TypeError, ArithmeticError, AttributeError, SafetensorError,
    StrictDataclassError,
)  # fmt: skip


@dataclass
class Model:
    """A causal language model whose attention follows the one visibility rule.

    `causal` is the transformers model, `folder` where it came from (None for a new one), `digest` the SHA-256 of all
    its bytes, `context_tokens` the longest sequence it was made for.
    """

    causal: Any
    tokenizer: Tokenizer
    name: str
    folder: Path | None
    digest: str
    context_tokens: int

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.causal.parameters()).device

    @property
    def head(self) -> torch.nn.Linear:
        """The vocabulary projection."""
        return self.causal.get_output_embeddings()

    @property
    def hidden_size(self) -> int:
        """D, the width of a hidden state."""
        return int(self.causal.config.hidden_size)

    def input_tables(self) -> set[Tensor]:
        """Weights of all embeddings; a tied head's is one of them."""
        return {m.weight for m in self.causal.modules() if isinstance(m, torch.nn.Embedding)}

    def vocabulary_weights(self) -> set[Tensor]:
        """Weights whose rows belong to tokens or positions: all embeddings and the head."""
        return {*self.input_tables(), self.head.weight}

    @cached_property
    def softcap(self) -> float | None:
        """Soft cap on the final logits (Gemma 2), None where there is none."""
        return self.causal.config.to_dict().get("final_logit_softcapping")

    @property
    def layers(self) -> list[torch.nn.Module]:
        """The blocks, first to last."""
        lists = [list(m) for m in self.causal.base_model.children() if isinstance(m, torch.nn.ModuleList)]
        return max(lists, key=len, default=[])

    @property
    def virtual_tokens(self) -> VirtualTokens | None:
        """What stands before every sequence, None where nothing does."""
        module: VirtualTokens | None = dict(self.causal.named_children()).get(NAME)
        return module if module is not None and module.enabled else None

    @property
    def num_virtual_tokens(self) -> int:
        """How many tokens of the context virtual tokens take."""
        return 0 if self.virtual_tokens is None else self.virtual_tokens.num_tokens

    @property
    def room_tokens(self) -> int:
        """How many tokens of the context are left for a sequence."""
        return self.context_tokens - self.num_virtual_tokens

    def hidden(self, attention: Any) -> Tensor:
        """Hidden states [T, D] before the vocabulary head.

        `attention` carries `input_ids` and `position_ids` [1, P + T] and computes attention (models/attention.py);
        P are its virtual tokens.
        """
        virtual: Virtual | None = attention.virtual
        if virtual is None:
            inputs = {"input_ids": attention.input_ids}
        else:
            inputs = {"inputs_embeds": virtual.embed(self.causal.get_input_embeddings()(attention.input_ids))}
        out = self.causal.base_model(**inputs, position_ids=attention.position_ids, pack=attention, use_cache=False)
        return out.last_hidden_state[0, 0 if virtual is None else virtual.num_tokens :]

    def attention(self, pack: Pack) -> Any:
        """The rule for one pack on this model's device, with the model's virtual tokens as its root."""
        from tunesmith.models.attention import PackAttention

        made = self.virtual_tokens
        return PackAttention(pack, device=self.device, virtual=None if made is None else made())

    def target_logprobs(self, pack: Pack, *, hidden_TD: Tensor | None = None) -> Tensor:
        """Log-probability [N] of each of the pack's targets, in float32 at least; gradients flow.

        `hidden_TD` are the pack's hidden states, where they are there already.
        """
        if hidden_TD is None:
            hidden_TD = self.hidden(self.attention(pack))
        return target_logprobs(
            hidden_TD,
            head=self.head,
            source_N=torch.from_numpy(pack.source_N).to(hidden_TD.device),
            target_N=torch.from_numpy(pack.target_N).to(hidden_TD.device),
            softcap=self.softcap,
        )

    def num_parameters(self) -> int:
        """Parameters in all, tied ones once and those stored in few bits as what they stand for."""
        stored = sum(m.in_features * m.out_features for m in self.causal.modules() if isinstance(m, QuantisedLinear))
        return stored + sum(p.numel() for p in self.causal.parameters())

    def checkpoint_activations(self) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its new name is not in transformers 5.17
            self.causal.gradient_checkpointing_enable({"use_reentrant": False})
        self.causal.enable_input_require_grads()

    def save(self, folder: Path) -> None:
        """Write weights, configuration and tokenizer so that plain transformers loads them."""
        self.causal.save_pretrained(folder, safe_serialization=True)
        self.save_tokenizer(folder)

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.backend.save(str(folder / "tokenizer.json"))
        config = {k: v for k, v in self.tokenizer.config.items() if k != "chat_template"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), "utf-8")
        if self.tokenizer.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.tokenizer.chat_template, "utf-8")


@contextlib.contextmanager
def _quiet() -> Any:
    """transformers' progress bars and advice do not belong into this program's output."""
    from transformers.utils import logging as transformers_logging

    level = logging.getLogger("transformers").level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.getLogger("transformers").setLevel(level)


def load_model(base: "str | NewBase", *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Model:
    """Load `base` (or make it) with all dropout off and the one visibility rule as its attention.

    Raises ModelError for what must not or cannot be loaded, NotFoundError for what is not there.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from tunesmith.models import attention

    folder = None if isinstance(base, NewBase) else resolve_base(base)
    config_path = Path(base.config) if isinstance(base, NewBase) else resolve_base(base) / "config.json"
    raw = read_config(config_path)
    tokenizer = Tokenizer.from_folder(Path(base.tokenizer) if isinstance(base, NewBase) else config_path.parent)
    overrides = {name: 0.0 for name in DROPOUTS if raw.get(name)}
    with _quiet():
        if isinstance(base, NewBase):
            try:
                config = AutoConfig.for_model(**raw | overrides)
            except LOADING_ERRORS as error:
                raise ModelError(f"config.json makes no sense: {error}", file=config_path, hint="mend it") from error
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(base.seed)
                causal = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=dtype)
        else:
            assert folder is not None
            if not any(folder.glob("*.safetensors")):
                raise ModelError(
                    "no .safetensors weights here", file=folder, hint="convert the weights to safetensors first"
                )
            try:
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    folder,
                    output_loading_info=True,
                    attn_implementation=attention.NAME,
                    dtype=dtype,
                    use_safetensors=True,
                    trust_remote_code=False,
                    local_files_only=True,
                    **overrides,
                )
            except LOADING_ERRORS as error:
                raise ModelError(
                    f"the model cannot be loaded: {error}", file=folder, hint="restore its files"
                ) from error
            causal, report = loaded
            _check_complete(report, folder)
    causal.to(device)
    if len(causal.get_input_embeddings().weight) < tokenizer.num_tokens:
        raise ModelError(
            f"the tokenizer has {tokenizer.num_tokens:,} tokens and the model only "
            f"{len(causal.get_input_embeddings().weight):,}",
            file=folder,
            hint="use the tokenizer that belongs to the model",
        )
    digest = digest_folder(folder) if folder is not None else _digest_new(base, raw, tokenizer)
    name = base if isinstance(base, str) else "new"
    return Model(causal, tokenizer, name, folder, digest, context_of(raw))


def _check_complete(report: dict[str, Any], folder: Path) -> None:
    """transformers makes missing weights up at random and leaves superfluous ones out; neither is a model."""
    for name, words in (
        ("missing_keys", "lack"),
        ("unexpected_keys", "hold the unknown"),
        ("mismatched_keys", "misfit"),
    ):
        found = sorted(map(str, report.get(name) or []))
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise ModelError(f"the weights {words} {found[0]}{more}", file=folder, hint="restore the model's files")


def _digest_new(base: Any, raw: dict[str, Any], tokenizer: Tokenizer) -> str:
    content = json.dumps([raw, base.seed, tokenizer.digest], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
