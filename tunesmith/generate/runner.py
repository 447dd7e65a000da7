"""Completions of many prompts at once, with the shared beginning of a batch computed and stored once.

The prompts of a batch are one pack, a root with a leaf a row, and go through the model in one call under the visibility
rule of training. Its keys and values are kept in two parts, the prefix once and the rest row by row, and every further
call computes one token a row. Its query sees the union of both parts, so the two sets of scores meet in one softmax,

    out = softmax([q K_prefix^T, q K_own^T]) [V_prefix; V_own],

and the prefix scores of all rows are one matrix product (as in Hydragen, Juravsky et al. 2024, eq. 2-4, which merges
two softmaxes instead). Rows that end make room for the others at once.

Shapes: T packed tokens, B rows, H query heads, K key/value heads, G query heads a key/value head, D head dimension,
E hidden, P prefix tokens, L own tokens, C slots for own tokens, S = P + L keys a row may see.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.pack import Pack
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import ModelError
from tunesmith.generate.pairs import PairKeyValues
from tunesmith.generate.sampling import Sampling, choose, random_stream
from tunesmith.generate.scheduler import Batch, plan_batches, plan_by_length
from tunesmith.models.attention import PackAttention
from tunesmith.models.load import Model
from tunesmith.models.readout import head_logits

BATCH_TOKENS = 16_384
BATCH_ROWS = 128
REPLACEMENT_CHARACTER = "\ufffd"  # what decoders put for bytes that are not (yet) a character

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Completion:
    """What followed a prompt.

    `tokens` ends with the stop id where one was drawn; `text` is without it, and is cut before a stop text. `logprobs`
    are those of the distribution each token was drawn from (see `choose`). `finish_reason` is "stop" at a stop id or a
    stop text, and "length" where `max_tokens` or the model's context was used up.
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    text: str


class Drawn(NamedTuple):
    """One token drawn for prompt number `row`; `finish_reason` is set with its last."""

    row: int
    token: int
    logprob: float
    finish_reason: FinishReason | None


class Generator:
    """Draws completions from a model; `stop_ids` end them (`ChatTemplate.stop_ids`).

    A batch has at most `batch_rows` rows, and room for `batch_tokens` keys and values in each layer; a single prompt
    that needs more is not refused.
    """

    def __init__(
        self,
        model: Model,
        *,
        stop_ids: Collection[int],
        batch_tokens: int = BATCH_TOKENS,
        batch_rows: int = BATCH_ROWS,
    ):
        self.model, self.stop_ids = model, frozenset(stop_ids)
        self.batch_tokens, self.batch_rows = batch_tokens, batch_rows

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: Sampling,
        on_token: Callable[[Drawn], None] | None = None,
    ) -> list[Completion]:
        """One completion for each prompt (token ids), in the order of the prompts.

        The same prompt given several times is completed independently each time. `on_token` hears of every token as it
        is drawn. Raises ModelError where a prompt is empty or leaves no room in the model's context, NumericalError
        where the model's logits are not finite.
        """
        tokens: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        reasons: dict[int, FinishReason] = {}
        for drawn in self._draw(prompts, sampling=sampling):
            tokens[drawn.row].append(drawn.token)
            logprobs[drawn.row].append(drawn.logprob)
            if drawn.finish_reason is not None:
                reasons[drawn.row] = drawn.finish_reason
            if on_token is not None:
                on_token(drawn)
        return [
            Completion(tokens[row], logprobs[row], reasons[row], self._text(tokens[row], stop=sampling.stop))
            for row in range(len(prompts))
        ]

    def stream(self, prompt: Sequence[int], *, sampling: Sampling) -> Iterator[str]:
        """The text of one completion, piece by piece as it is drawn; no piece ends within a character.

        Joined, the pieces are the `text` of `generate([prompt])`, where the tokens drawn spell valid UTF-8. Text that
        may turn out to begin a stop text is held back until that is known.
        """
        pieces = TextPieces(self.model.tokenizer, stop=sampling.stop)
        for drawn in self._draw([prompt], sampling=sampling):
            if drawn.token not in self.stop_ids and (piece := pieces.push(drawn.token)):
                yield piece
        if piece := pieces.close():
            yield piece

    def _text(self, tokens: list[int], *, stop: tuple[str, ...]) -> str:
        text = self.model.tokenizer.decode(tokens[:-1] if tokens and tokens[-1] in self.stop_ids else tokens)
        return text[: _stop_at(text, stop=stop)]

    def _draw(self, prompts: Sequence[Sequence[int]], *, sampling: Sampling) -> Iterator[Drawn]:
        """Every token of every completion, in the order in which they are drawn."""
        self._check_prompts(prompts)
        plan = plan_by_length if self.model.is_encoder_decoder else plan_batches
        batches = plan(
            prompts,
            new_tokens=min(sampling.max_tokens, self.model.room_tokens),
            batch_tokens=self.batch_tokens,
            batch_rows=self.batch_rows,
        )
        occurrences: Counter[tuple[int, ...]] = Counter()
        rows = []
        for index, prompt in enumerate(prompts):
            room = min(sampling.max_tokens, self.model.room_tokens - len(prompt))
            occurrence = occurrences[tuple(prompt)]
            occurrences[tuple(prompt)] += 1
            random = random_stream(prompt, seed=sampling.seed, occurrence=occurrence)
            rows.append(_Row(index, prompt, room, random, TextPieces(self.model.tokenizer, stop=sampling.stop)))
        with _evaluation_mode(self.model.causal):
            for batch in batches:
                yield from self._draw_batch(batch, [rows[index] for index in batch.rows], sampling=sampling)

    def _check_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        limit = self.model.room_tokens
        for index, prompt in enumerate(prompts):
            if not len(prompt):
                raise ModelError(
                    f"prompt {index} has no tokens", hint="begin it with the tokenizer's begin-of-text token"
                )
            if len(prompt) >= limit:
                raise ModelError(
                    f"prompt {index} has {len(prompt)} tokens; the model's context of {limit} tokens leaves room for "
                    f"prompts of at most {limit - 1}",
                    hint="shorten the prompt, or use a base with a longer context",
                )

    # no_grad and not inference_mode: what a module keeps from here (rotary tables) must still serve in training
    @torch.no_grad()
    def _draw_batch(self, batch: Batch, rows: list["_Row"], *, sampling: Sampling) -> Iterator[Drawn]:
        cache, hidden_BE = self._begun(batch, rows)
        while rows:
            logits_BV = head_logits(hidden_BE, head=self.model.head, softcap=self.model.softcap)
            uniform_B = None
            if sampling.temperature > 0:
                uniform = [row.random.random() for row in rows]
                uniform_B = torch.tensor(uniform, dtype=torch.float64, device=cache.device)
            tokens_B, logprobs_B = choose(logits_BV, sampling=sampling, uniform_B=uniform_B)
            alive = []
            for row, token, logprob in zip(rows, tokens_B.tolist(), logprobs_B.tolist(), strict=True):
                row.num_tokens += 1
                reason = self._finish_reason(row, token=token)
                alive.append(reason is None)
                yield Drawn(row.index, token, logprob, reason)
            if not all(alive):
                order = _compacted(alive)
                rows, tokens_B = [rows[i] for i in order], tokens_B[order]
                cache.keep(order)
            if rows:
                hidden_BE = self.model.hidden(cache.step(tokens_B))

    def _begun(self, batch: Batch, rows: list["_Row"]) -> "tuple[KeyValues | PairKeyValues, Tensor]":
        """The prompts computed and stored, and the hidden states [B, E] that the first tokens are drawn from."""
        prompts = [row.prompt for row in rows]
        if self.model.is_encoder_decoder:
            pairs = PairKeyValues(self.model, prompts, max_length=max(row.room for row in rows))
            return pairs, self.model.hidden(pairs.start())
        virtual = self.model.num_virtual_tokens
        cache = KeyValues(
            prefix_tokens=virtual + batch.prefix_tokens,
            lengths=[virtual + len(prompt) for prompt in prompts],
            max_length=max(virtual + len(row.prompt) + row.room for row in rows),
            device=self.model.device,
        )
        return cache, self._prefill(prompts, cache=cache)

    def _finish_reason(self, row: "_Row", *, token: int) -> FinishReason | None:
        if token in self.stop_ids:
            return "stop"
        if row.pieces.stop:
            row.pieces.push(token)
            if row.pieces.stopped:
                return "stop"
        return "length" if row.num_tokens >= row.room else None

    def _prefill(self, prompts: list[Sequence[int]], *, cache: "KeyValues") -> Tensor:
        """Computes the prompts and stores their keys and values -> hidden states at their last tokens [B, E]."""
        pack = _prompt_pack(prompts, prefix_tokens=cache.prefix_tokens - self.model.num_virtual_tokens)
        attention = self.model.attention(pack)
        hidden_TE = self.model.hidden(Prefill(attention, cache))
        assert len(cache.layers) == len(self.model.layers), "the model does not attend through the pack"
        return hidden_TE[torch.from_numpy(pack.source_N).to(cache.device)]


@dataclass(slots=True)
class _Row:
    """A prompt under way. `room` is how many tokens it may draw in all, `num_tokens` how many it has drawn."""

    index: int
    prompt: Sequence[int]
    room: int
    random: np.random.Generator
    pieces: "TextPieces"
    num_tokens: int = 0


class LayerKeyValues(NamedTuple):
    """Keys and values of one layer: of the prefix [K, P, D], and each row's own [B, K, C, D]."""

    prefix_key: Tensor
    prefix_value: Tensor
    own_key: Tensor
    own_value: Tensor


class KeyValues:
    """The keys and values of a batch, layer by layer.

    Position p of a row stands in the prefix for p < P and in the row's own slot p - P otherwise, so the prefix and
    the own slots beside each other are the row's keys in order of position. `lengths` is how many positions each row
    has stored, `max_length` the most that any will have; the slots grow by doubling.
    """

    def __init__(self, *, prefix_tokens: int, lengths: list[int], max_length: int, device: torch.device):
        self.prefix_tokens, self.lengths, self.max_length, self.device = prefix_tokens, lengths, max_length, device
        self.layers: dict[int, LayerKeyValues] = {}
        own = [length - prefix_tokens for length in lengths]
        self._row_N = torch.repeat_interleave(torch.arange(len(own)), torch.tensor(own)).to(device)
        self._slot_N = torch.cat([torch.arange(length) for length in own]).to(device)

    def store_prompts(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keys and values of the prompts' pack, [1, K, T, D]: the prefix, then the rest of each row."""
        (prefix_key, own_key), (prefix_value, own_value) = self._parts(key), self._parts(value)
        self.layers[layer] = LayerKeyValues(prefix_key, prefix_value, own_key, own_value)

    def _parts(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        packed_KTD, prefix = packed[0], self.prefix_tokens
        slots = self._num_slots(max(self.lengths) - prefix)
        # zeros: a slot that no row sees has weight zero, and zero times what uninitialised memory holds may be NaN
        own_BKCD = packed.new_zeros(len(self.lengths), packed.shape[1], slots, packed.shape[3])
        own_BKCD[self._row_N, :, self._slot_N] = packed_KTD[:, prefix:].transpose(0, 1)
        return packed_KTD[:, :prefix].clone(), own_BKCD

    def _num_slots(self, used: int) -> int:
        """The power of two above `used`, or the most that will be needed."""
        return min(1 << used.bit_length(), self.max_length - self.prefix_tokens)

    def step(self, tokens_B: Tensor) -> "Step":
        """One more token for every row -> the attention of the call that computes them."""
        position_B = torch.tensor(self.lengths, device=self.device)
        self.lengths = [length + 1 for length in self.lengths]
        return Step(self, tokens_B=tokens_B, position_B=position_B, num_keys=max(self.lengths))

    def append(
        self, layer: int, key: Tensor, value: Tensor, *, row_B: Tensor, slot_B: Tensor, num_slots: int
    ) -> LayerKeyValues:
        """Stores one key and value a row, [1, K, B, D], in its slot -> the layer with the own slots [:num_slots]."""
        stored = self.layers[layer]
        if num_slots > stored.own_key.shape[2]:
            stored = stored._replace(own_key=self._grown(stored.own_key), own_value=self._grown(stored.own_value))
            self.layers[layer] = stored
        rows = len(self.lengths)
        stored.own_key[row_B, :, slot_B] = key[0].transpose(0, 1)
        stored.own_value[row_B, :, slot_B] = value[0].transpose(0, 1)
        return stored._replace(
            own_key=stored.own_key[:rows, :, :num_slots], own_value=stored.own_value[:rows, :, :num_slots]
        )

    def _grown(self, own_BKCD: Tensor) -> Tensor:
        rows, (_, heads, slots, dimension) = len(self.lengths), own_BKCD.shape
        grown_BKCD = own_BKCD.new_zeros(rows, heads, self._num_slots(slots), dimension)
        grown_BKCD[:, :, :slots] = own_BKCD[:rows]
        return grown_BKCD

    def keep(self, order: list[int]) -> None:
        """Keep the rows `order`, in that order; only those that change their place are copied."""
        self.lengths = [self.lengths[old] for old in order]
        moved = [new for new, old in enumerate(order) if new != old]
        if moved:
            to, source = torch.tensor(moved), torch.tensor([order[new] for new in moved])
            to, source = to.to(self.device), source.to(self.device)
            for stored in self.layers.values():
                stored.own_key[to] = stored.own_key[source]
                stored.own_value[to] = stored.own_value[source]


class Prefill:
    """The attention of the call that computes the prompts: that of their pack, with the keys and values stored."""

    def __init__(self, attention: PackAttention, cache: KeyValues):
        self.attention, self.cache = attention, cache
        self.input_ids, self.position_ids, self.virtual = attention.input_ids, attention.position_ids, attention.virtual

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Tensor:
        """query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D]."""
        self.cache.store_prompts(module.layer_idx, key, value)
        return self.attention.attend(module, query, key, value, **keywords)


class Step:
    """The attention of a call that computes one token a row, at `position_B`, against all that is stored."""

    virtual = None  # they are stored

    def __init__(self, cache: KeyValues, *, tokens_B: Tensor, position_B: Tensor, num_keys: int):
        self.cache, self.position_B, self.num_keys = cache, position_B, num_keys
        self.input_ids, self.position_ids = tokens_B[None], position_B[None]
        self._row_B, self._slot_B = torch.arange(len(tokens_B), device=cache.device), position_B - cache.prefix_tokens
        self._hidden_BS: dict[int | None, Tensor] = {}  # by sliding window

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """query [1, H, B, D], key and value [1, K, B, D] -> [1, B, H, D]."""
        prefix, (_, heads, rows, _), kv_heads = self.cache.prefix_tokens, query.shape, key.shape[1]
        stored = self.cache.append(
            module.layer_idx,
            key,
            value,
            row_B=self._row_B,
            slot_B=self._slot_B,
            num_slots=self.num_keys - prefix,
        )
        groups = heads // kv_heads
        query_KGBD = query[0].unflatten(0, (kv_heads, groups)) * scaling
        prefix_KGBP = (query_KGBD.flatten(1, 2) @ stored.prefix_key.mT).unflatten(1, (groups, rows))
        own_BKGL = query_KGBD.permute(2, 0, 1, 3) @ stored.own_key.mT
        scores_BKGS = torch.cat([prefix_KGBP.permute(2, 0, 1, 3), own_BKGL], dim=-1)
        if softcap is not None:
            scores_BKGS = softcap * torch.tanh(scores_BKGS / softcap)
        scores_BKGS = scores_BKGS.masked_fill(self._hidden(sliding_window)[:, None, None], -torch.inf)
        at_least_float32 = torch.promote_types(scores_BKGS.dtype, torch.float32)
        weights_BKGS = scores_BKGS.softmax(dim=-1, dtype=at_least_float32).to(value.dtype)
        weights_KGBP = weights_BKGS[..., :prefix].permute(1, 2, 0, 3)
        prefix_out_KGBD = (weights_KGBP.flatten(1, 2) @ stored.prefix_value).unflatten(1, (groups, rows))
        out_BKGD = weights_BKGS[..., prefix:] @ stored.own_value + prefix_out_KGBD.permute(2, 0, 1, 3)
        return out_BKGD.flatten(1, 2)[None]

    def _hidden(self, window: int | None) -> Tensor:
        """Which keys a row must not see: later ones (slots of longer rows), and those beyond a sliding window."""
        if window not in self._hidden_BS:
            key_S, position_B1 = torch.arange(self.num_keys, device=self.position_B.device), self.position_B[:, None]
            hidden_BS = key_S > position_B1
            self._hidden_BS[window] = hidden_BS if window is None else hidden_BS | (position_B1 - key_S >= window)
        return self._hidden_BS[window]


class TextPieces:
    """Text of tokens as they come: `push` and `close` give the text that is certain to stand.

    Held back are an unfinished character (bytes of it are still to come) and what may be the beginning of a stop text.
    `stopped` is set once a stop text has come; it and what follows are not given out.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: tuple[str, ...]):
        self.tokenizer, self.stop, self.stopped = tokenizer, stop, False
        self._tokens: list[int] = []
        self._context = self._read = 0  # a decoder may treat the first token apart, so each piece is read after another
        self._held = ""

    def push(self, token: int) -> str:
        """The text that has become certain with this token, often none."""
        self._tokens.append(token)
        text = self._unread()
        if not text or text.endswith(REPLACEMENT_CHARACTER):
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return self._release(text, last=False)

    def close(self) -> str:
        """What was held back."""
        return self._release(self._unread(), last=True)

    def _unread(self) -> str:
        before = self.tokenizer.decode(self._tokens[self._context : self._read])
        return self.tokenizer.decode(self._tokens[self._context :])[len(before) :]

    def _release(self, text: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text, self._held = self._held + text, ""
        end = _stop_at(text, stop=self.stop)
        if end is not None:
            self.stopped = True
            return text[:end]
        if not last:
            begun = max((_overlap(text, stop) for stop in self.stop), default=0)
            text, self._held = text[: len(text) - begun], text[len(text) - begun :]
        return text


def _stop_at(text: str, *, stop: tuple[str, ...]) -> int | None:
    """Where the first stop text begins."""
    return min((at for at in map(text.find, stop) if at >= 0), default=None)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop` without completing it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _compacted(alive: list[bool]) -> list[int]:
    """The living rows, with the last of them in the places of the dead, so that few change their place."""
    living = [row for row, is_alive in enumerate(alive) if is_alive]
    movers = reversed(living)
    return [row if alive[row] else next(movers) for row in range(len(living))]


def _prompt_pack(prompts: list[Sequence[int]], *, prefix_tokens: int) -> Pack:
    """Prompts as a root, their common first `prefix_tokens`, with a leaf each; `source_N` are their last tokens."""
    parts = [prompts[0][:prefix_tokens], *(prompt[prefix_tokens:] for prompt in prompts)]
    starts = [0] + [prefix_tokens] * len(prompts)
    stops = np.cumsum([len(part) for part in parts])
    return Pack(
        tokens_T=np.concatenate([np.asarray(part, dtype=np.int64) for part in parts]),
        position_T=np.concatenate(
            [np.arange(start, start + len(part)) for start, part in zip(starts, parts, strict=True)]
        ),
        end_T=np.repeat([stops[-1], *stops[1:]], [len(part) for part in parts]),
        source_N=stops[1:] - 1,
        target_N=np.zeros(len(prompts), dtype=np.int64),
        weight_N=np.zeros(len(prompts), dtype=np.float32),
        sequence_N=np.arange(len(prompts)),
        rows_S=np.arange(len(prompts)),
        num_row_tokens=sum(len(prompt) for prompt in prompts),
    )


@contextlib.contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off; a model in training goes back to it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
