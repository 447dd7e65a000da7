"""Sequence to sequence: an encoder reads the prompt, and the answer is predicted from it token by token.

    loss = sum_n -w_n log p(y_n | source, y_<n)  /  sum_n w_n           (Sutskever et al. 2014, eq. 1; Raffel et al. 2020)

For encoder-decoders (T5, Flan-T5, mT5). What is read and what is trained comes from data/pairs.py; `w` is the answer's
weight, 1 by default, so every trained token counts alike however rows are batched.
"""

from typing import ClassVar, Literal

from tunesmith.data.pack import Pack
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example, Sequence
from tunesmith.objectives.base import Loss, Objective, Readout, cross_entropy, row_error


class Seq2seq(Objective):
    """Answer a prompt that an encoder reads."""

    kind: Literal["seq2seq"] = "seq2seq"
    summary: ClassVar[str] = "answer a prompt that an encoder reads, for encoder-decoders such as T5"
    reads_source: ClassVar[bool] = True

    def sequences(self, examples: list[Example], *, template: ChatTemplate, max_tokens: int) -> list[list[Sequence]]:
        """A source and a target a row; one longer than `max_tokens` is returned whole and settled by the caller."""
        for example in examples:
            if not example.messages:
                found = f"of the form '{example.form}'" if example.label is not None else "plain text"
                raise row_error(
                    example,
                    f"objective 'seq2seq' trains on prompts and answers and this row is {found}",
                    hint="map columns with data.mapping: {prompt: COLUMN, completion: COLUMN}",
                )
        return template.sequences(examples)

    def loss(self, readout: Readout, pack: Pack) -> Loss:
        """Negative log-likelihood of the answers."""
        return cross_entropy(readout, pack, count=self.count(pack))
