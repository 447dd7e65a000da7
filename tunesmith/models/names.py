"""Names of persons in texts, by a model that gives every token a tag: PER or PERSON, in BIO, BIOES, BILOU or IO notation.

    tag of a word = argmax_k (w_k . h_t + b_k),    t the word's first token in an encoder, its last in a decoder

which is where such models are trained to be read, here as elsewhere (Devlin et al. 2019, section 5.3). Words are told
from the text and not from the tokens, so that all pieces of a word count as one; words of persons with nothing but a space
between them are one name, unless the tag of the second begins one (Ramshaw and Marcus 1995). A text longer than the window
is read in windows that overlap, and the tag of a token is taken from the one in which it stands further from the edge.

Shapes: T tokens of a text, P packed tokens, K tags.
"""

import re
from functools import cache
from typing import Any

import numpy as np
import torch

from tunesmith.data.curate.names import Names
from tunesmith.data.pack import NEVER, build_packs
from tunesmith.data.types import Sequence
from tunesmith.errors import ModelError
from tunesmith.models.base import ENCODER_DECODERS, ENCODERS, listed_files, read_config, resolve_base
from tunesmith.models.heads import DOCUMENT, read_head_document
from tunesmith.models.load import Model, load_model

PACK_TOKENS = 4096
WINDOW_TOKENS = 512  # at most, with the marks around the text: who is a person is said near by
OVERLAP = 4  # which part of a window stands in the next one too
TAG = re.compile(r"(?:([BIESLU])-)?PER(?:SON)?", re.IGNORECASE)
INSIDE, BEGINS = 1, 2  # kinds of tags; all others are 0

APART = r"\s!-&(-,./:-@\[-`{-¿×÷‐-⯿、-〿！-／：-＠\U0001F000-\U0001FAFF"  # what is no part of a word: spaces, signs
ALONE = "぀-ヿ㐀-鿿"  # characters of scripts that set words without spaces: each is one
LETTER = rf"[^{APART}{ALONE}'’-]"
OWNS = rf"s(?!{LETTER})"  # of Anna's
WORD = re.compile(rf"[{ALONE}]|(?!(?<=['’]){OWNS}){LETTER}+(?:['’-](?!(?<!-){OWNS}){LETTER}+)*")  # O'Brien, Jean-Luc
BETWEEN = re.compile(r"(?:(?<=\b\w)\.)?[^\S\n\r]*")  # the words of one name: J. R. Miller


def load_names(base: str, *, device: str = "cpu") -> Names:
    """What finds names by transformers' token classification model in a folder, or of a hub name.

    It is loaded when the first text is asked about. Raises ModelError where none of its labels is a person's, and what
    `load_model` raises.
    """
    folder = resolve_base(base)
    config = read_config(folder / "config.json")
    labels: dict[str, Any] = config.get("id2label") or {}
    kinds = {number: kind for number, label in labels.items() if (kind := _kind(str(label)))}
    if not kinds or config["model_type"] in ENCODER_DECODERS:
        shown = ", ".join(map(str, labels.values())) or "none"
        raise ModelError(
            f"'{base}' tags no persons: its labels are {shown}",
            file=folder,
            hint="name a model for token classification with the labels PER or PERSON, such as dslim/bert-base-NER",
        )
    document = read_head_document(folder) if (folder / DOCUMENT).is_file() else {}
    pooling = document.get("objective", {}).get("pooling") or ("first" if config["model_type"] in ENCODERS else "last")

    @cache
    def model() -> Model:
        loaded = load_model(base, device=device, tags=True)
        loaded.causal.eval()
        return loaded

    def find(texts: list[str]) -> list[list[tuple[int, int]]]:
        return find_names(model(), texts, kinds=kinds, first=pooling == "first") if texts else []

    return Names(find, files=listed_files(base))


def _kind(label: str) -> int:
    found = TAG.fullmatch(label)
    return 0 if found is None else BEGINS if (found[1] or "I").upper() in "BSU" else INSIDE


def find_names(
    model: Model, texts: list[str], *, kinds: dict[str, int], first: bool
) -> list[list[tuple[int, int]]]:  # fmt: skip
    """Characters [start, end) of the names in each text, in order and apart.

    kinds: INSIDE or BEGINS of the tags of persons, by number. first: words are read at their first token, else at the last.
    """
    words = [[match.span() for match in WORD.finditer(text)] for text in texts]
    encoded = model.tokenizer.encode_places(texts, words=words)
    tags = _tags(model, [ids for ids, _ in encoded])
    found = []
    for text, spans, (_, places), tag_T in zip(texts, words, encoded, tags, strict=True):
        names: list[tuple[int, int]] = []
        inside = False  # the word before is a name's
        for (start, end), place in zip(spans, places, strict=True):
            kind = kinds.get(str(tag_T[place[0 if first else 1]]), 0) if place[0] >= 0 else 0
            if kind == INSIDE and inside and BETWEEN.fullmatch(text, names[-1][1], start):
                names[-1] = (names[-1][0], end)
            elif kind:
                names.append((start, end))
            inside = bool(kind)
        found.append(names)
    return found


def _tags(model: Model, rows: list[list[int]]) -> list[np.ndarray]:
    """The likeliest tag [T] of each token of texts, by number."""
    begin, end = model.tokenizer.begin_ids, model.tokenizer.end_ids
    room = min(model.context_tokens, WINDOW_TOKENS) - len(begin) - len(end)
    overlap = room // OVERLAP
    windows: list[tuple[int, int]] = []  # the text's number, and where in it the window begins
    sequences = []
    for number, ids in enumerate(rows):
        for start in range(0, max(len(ids) - overlap, min(len(ids), 1)), room - overlap):
            tokens_T = np.array([*begin, *ids[start : start + room], *end], dtype=np.int32)
            sequences.append(Sequence(tokens_T, np.zeros(len(tokens_T), np.float32), row=len(windows)))
            windows.append((number, start))
    parts: dict[int, np.ndarray] = {}
    with torch.no_grad():
        for pack in build_packs(sequences, max_tokens=PACK_TOKENS, min_shared=NEVER):
            attention = model.attention(pack)
            asked = {"input_ids": attention.input_ids, "position_ids": attention.position_ids}
            tag_P = model.causal(**asked, pack=attention, use_cache=False).logits[0].argmax(-1).cpu().numpy()
            for window, node in zip(pack.rows_S.tolist(), pack.nodes, strict=True):
                parts[window] = tag_P[node.start + len(begin) : node.stop - len(end)]
    found = [np.zeros(len(ids), np.int64) for ids in rows]
    for window, (number, start) in enumerate(windows):
        skipped = overlap // 2 if start else 0  # which the window before sees from further inside
        found[number][start + skipped : start + len(parts[window])] = parts[window][skipped:]
    return found
