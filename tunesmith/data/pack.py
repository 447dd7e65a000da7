"""Packs: sequences laid out as prefix trees, so that what several begin with is stored and computed once.

A pack is a forest in depth-first order. Three integer vectors say everything: `tokens_T`, `position_T` (depth in the
tree, which is the position id) and `end_T` (one past the last token of the subtree below this token). The one
visibility rule is

    token i sees token j   <=>   j <= i < end[j]

Of an encoder-decoder the forest holds what the decoder reads, in which nothing is shared; what the encoder reads stands
beside it, a text after the other, each once.

Plain packing is the case in which nothing is shared. Prefix trees for training appear in "Tree Training" (2024-26,
RL groups) and, for inference, in SGLang's RadixAttention; here they are the only layout, for every objective.

Shapes: T packed tokens, N targets, S sequences, E packed tokens of an encoder.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from tunesmith.data.types import Sequence

MIN_SHARED_TOKENS = 16  # below this a node costs more in kernel calls than it saves
FILLED_TO = 64  # tokens: a multiple of so many, where packs are filled up so that products have few shapes
NEVER = 1 << 30  # more tokens than any two sequences share


class Node(NamedTuple):
    """A run of tokens without a branch: tokens [start, stop), its subtree [start, end)."""

    start: int
    stop: int
    end: int


@dataclass(frozen=True)
class Pack:
    """Sequences as one prefix forest.

    tokens_T, position_T, end_T int64. For each target: `source_N` is the token whose hidden state predicts it,
    `target_N` the token id predicted, `weight_N` float32, `sequence_N` the index of the sequence it belongs to.
    Of a sequence with values and no choice the token itself is the source, and `target_N` its own id; `values_S` are the
    values. `choice_S` says which of its row's answers each sequence is, where they are answers to choose from.
    `rows_S` numbers the rows the sequences came from; `num_row_tokens` is the sum of the sequences' own lengths.
    `places_T` are the sequences' places, where they have them. `encoder_E` int64 are the tokens of the encoder, and
    `encoder_span_S2` [first, last) of each sequence's among them; sequences with the same text stand beside each other.
    """

    tokens_T: np.ndarray
    position_T: np.ndarray
    end_T: np.ndarray
    source_N: np.ndarray
    target_N: np.ndarray
    weight_N: np.ndarray
    sequence_N: np.ndarray
    rows_S: np.ndarray
    num_row_tokens: int
    values_S: tuple[np.ndarray | None, ...] = ()
    choice_S: np.ndarray | None = None
    places_T: np.ndarray | None = None
    encoder_E: np.ndarray | None = None
    encoder_span_S2: np.ndarray | None = None

    def below(self, num_tokens: int) -> "Pack":
        """The same forest below a root of `num_tokens` tokens with the id 0."""
        return replace(
            self,
            tokens_T=np.concatenate([np.zeros(num_tokens, np.int64), self.tokens_T]),
            position_T=np.concatenate([np.arange(num_tokens), self.position_T + num_tokens]),
            end_T=np.concatenate([np.full(num_tokens, num_tokens + len(self.tokens_T)), self.end_T + num_tokens]),
            source_N=self.source_N + num_tokens,
            places_T=None,
        )

    def padded(self, multiple: int = FILLED_TO) -> "Pack":
        """The same forest and behind it tokens with the id 0 that nothing sees, up to a multiple of so many tokens.

        Their places are 0. A pack of an encoder-decoder stays as it is.
        """
        length = len(self.tokens_T)
        more = -length % multiple
        if not more or self.encoder_E is not None:
            return self
        return replace(
            self,
            tokens_T=np.concatenate([self.tokens_T, np.zeros(more, np.int64)]),
            position_T=np.concatenate([self.position_T, np.arange(more)]),
            end_T=np.concatenate([self.end_T, np.full(more, length + more)]),
            places_T=None if self.places_T is None else np.concatenate([self.places_T, np.zeros(more, np.int64)]),
        )

    @property
    def num_computed_tokens(self) -> int:
        """Tokens that go through the model."""
        return len(self.tokens_T) + (0 if self.encoder_E is None else len(self.encoder_E))

    @property
    def num_root_tokens(self) -> int:
        """Tokens before the first branch, an encoder's included; 0 where the sequences do not all begin with one node."""
        nodes = self.nodes
        own = nodes[0].stop if nodes and nodes[0].end == len(self.tokens_T) else 0
        if self.encoder_span_S2 is None or len(self.encoder_span_S2) == 0:
            return own
        return own + int(self.encoder_span_S2[0, 1] if (self.encoder_span_S2 == self.encoder_span_S2[0]).all() else 0)

    @cached_property
    def nodes(self) -> list[Node]:
        """The tree's nodes in depth-first order, read off the three vectors."""
        if len(self.tokens_T) == 0:
            return []
        breaks = np.flatnonzero((self.end_T[1:] != self.end_T[:-1]) | (self.position_T[1:] != self.position_T[:-1] + 1))
        starts = np.concatenate([[0], breaks + 1]).tolist()
        stops = np.concatenate([breaks + 1, [len(self.tokens_T)]]).tolist()
        return [Node(a, b, int(self.end_T[a])) for a, b in zip(starts, stops, strict=True)]


def shared_length(a_T: np.ndarray, b_T: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(a_T), len(b_T))
    different = a_T[:length] != b_T[:length]
    first = int(different.argmax()) if length else 0
    return first if length and different[first] else length


def _key(sequence: Sequence) -> tuple[int, bytes, bytes]:
    """Sorts by tokens; those that an encoder reads for first by its text, short ones before long ones."""
    read = b"" if sequence.encoder_T is None else sequence.encoder_T.astype(">i4").tobytes()
    return len(read), read, sequence.tokens_T.astype(">i4").tobytes()


def _sorted(sequences: list[Sequence]) -> list[int]:
    return sorted(range(len(sequences)), key=lambda i: _key(sequences[i]))


def _in_common(a: Sequence, b: Sequence, *, min_shared: int) -> int:
    """How many tokens of `b` are computed already where `a` stands before it."""
    if b.encoder_T is not None:
        same = a.encoder_T is not None and np.array_equal(a.encoder_T, b.encoder_T)
        return len(b.encoder_T) if same else 0
    shared = shared_length(a.tokens_T, b.tokens_T)
    return shared if shared >= min_shared else 0


class _Path(NamedTuple):
    """The packed ranges from a root down to a node."""

    above: "_Path | None"
    start: int
    stop: int

    def indices(self) -> np.ndarray:
        """Packed index of every token on the way, root first."""
        ranges, node = [], self
        while True:
            ranges.append(np.arange(node.start, node.stop))
            if node.above is None:
                return np.concatenate(ranges[::-1])
            node = node.above


class _Builder:
    """Lays out sorted sequences depth first. `shared[i]` is what sorted sequence i shares with the one before it."""

    def __init__(self, sequences: list[Sequence], min_shared: int, *, merge_same: bool = False):
        self.sequences, self.min_shared = sequences, min_shared
        self.tokens: list[np.ndarray] = []
        self.places: list[np.ndarray] = []
        self.position: list[np.ndarray] = []
        self.end: list[np.ndarray] = []
        self.num_tokens = 0
        self.paths: list[_Path | None] = [None] * len(sequences)
        self.shared = [0] + [shared_length(a.tokens_T, b.tokens_T) for a, b in pairwise(sequences)]
        pairs = zip(self.shared[1:], pairwise(sequences), strict=True)
        self.same = [False] + [merge_same and n == len(a.tokens_T) == len(b.tokens_T) for n, (a, b) in pairs]
        self.todo: list[Callable[[], None]] = []  # a stack instead of recursion: trees may be deep

    def build(self) -> None:
        """Lay out all sequences."""
        self.group(0, len(self.sequences), 0, None)
        while self.todo:
            self.todo.pop()()

    def group(self, first: int, last: int, depth: int, path: _Path | None) -> None:
        """Sequences [first, last) have `path` in common; `min_shared` further ones, or all, make a node."""
        least = depth + self.min_shared
        borders = [i for i in range(first + 1, last) if self.shared[i] < least and not self.same[i]]
        for a, b in reversed(list(zip([first, *borders], [*borders, last], strict=True))):
            if a < b:
                self.todo.append(partial(self.node, a, b, depth, path))

    def node(self, first: int, last: int, depth: int, path: _Path | None) -> None:
        """What sequences [first, last) share beyond `depth`, and below it what they do not."""
        common = min([len(self.sequences[first].tokens_T), *self.shared[first + 1 : last]])
        here = _Path(path, self.num_tokens, self.num_tokens + common - depth)
        self.tokens.append(self.sequences[first].tokens_T[depth:common])
        if (places_T := self.sequences[first].places_T) is not None:
            self.places.append(places_T[depth:common])
        self.position.append(np.arange(depth, common))
        end = np.empty(common - depth, dtype=np.int64)
        self.end.append(end)
        self.num_tokens += common - depth
        while first < last and len(self.sequences[first].tokens_T) == common:
            self.paths[first] = here
            first += 1
        self.todo.append(partial(self.close, end))
        self.group(first, last, common, here)

    def close(self, end: np.ndarray) -> None:
        """The subtree below a node is laid out."""
        end[:] = self.num_tokens


def build_pack(sequences: list[Sequence], *, min_shared: int = MIN_SHARED_TOKENS, merge_same: bool = False) -> Pack:
    """Lay sequences out as a prefix forest. Prefixes of fewer than `min_shared` common tokens are not shared.

    `merge_same`: sequences that are the same from end to end are one all the same.
    """
    order = _sorted(sequences)
    ordered = [sequences[i] for i in order]
    encoder_E, encoder_span_S2 = _encoder(ordered)
    choosing = any(s.choice is not None for s in ordered)
    assert not choosing or all(s.choice is not None for s in ordered), "a pack holds choices, or none"
    builder = _Builder(ordered, min_shared if encoder_E is None else NEVER, merge_same=merge_same)
    builder.build()
    sources, targets, weights, owners = [], [], [], []
    for index, (sequence, path) in enumerate(zip(ordered, builder.paths, strict=True)):
        assert path is not None
        packed_T = path.indices()
        trained = np.flatnonzero(sequence.weight_T)
        assert len(packed_T) == len(sequence.tokens_T)
        read = sequence.values is not None and sequence.choice is None
        assert read or not len(trained) or trained[0] > 0, "nothing stands before the first token to predict it from"
        sources.append(packed_T[trained if read else trained - 1])
        targets.append(sequence.tokens_T[trained])
        weights.append(sequence.weight_T[trained])
        owners.append(np.full(len(trained), index))

    def joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
        return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)

    return Pack(
        tokens_T=joined(builder.tokens, np.int64),
        position_T=joined(builder.position, np.int64),
        end_T=joined(builder.end, np.int64),
        source_N=joined(sources, np.int64),
        target_N=joined(targets, np.int64),
        weight_N=joined(weights, np.float32),
        sequence_N=joined(owners, np.int64),
        rows_S=np.array([s.row for s in ordered], dtype=np.int64),
        num_row_tokens=sum(s.num_tokens for s in sequences),
        values_S=tuple(s.values for s in ordered),
        choice_S=np.array([s.choice for s in ordered], dtype=np.int64) if choosing else None,
        places_T=joined(builder.places, np.int64) if builder.places else None,
        encoder_E=encoder_E,
        encoder_span_S2=encoder_span_S2,
    )


def _encoder(ordered: list[Sequence]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """What an encoder reads, each text once, and where each sequence's stands."""
    texts = [s.encoder_T for s in ordered if s.encoder_T is not None]
    if not texts:
        return None, None
    assert len(texts) == len(ordered), "an encoder reads for every sequence of a pack, or for none"
    spans, distinct = [(0, len(texts[0]))], [texts[0]]
    for before, text in pairwise(texts):
        if not np.array_equal(before, text):
            spans.append((spans[-1][1], spans[-1][1] + len(text)))
            distinct.append(text)
        else:
            spans.append(spans[-1])
    return np.concatenate(distinct).astype(np.int64), np.array(spans, dtype=np.int64)


class Forest:
    """One prefix forest of many sequences, as numbers only: tokens with the same beginning have the same place."""

    def __init__(self, sequences: list[Sequence], *, min_shared: int = MIN_SHARED_TOKENS):
        order = _sorted(sequences)
        builder = _Builder([sequences[i] for i in order], min_shared)
        builder.build()
        self.num_tokens = builder.num_tokens
        self._paths = [path for _, path in sorted(zip(order, builder.paths, strict=True), key=lambda pair: pair[0])]

    def places(self, index: int) -> np.ndarray:
        """Places [T] of the tokens of one sequence."""
        path = self._paths[index]
        assert path is not None
        return path.indices()


def build_packs(sequences: list[Sequence], *, max_tokens: int, min_shared: int = MIN_SHARED_TOKENS) -> Iterator[Pack]:
    """Split sequences into packs of at most `max_tokens` computed tokens each, besides the pack's root.

    The root is what all sequences of a pack begin with; a long prompt would otherwise fill every pack anew. Sequences
    with a common beginning stand beside each other in sorted order, so they meet in one pack.
    """
    units = [[sequence] for sequence in sequences]
    return build_unit_packs(units, max_tokens=max_tokens, min_shared=min_shared, merge_same=False)


def build_unit_packs(
    units: list[list[Sequence]], *, max_tokens: int, min_shared: int = MIN_SHARED_TOKENS, merge_same: bool = True
) -> Iterator[Pack]:
    """As `build_packs`, but the sequences of a unit stay in one pack, and a unit beyond `max_tokens` is one alone.

    `merge_same`: sequences that are the same from end to end are computed and counted once.
    """
    group: list[list[Sequence]] = []
    known: set[bytes] = set()
    cost = root = 0
    for unit in sorted((sorted(unit, key=_key) for unit in units), key=lambda unit: [_key(s) for s in unit]):
        last = group[-1][-1] if group else None
        added, shared = _added(unit, last=last, known=known, min_shared=min_shared)
        if group and cost + added - min(root, shared) > max_tokens:
            yield from _within(group, max_tokens, min_shared, merge_same)
            group, known = [], set()
            added, shared = _added(unit, last=None, known=known, min_shared=min_shared)
        cost, root = (cost + added, min(root, shared)) if group else (added, shared)
        group.append(unit)
        if merge_same:
            known.update(s.tokens_T.tobytes() for s in unit)
    if group:
        yield from _within(group, max_tokens, min_shared, merge_same)


def _added(unit: list[Sequence], *, last: Sequence | None, known: set[bytes], min_shared: int) -> tuple[int, int]:
    """Tokens that a sorted unit adds behind `last`, and the fewest that one of its sequences shares with the one before."""
    added, least = 0, NEVER
    for sequence in unit:
        if known and sequence.tokens_T.tobytes() in known:
            continue
        length = sequence.num_tokens
        shared = length if last is None else _in_common(last, sequence, min_shared=min_shared)
        added += length if last is None else length - shared
        least, last = min(least, shared), sequence
    return added, least


def _within(group: list[list[Sequence]], max_tokens: int, min_shared: int, merge_same: bool) -> Iterator[Pack]:
    """The group as one pack, or halved: what rows share by pairs can be a little more than what the tree stores once."""
    pack = build_pack([s for unit in group for s in unit], min_shared=min_shared, merge_same=merge_same)
    if len(group) == 1 or pack.num_computed_tokens - pack.num_root_tokens <= max_tokens:
        yield pack
    else:
        middle = len(group) // 2
        yield from _within(group[:middle], max_tokens, min_shared, merge_same)
        yield from _within(group[middle:], max_tokens, min_shared, merge_same)
