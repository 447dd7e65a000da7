"""The token contract: the same template and tokenizer pass, and every change that alters an id, a mask or a stop fails."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers, processors

from tunesmith.data.contract import FILE, check_contract, write_contract
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.types import Example, Message, Origin
from tunesmith.errors import TemplateError
from tunesmith.objectives.base import Objective
from tunesmith.objectives.causal import Causal
from tunesmith.objectives.classification import Classification
from tunesmith.objectives.contrastive import Contrastive
from tunesmith.objectives.instruction import Instruction
from tunesmith.objectives.regression import Regression
from tunesmith.objectives.token_classification import TokenClassification

INSTRUCTION = Instruction()
SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")


def conversation(*turns: tuple[str, str], weight: float = 1.0, tools: tuple[dict[str, Any], ...] = ()) -> Example:
    messages = tuple(Message(role, text, weight if role == "assistant" else 1.0) for role, text in turns)
    return Example(Origin("rows.jsonl", 1), "chat", messages, tools=tools)


EXAMPLES = [
    conversation(("user", "Where is my parcel?"), ("assistant", "On its way.")),
    conversation(("system", "Be kind."), ("user", "<|end|> \u2028 \U0001f600"), ("assistant", "<|assistant|>")),
    conversation(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
]


@pytest.fixture(scope="session")
def template(toy_tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(toy_tokenizer)


def written(
    folder: Path, template: ChatTemplate, examples: list[Example], objective: Objective = INSTRUCTION
) -> dict[str, Any]:
    write_contract(folder, template=template, objective=objective, examples=examples)
    document: dict[str, Any] = json.loads((folder / FILE).read_text())
    return document


def check(document: dict[str, Any], template: ChatTemplate, objective: Objective = INSTRUCTION) -> None:
    check_contract(document, template=template, objective=objective, file=Path(FILE))


def test_what_was_written_holds(tmp_path, template, toy_tokenizer_folder):
    document = written(tmp_path, template, EXAMPLES)
    check(document, template)
    check(document, ChatTemplate(Tokenizer.from_folder(toy_tokenizer_folder)))


def test_it_says_what_is_trained(tmp_path, template, toy_tokenizer):
    document = written(tmp_path, template, EXAMPLES)
    assert document["stop_ids"] == template.stop_ids()
    assert document["template"] == template.source
    probes = {probe["messages"][0]["content"]: probe for probe in document["probes"]}
    (sequence,) = probes["Where is my parcel?"]["sequences"]
    trained = [i for i, w in zip(sequence["ids"], sequence["weights"], strict=True) if w]
    assert toy_tokenizer.decode(trained, skip_special_tokens=False) == "On its way.<|end|>"
    assert len(sequence["ids"]) == len(sequence["weights"])
    assert len({p["messages"][0]["role"] for p in document["probes"]}) == 2  # with a system prompt and without


def test_it_holds_for_rows_with_tools_and_weights(tmp_path, toy_tokenizer):
    template = ChatTemplate(
        toy_tokenizer,
        source="{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    )
    tools = ({"type": "function", "function": {"name": "find"}},)
    call = [{"type": "function", "function": {"name": "find", "arguments": {"id": 3}}}]
    example = Example(
        Origin("rows.jsonl", 1),
        "chat",
        (
            Message("user", "where?"),
            Message("assistant", "hm", 0.0),
            Message("user", "where?"),
            Message("assistant", "", 1.0, {"tool_calls": call}),
            Message("tool", "there", 1.0, {"tool_call_id": "1", "name": "find"}),
            Message("assistant", "there"),
        ),
        tools=tools,
    )
    check(written(tmp_path, template, [example]), template)


CHANGES = {
    "a space after the role": lambda source: source.replace("|>{{ m.content }}", "|> {{ m.content }}"),
    "no begin token": lambda source: source.replace("<|begin|>", ""),
    "trimmed texts": lambda source: source.replace("{{ m.content }}", "{{ m.content | trim }}"),
    "another generation prompt": lambda source: source.replace(
        "{% if add_generation_prompt %}<|assistant|>", "{% if add_generation_prompt %}<|assistant|>\n"
    ),
    "another stop token": lambda source: source.replace("<|end|>", "<|pad|>"),
    "a line break after a turn": lambda source: source.replace("<|end|>", "<|end|>\n"),
    "a system prompt of its own": lambda source: "<|system|>You are helpful.<|end|>" + source,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_template_is_found(tmp_path, template, change):
    document = written(tmp_path, template, EXAMPLES)
    other = ChatTemplate(template.tokenizer, source=CHANGES[change](template.source))
    assert other.source != template.source
    with pytest.raises(TemplateError) as caught:
        check(document, other)
    assert caught.value.hint
    assert caught.value.file == FILE


def test_a_changed_tokenizer_is_found(tmp_path, template, make_tokenizer_folder):
    document = written(tmp_path, template, EXAMPLES)
    swapped = ("<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|system|>", "<|assistant|>")
    folder = make_tokenizer_folder(swapped, template=template.source, eos="<|end|>")
    with pytest.raises(TemplateError, match="token contract broken"):
        check(document, ChatTemplate(Tokenizer.from_folder(folder)))


def test_another_end_of_text_token_is_found(tmp_path, template, make_tokenizer_folder):
    document = written(tmp_path, template, EXAMPLES)
    folder = make_tokenizer_folder(SPECIAL, template=template.source, bos="<|begin|>", eos="<|pad|>", pad="<|pad|>")
    with pytest.raises(TemplateError, match="other stop tokens"):
        check(document, ChatTemplate(Tokenizer.from_folder(folder)))


@pytest.mark.parametrize("what", ["ids", "weights"])
def test_a_changed_probe_is_found(tmp_path, template, what):
    document = written(tmp_path, template, EXAMPLES)
    document["probes"][-1]["sequences"][0][what][-1] += 1
    with pytest.raises(TemplateError, match=f"probe {len(document['probes'])} "):
        check(document, template)


def test_a_base_without_a_chat_template_has_a_contract_too(tmp_path, make_tokenizer_folder):
    plain = ChatTemplate(Tokenizer.from_folder(make_tokenizer_folder(SPECIAL, bos="<|begin|>", eos="<|end|>")))
    assert plain.plain
    document = written(tmp_path, plain, EXAMPLES[:1])
    assert document["plain"]
    check(document, plain)


def test_plain_texts_have_the_fixed_probes(tmp_path, template):
    document = written(tmp_path, template, [Example(Origin("t.txt", 1), "text", text="Once upon a time")])
    assert len(document["probes"]) >= 2
    check(document, template)


@pytest.mark.parametrize(
    "demand",
    [
        "{% if messages[0].role != 'system' %}{{ raise_exception('a system prompt is needed') }}{% endif %}",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system prompt is possible') }}{% endif %}",
    ],
)
def test_a_template_that_is_particular_has_a_contract_of_what_it_takes(tmp_path, toy_tokenizer, demand):
    template = ChatTemplate(toy_tokenizer, source=demand + (toy_tokenizer.chat_template or ""))
    system = () if "== 'system'" in demand else (("system", "Be kind."),)
    example = conversation(*system, ("user", "Where is my parcel?"), ("assistant", "On its way."))
    document = written(tmp_path, template, [example])
    assert any(m["content"] == "On its way." for probe in document["probes"] for m in probe["messages"])
    check(document, template)


# --------------------------------------------------------------------------------------------------- plain texts

READERS: dict[str, Objective] = {
    "causal": Causal(),
    "classification": Classification(pooling="last"),
    "regression": Regression(pooling="mean"),
    "token_classification": TokenClassification(pooling="last"),
    "contrastive": Contrastive(pooling="mean"),
}


def normalised(normaliser: normalizers.Normalizer) -> Callable[[Backend], None]:
    def change(backend: Backend) -> None:
        backend.normalizer = normaliser

    return change


def marked(single: str, *names: str) -> Callable[[Backend], None]:
    def change(backend: Backend) -> None:
        marks = [(name, SPECIAL.index(name)) for name in names]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=marks)

    return change


TOKENIZERS: dict[str, Callable[[Backend], None]] = {
    "lower case": normalised(normalizers.Lowercase()),
    "composed": normalised(normalizers.NFC()),
    "decomposed": normalised(normalizers.NFD()),
    "compatible": normalised(normalizers.NFKC()),
    "no accents": normalised(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
    "another begin": marked("<|pad|> $A <|end|>", "<|pad|>", "<|end|>"),
}
ENDS = {"another end": marked("<|begin|> $A <|pad|>", "<|begin|>", "<|pad|>")}


def reread(template: ChatTemplate, change: Callable[[Backend], None], **config: str) -> ChatTemplate:
    """The template with another tokenizer."""
    old = template.tokenizer
    backend = Backend.from_str(old.backend.to_str())
    change(backend)
    return ChatTemplate(Tokenizer(backend, old.config | config, old.chat_template))


@pytest.mark.parametrize("name", READERS)
def test_texts_are_kept_as_the_objective_reads_them(tmp_path, template, name):
    objective, tokenizer = READERS[name], template.tokenizer
    document = written(tmp_path, template, [], objective)
    check(document, template, objective)
    assert len(document["texts"]) >= 2
    (sequence,) = document["texts"][0]["sequences"]
    text = document["texts"][0]["text"]
    assert sequence["ids"] == [*tokenizer.begin_ids, *tokenizer.encode_text([text])[0], *tokenizer.end_ids]
    read = sum(weight > 0 for weight in sequence["weights"])
    count = len(sequence["ids"])
    expected = {"causal": count - 1, "classification": 1, "token_classification": len(text.split())}
    assert read == expected.get(name, count)


@pytest.mark.parametrize("change", TOKENIZERS | ENDS)
@pytest.mark.parametrize("name", READERS)
def test_a_tokenizer_that_reads_texts_otherwise_is_found(tmp_path, template, name, change):
    """The conversations alone would not say so: their special tokens come from the chat template."""
    document = written(tmp_path, template, [], READERS[name]) | {"probes": []}
    other = reread(template, (TOKENIZERS | ENDS)[change])
    if name == "causal" and change in ENDS:
        other = reread(template, lambda backend: None, eos_token="<|pad|>")  # what it ends texts with
    with pytest.raises(TemplateError, match="token contract broken: text") as caught:
        check(document, other, READERS[name])
    assert caught.value.hint
    assert caught.value.file == FILE


def test_an_objective_that_reads_otherwise_is_found(tmp_path, template):
    document = written(tmp_path, template, [], READERS["classification"])
    with pytest.raises(TemplateError, match="token contract broken: text 1"):
        check(document, template, READERS["regression"])


def test_a_contract_without_texts_still_holds(tmp_path, template):
    """Of a run of an earlier version, and of an objective that reads conversations alone."""
    document = written(tmp_path, template, EXAMPLES, READERS["classification"])
    del document["texts"]
    check(document, template, READERS["classification"])
    assert written(tmp_path, template, EXAMPLES)["texts"] == []


def test_a_text_whose_words_cannot_be_told_apart_is_no_probe(tmp_path, template):
    other = reread(template, normalised(normalizers.Replace("2", "")))  # nothing is left of the word
    kept = written(tmp_path, template, [], READERS["token_classification"])["texts"]
    document = written(tmp_path, other, [], READERS["token_classification"])
    assert all("2" not in probe["text"] for probe in document["texts"])
    assert document["texts"]
    check(document, other, READERS["token_classification"])
    with pytest.raises(TemplateError, match="token contract broken: text 1"):
        check(document | {"probes": [], "texts": kept}, other, READERS["token_classification"])
