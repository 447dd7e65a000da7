"""What an encoder reads and a decoder writes: ids, packs, and how they are kept."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunesmith.data.contract import FILE, check_contract, write_contract
from tunesmith.data.pack import build_pack, build_packs
from tunesmith.data.pairs import PairTemplate
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.tokens import TokenStore
from tunesmith.data.types import Example, Message, Origin, Sequence
from tunesmith.errors import TemplateError
from tunesmith.models.base import template_for
from tunesmith.objectives.seq2seq import Seq2seq
from tunesmith.storage import read_json

SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
START, END = 0, 2


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer_folder: Callable[..., Path]) -> Tokenizer:
    return Tokenizer.from_folder(make_tokenizer_folder(SPECIAL, eos="<|end|>", pad="<|pad|>"))


@pytest.fixture(scope="module")
def template(tokenizer: Tokenizer) -> PairTemplate:
    return PairTemplate(tokenizer, start_id=START)


def row(*turns: tuple[str, str], **more: Any) -> Example:
    return Example(Origin("rows.jsonl", 3), "chat", tuple(Message(*turn) for turn in turns), **more)


CALL = Example(
    Origin("rows.jsonl", 3), "chat", (Message("user", "a"), Message("assistant", "", 1.0, {"tool_calls": []}))
)
ROW = row(("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "4"))


def test_the_source_is_the_prompt_and_the_target_the_answer(template: PairTemplate) -> None:
    ((sequence,),) = template.sequences([ROW])
    encode = template.tokenizer.encode_text
    assert sequence.encoder_T is not None
    assert sequence.encoder_T.tolist() == [*encode(["Be brief.\n2 + 2?"])[0], END]
    assert sequence.tokens_T.tolist() == [START, *encode(["4"])[0], END]
    assert sequence.weight_T.tolist() == [0, 1, 1]
    assert template.stop_ids() == [END]


def test_the_prompt_in_use_is_the_source_of_training(template: PairTemplate) -> None:
    examples = [
        ROW,
        row(("user", "a\n"), ("assistant", "b")),
        row(("user", "a<|end|>b<|user|>"), ("assistant", "<|end|>")),
        row(("system", "s "), ("user", " ü👋"), ("assistant", " x ")),
    ]
    for example, (sequence,) in zip(examples, template.sequences(examples), strict=True):
        prompt = template.prompt(list(example.messages[:-1]))
        assert sequence.encoder_T is not None
        assert prompt.ids == sequence.encoder_T.tolist()
        assert template.tokenizer.decode(prompt.ids) == prompt.text
        special = set(template.tokenizer.special_ids.values())
        assert [i for i in (*prompt.ids, *sequence.tokens_T.tolist()) if i in special] == [END, START, END]


def test_a_chat_template_may_write_the_source(tokenizer: Tokenizer) -> None:
    source = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|end|>"
    template = PairTemplate(tokenizer, start_id=START, source=source)
    ids = template.prompt([Message("user", "a")]).ids
    assert ids == [tokenizer.special_ids["<|user|>"], *tokenizer.encode_text(["a"])[0], END]
    assert template.identity != PairTemplate(tokenizer, start_id=1, source=source).identity


def test_a_weight_is_the_answer_s(template: PairTemplate) -> None:
    messages = (Message("user", "a"), Message("assistant", "b", 0.5))
    ((sequence,),) = template.sequences([Example(Origin("rows.jsonl", 3), "chat", messages)])
    assert sequence.weight_T.tolist() == [0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("example", "found"),
    [
        (row(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")), "3 turns"),
        (row(("user", "a"), ("user", "c"), ("assistant", "d")), "2 turns"),
        (row(("system", "a"), ("assistant", "d")), "system"),
        (row(("assistant", "d")), "nothing"),
        (row(("user", "a"), ("tool", "b"), ("assistant", "d")), "tools"),
        (row(("user", "a"), ("assistant", "d"), tools=({"name": "x"},)), "tools"),
        (CALL, "calls a tool"),
    ],
)  # fmt: skip
def test_what_is_no_prompt_with_one_answer_is_refused_by_name(
    template: PairTemplate, example: Example, found: str
) -> None:
    with pytest.raises(TemplateError, match=found) as error:
        template.sequences([ROW, example])
    assert (error.value.file, error.value.line) == ("rows.jsonl", 3)
    assert "objective: instruction" in error.value.hint


def test_a_conversation_is_refused_in_use_too(template: PairTemplate) -> None:
    with pytest.raises(TemplateError, match="answers one user turn"):
        template.prompt([Message("user", "a"), Message("assistant", "b"), Message("user", "c")])


def test_the_configuration_decides_which_template_it_is(tokenizer: Tokenizer) -> None:
    made = template_for(tokenizer, config={"model_type": "t5", "decoder_start_token_id": 5, "pad_token_id": 1})
    assert isinstance(made, PairTemplate)
    assert made.start_id == 5
    made = template_for(tokenizer, config={"model_type": "mt5", "pad_token_id": 1})
    assert isinstance(made, PairTemplate)
    assert made.start_id == 1
    assert type(template_for(tokenizer, config={"model_type": "llama"})) is ChatTemplate


def test_the_token_contract_holds_the_sources(template: PairTemplate, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_contract(tmp_path, template=template, objective=Seq2seq(), examples=[ROW])
    document = read_json(tmp_path / FILE)
    assert document["probes"][-1]["sequences"][0]["encoder_ids"] == template.prompt(list(ROW.messages[:-1])).ids
    check_contract(document, template=template, objective=Seq2seq(), file=tmp_path / FILE)
    other = PairTemplate(tokenizer, start_id=START, source="{{ messages[-1].content }}!")
    with pytest.raises(TemplateError, match="token contract broken"):
        check_contract(document, template=other, objective=Seq2seq(), file=tmp_path / FILE)


# Sequences and packs


def test_sequences_come_back_from_the_disk(
    token_store: Callable[..., TokenStore], pair_rows: list[Sequence], sequence: Callable[..., Sequence], tmp_path: Path
) -> None:
    rows = [pair_rows[0], sequence([1, 2, 3]), pair_rows[1]]
    store = token_store([[r] for r in rows], folder=tmp_path / "store")
    for index, expected in enumerate(rows):
        (found,) = store.unit(index)
        assert found.tokens_T.tolist() == expected.tokens_T.tolist()
        assert (found.encoder_T is None) == (expected.encoder_T is None)
        if found.encoder_T is not None and expected.encoder_T is not None:
            assert found.encoder_T.tolist() == expected.encoder_T.tolist()
    assert store.num_tokens == sum(r.num_tokens for r in rows)


def test_a_cut_keeps_the_end_of_the_source(pair_rows: list[Sequence]) -> None:
    row = pair_rows[1]
    assert row.encoder_T is not None
    short = row.cut(10)
    assert short.encoder_T is not None
    assert short.encoder_T.tolist() == [*row.encoder_T[:9].tolist(), int(row.encoder_T[-1])]
    assert short.tokens_T.tolist() == row.tokens_T[:10].tolist()
    assert (row.num_context_tokens, short.num_context_tokens) == (40, 10)
    assert row.cut(40).encoder_T is row.encoder_T


def test_a_pack_holds_every_text_once_and_answers_share_nothing(pair_rows: list[Sequence]) -> None:
    alike = [replace(row, tokens_T=pair_rows[1].tokens_T, weight_T=pair_rows[1].weight_T) for row in pair_rows]
    for rows in (pair_rows, alike):
        pack = build_pack(rows, min_shared=1)
        assert pack.encoder_E is not None
        assert pack.encoder_span_S2 is not None
        assert len(pack.nodes) == len(rows)
        for number, node, (first, last) in zip(pack.rows_S, pack.nodes, pack.encoder_span_S2, strict=True):
            row = rows[number]
            assert row.encoder_T is not None
            assert pack.encoder_E[first:last].tolist() == row.encoder_T.tolist()
            assert pack.tokens_T[node.start : node.stop].tolist() == row.tokens_T.tolist()
        assert pack.num_computed_tokens == sum(r.num_tokens for r in rows) - 40


@pytest.mark.parametrize("max_tokens", [1, 30, 70, 1000])
def test_packs_hold_as_many_tokens_as_they_may(pair_rows: list[Sequence], max_tokens: int) -> None:
    packs = list(build_packs(pair_rows, max_tokens=max_tokens))
    assert sorted(n for pack in packs for n in pack.rows_S.tolist()) == list(range(len(pair_rows)))
    for pack in packs:
        assert len(pack.rows_S) == 1 or pack.num_computed_tokens - pack.num_root_tokens <= max_tokens
    assert len(packs) == {1: 8, 30: 5, 70: 3, 1000: 1}[max_tokens]


def test_sequences_with_and_without_a_source_do_not_mix(
    pair_rows: list[Sequence], sequence: Callable[..., Sequence]
) -> None:
    with pytest.raises(AssertionError, match="for every sequence"):
        build_pack([pair_rows[0], sequence([1, 2])])


def test_nothing_changes_for_a_decoder(tree_rows: list[Sequence]) -> None:
    pack = build_pack(tree_rows)
    assert pack.encoder_E is None
    assert pack.encoder_span_S2 is None
    assert pack.num_computed_tokens == len(pack.tokens_T)
    assert all(row.num_tokens == row.num_context_tokens == len(row.tokens_T) for row in tree_rows)
    assert np.array_equal(pack.tokens_T, build_pack(tree_rows[::-1]).tokens_T)


# As T5's own tokenizer does it


@pytest.fixture(scope="module")
def pieces_folder(make_tokenizer_folder: Callable[..., Path]) -> Path:
    """A unigram tokenizer with T5's special tokens, its word marks, and its end token added by the tokenizer itself."""
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    alphabet = sorted(set("▁abcdefghijklmnopqrstuvwxyz:.,?<>_/0123456789"))
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁the", -2.0), ("▁text", -3.0), ("summarize", -3.0)]
    backend = Backend(models.Unigram([*words, *((c, -5.0) for c in alphabet)], unk_id=2, byte_fallback=False))
    backend.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Replace(" {2,}", " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    names = ["<pad>", "</s>", "<unk>", "<extra_id_0>", "<extra_id_1>"]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return make_tokenizer_folder(backend, eos="</s>", pad="<pad>")


@pytest.mark.parametrize("text", ["summarize: the text.", "the", "  two  spaces ", "0"])
def test_ids_are_those_of_the_tokenizer_s_own_call(pieces_folder: Path, text: str) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(pieces_folder)
    template = PairTemplate(Tokenizer.from_folder(pieces_folder), start_id=0)
    assert template.prompt([Message("user", text)]).ids == theirs(text).input_ids
    ((sequence,),) = template.sequences([row(("user", text), ("assistant", text))])
    assert sequence.tokens_T.tolist() == [0, *theirs(text).input_ids]


def test_text_that_looks_like_a_sentinel_stays_text(pieces_folder: Path) -> None:
    template = PairTemplate(Tokenizer.from_folder(pieces_folder), start_id=0)
    sentinel = template.tokenizer.special_ids["<extra_id_0>"]
    example = row(("user", "the <extra_id_0> text"), ("assistant", "<extra_id_0> a"))
    ((sequence,),) = template.sequences([example])
    assert sequence.encoder_T is not None
    assert sentinel not in sequence.encoder_T.tolist() + sequence.tokens_T.tolist()
    written = PairTemplate(template.tokenizer, start_id=0, source="{{ messages[-1].content }} <extra_id_0>")
    assert written.prompt([Message("user", "the")]).ids[-2:] == [sentinel, 1]
