"""Load a base model safely, or make a new one from a configuration.

What is refused is in `models/base.py`; weights are read from safetensors alone, and `trust_remote_code` is never on.
"""

import contextlib
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor

from tunesmith.data.pack import MIN_SHARED_TOKENS, NEVER, Pack, build_packs
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.types import Sequence
from tunesmith.errors import ModelError
from tunesmith.models.base import (
    ENCODER_DECODERS,
    ENCODERS,
    POOLED,
    NewBase,
    config_path,
    context_of,
    digest_files,
    file_digests,
    first_position,
    read_config,
    start_token,
)
from tunesmith.models.encoder_decoder import PairAttention
from tunesmith.models.extended import ExtendedEmbedding
from tunesmith.models.quantised import QuantisedLinear
from tunesmith.models.readout import target_logprobs, target_scores
from tunesmith.models.virtual import NAME, Virtual, VirtualTokens

DROPOUTS = (
    "attention_dropout", "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "resid_dropout",
    "summary_first_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "embedding_dropout",
    "mlp_dropout", "dropout_rate",
)  # fmt: skip


OTHER_HEADS = (
    "pooler.", "cls.", "lm_head.", "classifier.", "pre_classifier.", "vocab_transform.", "vocab_layer_norm.",
    "vocab_projector.", "head.", "decoder.", "discriminator_predictions.", "generator_predictions.", "generator_lm_head.",
)  # of an encoder, for what it was trained on; not read here  # fmt: skip
LOADING_ERRORS = (
    OSError, ValueError, LookupError, RuntimeError, TypeError, ArithmeticError, AttributeError, SafetensorError,
    StrictDataclassError,
)  # fmt: skip


@dataclass
class Model:
    """A causal language model whose attention follows the one visibility rule.

    `causal` is the transformers model, `folder` where it came from (None for a new one), `digest` the SHA-256 of all
    its bytes, `context_tokens` the longest sequence it was made for, `outputs` the head of an objective that has one
    (models/heads.py), `files` the SHA-256 of each file in the folder as it was loaded. `stands_for` is the type of device
    that a model on `meta` is planned for.
    """

    causal: Any
    tokenizer: Tokenizer
    name: str
    folder: Path | None
    digest: str
    context_tokens: int
    outputs: torch.nn.Linear | None = None
    files: dict[str, str] = field(default_factory=dict)
    stands_for: str | None = None

    @property
    def runs_on(self) -> str:
        """`cpu` or `cuda`."""
        return self.stands_for or self.device.type

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.causal.parameters()).device

    @property
    def head(self) -> torch.nn.Linear:
        """The vocabulary projection; None of an encoder."""
        return self.causal.get_output_embeddings()

    @property
    def is_encoder(self) -> bool:
        """Whether every token sees the whole text, so that there is no next token to predict."""
        return str(self.causal.config.model_type) in ENCODERS

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether an encoder reads a text and a decoder writes another."""
        return str(self.causal.config.model_type) in ENCODER_DECODERS

    @property
    def start_id(self) -> int:
        """The token that every answer of an encoder-decoder begins with."""
        return start_token(self.causal.config.to_dict())

    @property
    def min_shared_tokens(self) -> int:
        """How many tokens rows must begin with alike to be computed together; an encoder's rows have nothing in common."""
        return NEVER if self.is_encoder else MIN_SHARED_TOKENS

    @property
    def hidden_size(self) -> int:
        """D, the width of a hidden state."""
        return int(self.causal.config.hidden_size)

    def input_tables(self) -> set[Tensor]:
        """Weights of all embeddings; a tied head's is one of them."""
        tables = (m for m in self.causal.modules() if isinstance(m, torch.nn.Embedding | ExtendedEmbedding))
        return {weight for table in tables for weight in table.parameters()}

    def vocabulary_weights(self) -> set[Tensor]:
        """Weights whose rows belong to tokens, positions or classes: all embeddings and the heads."""
        heads = [head for head in (self.head, self.outputs) if head is not None]
        return {*self.input_tables(), *(weight for head in heads for weight in head.parameters())}

    @cached_property
    def softcap(self) -> float | None:
        """Soft cap on the final logits (Gemma 2), None where there is none."""
        return self.causal.config.to_dict().get("final_logit_softcapping")

    @property
    def layers(self) -> list[torch.nn.Module]:
        """The blocks, first to last; of an encoder-decoder the encoder's before the decoder's."""
        if self.is_encoder_decoder:
            return [*self.causal.encoder.block, *self.causal.decoder.block]
        lists = [list(m) for m in self.causal.base_model.modules() if isinstance(m, torch.nn.ModuleList)]
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
        P are its virtual tokens. Of an encoder-decoder they are the decoder's.
        """
        if self.is_encoder_decoder:
            return attention.hidden(self.causal)
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

        if self.is_encoder_decoder:
            return PairAttention(pack, device=self.device)
        made = self.virtual_tokens
        return PackAttention(
            pack,
            device=self.device,
            virtual=None if made is None else made(),
            both_ways=self.is_encoder,
            first_position=first_position(self.causal.config.to_dict()),
        )

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

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside the block dropout is off."""
        was_training = self.causal.training
        self.causal.eval()
        try:
            yield
        finally:
            self.causal.train(was_training)

    def row_logprobs(
        self, sequences: list[Sequence], *, num_rows: int, max_tokens: int, min_shared: int = MIN_SHARED_TOKENS
    ) -> np.ndarray:
        """Log-probability [B] of all targets of each row, in nats and float64; `row` says whose a sequence is."""
        total_B = np.zeros(num_rows)
        with torch.no_grad():
            for pack in build_packs(sequences, max_tokens=max_tokens, min_shared=min_shared):
                logprob_N = self.target_logprobs(pack).double().cpu().numpy()
                np.add.at(total_B, pack.rows_S[pack.sequence_N], logprob_N)
        return total_B

    def row_scores(self, sequences: list[Sequence], *, num_rows: int, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """As `row_logprobs`, and whether every target of a row [B] is the token that the model finds likeliest."""
        total_B, best_B = np.zeros(num_rows), np.ones(num_rows, dtype=bool)
        with torch.no_grad():
            for pack in build_packs(sequences, max_tokens=max_tokens, min_shared=MIN_SHARED_TOKENS):
                target_N = torch.from_numpy(pack.target_N).to(self.device)
                found = target_scores(self.hidden_at(pack), head=self.head, target_N=target_N, softcap=self.softcap)
                logprob_N, likeliest_N = (part.cpu().numpy() for part in found)
                rows_N = pack.rows_S[pack.sequence_N]
                np.add.at(total_B, rows_N, logprob_N.astype(np.float64))
                np.logical_and.at(best_B, rows_N, likeliest_N)
        return total_B, best_B

    def outputs_at(self, pack: Pack, *, hidden_TD: Tensor | None = None) -> Tensor:
        """What the objective's head gives [N, K] at each token that is read, in float32 at least; gradients flow."""
        assert self.outputs is not None, "models/heads.py puts it there"
        hidden_ND = self.hidden_at(pack, hidden_TD=hidden_TD)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            return hidden_ND @ self.outputs.weight.to(hidden_ND.dtype).T

    def hidden_at(self, pack: Pack, *, hidden_TD: Tensor | None = None) -> Tensor:
        """Hidden states [N, D] at the pack's sources, in float32 at least; gradients flow."""
        if hidden_TD is None:
            hidden_TD = self.hidden(self.attention(pack))
        hidden_ND = hidden_TD.index_select(0, torch.from_numpy(pack.source_N).to(hidden_TD.device))
        return hidden_ND.to(torch.promote_types(hidden_ND.dtype, torch.float32))

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """All parameters by name, those of the head last."""
        yield from self.causal.named_parameters()
        if self.outputs is not None:
            yield from self.outputs.named_parameters(prefix="outputs")

    def num_parameters(self) -> int:
        """Parameters in all, tied ones once and those stored in few bits as what they stand for."""
        stored = sum(m.in_features * m.out_features for m in self.causal.modules() if isinstance(m, QuantisedLinear))
        return stored + sum(p.numel() for _, p in self.named_parameters())

    def compile_blocks(self, *, backend: str = "inductor") -> None:
        """torch.compile of each block: one graph before attention and one behind it, for packs of any length."""
        from tunesmith.models.attention import leave_out_of_graphs

        leave_out_of_graphs()
        for layer in self.layers:
            layer.compile(dynamic=True, backend=backend)

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
        (folder / "tokenizer.json").write_text(self.tokenizer.backend.to_str(pretty=True), "utf-8")
        config = {k: v for k, v in self.tokenizer.config.items() if k != "chat_template"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), "utf-8")
        if self.tokenizer.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.tokenizer.chat_template, "utf-8")


@contextlib.contextmanager
def quiet() -> Any:
    """transformers' progress bars and advice do not belong into this program's output."""
    from transformers.utils import logging as transformers_logging

    level = logging.getLogger("transformers").level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.getLogger("transformers").setLevel(level)


def load_model(
    base: "str | NewBase", *, dtype: torch.dtype = torch.float32, device: str = "cpu", tags: bool = False
) -> Model:
    """Load `base` (or make it) with all dropout off and the one visibility rule as its attention.

    On the device `meta` it has shapes and no numbers, however large it is (models/outline.py). `tags`: as transformers'
    class that gives every token a tag, with its head. Raises ModelError for what must not or cannot be loaded,
    NotFoundError for what is not there.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForTokenClassification

    from tunesmith.models import attention

    path = config_path(base)
    folder = None if isinstance(base, NewBase) else path.parent
    raw = read_config(path)
    tokenizer = Tokenizer.from_folder(Path(base.tokenizer) if isinstance(base, NewBase) else path.parent)
    encoder, pairs = raw["model_type"] in ENCODERS, raw["model_type"] in ENCODER_DECODERS
    plain_class = AutoModel if encoder else AutoModelForSeq2SeqLM if pairs else AutoModelForCausalLM
    classes = AutoModelForTokenClassification if tags else plain_class
    plain: dict[str, Any] = {"add_pooling_layer": False} if raw["model_type"] in POOLED and not tags else {}
    with quiet():
        config = _config_without_dropout(folder, raw, path)
        if folder is not None and not any(folder.glob("*.safetensors")):
            raise ModelError(
                "no .safetensors weights here", file=folder, hint="convert the weights to safetensors first"
            )
        if folder is None or device == "meta":
            with torch.random.fork_rng(devices=[]), torch.device(device if device == "meta" else "cpu"):
                torch.manual_seed(base.seed if isinstance(base, NewBase) else 0)
                causal = classes.from_config(config, attn_implementation=attention.NAME, dtype=dtype, **plain)
        else:
            try:
                loaded: Any = classes.from_pretrained(
                    folder,
                    config=config,
                    output_loading_info=True,
                    attn_implementation=attention.NAME,
                    dtype=dtype,
                    use_safetensors=True,
                    trust_remote_code=False,
                    local_files_only=True,
                    **plain,
                )
            except LOADING_ERRORS as error:
                raise ModelError(
                    f"the model cannot be loaded: {error}", file=folder, hint="restore its files"
                ) from error
            causal, report = loaded
            prefix = f"{causal.base_model_prefix}."
            ignored = ("pooler.",) if tags else OTHER_HEADS if encoder else ()
            _check_complete(report, folder, prefix=prefix, ignored=ignored)
    causal.to(device)
    if len(causal.get_input_embeddings().weight) < tokenizer.num_tokens:
        raise ModelError(
            f"the tokenizer has {tokenizer.num_tokens:,} tokens and the model only "
            f"{len(causal.get_input_embeddings().weight):,}",
            file=folder,
            hint="use the tokenizer that belongs to the model",
        )
    files = {} if folder is None else file_digests(folder)
    digest = digest_files(files) if files else _digest_new(base, raw, tokenizer)
    name = base if isinstance(base, str) else "new"
    return Model(causal, tokenizer, name, folder, digest, context_of(raw), files=files)


def _config_without_dropout(folder: Path | None, raw: dict[str, Any], path: Path) -> Any:
    """transformers' configuration of a folder, or of a new model, with every dropout off: also those left to a default."""
    from transformers import AutoConfig

    try:
        config: Any = (
            AutoConfig.for_model(**raw)
            if folder is None
            else AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        )
        for name in DROPOUTS:
            if config.to_dict().get(name):
                setattr(config, name, 0.0)
    except LOADING_ERRORS as error:
        raise ModelError(f"config.json makes no sense: {error}", file=path, hint="mend it") from error
    return config


def _check_complete(report: dict[str, Any], folder: Path, *, prefix: str, ignored: tuple[str, ...]) -> None:
    """transformers makes missing weights up at random and leaves superfluous ones out; neither is a model."""
    for name, words in (
        ("missing_keys", "lack"),
        ("unexpected_keys", "hold the unknown"),
        ("mismatched_keys", "misfit"),
    ):
        keys = map(str, report.get(name) or [])
        found = sorted(key for key in keys if not key.removeprefix(prefix).startswith(ignored))
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise ModelError(f"the weights {words} {found[0]}{more}", file=folder, hint="restore the model's files")


def _digest_new(base: Any, raw: dict[str, Any], tokenizer: Tokenizer) -> str:
    content = json.dumps([raw, base.seed, tokenizer.digest], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
