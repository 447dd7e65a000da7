"""Conversation -> what an encoder reads and what a decoder writes, for encoder-decoders.

    source = ids(prompt) </s>                  target = <start> ids(answer) </s>

A prompt is one user turn, with system text before it where there is some. Both sides are ids of their own, so no token can
straddle the border between them. The same function makes the source in training, in evaluation and in use; a chat template
may write it (`data.template`), otherwise it is the text itself, as T5 has it (Raffel et al. 2020, section 2.4).
"""

import datetime

import numpy as np

from tunesmith.data.template import ChatTemplate, RenderedPrompt
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.types import Example, Message, Sequence
from tunesmith.errors import TemplateError

SOURCE_TEMPLATE = (
    "{% for m in messages %}{{ m.content }}"
    "{% if not loop.last and not m.content[-1:].isspace() %}{{ '\\n' }}{% endif %}{% endfor %}"
)


class PairTemplate(ChatTemplate):
    """Renders a prompt for an encoder and an answer for a decoder, whose first token is `start_id`."""

    def __init__(
        self, tokenizer: Tokenizer, *, start_id: int, source: str | None = None, today: datetime.date | None = None
    ):
        source = source if source is not None else tokenizer.chat_template
        super().__init__(tokenizer, source=SOURCE_TEMPLATE if source is None else source, today=today)
        self.plain, self.start_id = True, start_id

    @property
    def identity(self) -> str:
        """The source's template, and what the target begins with."""
        return f"{self.start_id} {super().identity}"

    def prompt(self, messages: list[Message], *, tools: tuple[dict[str, object], ...] = ()) -> RenderedPrompt:
        """What the encoder is given to answer `messages`: the same ids as in training."""
        _check(messages, tools)
        return self._sources([self._written(messages)])[0]

    def sequences(self, examples: list[Example]) -> list[list[Sequence]]:
        """One sequence for each row; raises TemplateError naming the row that is no prompt with one answer."""
        written, answers = [], []
        for example in examples:
            try:
                *messages, answer = _pair(example)
                written.append(self._written(messages))
            except TemplateError as error:
                file, line = example.origin
                raise TemplateError(error.message, hint=error.hint, file=file, line=line) from error
            answers.append(answer)
        sources = self._sources(written)
        targets = self.tokenizer.encode_text([answer.content for answer in answers])
        return [
            [self._sequence(source.ids, ids, weight=answer.weight)]
            for source, ids, answer in zip(sources, targets, answers, strict=True)
        ]

    def stop_ids(self) -> list[int]:
        """The token that ends an answer."""
        return [self.tokenizer.eos_id]

    def _sequence(self, source: list[int], answer: list[int], *, weight: float) -> Sequence:
        tokens_T = np.array([self.start_id, *answer, self.tokenizer.eos_id], dtype=np.int32)
        weight_T = np.full(len(tokens_T), weight, dtype=np.float32)
        weight_T[0] = 0
        return Sequence(tokens_T, weight_T, encoder_T=np.array(source, dtype=np.int32))

    def _written(self, messages: list[Message]) -> tuple[str, str | None]:
        """The source as text, and the guard before what in it only looks special."""
        guard = self._guard(messages, ())
        return self.render(self._guarded(messages, guard), generation_prompt=True), guard

    def _sources(self, written: list[tuple[str, str | None]]) -> list[RenderedPrompt]:
        """Text and ids of what the encoder reads."""
        together = iter(self.tokenizer.encode_rendered([text for text, guard in written if guard is None]))
        eos = self.tokenizer.eos_id
        found = []
        for text, guard in written:
            ids = next(together) if guard is None else self.tokenizer.encode_rendered([text], guard=guard)[0]
            shown = text if guard is None else text.replace(guard, "")
            found.append(RenderedPrompt(shown, ids if ids[-1:] == [eos] else [*ids, eos]))
        return found


def _pair(example: Example) -> list[Message]:
    """The prompt's messages and the answer. TemplateError where the row is something else."""
    messages, answer = example.asked
    _check(list(messages), example.tools)
    if answer.extra:
        raise TemplateError("the answer calls a tool, and an encoder-decoder answers in plain text", hint=OTHER_BASE)
    return [*messages, answer]


OTHER_BASE = "use a decoder as base, with objective: instruction"


def _check(messages: list[Message], tools: tuple[dict[str, object], ...]) -> None:
    """TemplateError unless it is one user turn, with system text before it or without."""
    roles = [m.role for m in messages]
    if tools or any(m.extra for m in messages) or "tool" in roles:
        raise TemplateError("the row has tools, and an encoder-decoder answers in plain text", hint=OTHER_BASE)
    if roles not in (["user"], ["system", "user"]):
        turns = sum(role in ("user", "assistant") for role in roles)
        found = f"{turns} turns" if turns > 1 else " and ".join(roles) or "nothing"
        raise TemplateError(
            f"an encoder-decoder answers one user turn (with system text before it), and before the answer stands {found}",
            hint=f"make a row of each question with its answer, or {OTHER_BASE}",
        )
