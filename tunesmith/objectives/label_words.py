"""Classification in the model's own words: the class is the one whose name is the likeliest answer to the prompt.

    z_k = log p(name_k <stop> | prompt(x)),    p = softmax(z),    loss = sum_s -u_s log p(y_s | x_s) / sum_s u_s

This is PET (Schick & Schuetze 2021, section 3.1) with each class's own name, of any number of tokens, as its verbaliser; the
names of all classes are scored, so nothing else can come out. There is no head: nothing starts from zero, and the model
still writes text. Class weights, hierarchies, calibration and not knowing are those of classification.py. The K answers of
a row share its prompt, which is computed once.

Shapes: B rows, S sequences, N targets, K classes.
"""

from dataclasses import replace
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.pack import Pack
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example, Message, Origin, Sequence
from tunesmith.errors import RecipeError
from tunesmith.objectives.base import Objective, Readout
from tunesmith.objectives.classification import Classification
from tunesmith.objectives.headed import no_text

ASKED = Message("user", "?")  # how a class is written does not depend on what is asked


class LabelWords(Classification):
    """A class of a text, answered in words."""

    kind: Literal["label_words"] = "label_words"  # type: ignore[assignment]
    summary: ClassVar[str] = "a class of a text, told by the likelihood of its name as the answer; no head"
    whole_units: ClassVar[bool] = True
    idle: ClassVar[tuple[str, ...]] = ("several", "pooling", "head_rate_factor")

    @property
    def num_outputs(self) -> int:
        """None: it reads log-probabilities of words."""
        return 0

    def rate_factors(self) -> dict[str, float]:
        """None: nothing of its own is trained."""
        return {}

    def for_model(self, *, encoder: bool) -> Self:
        """As it is. RecipeError for an encoder, which speaks no words."""
        return Objective.for_model(self, encoder=encoder)

    def read(self, examples: list[Example], *, template: ChatTemplate) -> list[list[Sequence]]:
        """For each row its prompt with the name of every class behind it."""
        assert self.labels is not None, "fitted fills them in"
        names = names_of(self.labels, template=template)
        written = {name_T.tobytes(): label for label, name_T in zip(self.labels, names, strict=True)}
        for label, name_T in zip(self.labels, names, strict=True):
            if (other := written[name_T.tobytes()]) != label:
                raise RecipeError(
                    f"the classes {label!r} and {other!r} are the same answer in the base's tokens",
                    hint="rename one of them, or use objective: classification",
                )
        return [choices(prompt_of(in_words(e), template=template), names=names) for e in examples]

    def cut(self, sequences: list[Sequence], *, num_tokens: int) -> list[Sequence]:
        """The names stay whole and behind one prompt, which loses what stands before its last token."""
        over = max(s.num_tokens for s in sequences) - num_tokens
        if over <= 0:
            return sequences
        start = len(sequences[0].tokens_T) - sequences[0].num_targets
        if over >= start:
            return []
        kept = [*range(start - 1 - over), start - 1]
        return [
            replace(
                s,
                tokens_T=np.concatenate([s.tokens_T[kept], s.tokens_T[start:]]),
                weight_T=np.concatenate([s.weight_T[kept], s.weight_T[start:]]),
            )
            for s in sequences
        ]

    def by_row(self, readout: Readout, pack: Pack) -> tuple[Tensor, np.ndarray]:
        """z [B, K], and the number of each row."""
        assert pack.choice_S is not None
        assert self.labels is not None
        z_S = readout.value.new_zeros(readout.num_sequences).index_add(0, readout.sequence_N, readout.value)
        order_BK = np.lexsort((pack.choice_S, pack.rows_S)).reshape(-1, len(self.labels))
        assert (pack.choice_S[order_BK] == np.arange(len(self.labels))).all(), "a pack holds all answers of its rows"
        return z_S[torch.from_numpy(order_BK).to(z_S.device)], pack.rows_S[order_BK[:, 0]]


def in_words(example: Example) -> Example:
    """A text as a conversation in which the assistant answers with its class; with nothing where none is known."""
    if example.messages:
        return example
    if example.text is None:
        raise no_text(example)
    label = example.label or ""
    answer = label if isinstance(label, str) else ", ".join(label)
    return Example(example.origin, "prompt_completion", (Message("user", example.text), Message("assistant", answer)))


def prompt_of(example: Example, *, template: ChatTemplate) -> list[int]:
    """Token ids of what is asked in a conversation."""
    return template.prompt(list(example.asked[0]), tools=example.tools).ids


def names_of(labels: tuple[str, ...], *, template: ChatTemplate) -> list[np.ndarray]:
    """Token ids of each class's name as the assistant's turn, with the token that ends it."""
    start = len(template.prompt([ASKED]).ids)
    answers = [Example(Origin("class", 1), "chat", (ASKED, Message("assistant", label))) for label in labels]
    return [sequences[-1].tokens_T[start:] for sequences in template.sequences(answers)]


def choices(prompt: list[int], *, names: list[np.ndarray]) -> list[Sequence]:
    """The answers to one prompt, each name's tokens trained."""
    prompt_T = np.array(prompt, dtype=np.int32)
    return [
        Sequence(
            np.concatenate([prompt_T, name_T]),
            (np.arange(len(prompt_T) + len(name_T)) >= len(prompt_T)).astype(np.float32),
            choice=k,
        )
        for k, name_T in enumerate(names)
    ]
