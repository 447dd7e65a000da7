"""Conversations to ids and masks, against transformers' own rendering and against what each template is known to write."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenizer import GUARDS, Tokenizer
from tunesmith.data.types import Example, Message, Origin, Sequence
from tunesmith.errors import TemplateError

REPOSITORY = Path(__file__).resolve().parents[2]
STARTER = REPOSITORY / "recipes" / "starter" / "tokenizer"
DIRTY = REPOSITORY / ".." / "shared" / "data" / "dirty" / "special_tokens.jsonl"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3: reasoning is kept in the turns after the last question and dropped from earlier ones; tools are listed first.
THINKING = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- "# Tools\n\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string %}
        {%- set ns.searching = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\n' }}
                {%- endif %}
                {%- set call = tool_call.function if tool_call.function else tool_call %}
                {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
                {{- call.arguments if call.arguments is string else call.arguments | tojson }}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
    "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI_3 = (  # the end-of-text token behind a finished conversation is not what ends a turn
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == "
    "'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
MARKED = (  # as SmolLM3: what the assistant wrote stands between generation tags
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}"
    "{{ '<|im_start|>assistant\n' + message.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"


@dataclass(frozen=True)
class Family:
    """A template, its special tokens, and what it makes of an answer: the text that is to be trained."""

    template: str
    special: tuple[str, ...]
    eos: str
    trained: Callable[[str], str]
    bos: str | None = None
    system: bool = True


FAMILIES = {
    "chatml": Family(CHATML, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>", lambda a: f"{a}<|im_end|>"),
    "thinking": Family(
        THINKING,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        lambda a: "<think>\n\n</think>\n\n" + a.lstrip("\n") + "<|im_end|>",
    ),
    "llama 3": Family(
        LLAMA_3,
        ("<|begin_of_text|>", "<|end_of_text|>", *HEADERS),
        "<|eot_id|>",
        lambda a: f"{a.strip()}<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    "llama 2": Family(LLAMA_2, ("<unk>", "<s>", "</s>"), "</s>", lambda a: f" {a.strip()} </s>", bos="<s>"),
    "gemma": Family(
        GEMMA,
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        lambda a: f"{a.strip()}<end_of_turn>",
        bos="<bos>",
        system=False,
    ),
    "phi 3": Family(
        PHI_3, ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|endoftext|>", lambda a: f"{a}<|end|>"
    ),
    "marked": Family(MARKED, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>", lambda a: f"{a}<|im_end|>"),
}  # fmt: skip


@dataclass(frozen=True)
class Rig:
    """A family's template in our hands and in those of transformers."""

    family: Family
    ours: ChatTemplate
    theirs: Any

    def their_ids(self, messages: list[Message], *, prompt: bool, tools: Any = None) -> list[int]:
        shown = [m.as_dict() for m in messages]
        return self.theirs.apply_chat_template(
            shown, tools=tools, add_generation_prompt=prompt, tokenize=True, return_dict=False
        )

    @property
    def special(self) -> dict[int, str]:
        return {i: name for name, i in self.ours.tokenizer.special_ids.items()}

    def special_ids(self, text: str) -> list[int]:
        return [i for i in self.ours.tokenizer.encode_rendered([text])[0] if i in self.special]

    def text(self, ids: Any) -> str:
        return self.ours.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def trained_runs(self, sequence: Sequence) -> list[list[int]]:
        """The runs of trained tokens."""
        runs: list[list[int]] = []
        before = 0.0
        for token, weight in zip(sequence.tokens_T.tolist(), sequence.weight_T.tolist(), strict=True):
            if weight and not before:
                runs.append([])
            if weight:
                runs[-1].append(token)
            before = weight
        return runs


@pytest.fixture(scope="module")
def rigs(make_tokenizer_folder: Callable[..., Path]) -> dict[str, Rig]:
    from transformers import AutoTokenizer

    made = {}
    for name, family in FAMILIES.items():
        folder = make_tokenizer_folder(family.special, template=family.template, bos=family.bos, eos=family.eos)
        made[name] = Rig(family, ChatTemplate(Tokenizer.from_folder(folder)), AutoTokenizer.from_pretrained(folder))
    starter = Family("", (), "<|end|>", lambda a: f"{a}<|end|>")
    made["starter"] = Rig(starter, ChatTemplate(Tokenizer.from_folder(STARTER)), AutoTokenizer.from_pretrained(STARTER))
    return made


ALL = [*FAMILIES, "starter"]


def chat(*turns: tuple[str, str] | tuple[str, str, float], tools: tuple[dict[str, Any], ...] = ()) -> Example:
    return Example(Origin("rows.jsonl", 7), "chat", tuple(Message(*turn) for turn in turns), tools=tools)


def conversations(rig: Rig) -> list[Example]:
    system = [("system", "Be brief. ")] if rig.family.system else []
    return [
        chat(("user", "What is 2 + 2?"), ("assistant", "4")),
        chat(*system, ("user", " Grüße aus\nZürich 👋 "), ("assistant", "Hallo\nzurück")),
        chat(
            *system,
            ("user", "a"),
            ("assistant", "b c"),
            ("user", "d"),
            ("assistant", "e"),
            ("user", "f"),
            ("assistant", "g"),
        ),
    ]


def answers(example: Example) -> list[tuple[int, Message]]:
    return [(k, m) for k, m in enumerate(example.messages) if m.role == "assistant" and m.weight]


@pytest.mark.parametrize("name", ALL)
def test_ids_are_those_of_transformers(rigs: dict[str, Rig], name: str) -> None:
    rig = rigs[name]
    for example in conversations(rig):
        messages = list(example.messages)
        sequences = [s.tokens_T.tolist() for s in rig.ours.sequences([example])[0]]
        for k, message in answers(example):
            prompt = rig.their_ids(messages[:k], prompt=True)
            full = rig.their_ids(messages[: k + 1], prompt=False)
            assert rig.ours.prompt(messages[:k]).ids == prompt
            stop = rig.special_ids(rig.family.trained(message.content))[-1]
            turn = full[: full.index(stop, len(prompt)) + 1]
            assert turn[: len(prompt)] == prompt
            assert any(ids[: len(turn)] == turn for ids in sequences)


@pytest.mark.parametrize("name", ALL)
def test_the_answers_are_trained_with_one_stop_token_each_and_nothing_else(rigs: dict[str, Rig], name: str) -> None:
    rig = rigs[name]
    for example in conversations(rig):
        sequences = rig.ours.sequences([example])[0]
        runs = [run for s in sequences for run in rig.trained_runs(s)]
        expected = [rig.family.trained(m.content) for _, m in answers(example)]
        assert [rig.text(run) for run in runs] == expected
        for run in runs:
            assert [i for i in run if i in rig.special] == run[-1:]
        turns_apart = name == "thinking"  # what was reasoned in earlier turns is not shown to later ones
        assert len(sequences) == (len(runs) if turns_apart else 1)


@pytest.mark.parametrize("name", ALL)
def test_weights_are_those_of_the_turns(rigs: dict[str, Rig], name: str) -> None:
    rig = rigs[name]
    turns = [("user", "a"), ("assistant", "b", 0.0), ("user", "c"), ("assistant", "d", 0.5)]
    sequences = rig.ours.sequences([chat(*turns), chat(*turns[:2])])
    (sequence,) = sequences[0]
    (run,) = rig.trained_runs(sequence)
    assert rig.text(run) == rig.family.trained("d")
    assert set(sequence.weight_T.tolist()) == {0.0, 0.5}
    messages = [Message(*turn) for turn in turns]
    assert sequence.tokens_T.tolist() == [*rig.their_ids(messages[:3], prompt=True), *run]
    assert sequences[1] == []


STOPS = {
    "chatml": {"<|im_end|>"},
    "thinking": {"<|im_end|>"},
    "llama 3": {"<|eot_id|>"},
    "llama 2": {"</s>"},
    "gemma": {"<end_of_turn>", "<eos>"},
    "phi 3": {"<|end|>", "<|endoftext|>"},
    "marked": {"<|im_end|>"},
    "starter": {"<|end|>"},
}


@pytest.mark.parametrize("name", ALL)
def test_generation_stops_at_what_was_trained_to_stop(rigs: dict[str, Rig], name: str) -> None:
    rig = rigs[name]
    assert {rig.special[i] for i in rig.ours.stop_ids()} == STOPS[name]
    for example in conversations(rig):
        for sequence in rig.ours.sequences([example])[0]:
            assert sequence.tokens_T[-1] in rig.ours.stop_ids()


# Text that reads like special tokens


def structure(rig: Rig, example: Example) -> list[list[int]]:
    """The special tokens of each of the example's sequences."""
    return [[i for i in s.tokens_T.tolist() if i in rig.special] for s in rig.ours.sequences([example])[0]]


def check_stays_text(rig: Rig, turns: list[tuple[str, str]]) -> None:
    """Special tokens are those of the same conversation about nothing; the text is what transformers renders."""
    example, harmless = chat(*turns), chat(*[(role, "x") for role, _ in turns])
    assert structure(rig, example) == structure(rig, harmless)
    messages = list(example.messages)
    sequences = rig.ours.sequences([example])[0]
    for k, _ in answers(example):
        prompt = rig.ours.prompt(messages[:k])
        rendered = rig.theirs.apply_chat_template(
            [m.as_dict() for m in messages[: k + 1]], tokenize=False, add_generation_prompt=False
        )
        assert rendered.startswith(prompt.text)
        assert rig.text(prompt.ids) == prompt.text
        turn = prompt.text + rig.family.trained(messages[k].content)
        assert rendered.startswith(turn)
        held = [s for s in sequences if s.tokens_T[: len(prompt.ids)].tolist() == prompt.ids]
        assert any(rig.text(s.tokens_T).startswith(turn) for s in held)


@pytest.mark.parametrize("name", ALL)
def test_special_looking_text_stays_text(rigs: dict[str, Rig], name: str) -> None:
    rig = rigs[name]
    names = sorted({token for family in FAMILIES.values() for token in family.special})
    pieces = st.sampled_from(
        [*names, *rig.special.values(), "<|", "|>", "im_end", "[INST]", "{{ 1 }}", " ", "\n", "é", "word"]
    )
    text = st.lists(pieces, min_size=1, max_size=5).map("".join)

    @settings(max_examples=25, deadline=None, database=None)
    @given(st.lists(text, min_size=1, max_size=2), st.lists(text, min_size=2, max_size=2))
    def check(questions: list[str], replies: list[str]) -> None:
        turns = []
        for question, reply in zip(questions, replies, strict=False):
            turns += [("user", question), ("assistant", reply)]
        check_stays_text(rig, turns)

    check()


@pytest.mark.skipif(not DIRTY.is_file(), reason="shared/data/dirty is absent")
@pytest.mark.parametrize("name", ALL)
def test_collected_rows_with_special_looking_text(rigs: dict[str, Rig], name: str) -> None:
    rows = [json.loads(line)["messages"] for line in DIRTY.read_text("utf-8").splitlines()]
    assert len(rows) == 8
    for row in rows:
        check_stays_text(rigs[name], [(m["role"], m["content"]) for m in row])


def test_every_noncharacter_in_a_row_is_refused_and_some_are_kept(rigs: dict[str, Rig]) -> None:
    rig = rigs["chatml"]
    check_stays_text(rig, [("user", f"<|im_end|>{GUARDS[:-1]}"), ("assistant", "x")])
    check_stays_text(rig, [("user", GUARDS), ("assistant", "x")])
    with pytest.raises(TemplateError, match="noncharacter") as error:
        rig.ours.sequences([chat(("user", f"<|im_end|>{GUARDS}"), ("assistant", "x"))])
    assert (error.value.file, error.value.line) == ("rows.jsonl", 7)


# Prompts are prefixes, however tokens fall


SPACED = "{% for m in messages %}{{ m.content }}{{ ' ' if m.role == 'user' else eos_token }}{% endfor %}"


@settings(max_examples=60, deadline=None)
@given(st.text("ab \n'9é", min_size=1, max_size=8), st.text("ab \n'9é", min_size=1, max_size=8))
def test_a_token_across_the_border_does_not_break_the_prompt(question: str, reply: str) -> None:
    tokenizer = Tokenizer.from_folder(STARTER)
    template = ChatTemplate(tokenizer, source=SPACED)
    (sequence,) = template.sequences([chat(("user", question), ("assistant", reply))])[0]
    prompt = template.prompt([Message("user", question)])
    ids, trained = sequence.tokens_T.tolist(), sequence.weight_T > 0
    assert ids[: len(prompt.ids)] == prompt.ids
    assert trained.tolist() == [False] * len(prompt.ids) + [True] * (len(ids) - len(prompt.ids))
    assert tokenizer.decode(ids[len(prompt.ids) :], skip_special_tokens=False) == f"{reply}<|end|>"


def test_a_tokenizer_that_puts_a_space_before_text_puts_none_inside_the_answer() -> None:
    folder = REPOSITORY / ".." / "shared" / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip("shared/models is absent")
    tokenizer = Tokenizer.from_folder(folder)
    template = ChatTemplate(tokenizer, source=SPACED)
    prompt = template.prompt([Message("user", "Once upon a")])
    try:
        (sequence,) = template.sequences([chat(("user", "Once upon a"), ("assistant", "time"))])[0]
    except TemplateError as error:  # exact or refused, never an answer with a space too many
        assert "told apart" in error.message
    else:
        assert sequence.tokens_T[: len(prompt.ids)].tolist() == prompt.ids
        assert tokenizer.decode(sequence.tokens_T.tolist()) == "Once upon a time"


def test_many_rows_at_once_give_what_each_gives_alone(rigs: dict[str, Rig]) -> None:
    rig = rigs["chatml"]
    examples = conversations(rig) + [chat(("user", "<|im_end|>"), ("assistant", "no <|im_start|>"))]
    examples = examples[::-1] + examples
    together = rig.ours.sequences(examples)
    assert len(together) == len(examples)
    for example, sequences in zip(examples, together, strict=True):
        alone = rig.ours.sequences([example])[0]
        assert [(s.tokens_T.tolist(), s.weight_T.tolist()) for s in sequences] == [
            (s.tokens_T.tolist(), s.weight_T.tolist()) for s in alone
        ]


# Tools


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"b": {"é": 1}, "a": [1, 2]}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1, "y": [2]}}}


def test_tool_calls_are_trained_and_tools_are_shown(rigs: dict[str, Rig]) -> None:
    rig = rigs["thinking"]
    messages = (
        Message("user", "1 + 2?"),
        Message("assistant", "", extra={"tool_calls": [CALL]}),
        Message("tool", "3"),
        Message("assistant", "Three."),
    )
    example = Example(Origin("rows.jsonl", 7), "chat", messages, tools=(TOOL,))
    sequences = rig.ours.sequences([example])[0]
    call = (
        '<think>\n\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"x": 1, "y": [2]}}\n</tool_call><|im_end|>'
    )
    texts = [rig.text(run) for s in sequences for run in rig.trained_runs(s)]
    assert texts == [call, "<think>\n\n</think>\n\nThree.<|im_end|>"]
    for k in (1, 3):
        prompt = rig.ours.prompt(list(messages[:k]), tools=(TOOL,)).ids
        assert prompt == rig.their_ids(list(messages[:k]), prompt=True, tools=[TOOL])
        assert any(s.tokens_T[: len(prompt)].tolist() == prompt for s in sequences)


def test_special_tokens_that_belong_to_an_answer_do_not_end_it(make_tokenizer_folder: Callable[..., Path]) -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
        "{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    special = ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")
    tokenizer = Tokenizer.from_folder(make_tokenizer_folder(special, template=source, eos="<|im_end|>"))
    messages = (Message("user", "1 + 2?"), Message("assistant", "Look: ", extra={"tool_calls": [CALL, CALL]}))
    template = ChatTemplate(tokenizer)
    (sequence,) = template.sequences([Example(Origin("f", 1), "chat", messages)])[0]
    trained = tokenizer.decode(sequence.tokens_T[sequence.weight_T > 0].tolist(), skip_special_tokens=False)
    call = '<tool_call>{"name": "add", "arguments": {"x": 1, "y": [2]}}</tool_call>'
    assert trained == f"Look: {call}{call}<|im_end|>"
    assert template.stop_ids() == [tokenizer.special_ids["<|im_end|>"]]


# What jinja2 templates of real models use


USES = {
    "json": "{{ tools | tojson }}{{ tools | tojson(indent=4) }}{{ tools | tojson(separators=(',', ':'), sort_keys=true) }}"
    "{{ messages[0].content | tojson(ensure_ascii=true) }}",
    "loops": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ loop.index0 }}{{ loop.revindex }}"
    "{{ loop.previtem.role }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "filters": "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role', 'equalto', 'user') | list "
    "| length }}{{ (messages | last).content | upper | replace('A', 'b') | default('x') }}{{ messages[0] | items | list }}",
    "strings": "{{ ('a b'.split(' ') | last) ~ 1 ~ none ~ messages[0].content.strip().startswith('h') }}"
    "{{ messages[0]['content'][:2] + 'x'.rstrip('x').title() }}{{ messages[0].missing is defined }}{{ messages[0].missing }}",
    "state": "{% set ns = namespace(a=0, b='') %}{% for m in messages %}{% set ns.a = ns.a + 2 * loop.index %}"
    "{% set ns.b = ns.b + m.role[0] %}{% endfor %}{{ ns.a }}{{ ns.b }}{{ 7 // 2 }}{{ 7 % 4 }}{{ dict(a=1)['a'] }}",
    "macros": "{% macro turn(m, last=false) %}<{{ m.role }}>{{ m.content }}{% if last %}!{% endif %}{% endmacro %}"
    "{% set body %}{% for m in messages %}{{ turn(m, last=loop.last) }}{% endfor %}{% endset %}{{ body | trim }}",
    "white space": "  {% if true %}  \n  a\n  {%- endif %}\n\n{{- ' b ' -}}\n\n  c  \n",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "tools are none": "{% if tools is none or not tools %}none{% else %}{{ tools | length }}{% endif %}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{% if pad_token is defined and pad_token %}{{ pad_token }}{% endif %}",
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["no tools", "tools"])
def test_what_templates_use_is_rendered_as_transformers_renders_it(
    rigs: dict[str, Rig], use: str, tools: list[Any] | None
) -> None:
    rig = rigs["llama 3"]
    messages = [
        {"role": r, "content": c}
        for r, c in (("system", " héllo "), ("user", "A b"), ("assistant", "c"), ("user", "d"))
    ]
    theirs = rig.theirs.apply_chat_template(messages, tools=tools, chat_template=USES[use], tokenize=False)
    ours = ChatTemplate(rig.ours.tokenizer, source=USES[use]).render(messages, tools=tools, generation_prompt=False)
    assert ours == theirs


# What is refused


def template(source: str) -> ChatTemplate:
    return ChatTemplate(Tokenizer.from_folder(STARTER), source=source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "never learn to stop"),
        (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|><think>{% endif %}",
            "does not begin with the rendered prompt",
        ),
        ("{{ raise_exception('no ' ~ messages[0].role) }}", "no user"),
        ("{{ messages[0].nothing.more }}", "fails on this conversation"),
    ],
    ids=["no stop token", "another generation prompt", "raise_exception", "missing field"],
)
def test_templates_that_cannot_be_masked_are_refused_at_the_row(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message) as error:
        template(source).sequences([chat(("user", "a"), ("assistant", "b"))])
    assert (error.value.file, error.value.line) == ("rows.jsonl", 7)
    assert error.value.hint


@pytest.mark.parametrize(
    "source",
    [
        "{% for %}",
        "{{ 1 | nofilter }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if a %}" * 1500 + "{% endif %}" * 1500,
    ],
    ids=["syntax", "unknown filter", "deep brackets", "deep blocks"],
)
def test_what_does_not_compile_is_refused(source: str) -> None:
    with pytest.raises(TemplateError):
        template(source).render([{"role": "user", "content": "a"}], generation_prompt=True)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' | dictsort }}",
        "{{ 1 // 0 }}",
        "{{ messages['a'] + 1 }}",
        "{{ strftime_now(5) }}",
        "{% for a, b in [1] %}{% endfor %}",
        "{% include 'x' %}",
        "{{ self.nothing() }}",
        "{{ 'a'.encode('rot13') }}",
        "{{ messages | map('nofilter') | list }}",
        "{{ (messages | map('upper')).throw(1) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_whatever_goes_wrong_inside_is_a_template_error(source: str) -> None:
    with pytest.raises(TemplateError):
        template(source).render([{"role": "user", "content": "a"}], generation_prompt=True)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ '' | attr('__class__') }}",
        "{{ ''['__class__'] }}",
        "{{ messages | map(attribute='__class__') | first }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__.datetime }}",
        "{{ range.__self__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.__base__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ self._TemplateReference__context }}",
        "{{ loop.__class__ }}{% for m in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
        "{% macro f() %}{% endmacro %}{{ f._environment }}{{ f._func }}",
        "{{ (messages | map('upper')).gi_frame.f_globals }}",
        "{{ environment }}{{ context }}{{ resolve }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ messages[0].clear() }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '{0.__class__}'.format_map({'0': 1}) }}",
        "{{ '%s' % 1 }}",
    ],
)
def test_nothing_of_python_is_within_reach(source: str) -> None:
    messages = [{"role": "user", "content": "a"}]
    try:
        text = template(source).render(messages, generation_prompt=True)
    except TemplateError:
        text = ""
    assert text == ""
    assert messages == [{"role": "user", "content": "a"}]


DOUBLING = "{{% set n = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set n.x = {step} %}}{{% endfor %}}"
LARGE = (
    "{% set n = namespace(x='a') %}{% for i in range(16) %}{% set n.x = n.x ~ n.x %}{% endfor %}"  # 65,536 characters
)
HUGE = "{% set n = namespace(x='a') %}{% for i in range(24) %}{% set n.x = n.x ~ n.x %}{% endfor %}"  # 16 million
HOSTILE = {
    "endless loop": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "huge range": "{% for a in range(10 ** 10) %}{% endfor %}",
    "huge range without power": "{% for a in range(10000000000) %}{% endfor %}",
    "twice calling macros": "{% macro f(n) %}{% if n > 0 %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for a in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "text doubled by ~": DOUBLING.format(start="'a'", step="n.x ~ n.x"),
    "text doubled by +": DOUBLING.format(start="'a'", step="n.x + n.x"),
    "lists doubled": DOUBLING.format(start="[1]", step="n.x + n.x"),
    "text doubled by a filter": DOUBLING.format(start="'aa'", step="n.x | replace('a', 'aa')"),
    "text doubled by a method": DOUBLING.format(start="'aa'", step="n.x.replace('a', 'aa')"),
    "numbers squared": DOUBLING.format(start="99", step="n.x * n.x"),
    "lists in lists, written": DOUBLING.format(start="[]", step="[n.x, n.x]") + "{{ n.x }}",
    "lists in lists, as JSON": DOUBLING.format(start="[]", step="[n.x, n.x]") + "{{ n.x | tojson }}",
    "lists in lists, compared": DOUBLING.format(start="[]", step="[n.x, n.x]")
    + "{% set o = n %}"
    + DOUBLING.format(start="[]", step="[n.x, n.x]")
    + "{{ n.x == o.x }}",
    "each letter replaced": LARGE + "{{ n.x.replace('a', n.x) | length }}",
    "each letter replaced by a filter": LARGE + "{{ n.x | replace('a', n.x) | length }}",
    "joined by itself": LARGE + "{{ n.x.join(n.x | list) | length }}",
    "joined by a filter": LARGE + "{{ n.x | list | join(n.x) | length }}",
    "translated": LARGE + "{{ n.x.translate({97: n.x}) | length }}",
    "a wide field": "{{ '{:2500000000}'.format(1) | length }}",
    "a padded text": "{{ 'a'.ljust(2500000000) | length }}",
    "a centred text": "{{ 'a' | center(2500000000) | length }}",
    "a multiplied text": "{{ ('a' * 2500000000) | length }}",
    "a wide number": "{{ ('%2500000000d' % 1) | length }}",
    "placeholder text": "{{ lipsum(n=100000000) }}",
    "filled batches": "{{ [1] | batch(1000000000, 'x') | list | length }}",
    "filled slices": "{{ [1] | slice(1000000000, 'x') | list | length }}",
    "indented": LARGE + "{{ n.x.replace('a', 'a\n') | indent(40000) | length }}",
    "indented JSON": DOUBLING.format(start="[]", step="[n.x]").replace("60", "900")
    + "{{ n.x | tojson(indent=100000000) }}",
    "tabs expanded": "{{ '\t'.expandtabs(2500000000) | length }}",
    "truncated": "{{ ('a' ~ messages[0].content) | truncate(2500000000, end='x') | length }}"
    + HUGE
    + "{% for i in range(400) %}{{ n.x | truncate(5) }}{{ n.x | wordwrap(1) }}{% endfor %}",
    "captured": "{% set x %}{% for a in range(40) %}{% for b in range(25000) %}"
    + "A" * 3000
    + "{% endfor %}{% endfor %}{% endset %}",
    "captured by a macro": "{% macro f() %}{% for a in range(40) %}{% for b in range(25000) %}"
    + "A" * 3000
    + "{% endfor %}{% endfor %}{% endmacro %}{% if f() %}{% endif %}",
    "captured by a filter": "{% filter upper %}{% for a in range(40) %}{% for b in range(25000) %}"
    + "A" * 3000
    + "{% endfor %}{% endfor %}{% endfilter %}",
    "written": "{% for a in range(100000) %}" + "A" * 3000 + "{% endfor %}",
    "sums": "{% for i in range(100000) %}{{ range(100000) | sum }}{% endfor %}",
    "sorts": "{% for i in range(100000) %}{% set x = range(100000) | sort %}{% endfor %}",
    "searches": HUGE + "{% set l = n.x | list %}{% for i in range(400000) %}{% if 'x' in l %}{% endif %}{% endfor %}",
    "searches in text": HUGE + "{% for i in range(400000) %}{% if 'ax' in n.x %}{% endif %}{% endfor %}",
    "comparisons": HUGE
    + "{% set m = n.x ~ 'b' %}{% set k = n.x ~ 'c' %}{% for i in range(400000) %}{% if m == k %}{% endif %}{% endfor %}",
    "slices": HUGE
    + "{% set o = namespace(l=[]) %}{% for i in range(1000) %}{% set o.l = o.l + [n.x[i:]] %}{% endfor %}",
    "kept values": HUGE
    + "{% set o = namespace(l=[]) %}{% for i in range(1000) %}{% set o.l = o.l + [n.x | upper] %}{% endfor %}",
    "joined values": HUGE
    + "{% set o = namespace(l=[]) %}{% for i in range(1000) %}{% set o.l = o.l + [n.x] %}{% endfor %}{{ o.l | join | length }}",
}

# Runs in a process of its own, a child for each template, so that whatever gets through hurts nobody.
RUN_HOSTILE = """
import json, os, resource, sys
from pathlib import Path
from tunesmith.data import sandbox
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import TemplateError

sandbox.MAX_SECONDS = 0.3  # the tests need not wait for it
tokenizer = Tokenizer.from_folder(Path(sys.argv[1]))
found = {}
for name, source in json.load(sys.stdin).items():
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (3, 3))
        try:
            template = ChatTemplate(tokenizer, source=source)
            text = template.render([{"role": "user", "content": "hi"}], generation_prompt=True)
            said = f"rendered {len(text)} characters"
        except TemplateError as error:
            said = "refused"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"[:200]
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read()
    _, status, usage = os.wait4(child, 0)
    found[name] = [said or f"killed, status {status}", usage.ru_maxrss // 1024]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[str, int]]:
    """What became of each hostile template, and how many MiB it took at most."""
    done = subprocess.run(
        [sys.executable, "-c", RUN_HOSTILE, str(STARTER)],
        input=json.dumps(HOSTILE), capture_output=True, text=True, cwd=REPOSITORY, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {name: (said, mebibytes) for name, (said, mebibytes) in json.loads(done.stdout).items()}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_soon_and_take_little_memory(
    outcomes: dict[str, tuple[str, int]], name: str
) -> None:
    said, mebibytes = outcomes[name]
    assert said == "refused" or said.startswith("rendered"), said
    assert mebibytes < 600


def test_one_rendering_leaves_no_budget_spent_for_the_next() -> None:
    counting = template("{% for i in range(90000) %}{% endfor %}{{ messages[0].content }}")
    for _ in range(12):
        assert counting.render([{"role": "user", "content": "a"}], generation_prompt=True) == "a"


# Bases without a template


@pytest.fixture
def plain(make_tokenizer_folder: Callable[..., Path]) -> ChatTemplate:
    return ChatTemplate(Tokenizer.from_folder(make_tokenizer_folder(("<s>", "</s>"), bos="<s>", eos="</s>")))


@pytest.mark.parametrize(("prompt", "shown"), [("Q", "Q\n"), ("Q\n", "Q\n"), ("Q ", "Q ")])
def test_without_a_template_prompt_and_completion_are_joined(plain: ChatTemplate, prompt: str, shown: str) -> None:
    assert plain.plain
    (sequence,) = plain.sequences([chat(("user", prompt), ("assistant", "A\n"))])[0]
    assert plain.tokenizer.decode(sequence.tokens_T.tolist(), skip_special_tokens=False) == f"<s>{shown}A\n</s>"
    trained = sequence.tokens_T[sequence.weight_T > 0].tolist()
    assert plain.tokenizer.decode(trained, skip_special_tokens=False) == "A\n</s>"
    assert plain.prompt([Message("user", prompt)]).ids == sequence.tokens_T[: -len(trained)].tolist()
    assert plain.stop_ids() == [plain.tokenizer.eos_id]


@pytest.mark.parametrize(
    "turns",
    [
        [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
        [("user", "a"), ("tool", "b"), ("assistant", "c")],
    ],
)
def test_without_a_template_conversations_are_refused(plain: ChatTemplate, turns: list[tuple[str, str]]) -> None:
    with pytest.raises(TemplateError, match="no chat template") as error:
        plain.sequences([chat(*turns)])
    assert "data.template" in error.value.hint
    assert (error.value.file, error.value.line) == ("rows.jsonl", 7)
