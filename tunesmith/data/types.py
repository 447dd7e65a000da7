"""Row -> Example -> Sequence: the three shapes data takes before it is packed.

A Row is what the file holds. An Example is what the row means. A Sequence is what the model reads: token ids, and for
every token the weight with which it is trained (0: it is only read).
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


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


@dataclass(frozen=True, slots=True)
class Example:
    """What a row means: a conversation with trained assistant turns, or plain text (`text` is not None).

    `form` is one of `chat`, `prompt_completion`, `alpaca`, `sharegpt`, `text`. `columns` keeps the row's other fields.
    """

    origin: Origin
    form: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """32 hex digits: SHA-256 of what is trained and read, so the same content has the same key for ever."""
        content = [[m.role, m.content, m.weight, m.extra] for m in self.messages], self.text, self.tools
        return hashlib.sha256(
            json.dumps(content, sort_keys=True, default=str).encode("utf-8", "surrogatepass")
        ).hexdigest()[:32]

    @property
    def prompt_key(self) -> str:
        """As `key`, of the part before the last assistant turn (of the whole text for plain text)."""
        if self.text is not None or not self.messages:
            return self.key
        content = [[m.role, m.content, m.extra] for m in self.messages[:-1]], self.tools
        return hashlib.sha256(
            json.dumps(content, sort_keys=True, default=str).encode("utf-8", "surrogatepass")
        ).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Sequence:
    """Token ids and, for each token, the weight with which it is predicted from what stands before it.

    tokens_T int32, weight_T float32; weight_T[0] is 0 (nothing stands before the first token).
    `row` numbers the row it came from, in the order of the prepared split. `places_T` int64, where it is given, numbers
    each token among all that have a beginning of their own (data/pack.py, Forest).
    """

    tokens_T: np.ndarray
    weight_T: np.ndarray
    row: int = 0
    places_T: np.ndarray | None = None

    @property
    def num_targets(self) -> int:
        """Tokens with a weight above zero."""
        return int(np.count_nonzero(self.weight_T))
