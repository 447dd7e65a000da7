import json
import lzma
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jinja2 import TemplateError
from train_tokenizer import BYTE_TOKENS, PIECE, SPECIAL_TOKENS, VOCABULARY_SIZE, structured_text
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
STARTER = ROOT / "recipes" / "starter"
HELDOUT = ROOT / ".." / "shared" / "data" / "prose" / "heldout.txt.xz"
TOKENIZER = AutoTokenizer.from_pretrained(STARTER / "tokenizer")
PIECES = [
    piece for piece in TOKENIZER.get_vocab() if piece not in set(SPECIAL_TOKENS) and piece not in set(BYTE_TOKENS)
]


def encode(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


@given(st.text(max_size=60))
@example("a▁b\u2028\r\n\t\x00é e\u0301 漢字 😀👩‍👩‍👧  ")
@example("<0x0A> <|end|> <|user|>hi  \n\n\n  ")
def test_decode_of_encode_is_the_text(text: str):
    assert TOKENIZER.decode(encode(text)) == text


@given(st.text(alphabet=" \n\t'\".,-a1é{}😀", max_size=40))
def test_decode_of_encode_is_the_text_around_spaces_and_marks(text: str):
    assert TOKENIZER.decode(encode(text)) == text


def test_ids_that_models_are_trained_with():
    assert len(TOKENIZER) == VOCABULARY_SIZE == 4096
    assert [TOKENIZER.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(16))
    assert [TOKENIZER.convert_tokens_to_ids(token) for token in BYTE_TOKENS] == list(range(16, 272))
    assert (TOKENIZER.pad_token, TOKENIZER.bos_token, TOKENIZER.eos_token) == ("<|pad|>", "<|begin|>", "<|end|>")
    assert TOKENIZER.model_max_length == 2048
    assert TOKENIZER.clean_up_tokenization_spaces is False


def test_nothing_is_added_to_a_text():
    assert encode("") == []
    assert encode("The") == [TOKENIZER.get_vocab()["The"]]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("\n", ["\n"]),
        ("\n\n", ["\n\n"]),
        ("the\n\n\n the", ["the", "\n\n", "\n", " the"]),
        ("  the ", [" ", " the", " "]),
        (" 2024", [" ", "2", "0", "2", "4"]),
        ("don't", ["d", "on", "'t"]),
        ('{"and":"the"}', ['{"', "and", '":"', "the", '"}']),
        ("é¿", ["é", "<0xC2>", "<0xBF>"]),
    ],
)
def test_pieces_of_a_text(text: str, pieces: list[str]):
    assert TOKENIZER.convert_ids_to_tokens(encode(text)) == pieces


def test_no_piece_crosses_a_boundary():
    for piece in PIECES:
        inner = piece.removeprefix(" ") or piece
        kinds = {
            "letter" if c.isalpha() else "digit" if c.isdigit() else "space" if c.isspace() else "mark" for c in inner
        }
        contraction = inner in {"'s", "'t", "'d", "'m", "'re", "'ve", "'ll", "'v", "'l", "'r"}
        assert len(kinds) == 1 or contraction, repr(piece)
        assert not inner.isdigit() or len(piece) == 1, repr(piece)
        assert "\n" not in piece or piece in ("\n", "\n\n"), repr(piece)


def test_a_conversation_is_rendered_compactly_and_word_for_word():
    system, user, assistant = " Be brief. ", "Hi\n", "{}"
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": user},
        {"role": "assistant", "content": assistant},
    ]
    ids = TOKENIZER.apply_chat_template(messages)["input_ids"]
    assert ids == [1, 3, *encode(system), 2, 4, *encode(user), 2, 5, *encode(assistant), 2]
    prompt = TOKENIZER.apply_chat_template(messages[:2], add_generation_prompt=True)["input_ids"]
    assert ids[: len(prompt)] == prompt
    assert prompt[-1] == 5


@pytest.mark.parametrize("role", ["tool", "developer", "User", ""])
def test_an_unknown_role_is_refused(role: str):
    with pytest.raises(TemplateError, match="unknown role"):
        TOKENIZER.apply_chat_template([{"role": role, "content": "x"}], tokenize=False)


def test_the_committed_tokenizer_is_the_one_the_program_makes():
    saved = json.loads((STARTER / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    assert saved["pre_tokenizer"]["pattern"] == {"Regex": PIECE}
    assert saved["normalizer"] is None
    template = (STARTER / "chat_template.jinja").read_text(encoding="utf-8").strip()
    assert (STARTER / "tokenizer" / "chat_template.jinja").read_text(encoding="utf-8").strip() == template


def test_the_model_configuration_fits_the_tokenizer():
    config = json.loads((STARTER / "config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == len(TOKENIZER)
    assert config["max_position_embeddings"] == TOKENIZER.model_max_length
    ids = (config["pad_token_id"], config["bos_token_id"], config["eos_token_id"])
    assert ids == (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id)


def test_structured_text_is_repeatable_and_holds_json():
    documents = ["The quick brown fox jumps over the lazy dog."]
    texts = list(structured_text(documents, num_records=20))
    assert texts == list(structured_text(documents, num_records=20))
    assert all(isinstance(json.loads(text), dict) for text in texts[::3])


@pytest.mark.skipif(not HELDOUT.exists(), reason="the prose corpus is not beside the repository")
def test_held_out_prose_is_short_and_comes_back():
    text = lzma.decompress(HELDOUT.read_bytes()).decode("utf-8")[:200_000]
    ids = TOKENIZER._tokenizer.encode(text).ids
    assert TOKENIZER.decode(ids) == text
    assert len(text.encode("utf-8")) / len(ids) > 3.4
