"""Instruction tuning: the assistant's turns, each up to and with its stop token, are predicted from what stands before.

    loss = sum_n -w_n log p(y_n | before)  /  sum_n w_n              (Ouyang et al. 2022, section 3.5, SFT)

What is trained comes from data/template.py. `w` is the turn's weight (the hosted format's `weight`), 1 by default: every
trained token counts alike, so a long answer weighs more than a short one, however rows are batched.
"""

from typing import ClassVar, Literal

from tunesmith.data.pack import Pack
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example, Sequence
from tunesmith.objectives.base import Loss, Objective, Readout, cross_entropy, row_error
from tunesmith.objectives.causal import Causal


class Instruction(Objective):
    """Answer as the examples' assistant turns do."""

    kind: Literal["instruction"] = "instruction"
    summary: ClassVar[str] = "answer as the examples' assistant turns do"
    replays: ClassVar[bool] = True

    def sequences(self, examples: list[Example], *, template: ChatTemplate, max_tokens: int) -> list[list[Sequence]]:
        """The rendered conversations; a row longer than `max_tokens` is returned whole and settled by the caller."""
        for example in examples:
            if not example.messages:
                labelled = example.label is not None
                found = f"of the form '{example.form}'" if labelled else "plain text"
                other = "classification" if labelled else "causal"
                raise row_error(
                    example,
                    f"objective 'instruction' trains on prompts and answers and this row is {found}",
                    hint=f"use objective: {other}, or map columns with data.mapping: {{prompt: COLUMN, completion: COLUMN}}",
                )
        return template.sequences(examples)

    def general_sequences(
        self, examples: list[Example], *, template: ChatTemplate, max_tokens: int
    ) -> list[list[Sequence]]:
        """As continued pre-training reads them."""
        return Causal().general_sequences(examples, template=template, max_tokens=max_tokens)

    def loss(self, readout: Readout, pack: Pack) -> Loss:
        """Negative log-likelihood of the trained turns."""
        return cross_entropy(readout, pack, count=self.count(pack))
