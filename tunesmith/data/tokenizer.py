"""Text to ids and back, from a `tokenizer.json`: one function for training, evaluation and serving.

Special tokens come into the ids from templates alone. Text of a row that looks like a special token stays text:
templates are rendered with a guard character before such text, and `encode_rendered` takes the guards out again after
it has told the special tokens that the template itself wrote from the others.
"""

import bisect
import hashlib
import itertools
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from tunesmith.errors import ModelError

GUARDS = "".join(map(chr, range(0xFDD0, 0xFDF0)))  # Unicode noncharacters: never part of interchanged text


def _content(value: Any) -> str | None:
    """A token in tokenizer_config.json is a string or an object that holds one."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_config(folder: Path) -> tuple[dict[str, Any], Any]:
    """tokenizer_config.json and the chat template, each of which may be missing."""
    path = folder / "tokenizer_config.json"
    try:
        config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        if not isinstance(config, dict):
            raise ValueError("it holds no object")
        path = folder / "chat_template.jinja"
        template = path.read_text("utf-8") if path.is_file() else config.get("chat_template")
    except (OSError, ValueError) as error:  # a UnicodeDecodeError is a ValueError
        raise ModelError(f"{path.name} cannot be read: {error}", file=path, hint="restore the file") from error
    return config, template


@dataclass
class Tokenizer:
    """A fast tokenizer read from a folder with `tokenizer.json` and `tokenizer_config.json`."""

    backend: Backend
    config: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    folder: Path | None = None
    _marked_backends: dict[str, Backend] = field(default_factory=dict, repr=False)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read a tokenizer; raises ModelError when the folder holds none that can be read without running code."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                "no tokenizer.json here",
                file=folder,
                hint="save the tokenizer in the fast format (tokenizer.json) beside the weights",
            )
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the tokenizers library raises bare Exception for every malformed file
            raise ModelError(f"tokenizer.json cannot be read: {error}", file=path, hint="save it again") from error
        backend.no_padding()
        backend.no_truncation()
        config, template = _read_config(folder)
        if isinstance(template, list):  # several named templates: the default one
            template = next((t.get("template") for t in template if t.get("name") == "default"), None)
        return cls(backend, config, template, folder)

    @cached_property
    def _plain(self) -> Backend:
        """The same tokenizer, blind to special tokens."""
        plain = Backend.from_str(self.backend.to_str())
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Special tokens and their ids."""
        added = self.backend.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    @cached_property
    def special_pattern(self) -> re.Pattern[str] | None:
        """Matches any special token in a text."""
        names = sorted(self.special_ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None

    def token_id(self, name: str) -> int | None:
        """Id of `eos_token`, `bos_token` or `pad_token` as the tokenizer's configuration names it."""
        content = _content(self.config.get(name))
        return None if content is None else self.backend.token_to_id(content)

    def special_text(self, name: str) -> str:
        """Text of `eos_token`, `bos_token` ...; empty where there is none."""
        return _content(self.config.get(name)) or ""

    @property
    def eos_id(self) -> int:
        """The end-of-text token; ModelError where the tokenizer names none."""
        index = self.token_id("eos_token")
        if index is None:
            raise ModelError(
                "the tokenizer names no end-of-text token",
                file=self.folder,
                hint='set "eos_token" in tokenizer_config.json',
            )
        return index

    @cached_property
    def _marks(self) -> tuple[list[int], list[int]]:
        """What the tokenizer itself puts before a text and after it."""
        found = self.backend.encode("a", add_special_tokens=True)
        own = [place for place, special in enumerate(found.special_tokens_mask) if not special]
        return (found.ids[: own[0]], found.ids[own[-1] + 1 :]) if own else ([], [])

    @cached_property
    def begin_ids(self) -> list[int]:
        """What stands before plain text: what the tokenizer itself adds, or its begin-of-text token, or nothing."""
        bos = self.token_id("bos_token")
        return self._marks[0] or ([] if bos is None else [bos])

    @cached_property
    def end_ids(self) -> list[int]:
        """What stands after plain text: what the tokenizer itself adds, or its end of text, or what separates texts."""
        known = (self.token_id(name) for name in ("eos_token", "sep_token"))
        return self._marks[1] or [index for index in known if index is not None][:1]

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the tokenizer and its template."""
        content = self.backend.to_str() + json.dumps(self.config, sort_keys=True) + (self.chat_template or "")
        return hashlib.sha256(content.encode("utf-8")).hexdigest()

    def looks_special(self, text: str) -> bool:
        """Whether a row's text holds something that reads like a special token."""
        return self.special_pattern is not None and self.special_pattern.search(text) is not None

    def guarded(self, text: str, *, guard: str) -> str:
        """The text with a guard character before everything in it that reads like a special token."""
        if self.special_pattern is None:
            return text
        return self.special_pattern.sub(lambda match: guard + match.group(), text)

    def encode_text(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts in which nothing is special; no begin or end tokens."""
        return [e.ids for e in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_words(self, rows: list[tuple[str, ...]]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """For each row of words, the ids of the words with spaces between them, and each word's first and last id.

        The place of a word of which the tokenizer keeps nothing is (-1, -1).
        """
        spans = []
        for words in rows:
            starts = itertools.accumulate((len(word) + 1 for word in words), initial=0)
            spans.append([(start, start + len(word)) for start, word in zip(starts, words, strict=False)])
        return self.encode_places([" ".join(words) for words in rows], words=spans)

    def encode_places(
        self, texts: list[str], *, words: list[list[tuple[int, int]]]
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """As `encode_words`, of texts with words at characters [start, stop), in order and apart."""
        found = []
        encodings = self._plain.encode_batch(texts, add_special_tokens=False)
        for spans, encoding in zip(words, encodings, strict=True):
            starts = [start for start, _ in spans]
            places = [(-1, -1)] * len(spans)
            for token, (start, stop) in enumerate(encoding.offsets):
                first = max(bisect.bisect_right(starts, start) - 1, 0)
                for word in range(first, bisect.bisect_left(starts, stop)):
                    if start < spans[word][1]:  # and not only the space behind it
                        places[word] = (places[word][0] if places[word][0] >= 0 else token, token)
            found.append((encoding.ids, places))
        return found

    def encode_rendered(self, texts: list[str], *, guard: str | None = None) -> list[list[int]]:
        """Ids of rendered templates: special tokens are recognised, but not those that a guard stands before.

        With a guard the roles are swapped: the marks are taken from what only looks special and put before the real
        special tokens, and a copy of the tokenizer that knows these by their marked names reads the text as a whole.
        """
        if guard is None:
            return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        names = "|".join(map(re.escape, sorted(self.special_ids, key=len, reverse=True)))
        pattern = re.compile(f"({re.escape(guard)}?)({names})")
        swapped = [pattern.sub(lambda m: m[2] if m[1] else guard + m[2], text) for text in texts]
        return [e.ids for e in self._marked(guard).encode_batch_fast(swapped, add_special_tokens=False)]

    def _marked(self, guard: str) -> Backend:
        """The same tokenizer, with `guard` before the names of all its special tokens."""
        if guard not in self._marked_backends:
            document = json.loads(self.backend.to_str())
            names = set(self.special_ids)
            for token in document["added_tokens"]:
                if token["content"] in names:
                    token["content"] = guard + token["content"]
            vocabulary = document["model"].get("vocab")
            if isinstance(vocabulary, dict):
                document["model"]["vocab"] = {(guard + k if k in names else k): v for k, v in vocabulary.items()}
            elif isinstance(vocabulary, list):
                document["model"]["vocab"] = [[guard + k if k in names else k, score] for k, score in vocabulary]
            unknown = document["model"].get("unk_token")
            if unknown in names:
                document["model"]["unk_token"] = guard + unknown
            document["post_processor"] = None
            self._marked_backends[guard] = Backend.from_str(json.dumps(document))
        return self._marked_backends[guard]

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids."""
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
