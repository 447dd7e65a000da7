"""Extending a byte-pair tokenizer for the texts of a run: merges behind the old ones, so every old id keeps its meaning.

Byte-pair encoding (Sennrich et al. 2016, algorithm 1) goes on where the tokenizer's own training ended. Words are counted,
spelled with the merges there are, and again and again what saves most tokens becomes a token:

    argmax_c  n(c) (|c| - 1),      c a pair of neighbouring tokens, or the bytes of a character without a token of its own

Ties go to the smaller ids. Only the words that hold the chosen candidate are counted again. Ours differs in that nothing is
learned whose text is a token already (a special one, say), so what is read with the new merges is what was counted.

How many tokens a word takes is called fertility (Rust et al. 2021, section 3.2); it is measured on texts that nothing was
learned from.
"""

import heapq
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers

from tunesmith.data.batched import batched
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import ModelError, RecipeError

MIN_OCCURRENCES = 2  # what occurs once would be learned by heart
MAX_WORD_CHARACTERS = 256  # a longer run without a space is counted in parts
BATCH_TEXTS = 256
BATCH_WORDS = 1 << 14
CHARACTER_BORDER = re.compile("(?<=[^ \u2581])(?=[ \u2581])|(?<=\n)(?=[^\n])")  # U+2581 is SentencePiece's space
BYTE_BORDER = re.compile("(?<=[^Ġ])(?=Ġ)|(?<=Ċ)(?=[^Ċ])")  # a space and a line end as the byte alphabet writes them
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
BYTE_LIKE = re.compile(r"<0x..>", re.DOTALL)  # decoders read such a token as a byte, whatever stands in it

Ids = tuple[int, ...]


@dataclass(frozen=True)
class NewToken:
    """A learned token: what it stands for in the model's own alphabet, and the ids it is put together from."""

    text: str
    parts: Ids
    is_merge: bool  # else a character, spelled in bytes before


@dataclass(frozen=True)
class Fertility:
    """How texts come out in tokens. Words are what white space separates."""

    words: int
    bytes: int
    tokens: int

    def as_dict(self) -> dict[str, float]:
        """The counts, tokens a word and bytes a token."""
        per_word = round(self.tokens / max(1, self.words), 4)
        per_token = round(self.bytes / max(1, self.tokens), 4)
        counts = {"words": self.words, "bytes": self.bytes, "tokens": self.tokens}
        return counts | {"tokens_per_word": per_word, "bytes_per_token": per_token}


def fertility(texts: Iterable[str], *, tokenizer: Tokenizer) -> Fertility:
    """Count words, bytes and tokens of texts; nothing in them is special."""
    words = num_bytes = tokens = 0
    for batch in batched(texts, BATCH_TEXTS):
        words += sum(len(text.split()) for text in batch)
        num_bytes += sum(len(text.encode("utf-8")) for text in batch)
        tokens += sum(map(len, tokenizer.encode_text(batch)))
    return Fertility(words, num_bytes, tokens)


def first_new_id(tokenizer: Tokenizer) -> int:
    """One past the largest id there is."""
    return max(tokenizer.backend.get_vocab(with_added_tokens=True).values()) + 1


def check_extensible(tokenizer: Tokenizer) -> None:
    """ModelError unless it is byte-pair encoding over bytes, or over characters with bytes for the others."""
    model = json.loads(tokenizer.backend.to_str())["model"]
    reason = None
    if model["type"] != "BPE":
        reason = f"the tokenizer is of the kind {model['type']}, which has no merges to go on from"
    elif model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        reason = "the tokenizer marks the parts of a word, so a merge depends on where in the word it stands"
    elif model.get("dropout"):
        reason = "the tokenizer drops merges at random"
    elif not (_spells_bytes(model) or set(pre_tokenizers.ByteLevel.alphabet()) <= set(model["vocab"])):
        reason = "the tokenizer has no tokens for bytes, so a character that it does not know is lost"
    if reason:
        raise ModelError(
            f"{reason}: it cannot be extended",
            file=tokenizer.folder,
            hint="leave objective.new_tokens out, or choose a base with a byte-level or byte-fallback BPE tokenizer",
        )


def _spells_bytes(model: dict[str, Any]) -> bool:
    return bool(model.get("byte_fallback")) and set(BYTE_TOKENS) <= set(model["vocab"])


# ------------------------------------------------------------------------------------------------------------- counting


def count_words(texts: Iterable[str], *, tokenizer: Tokenizer) -> Counter[str]:
    """How often each word occurs, as the tokenizer's normaliser and pre-tokeniser write it.

    A tokenizer that hands on whole texts has them cut at spaces and line ends, so memory grows with the number of
    different words alone. Added tokens are no part of any word.
    """
    backend = tokenizer.backend
    added = [token.content for token in backend.get_added_tokens_decoder().values() if not token.special]
    apart = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True)))) if added else None
    counts: Counter[str] = Counter()
    for text in texts:
        for part in apart.split(text) if apart else (text,):
            normal = backend.normalizer.normalize_str(part) if backend.normalizer else part
            pieces = backend.pre_tokenizer.pre_tokenize_str(normal) if backend.pre_tokenizer else [(normal, (0, 0))]
            counts.update(piece for piece, _ in pieces)
    words: Counter[str] = Counter()
    border = CHARACTER_BORDER if _spells_bytes(json.loads(backend.to_str())["model"]) else BYTE_BORDER
    for piece, count in counts.items():
        for word in border.split(piece):
            for start in range(0, len(word), MAX_WORD_CHARACTERS):
                words[word[start : start + MAX_WORD_CHARACTERS]] += count
    return words


class _Speller:
    """Spells words with the merges there are, without a normaliser, pre-tokeniser or added tokens."""

    def __init__(self, tokenizer: Tokenizer):
        document = json.loads(tokenizer.backend.to_str())
        self.texts = {index: text for text, index in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
        self.by_bytes = _spells_bytes(document["model"])
        self._vocabulary: dict[str, int] = document["model"]["vocab"]
        empty: dict[str, Any] = {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "added_tokens": []}
        self.backend = Backend.from_str(json.dumps(document | empty))

    @cached_property
    def unknown(self) -> re.Pattern[str]:
        """A character that is spelled in bytes."""
        known = "".join(re.escape(text) for text in self._vocabulary if len(text) == 1)
        return re.compile(f"([^{known}])" if known else "(.)", re.DOTALL)

    def in_bytes(self, character: str) -> Ids:
        """Ids of the bytes of a character."""
        return tuple(self._vocabulary[BYTE_TOKENS[byte]] for byte in character.encode("utf-8"))

    def spell(self, words: list[str]) -> list[list[int]]:
        """Ids of words; -1 - code point stands for a character without a token of its own."""
        if not self.by_bytes:
            return [e.ids for e in self.backend.encode_batch_fast(words)]
        parts = [self.unknown.split(word) for word in words]
        known = iter(self.backend.encode_batch_fast([part for word in parts for part in word[::2]]))
        spelled: list[list[int]] = []
        for word in parts:
            ids: list[int] = []
            for number, part in enumerate(word):
                ids += [-1 - ord(part)] if number % 2 else next(known).ids
            spelled.append(ids)
        return spelled


# ------------------------------------------------------------------------------------------------------------- learning


@dataclass
class _Corpus:
    """Words as ids with their counts, and where each candidate occurs.

    A candidate is a pair of ids, or the one negative id of a character that is spelled in bytes. `places` may name a word
    that holds its candidate no more.
    """

    words: list[list[int]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    occurrences: Counter[Ids] = field(default_factory=Counter)
    places: dict[Ids, list[int]] = field(default_factory=dict)

    def add(self, ids: list[int], *, count: int) -> None:
        """Take up a word."""
        for candidate in _candidates(ids):
            self.occurrences[candidate] += count
            self.places.setdefault(candidate, []).append(len(self.words))
        self.words.append(ids)
        self.counts.append(count)

    def replace(self, chosen: Ids, *, new: int) -> set[Ids]:
        """Put `new` for the chosen candidate wherever it stands; returns the candidates that occur more often now."""
        change: Counter[Ids] = Counter()
        for place in self.places.pop(chosen):
            before = self.words[place]
            after = _replaced(before, chosen, new)
            if after == before:
                continue
            count = self.counts[place]
            for candidate in _candidates(before):
                change[candidate] -= count
            for candidate in _candidates(after):
                change[candidate] += count
                if new in candidate:
                    self.places.setdefault(candidate, []).append(place)
            self.words[place] = after
        for candidate, difference in change.items():
            self.occurrences[candidate] += difference
        del self.occurrences[chosen]
        return {candidate for candidate, difference in change.items() if difference > 0 and candidate != chosen}


def _candidates(ids: list[int]) -> Iterator[Ids]:
    """Neighbouring tokens, and the characters that are spelled in bytes."""
    yield from ((a, b) for a, b in pairwise(ids) if a >= 0 and b >= 0)
    yield from ((a,) for a in ids if a < 0)


def _replaced(ids: list[int], chosen: Ids, new: int) -> list[int]:
    """`new` in the place of `chosen`, from left to right."""
    if len(chosen) == 1:
        return [new if a == chosen[0] else a for a in ids]
    first, second = chosen
    result: list[int] = []
    i, last = 0, len(ids) - 1
    while i <= last:
        if ids[i] == first and i < last and ids[i + 1] == second:
            result.append(new)
            i += 2
        else:
            result.append(ids[i])
            i += 1
    return result


def learn_tokens(words: Counter[str], *, tokenizer: Tokenizer, num_new: int) -> list[NewToken]:
    """The next `num_new` tokens for these words, in the order learned. RecipeError where the words hold fewer."""
    check_extensible(tokenizer)
    speller = _Speller(tokenizer)
    corpus = _Corpus()
    for batch in batched(words.items(), BATCH_WORDS):
        for ids, (_, count) in zip(speller.spell([word for word, _ in batch]), batch, strict=True):
            if len(ids) > 1 or (ids and ids[0] < 0):
                corpus.add(ids, count=count)
    texts, taken, first = speller.texts, set(speller.texts.values()), first_new_id(tokenizer)

    def parts(candidate: Ids) -> Ids:
        return candidate if len(candidate) == 2 else speller.in_bytes(chr(-1 - candidate[0]))

    def entry(candidate: Ids) -> tuple[int, Ids, Ids]:
        spelled = parts(candidate)
        return -corpus.occurrences[candidate] * (len(spelled) - 1), spelled, candidate

    heap = [entry(candidate) for candidate in corpus.occurrences]
    heapq.heapify(heap)
    learned: list[NewToken] = []
    while heap and len(learned) < num_new:
        saved, spelled, candidate = heapq.heappop(heap)
        now = entry(candidate)
        if corpus.occurrences[candidate] < MIN_OCCURRENCES:
            continue
        if now[0] != saved:
            heapq.heappush(heap, now)
            continue
        is_merge = len(candidate) == 2
        text = texts[candidate[0]] + texts[candidate[1]] if is_merge else chr(-1 - candidate[0])
        if text in taken or (speller.by_bytes and BYTE_LIKE.fullmatch(text)):
            corpus.occurrences[candidate] = 0
            continue
        index = first + len(learned)
        learned.append(NewToken(text, spelled, is_merge))
        texts[index] = text
        taken.add(text)
        for risen in corpus.replace(candidate, new=index):
            heapq.heappush(heap, entry(risen))
    if len(learned) < num_new:
        raise RecipeError(
            f"objective.new_tokens is {num_new:,} and the training texts hold only {len(learned):,} pieces that occur "
            f"{MIN_OCCURRENCES} times and have no token yet",
            hint=f"use objective.new_tokens: {len(learned)} or less, or give more text",
        )
    return learned


# ------------------------------------------------------------------------------------------------------------ extending


def extended(tokenizer: Tokenizer, *, tokens: list[NewToken]) -> Tokenizer:
    """The tokenizer with these tokens behind its own. ModelError where an old id would change its meaning."""
    document = json.loads(tokenizer.backend.to_str())
    names = {index: text for text, index in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    vocabulary = document["model"]["vocab"]
    for token in document["added_tokens"]:
        vocabulary[token["content"]] = token["id"]  # else the ids of added tokens would count on from the new size
    for index, token in enumerate(tokens, start=first_new_id(tokenizer)):
        names[index] = token.text
        vocabulary[token.text] = index
        if token.is_merge:
            document["model"]["merges"].append([names[part] for part in token.parts])
    found = Tokenizer(
        Backend.from_str(json.dumps(document, ensure_ascii=False)),
        tokenizer.config,
        tokenizer.chat_template,
        tokenizer.folder,
    )
    check_extends(found, old=tokenizer)
    return found


def check_extends(tokenizer: Tokenizer, *, old: Tokenizer) -> None:
    """ModelError unless every old id means what it meant, and special tokens still come from templates alone."""
    now, before = (t.backend.get_vocab(with_added_tokens=True) for t in (tokenizer, old))
    moved = next((text for text, index in before.items() if now.get(text) != index), None)
    if moved is None and tokenizer.special_ids != old.special_ids:
        moved = next(iter(set(tokenizer.special_ids) ^ set(old.special_ids)))
    if moved is None:
        spelled = zip(old.special_ids.items(), tokenizer.encode_text(list(old.special_ids)), strict=True)
        moved = next((text for (text, index), ids in spelled if index in ids), None)
    if moved is not None:
        raise ModelError(
            f"the extended tokenizer does not keep the meaning of {moved!r}",
            file=tokenizer.folder,
            hint="use the tokenizer that was saved with the run, and the base that it was trained from",
        )


def old_pieces(tokenizer: Tokenizer, *, old: Tokenizer) -> list[list[int]]:
    """For each token behind those of `old`, in order, the ids that `old` spells its text with."""
    first = first_new_id(old)
    new = sorted((index, text) for text, index in tokenizer.backend.get_vocab().items() if index >= first)
    return [e.ids for e in _Speller(old).backend.encode_batch_fast([text for _, text in new])]
