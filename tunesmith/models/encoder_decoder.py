"""Encoder-decoders of the T5 family: the texts and answers of many rows in one call, and no padded batch.

    encoder            token i sees token j  <=>  both are of one text
    decoder            token i sees token j  <=>  j <= i < end[j]
    cross-attention    a token of an answer sees the text that the answer belongs to

    score_hij = q_hi . k_hj + b_h[bucket(j - i)]         (Raffel et al. 2020, section 2.1; Shaw et al. 2018)

The bias depends on the distance alone, so it is computed once a pack for every distance, [H, R], and laid out for texts of
each length. transformers' own stacks would lay it out for every pair of tokens of the pack and hand it from block to block;
therefore the blocks are called here and not by their stack, and a block that is given a bias makes none. The bias is a
parameter and takes its gradient from the scores.

Shapes: T packed tokens of the decoder, E of the encoder, D hidden, H heads, n tokens of one text, R distances.
"""

from collections.abc import Iterable
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.pack import Pack


class Run(NamedTuple):
    """So many pieces beside each other, each with so many queries and keys."""

    pieces: int
    queries: int
    keys: int


def runs_of(sizes: Iterable[tuple[int, int]]) -> list[Run]:
    """Pieces of (queries, keys) in the order of the pack; those of one size beside each other are computed in one call."""
    return [Run(len(list(same)), *size) for size, same in groupby(sizes)]


def attend_pieces(
    query: Tensor, key: Tensor, value: Tensor, *, runs: list[Run], biases: dict[int, Tensor], scaling: float
) -> Tensor:
    """Attention within each piece: query [1, H, T, D], key and value [1, H, E, D] -> [1, T, H, D].

    `biases` has [1, H, n, n] for pieces of n tokens; none where there is nothing to add.
    """
    dtype = value.dtype
    if query.device.type == "cpu":  # the CPU's kernels are slower in bf16 than with the conversions
        query, key, value = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (query, key, value))
    query_parts = query[0].split([run.pieces * run.queries for run in runs], dim=1)
    sizes = [run.pieces * run.keys for run in runs]
    out = []
    with torch.autocast(query.device.type, enabled=False):
        for run, part_q, part_k, part_v in zip(
            runs, query_parts, key[0].split(sizes, dim=1), value[0].split(sizes, dim=1), strict=True
        ):
            pieces_q = part_q.unflatten(1, (run.pieces, run.queries)).transpose(0, 1)
            pieces_k = part_k.unflatten(1, (run.pieces, run.keys)).transpose(0, 1)
            pieces_v = part_v.unflatten(1, (run.pieces, run.keys)).transpose(0, 1)
            bias = biases.get(run.queries)
            found = torch.nn.functional.scaled_dot_product_attention(
                pieces_q, pieces_k, pieces_v, attn_mask=None if bias is None else bias.to(pieces_q.dtype), scale=scaling
            )
            out.append(found.transpose(1, 2).flatten(0, 1))
    return torch.cat(out)[None].to(dtype)


def distance_bias(stack: Any, *, longest: int, both_ways: bool) -> Tensor:
    """b [H, R] of a stack for distances 1 - longest to longest - 1, in this order."""
    attention = stack.block[0].layer[0].SelfAttention
    distance_R = torch.arange(1 - longest, longest, device=stack.embed_tokens.weight.device)
    bucket_R = attention._relative_position_bucket(
        distance_R,
        bidirectional=both_ways,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    bias_RH: Tensor = attention.relative_attention_bias(bucket_R)
    return bias_RH.T


def piece_biases(stack: Any, *, lengths: Iterable[int], both_ways: bool) -> dict[int, Tensor]:
    """[1, H, n, n] for each length n; what lies ahead is hidden unless a token sees both ways."""
    wanted = sorted(set(lengths))
    longest = wanted[-1]
    bias_HR = distance_bias(stack, longest=longest, both_ways=both_ways)
    found = {}
    for n in wanted:
        window_HR = bias_HR[:, longest - n : longest + n - 1]
        bias_Hnn = window_HR.unfold(1, n, 1).flip(1)  # row i begins at distance -i
        if not both_ways:
            ahead_nn = torch.ones(n, n, dtype=torch.bool, device=bias_Hnn.device).triu(1)
            bias_Hnn = bias_Hnn.masked_fill(ahead_nn, -torch.inf)
        found[n] = bias_Hnn[None]
    return found


class Encoding:
    """The attention of a call that computes the encoder's hidden states."""

    virtual = None

    def __init__(self, stack: Any, *, lengths: list[int]):
        self.runs = runs_of((n, n) for n in lengths)
        self.biases = piece_biases(stack, lengths=lengths, both_ways=True)

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, **_: Any) -> Tensor:
        """query, key and value [1, H, E, D] -> [1, E, H, D]."""
        return attend_pieces(query, key, value, runs=self.runs, biases=self.biases, scaling=scaling)


class Decoding:
    """The attention of a call that computes the decoder's hidden states, to itself and to the encoder's."""

    virtual = None

    def __init__(self, stack: Any, *, lengths: list[int], across: list[tuple[int, int]]):
        self.runs = runs_of((n, n) for n in lengths)
        self.across = runs_of(across)
        self.biases = piece_biases(stack, lengths=lengths, both_ways=False)

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, **_: Any) -> Tensor:
        """query [1, H, T, D], key and value [1, H, T or E, D] -> [1, T, H, D]."""
        if module.is_causal:
            return attend_pieces(query, key, value, runs=self.runs, biases=self.biases, scaling=scaling)
        return attend_pieces(query, key, value, runs=self.across, biases={}, scaling=scaling)


def run_stack(stack: Any, ids_1T: Tensor, *, attention: Any, encoder_1ED: Tensor | None = None) -> Tensor:
    """Hidden states [1, T, D] of a stack. Its own `forward` would lay the bias out for all pairs of tokens."""
    hidden_1TD: Tensor = stack.embed_tokens(ids_1T)
    given = hidden_1TD.new_zeros(())  # stands for a bias; `attention` has the real one
    for block in stack.block:
        hidden_1TD = block(hidden_1TD, None, given, encoder_1ED, None, given, pack=attention)[0]
    hidden_1TD = stack.final_layer_norm(hidden_1TD)
    return hidden_1TD


def encode(causal: Any, ids_1E: Tensor, *, lengths: list[int]) -> Tensor:
    """Hidden states [1, E, D] of the encoder; the texts of `lengths` tokens stand one after the other."""
    return run_stack(causal.encoder, ids_1E, attention=Encoding(causal.encoder, lengths=lengths))


def decode(causal: Any, ids_1T: Tensor, *, attention: Any, encoder_1ED: Tensor) -> Tensor:
    """Hidden states [T, D] of the decoder, as the vocabulary head takes them."""
    hidden_TD = run_stack(causal.decoder, ids_1T, attention=attention, encoder_1ED=encoder_1ED)[0]
    config = causal.config.to_dict()
    return hidden_TD * config["d_model"] ** -0.5 if config.get("scale_decoder_outputs") else hidden_TD


class PairAttention:
    """What an encoder and a decoder read of one pack, and who sees what."""

    def __init__(self, pack: Pack, *, device: torch.device):
        assert pack.encoder_E is not None, "an encoder-decoder reads packs with a text for the encoder"
        assert pack.encoder_span_S2 is not None
        self.encoder_ids = torch.from_numpy(pack.encoder_E)[None].to(device)
        self.input_ids = torch.from_numpy(pack.tokens_T)[None].to(device)
        self.lengths = [node.stop - node.start for node in pack.nodes]
        first_S = np.concatenate([[True], (np.diff(pack.encoder_span_S2[:, 0]) != 0)])
        texts = pack.encoder_span_S2[first_S]
        self.text_lengths = (texts[:, 1] - texts[:, 0]).tolist()
        answers = np.add.reduceat(np.array(self.lengths), np.flatnonzero(first_S)).tolist()
        self.across = list(zip(answers, self.text_lengths, strict=True))

    def hidden(self, causal: Any) -> Tensor:
        """Hidden states [T, D] of the decoder before the vocabulary head."""
        encoder_1ED = encode(causal, self.encoder_ids, lengths=self.text_lengths)
        attention = Decoding(causal.decoder, lengths=self.lengths, across=self.across)
        return decode(causal, self.input_ids, attention=attention, encoder_1ED=encoder_1ED)
