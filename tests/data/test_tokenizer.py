"""Text to ids and back; text that reads like a special token stays text."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from tunesmith.data.tokenizer import GUARDS, Tokenizer
from tunesmith.errors import ModelError

REPOSITORY = Path(__file__).resolve().parents[2]
STARTER = REPOSITORY / "recipes" / "starter" / "tokenizer"
MODELS = REPOSITORY / ".." / "shared" / "models"
GUARD = GUARDS[0]

starter = Tokenizer.from_folder(STARTER)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
# text made of special tokens, of pieces of them, and of what stands around them
special_text = st.lists(
    st.sampled_from(
        ["<|end|>", "<|user|>", "<|", "|>", "<|e", "nd|>", "end", "<", "|", " ", "\n", "hello", "é", "<|<|end|>"]
    ),
    max_size=12,
).map("".join)


@settings(max_examples=100, deadline=None)
@given(any_text)
def test_text_comes_back_as_it_was(text: str) -> None:
    assert starter.decode(starter.encode_text([text])[0]) == text


@settings(max_examples=100, deadline=None)
@given(special_text)
def test_plain_text_never_becomes_a_special_token(text: str) -> None:
    ids = starter.encode_text([text])[0]
    assert not set(ids) & set(starter.special_ids.values())
    assert starter.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=100, deadline=None)
@given(special_text)
def test_a_guard_hides_every_special_token_and_nothing_else(text: str) -> None:
    guarded = starter.guarded(text, guard=GUARD)
    assert guarded.replace(GUARD, "") == text
    assert (guarded == text) == (not starter.looks_special(text))
    ids = starter.encode_rendered([guarded], guard=GUARD)[0]
    assert not set(ids) & set(starter.special_ids.values())
    assert starter.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=100, deadline=None)
@given(special_text, special_text)
def test_only_what_the_template_wrote_is_special(before: str, after: str) -> None:
    rendered = f"<|user|>{starter.guarded(before, guard=GUARD)}<|end|>{starter.guarded(after, guard=GUARD)}"
    ids = starter.encode_rendered([rendered], guard=GUARD)[0]
    special = [i for i in ids if i in set(starter.special_ids.values())]
    assert special == [starter.special_ids["<|user|>"], starter.special_ids["<|end|>"]]
    assert starter.decode(ids, skip_special_tokens=False) == f"<|user|>{before}<|end|>{after}"


@settings(max_examples=60, deadline=None)
@given(st.lists(special_text, max_size=4))
def test_rendered_text_gives_the_ids_of_transformers(texts: list[str]) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(STARTER)
    expected = [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert starter.encode_rendered(texts) == expected


def metaspace_first() -> Backend:
    """Llama 2 as transformers saves it anew: a space before the first word of a text, and not after special tokens."""
    names = ["<s>", "</s>", "▁", "▁a", "▁b", *"abcdefgh", "\n"]
    backend = Backend(models.BPE({name: index for index, name in enumerate(names)}, [("▁", "a"), ("▁", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>")])
    return backend


def prefix_space() -> Backend:
    """GPT-2's pre-tokenizer with a space put before."""
    names = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Backend(models.BPE({name: index for index, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>")])
    return backend


def swallows_space() -> Backend:
    """Phi-3: special tokens that take the white space behind them along."""
    backend = Backend(models.BPE({name: index for index, name in enumerate(["<s>", "</s>", *"abcdefgh \n"])}, []))
    backend.add_special_tokens([AddedToken(n, special=True, normalized=False, rstrip=True) for n in ("<s>", "</s>")])
    return backend


def lowercases() -> Backend:
    backend = Backend(models.BPE({name: index for index, name in enumerate(["<s>", "</s>", *"abcdefgh \n"])}, []))
    backend.normalizer = normalizers.Lowercase()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>")])
    return backend


def shared_tokenizer(name: str) -> Callable[[], Backend]:
    def load() -> Backend:
        if not (MODELS / name).is_dir():
            pytest.skip("shared/models is absent")
        return Tokenizer.from_folder(MODELS / name).backend

    return load


KINDS: dict[str, Callable[[], Backend]] = {
    "metaspace first": metaspace_first,
    "prefix space": prefix_space,
    "special tokens that swallow space": swallows_space,
    "lowercases": lowercases,
    "stories260k": shared_tokenizer("stories260k"),
    "babyllama": shared_tokenizer("babyllama-tok105"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_looking_for_guards_changes_no_ids(kind: str) -> None:
    tokenizer = Tokenizer(KINDS[kind](), {"bos_token": "<s>", "eos_token": "</s>"})

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.lists(st.sampled_from(["<s>", "</s>", "a", "b", " ", "\n", "ab", " a"]), max_size=8).map("".join))
    def same(text: str) -> None:
        assert tokenizer.encode_rendered([text], guard=GUARD) == tokenizer.encode_rendered([text])

    same()


def alarm(seconds: int) -> None:
    def ring(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeoutError(f"still at it after {seconds} seconds")

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)


def test_a_special_token_of_one_character_can_be_guarded() -> None:
    backend = Backend(models.BPE({c: i for i, c in enumerate("ab")}, []))
    backend.add_special_tokens([AddedToken("§", special=True, normalized=False)])
    tokenizer = Tokenizer(backend, {"eos_token": "§"})
    alarm(5)
    try:
        ids = tokenizer.encode_rendered([tokenizer.guarded("a§b", guard=GUARD) + "§"], guard=GUARD)[0]
    finally:
        signal.alarm(0)
    assert ids.count(tokenizer.eos_id) == 1
    assert ids[-1] == tokenizer.eos_id


# Reading a folder


def test_a_folder_without_a_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(ModelError, match=r"no tokenizer\.json") as error:
        Tokenizer.from_folder(tmp_path)
    assert error.value.hint


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"model": 3}'),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "\udcff"),
        ("chat_template.jinja", "\udcff"),
    ],
)
def test_broken_files_are_named(toy_tokenizer_folder: Path, tmp_path: Path, name: str, content: str) -> None:
    for path in toy_tokenizer_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=name.partition(".")[0]):
        Tokenizer.from_folder(tmp_path)


def test_padding_and_truncation_saved_in_the_file_are_off(make_tokenizer_folder: Callable[..., Path]) -> None:
    backend = Backend.from_file(str(STARTER / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    tokenizer = Tokenizer.from_folder(make_tokenizer_folder(backend, eos="<|end|>"))
    text = "many words that take more than three tokens"
    assert tokenizer.encode_text([text]) == starter.encode_text([text])
    assert tokenizer.encode_rendered([text, "a"]) == starter.encode_rendered([text, "a"])


@pytest.mark.parametrize("where", ["jinja file", "string", "list"])
def test_the_chat_template_is_found_wherever_it_is_kept(toy_tokenizer_folder: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((toy_tokenizer_folder / "tokenizer.json").read_bytes())
    config: dict[str, object] = {"eos_token": {"content": "<|end|>", "special": True}, "chat_template": "in the config"}
    if where == "list":
        config["chat_template"] = [{"name": "rag", "template": "x"}, {"name": "default", "template": "in the list"}]
    if where == "jinja file":
        (tmp_path / "chat_template.jinja").write_text("in the file", "utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    expected = {"jinja file": "in the file", "string": "in the config", "list": "in the list"}
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.chat_template == expected[where]
    assert tokenizer.special_text("eos_token") == "<|end|>"
    assert tokenizer.eos_id == tokenizer.backend.token_to_id("<|end|>")


def test_without_an_end_token_the_hint_says_what_to_set(make_tokenizer_folder: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.from_folder(make_tokenizer_folder(("<a>",)))
    with pytest.raises(ModelError, match="no end-of-text token") as error:
        _ = tokenizer.eos_id
    assert "eos_token" in error.value.hint


@pytest.mark.parametrize(
    ("template", "bos", "expected"),
    [(None, None, []), (None, "<s>", ["<s>"]), ("<s> $A", None, ["<s>"]), ("<s> $A </s>", "<s>", ["<s>"])],
)
def test_text_begins_as_the_tokenizer_begins_it(
    make_tokenizer_folder: Callable[..., Path], template: str | None, bos: str | None, expected: list[str]
) -> None:
    backend = metaspace_first()
    if template:
        ids = [("<s>", 0), ("</s>", 1)]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    tokenizer = Tokenizer.from_folder(make_tokenizer_folder(backend, bos=bos, eos="</s>"))
    assert tokenizer.begin_ids == [tokenizer.special_ids[name] for name in expected]


def test_the_digest_knows_tokens_configuration_and_template(make_tokenizer_folder: Callable[..., Path]) -> None:
    folders = [
        make_tokenizer_folder(("<a>", "<b>"), eos="<a>", template="x"),
        make_tokenizer_folder(("<a>", "<c>"), eos="<a>", template="x"),
        make_tokenizer_folder(("<a>", "<b>"), eos="<b>", template="x"),
        make_tokenizer_folder(("<a>", "<b>"), eos="<a>", template="y"),
    ]
    assert len({Tokenizer.from_folder(folder).digest for folder in folders}) == 4
    assert Tokenizer.from_folder(folders[0]).digest == Tokenizer.from_folder(folders[0]).digest
