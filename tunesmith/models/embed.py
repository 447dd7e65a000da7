"""Texts as vectors: the mean of an encoder's hidden states, of length 1.

    e(text) = m / |m|,   m = 1/T sum_t h_t                               (Reimers and Gurevych 2019, section 3: MEAN)

The mean runs over all tokens of the text and the marks around it. Texts are packed and never padded, so nothing has to be
masked, and an embedding does not depend on the texts beside it.

Shapes: B texts, T packed tokens, S texts of a pack, D hidden.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.pack import Pack, build_packs
from tunesmith.data.types import Sequence
from tunesmith.errors import ModelError
from tunesmith.models.load import Model, load_model

PACK_TOKENS = 4096


def load_embedder(base: str, *, device: str = "cpu") -> Callable[[list[str]], np.ndarray]:
    """The function from texts to embeddings [B, D] of an encoder: `base` is a folder or a hub name.

    Raises ModelError where it is no encoder, and what `load_model` raises.
    """
    model = load_model(base, device=device)
    if not model.is_encoder:
        raise ModelError(
            f"'{base}' is no encoder: it was not made to read a text as a whole",
            hint="name an encoder, for example sentence-transformers/all-MiniLM-L6-v2",
        )
    model.causal.eval()
    return lambda texts: embed_texts(model, texts)


def embed_texts(model: Model, texts: list[str]) -> np.ndarray:
    """float32 [B, D], or float64 where the model computes in it; of a text beyond the context its beginning is read."""
    tokenizer = model.tokenizer
    begin, end = tokenizer.begin_ids, tokenizer.end_ids
    room = model.context_tokens - len(begin) - len(end)
    sequences = []
    for number, ids in enumerate(tokenizer.encode_text(texts)):
        tokens_T = np.array([*begin, *ids[:room], *end], dtype=np.int32)
        sequences.append(Sequence(tokens_T, np.zeros(len(tokens_T), np.float32), row=number))
    with torch.no_grad():
        found = [
            (pack.rows_S, _means(model.hidden(model.attention(pack)), pack).cpu().numpy())
            for pack in build_packs(sequences, max_tokens=PACK_TOKENS, min_shared=model.min_shared_tokens)
        ]
    embedding_BD = np.zeros((len(texts), model.hidden_size), found[0][1].dtype if found else np.float32)
    for rows_S, embedding_SD in found:
        embedding_BD[rows_S] = embedding_SD
    return embedding_BD


def _means(hidden_TD: Tensor, pack: Pack) -> Tensor:
    """[S, D]: the mean of each text's hidden states, of length 1, in float32 at least."""
    hidden_TD = hidden_TD.to(torch.promote_types(hidden_TD.dtype, torch.float32))
    lengths_S = torch.tensor([node.stop - node.start for node in pack.nodes], device=hidden_TD.device)
    text_T = torch.repeat_interleave(lengths_S)
    total_SD = hidden_TD.new_zeros(len(lengths_S), hidden_TD.shape[1]).index_add_(0, text_T, hidden_TD)
    return torch.nn.functional.normalize(total_SD, dim=-1)  # the length of the sum and of the mean differ by a factor
