"""Conversations to ids and masks, against transformers' rendering and against what each template is known to write."""

import json
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

TEMPLATES = Path(__file__).parent / "templates"
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


@dataclass(frozen=True)
class Family:
    """Special tokens that go with templates/NAME.jinja, what ends a turn, and what is trained of an answer."""

    special: tuple[str, ...]
    eos: str
    trained: Callable[[str], str]
    stops: set[str]
    bos: str | None = None
    system: bool = True


FAMILIES = {
    "chatml": Family(CHATML, "<|im_end|>", lambda a: f"{a}<|im_end|>", {"<|im_end|>"}),
    # as Qwen3: reasoning is kept after the last question and dropped from earlier turns; tools are listed first
    "thinking": Family(
        CHATML, "<|im_end|>", lambda a: "<think>\n\n</think>\n\n" + a.lstrip("\n") + "<|im_end|>", {"<|im_end|>"}
    ),
    "llama_3": Family(
        LLAMA_3, "<|eot_id|>", lambda a: f"{a.strip()}<|eot_id|>", {"<|eot_id|>"}, bos="<|begin_of_text|>"
    ),
    "llama_2": Family(("<unk>", "<s>", "</s>"), "</s>", lambda a: f" {a.strip()} </s>", {"</s>"}, bos="<s>"),
    "gemma": Family(
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        lambda a: f"{a.strip()}<end_of_turn>",
        {"<end_of_turn>", "<eos>"},
        bos="<bos>",
        system=False,
    ),
    # the end-of-text token that it writes behind a finished conversation is not what ends a turn
    "phi_3": Family(
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|endoftext|>",
        lambda a: f"{a}<|end|>",
        {"<|end|>", "<|endoftext|>"},
    ),
    # as SmolLM3: what the assistant wrote stands between generation tags
    "marked": Family(CHATML, "<|im_end|>", lambda a: f"{a}<|im_end|>", {"<|im_end|>"}),
}
STARTER_FAMILY = Family((), "<|end|>", lambda a: f"{a}<|end|>", {"<|end|>"})


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
        source = (TEMPLATES / f"{name}.jinja").read_text("utf-8")
        folder = make_tokenizer_folder(family.special, template=source, bos=family.bos, eos=family.eos)
        made[name] = Rig(family, ChatTemplate(Tokenizer.from_folder(folder)), AutoTokenizer.from_pretrained(folder))
    starter = Tokenizer.from_folder(STARTER)
    made["starter"] = Rig(STARTER_FAMILY, ChatTemplate(starter), AutoTokenizer.from_pretrained(STARTER))
    return made


ALL = [*FAMILIES, "starter"]


def chat(*turns: tuple[str, str]) -> Example:
    return Example(Origin("rows.jsonl", 7), "chat", tuple(Message(*turn) for turn in turns))


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
    asked, unweighted = Message("user", "a"), Message("assistant", "b", 0.0)
    messages = (asked, unweighted, Message("user", "c"), Message("assistant", "d", 0.5))
    examples = [Example(Origin("rows.jsonl", 7), "chat", shown) for shown in (messages, (asked, unweighted))]
    sequences = rig.ours.sequences(examples)
    (sequence,) = sequences[0]
    (run,) = rig.trained_runs(sequence)
    assert rig.text(run) == rig.family.trained("d")
    assert set(sequence.weight_T.tolist()) == {0.0, 0.5}
    assert sequence.tokens_T.tolist() == [*rig.their_ids(list(messages[:3]), prompt=True), *run]
    assert sequences[1] == []


@pytest.mark.parametrize("name", ALL)
def test_generation_stops_at_what_was_trained_to_stop(rigs: dict[str, Rig], name: str) -> None:
    rig = rigs[name]
    assert {rig.special[i] for i in rig.ours.stop_ids()} == rig.family.stops
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
    except TemplateError:  # exact or refused, never an answer with a space too many
        return
    assert sequence.tokens_T[: len(prompt.ids)].tolist() == prompt.ids
    assert tokenizer.decode(sequence.tokens_T.tolist()) == "Once upon a time"


def test_the_same_exchange_twice_is_trained_twice_where_a_template_forgets_the_first() -> None:
    source = (
        "{% for m in (messages[-1:] if add_generation_prompt else messages[-2:]) %}<|{{ m.role }}|>{{ m.content }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    made = ChatTemplate(Tokenizer.from_folder(STARTER), source=source)
    exchange = [("user", "a"), ("assistant", "b")]
    sequences = made.sequences([chat(*exchange, *exchange)])[0]
    assert [s.num_targets for s in sequences] == [2, 2]
    assert sequences[0].tokens_T.tolist() == sequences[1].tokens_T.tolist()


def test_many_rows_at_once_give_what_each_gives_alone(rigs: dict[str, Rig]) -> None:
    rig = rigs["chatml"]
    examples = [*conversations(rig), chat(("user", "<|im_end|>"), ("assistant", "no <|im_start|>"))]
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
    "json": "{{ tools | tojson }}{{ tools | tojson(indent=4) }}"
    "{{ tools | tojson(separators=(',', ':'), sort_keys=true) }}"
    "{{ messages[0].content | tojson(ensure_ascii=true) }}",
    "loops": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ loop.index0 }}{{ loop.revindex }}"
    "{{ loop.previtem.role }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "filters": "{{ messages | map(attribute='role') | join(', ') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ (messages | last).content | upper | replace('A', 'b') | default('x') }}{{ messages[0] | items | list }}",
    "strings": "{{ ('a b'.split(' ') | last) ~ 1 ~ none ~ messages[0].content.strip().startswith('h') }}"
    "{{ messages[0]['content'][:2] + 'x'.rstrip('x').title() }}"
    "{{ messages[0].missing is defined }}{{ messages[0].missing }}",
    "state": "{% set ns = namespace(a=0, b='') %}{% for m in messages %}{% set ns.a = ns.a + 2 * loop.index %}"
    "{% set ns.b = ns.b + m.role[0] %}{% endfor %}{{ ns.a }}{{ ns.b }}{{ 7 // 2 }}{{ 7 % 4 }}{{ dict(a=1)['a'] }}",
    "macros": "{% macro turn(m, last=false) %}<{{ m.role }}>{{ m.content }}{% if last %}!{% endif %}{% endmacro %}"
    "{% set body %}{% for m in messages %}{{ turn(m, last=loop.last) }}{% endfor %}{% endset %}{{ body | trim }}",
    "white space": "  {% if true %}  \n  a\n  {%- endif %}\n\n{{- ' b ' -}}\n\n  c  \n",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "tools are none": "{% if tools is none or not tools %}none{% else %}{{ tools | length }}{% endif %}",
    "special tokens": "{{ bos_token }}{{ eos_token }}"
    "{% if pad_token is defined and pad_token %}{{ pad_token }}{% endif %}",
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["no tools", "tools"])
def test_what_templates_use_is_rendered_as_transformers_renders_it(
    rigs: dict[str, Rig], use: str, tools: list[Any] | None
) -> None:
    rig = rigs["llama_3"]
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
