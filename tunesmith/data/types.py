"""Row -> Example -> Sequence: the three shapes data takes before it is packed.

A Row is what the file holds. An Example is what the row means. A Sequence is what the model reads: token ids, and for
every token the weight with which it is trained (0: it is only read).
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

Label = str | tuple[str, ...]  # a class or a number, or several


class Origin(NamedTuple):
    """Where a row stands: the file as the user named it, and its line (JSONL) or record number, from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Row:
    """One record as read: `value` is the JSON value (a dict for every tabular source)."""

    origin: Origin
    value: Any


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `weight` follows the hosted format: 0 means that an assistant turn is read but not trained."""

    role: str
    content: str
    weight: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)  # tool_calls, tool_call_id, name: passed to the template

    def as_dict(self) -> dict[str, Any]:
        """The message as chat templates see it."""
        return {"role": self.role, "content": self.content, **self.extra}


class CodeTests(NamedTuple):
    """What is run with an answer that is code: code before it, and statements after it that raise where it is wrong."""

    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Example:
    """What a row means: a conversation with trained assistant turns, plain text (`text` is not None), or words.

    `form` is one of `chat`, `prompt_completion`, `alpaca`, `sharegpt`, `text`, `labelled` (a text and its `label`: a
    class, several, or a number) and `tagged` (`words`, and in `label` a tag for each). `columns` keeps the other fields.
    `tests` are those of an answer that is code.
    """

    origin: Origin
    form: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    words: tuple[str, ...] = ()
    label: Label | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    tests: CodeTests | None = None

    @property
    def plain_text(self) -> str | None:
        """The text, or the words with spaces between them; None of a conversation."""
        return " ".join(self.words) if self.words else self.text

    @property
    def all_text(self) -> str:
        """Everything that it says, a line a turn."""
        plain = self.plain_text
        return "\n".join(message.content for message in self.messages) if plain is None else plain

    @property
    def asked(self) -> "tuple[tuple[Message, ...], Message]":
        """The messages before the last assistant turn, and that turn."""
        last = max(place for place, message in enumerate(self.messages) if message.role == "assistant")
        return self.messages[:last], self.messages[last]

    @property
    def key(self) -> str:
        """32 hex digits: SHA-256 of what is trained and read, so the same content has the same key for ever."""
        labelled = () if self.label is None else (self.words, self.label)
        content = [[m.role, m.content, m.weight, m.extra] for m in self.messages], self.text, self.tools
        return _digest([*content, *labelled])

    @property
    def prompt_key(self) -> str:
        """As `key`, of the part before the last assistant turn; of the whole for plain text, without its label."""
        if self.label is not None:
            return _digest([self.text, self.words])
        if self.text is not None or not self.messages:
            return self.key
        return _digest([[[m.role, m.content, m.extra] for m in self.messages[:-1]], self.tools])


def _digest(content: list[Any]) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Sequence:
    """Token ids and, for each token, the weight with which it is predicted from what stands before it.

    tokens_T int32, weight_T float32; weight_T[0] is 0 (nothing stands before the first token).
    Where `values` are given, a token with a weight is read and not predicted: float32, what is known of the sequence, as
    its objective understands it. A `choice` numbers one of the answers that its row may have, and then such a token is
    predicted all the same. `row` numbers the row it came from, in the order of the prepared split. `places_T` int64,
    where it is given, numbers each token among all that have a beginning of their own (data/pack.py, Forest).
    `encoder_T` int32, where it is given, is what an encoder reads before a decoder reads and predicts `tokens_T`.
    """

    tokens_T: np.ndarray
    weight_T: np.ndarray
    row: int = 0
    values: np.ndarray | None = None
    places_T: np.ndarray | None = None
    encoder_T: np.ndarray | None = None
    choice: int | None = None

    def cut(self, num_tokens: int) -> "Sequence":
        """Its beginning; what is read at its last token keeps that token, and what an encoder reads keeps its end."""
        tokens_T, weight_T = self.tokens_T[:num_tokens].copy(), self.weight_T[:num_tokens].copy()
        if self.values is not None and self.weight_T[-1]:
            tokens_T[-1], weight_T[-1] = self.tokens_T[-1], self.weight_T[-1]
        encoder_T = self.encoder_T
        if encoder_T is not None and len(encoder_T) > num_tokens:
            encoder_T = np.concatenate([encoder_T[: num_tokens - 1], encoder_T[-1:]])
        return replace(self, tokens_T=tokens_T, weight_T=weight_T, encoder_T=encoder_T)

    @property
    def num_encoder_tokens(self) -> int:
        """What an encoder reads."""
        return 0 if self.encoder_T is None else len(self.encoder_T)

    @property
    def num_tokens(self) -> int:
        """All of its tokens."""
        return len(self.tokens_T) + self.num_encoder_tokens

    @property
    def num_context_tokens(self) -> int:
        """What a model's context must hold: its tokens, or those of its encoder where they are more."""
        return max(len(self.tokens_T), self.num_encoder_tokens)

    @property
    def num_targets(self) -> int:
        """Tokens with a weight above zero."""
        return int(np.count_nonzero(self.weight_T))
