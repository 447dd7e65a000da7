"""Token classification: a tag for each word, such as the names, places and dates of a sentence.

    loss = sum_w -log p(tag_w | text) / number of words,       p = softmax over the tags

A word is read at its first token in an encoder, which sees the whole text there, and at its last in a decoder, which has
seen the whole word and nothing behind it. Entities are runs of tags in BIO, BIOES or IO notation (Ramshaw & Marcus 1995).

Shapes: N words that are read, K tags.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field

from tunesmith.data.answers import Floats, Tags
from tunesmith.data.pack import Pack
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example, Sequence
from tunesmith.errors import DataError
from tunesmith.objectives.base import Loss, Readout, row_error
from tunesmith.objectives.headed import Calibration, Headed, known


class TokenClassification(Headed):
    """A tag for each word."""

    kind: Literal["token_classification"] = "token_classification"
    summary: ClassVar[str] = "a tag for each word, such as names and dates"
    metrics: ClassVar[tuple[str, ...]] = ("entity_f1", "tag_accuracy")
    baselines: ClassVar[tuple[str, ...]] = ("majority",)

    labels: tuple[str, ...] | None = Field(default=None, description="the tags; by default all that the rows have")

    @property
    def num_outputs(self) -> int:
        """One a tag."""
        return len(self.labels or ())

    def fitted(self, examples: Iterable[tuple[Example, bool]]) -> Self:
        """The tags of all rows."""
        if self.labels is not None:
            return self
        counts: Counter[str] = Counter()
        for example, _ in examples:
            counts.update(example.label if isinstance(example.label, tuple) else ())
        if len(counts) < 2:
            raise DataError(
                f"there are {len(counts)} tags in the rows",
                hint="give rows with words and tags: data.mapping: {words: COLUMN, tags: COLUMN}",
            )
        return self.model_copy(update={"labels": tuple(sorted(counts))})

    def read(self, examples: list[Example], *, template: ChatTemplate) -> list[list[Sequence]]:
        """The words with spaces between them, each read at one token."""
        tokenizer, found = template.tokenizer, []
        for example in examples:
            if not example.words:
                raise row_error(
                    example,
                    f"a row of the form '{example.form}' has no words with tags",
                    hint="map columns with data.mapping: {words: COLUMN, tags: COLUMN}",
                )
        for example, (ids, places) in zip(examples, tokenizer.encode_words([e.words for e in examples]), strict=True):
            tokens_T = np.array([*tokenizer.begin_ids, *ids, *tokenizer.end_ids], dtype=np.int32)
            weight_T = np.zeros(len(tokens_T), dtype=np.float32)
            weight_T[len(tokenizer.begin_ids) + self._read_at(example, places)] = 1
            found.append([Sequence(tokens_T, weight_T, values=np.zeros(0, np.float32))])
        return found

    def _read_at(self, example: Example, places: list[tuple[int, int]]) -> np.ndarray:
        """The token at which each word is read."""
        chosen = [first if self.pooling == "first" else last for first, last in places]
        for number, (word, place) in enumerate(zip(example.words, chosen, strict=True)):
            if place < 0 or (number and place == chosen[number - 1]):
                raise row_error(
                    example,
                    f"word {number + 1} ({word!r}) has no token of its own",
                    hint="take the word and its tag out, or set data.bad_rows: drop",
                )
        return np.array(chosen)

    def for_model(self, *, encoder: bool) -> Self:
        """`pooling` filled in."""
        return self.model_copy(update={"pooling": self.pooling or ("first" if encoder else "last")})

    def values(self, example: Example) -> list[float]:
        """Numbers of the words' tags."""
        assert self.labels is not None, "fitted fills them in"
        tags = example.label if isinstance(example.label, tuple) else ()
        if unknown := [tag for tag in tags if tag not in self.labels]:
            raise row_error(
                example, f"the tag {unknown[0]!r} is none of objective.labels", hint="add it, or mend the row"
            )
        return [float(self.labels.index(tag)) for tag in tags]

    def cut(self, sequences: list[Sequence], *, num_tokens: int) -> list[Sequence]:
        """Only the tags of words that are left."""
        short = super().cut(sequences, num_tokens=num_tokens)
        return [replace(s, values=s.values[: s.num_targets]) for s in short if s.values is not None]

    def row_weight(self, values: np.ndarray) -> float:
        """A row counts as many times as it has words."""
        return float(len(values))

    def loss(self, readout: Readout, pack: Pack) -> Loss:
        """Cross-entropy of the tags; with `accuracy` as a metric."""
        values = known(pack)
        tag_N = torch.from_numpy(np.concatenate(values).astype(np.int64)).to(readout.value.device)
        nll = torch.nn.functional.cross_entropy(readout.value, tag_N, reduction="sum")
        right = float((readout.value.detach().argmax(-1) == tag_N).sum())
        return Loss(nll, self.count(pack), {"accuracy": (right, float(len(tag_N)))})

    def by_row(self, readout: Readout, pack: Pack) -> tuple[torch.Tensor, np.ndarray]:
        """Every word's outputs."""
        return readout.value, pack.rows_S[pack.sequence_N]

    def calibrated(self, output_MK: Floats, values: list[np.ndarray]) -> Calibration:
        """Nothing: the likeliest tag is the answer."""
        return {}

    def predictions(self, output_MK: Floats, *, calibration: Calibration, counts: np.ndarray) -> Tags:
        """The likeliest tag of each word."""
        assert self.labels is not None
        names = np.array(self.labels)[output_MK.argmax(1)]
        return Tags(tuple(tuple(part.tolist()) for part in np.split(names, np.cumsum(counts)[:-1])))
