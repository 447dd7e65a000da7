"""Conversation -> token ids and what is trained in them, from the model's own chat template.

The mask comes from the difference of two renderings, never from marks in the template. For the assistant turn k,

    P_k = render(messages before k, with the generation prompt)      what the model will be given when it is used
    F_k = render(messages up to k)                                   what it should have written

F_k must begin with P_k; what follows, up to and with the stop token, is trained. Where the ids of a later turn's
rendering do not begin with those of an earlier one (templates that drop earlier reasoning, say), the turns become
sequences of their own, and the prefix tree stores what they share once. So the ids of every prompt, as rendered at
inference, are a prefix of what is trained: by construction, for every row.

Templates are data from strangers: they run in jinja2's immutable sandbox, with bounds on work and on output.
"""

import datetime
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tunesmith.data.sandbox import Sandbox, compile_template, render_bounded
from tunesmith.data.tokenizer import GUARDS, Tokenizer
from tunesmith.data.types import Example, Message, Sequence
from tunesmith.errors import TemplateError

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% elif not m.content[-1:].isspace() %}{{ '\\n' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as text for people and ids for the model."""

    text: str
    ids: list[int]


class ChatTemplate:
    """Renders conversations and says what is trained in them.

    `source` is a jinja2 chat template; without one, prompt and completion are joined as plain text and ended by the
    tokenizer's end-of-text token (`plain` is then true), and real conversations are refused. `today` is the date that a
    template may write (`strftime_now`); a run keeps the date of its training, so that what is served is what was trained.
    """

    def __init__(self, tokenizer: Tokenizer, *, source: str | None = None, today: datetime.date | None = None):
        self.tokenizer = tokenizer
        found = source if source is not None else tokenizer.chat_template
        self.plain = found is None
        self.source = PLAIN_TEMPLATE if found is None else found
        self.today = datetime.date.today() if today is None else today
        self._sandbox = Sandbox(today=self.today)
        self._template = compile_template(self._sandbox, self.source)
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        self._names = {name: tokenizer.special_text(name) for name in names}

    @property
    def identity(self) -> str:
        """What decides how conversations are rendered: the source, and the date where it is written."""
        return self.source + (self.today.isoformat() if "strftime_now" in self.source else "")

    def render(
        self, messages: list[dict[str, Any]], *, tools: list[dict[str, Any]] | None = None, generation_prompt: bool
    ) -> str:
        """The conversation as text; raises TemplateError where the template refuses it or breaks its bounds."""
        names = {"messages": messages, "tools": tools or None, "add_generation_prompt": generation_prompt}
        text = render_bounded(self._sandbox, self._template, names | self._names)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise TemplateError(
                "the text holds half of a surrogate pair, which is no character", hint="mend the text"
            ) from None
        return text

    def prompt(self, messages: list[Message], *, tools: tuple[dict[str, Any], ...] = ()) -> RenderedPrompt:
        """What the model is given to answer after `messages`: the same ids as in training."""
        guard = self._guard(messages, tools)
        text = self.render(
            self._guarded(messages, guard), tools=self._guard_value(list(tools), guard), generation_prompt=True
        )
        ids = self.tokenizer.encode_rendered([text], guard=guard)[0]
        return RenderedPrompt(text.replace(guard, "") if guard else text, ids)

    def sequences(self, examples: list[Example]) -> list[list[Sequence]]:
        """One list of sequences for each conversation; raises TemplateError naming the row that cannot be masked."""
        jobs = [self._turns(example) for example in examples]
        batch = [text for turns in jobs for turn in turns if turn.guard is None for text in (turn.prompt, turn.full)]
        encoded = iter(self.tokenizer.encode_rendered(batch))
        result = []
        for example, turns in zip(examples, jobs, strict=True):
            sequences: list[tuple[list[int], list[float]]] = []
            for turn in turns:
                if turn.guard is None:
                    prompt, full = next(encoded), next(encoded)
                else:
                    prompt, full = self.tokenizer.encode_rendered([turn.prompt, turn.full], guard=turn.guard)
                self._add_turn(sequences, turn, prompt, full, example)
            result.append(
                [
                    Sequence(np.array(ids, dtype=np.int32), np.array(weights, dtype=np.float32))
                    for ids, weights in sequences
                ]
            )
        return result

    def _add_turn(
        self,
        sequences: list[tuple[list[int], list[float]]],
        turn: "_Turn",
        prompt: list[int],
        full: list[int],
        example: Example,
    ) -> None:
        """Append what turn k trains to the last sequence where its ids go on from there, else start a new one."""
        if full[: len(prompt)] != prompt:  # a token straddles the border: the prompt's ids are what inference will see
            rest = turn.full[len(turn.prompt) :]
            apart = prompt + self.tokenizer.encode_rendered([rest], guard=turn.guard)[0]
            if self.tokenizer.decode(apart) != self.tokenizer.decode(full):
                raise TemplateError(
                    "prompt and answer cannot be told apart in tokens",
                    file=example.origin.file,
                    line=example.origin.line,
                    hint="let the chat template write a special token or white space between prompt and answer",
                )
            full = apart
        end = self._end_of_turn(full, start=len(prompt))
        if end is None:
            raise TemplateError(
                "the assistant turn ends without a special token, so the model would never learn to stop",
                file=example.origin.file,
                line=example.origin.line,
                hint="let the chat template write {{ eos_token }} or an end-of-turn token after each assistant turn",
            )
        full = full[: end + 1]
        weights = [0.0] * len(prompt) + [turn.weight] * (len(full) - len(prompt))
        if sequences and full[: len(sequences[-1][0])] == sequences[-1][0]:
            ids, before = sequences[-1]
            if len(prompt) >= len(ids):
                sequences[-1] = (full, before + weights[len(ids) :])
                return
        sequences.append((full, weights))

    def _end_of_turn(self, ids: list[int], *, start: int) -> int | None:
        """Where the turn that begins at `start` ends: the turn-ending token among the specials that close it.

        A template may write more after it (white space, an end-of-text token), and special tokens may belong to the
        answer itself (tool calls), so the one that closes a plain answer is looked for first.
        """
        closing = self._closing_specials(ids, start=start)
        if not closing:
            return None
        return next((i for i in closing if ids[i] == self._turn_end), closing[-1])

    def _closing_specials(self, ids: list[int], *, start: int) -> list[int]:
        """Positions of the special tokens at the end that only white space stands between."""
        special = set(self.tokenizer.special_ids.values())
        found: list[int] = []
        text: list[int] = []
        for i in range(len(ids) - 1, start - 1, -1):
            if ids[i] in special:
                if self.tokenizer.decode(text).strip():
                    break
                found, text = [i, *found], []
            else:
                text = [ids[i], *text]
        return found if found else []

    @cached_property
    def _turn_end(self) -> int | None:
        """The token right after a plain answer; None where the template refuses a plain conversation."""
        shown = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
        try:
            prompt = self.render(shown[:1], generation_prompt=True)
            full = self.render(shown, generation_prompt=False)
        except TemplateError:
            return None
        prompt_ids, full_ids = self.tokenizer.encode_rendered([prompt, full])
        closing = self._closing_specials(full_ids, start=len(prompt_ids))
        return full_ids[closing[0]] if closing else None

    def stop_ids(self) -> list[int]:
        """The tokens that end an assistant turn: what generation stops at."""
        eos = self.tokenizer.token_id("eos_token")
        return sorted({i for i in (self._turn_end, eos) if i is not None})

    def _turns(self, example: Example) -> list["_Turn"]:
        """P_k and F_k of every trained assistant turn, special-looking text guarded."""
        messages = list(example.messages)
        if self.plain and (
            len([m for m in messages if m.role == "assistant"]) > 1 or any(m.role == "tool" for m in messages)
        ):
            raise TemplateError(
                "the base has no chat template, so it cannot take a conversation of several turns",
                file=example.origin.file,
                line=example.origin.line,
                hint="give one in the recipe: data.template: FILE.jinja",
            )
        turns = []
        try:
            guard = self._guard(messages, example.tools)
            shown = self._guarded(messages, guard)
            tools = self._guard_value(list(example.tools), guard)
            for k, message in enumerate(messages):
                if message.role != "assistant" or message.weight == 0:
                    continue
                prompt = self.render(shown[:k], tools=tools, generation_prompt=True)
                full = self.render(shown[: k + 1], tools=tools, generation_prompt=False)
                if not full.startswith(prompt):
                    raise TemplateError(
                        "the rendered answer does not begin with the rendered prompt, so what is trained cannot be told",
                        hint="the template must write the same text before an answer with add_generation_prompt as without",
                    )
                turns.append(_Turn(prompt, full, float(message.weight), guard))
        except TemplateError as error:
            raise TemplateError(
                error.message, hint=error.hint, file=example.origin.file, line=example.origin.line
            ) from error
        return turns

    def _guard(self, messages: list[Message], tools: tuple[dict[str, Any], ...]) -> str | None:
        """A guard character if any text reads like a special token, else None."""
        text = "\n".join(m.content for m in messages)
        if any(m.extra for m in messages) or tools:
            text += json.dumps([[m.extra for m in messages], tools], ensure_ascii=False, default=str)
        if not self.tokenizer.looks_special(text):
            return None
        guard = next((guard for guard in GUARDS if guard not in text), None)
        if guard is None:
            raise TemplateError(
                "the text holds every Unicode noncharacter", hint="take these characters out of the row"
            )
        return guard

    def _guarded(self, messages: list[Message], guard: str | None) -> list[dict[str, Any]]:
        return [self._guard_value(message.as_dict(), guard) for message in messages]

    def _guard_value(self, value: Any, guard: str | None) -> Any:
        if guard is None:
            return value
        if isinstance(value, str):
            return self.tokenizer.guarded(value, guard=guard)
        if isinstance(value, dict):
            return {k: self._guard_value(v, guard) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._guard_value(v, guard) for v in value]
        return value


@dataclass(frozen=True, slots=True)
class _Turn:
    prompt: str
    full: str
    weight: float
    guard: str | None
