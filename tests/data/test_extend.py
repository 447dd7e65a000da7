"""Extending a byte-pair tokenizer: against a naive reference, and against a tokenizer trained at once."""

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from tunesmith.data.extend import (
    MIN_OCCURRENCES,
    check_extends,
    check_extensible,
    count_words,
    extended,
    fertility,
    first_new_id,
    learn_tokens,
    old_pieces,
)
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import ModelError, RecipeError

STARTER = Path(__file__).resolve().parents[2] / "recipes" / "starter" / "tokenizer"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
GERMAN = """\
Die Bäckerei öffnet früh. Wer über die Brücke geht, hört schon von weitem das Läuten der Glocken und riecht das Brot.
Der Müller bringt das Mehl, die Bäckerin bäckt das Brot, und die Kinder tragen es über die Brücke zu den Häusern.
Im Frühling blühen die Bäume an der Brücke, und die Bienen fliegen von Blüte zu Blüte. Im Sommer trocknen die Wäscherinnen
die Wäsche auf der Wiese. Im Herbst fallen die Blätter, und der Müller repariert das Mühlrad. Im Winter frieren die Bäche,
das Mühlrad steht still, und die Bäckerin erzählt den Kindern Märchen über den Müller, die Mühle und das Mädchen.
Die Häuser haben rote Dächer, und auf den Dächern sitzen die Vögel. Früher, erzählt die Großmutter, war die Brücke aus Holz;
heute ist sie aus Stein, und darüber fahren die Züge. Der Zug hält zweimal täglich, früh und spät, und die Leute grüßen sich.
"""
GERMAN_HELD_OUT = """\
Das Mädchen geht früh über die Brücke und grüßt den Müller. Die Bäckerin hört den Zug, und die Vögel fliegen über die Dächer.
"""
starter = Tokenizer.from_folder(STARTER)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def byte_level(merges: list[tuple[str, str]] | None = None, **model: Any) -> Backend:
    """Bytes first, then what the merges make; GPT-2's pre-tokeniser."""
    names = [*ALPHABET, *(a + b for a, b in merges or [])]
    backend = Backend(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=merges or [], **model))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def sentence_piece() -> Backend:
    """Characters and bytes, spaces marked, and no pre-tokeniser: the layout of Llama 2."""
    names = ["<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", *"abcdehilnorstuw."]
    vocabulary = {name: index for index, name in enumerate(names)} | {"\u2581d": len(names)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[("\u2581", "d")], byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    replace, strip = decoders.Replace("\u2581", " "), decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def grown(tokenizer: Tokenizer, texts: list[str], *, num_new: int) -> Tokenizer:
    words = count_words(texts, tokenizer=tokenizer)
    return extended(tokenizer, tokens=learn_tokens(words, tokenizer=tokenizer, num_new=num_new))


def merges_of(backend: Backend) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]


# ------------------------------------------------------------------------------------------------- what is learned


def naive(words: Counter[str], tokenizer: Tokenizer, num_new: int) -> list[str]:
    """All pairs counted anew for every token. Words of bytes, or of characters that all have tokens of their own."""
    vocabulary = tokenizer.backend.get_vocab()
    names = {index: name for name, index in vocabulary.items()}
    plain = json.loads(tokenizer.backend.to_str()) | {"pre_tokenizer": None, "normalizer": None, "added_tokens": []}
    spell = Backend.from_str(json.dumps(plain))
    spelled = {word: spell.encode(word).ids for word in words}
    found: list[str] = []
    while len(found) < num_new:
        counts: Counter[tuple[int, int]] = Counter()
        for word, ids in spelled.items():
            for pair in pairwise(ids):
                counts[pair] += words[word]
        new = {p: c for p, c in counts.items() if c >= MIN_OCCURRENCES and names[p[0]] + names[p[1]] not in vocabulary}
        if not new:
            return found
        pair = min(new, key=lambda p: (-new[p], p))
        index, text = max(names) + 1, names[pair[0]] + names[pair[1]]
        names[index] = text
        vocabulary[text] = index
        found.append(text)
        for word, ids in spelled.items():
            after, i = [], 0
            while i < len(ids):
                match = tuple(ids[i : i + 2]) == pair
                after.append(index if match else ids[i])
                i += 2 if match else 1
            spelled[word] = after
    return found


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=9), st.integers(1, 5), min_size=1, max_size=12),
    st.integers(1, 12),
    st.booleans(),
)
def test_what_is_learned_is_what_a_naive_search_finds(words: dict[str, int], num_new: int, begun: bool) -> None:
    tokenizer = Tokenizer(byte_level([("a", "b"), ("ab", "a")] if begun else None))
    expected = naive(Counter(words), tokenizer, num_new)
    if len(expected) < num_new:
        with pytest.raises(RecipeError, match=f"hold only {len(expected)} pieces") as error:
            learn_tokens(Counter(words), tokenizer=tokenizer, num_new=num_new)
        assert f"objective.new_tokens: {len(expected)} " in error.value.hint
    else:
        learned = learn_tokens(Counter(words), tokenizer=tokenizer, num_new=num_new)
        assert [token.text for token in learned] == expected
        vocabulary = {i: t for t, i in extended(tokenizer, tokens=learned).backend.get_vocab().items()}
        for token in learned:
            first, second = token.parts
            assert vocabulary[first] + vocabulary[second] == token.text


def trained(texts: list[str], *, num_merges: int) -> Backend:
    """The tokenizers library's own training, at once."""
    backend = byte_level()
    trainer = trainers.BpeTrainer(vocab_size=256 + num_merges, initial_alphabet=ALPHABET, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return backend


@pytest.mark.parametrize("begun", [0, 30])
def test_going_on_gives_what_training_at_once_gives(begun: int) -> None:
    lines = GERMAN.splitlines()
    expected = trained(lines, num_merges=100)
    found = grown(Tokenizer(trained(lines, num_merges=begun)), lines, num_new=100 - begun).backend
    assert merges_of(found) == merges_of(expected)
    assert found.get_vocab() == expected.get_vocab()


def test_by_hand() -> None:
    """aab aab ab: (a, b) stands there three times, then (a, ab) twice."""
    learned = learn_tokens(Counter({"aab": 2, "ab": 1}), tokenizer=Tokenizer(byte_level()), num_new=2)
    assert [token.text for token in learned] == ["ab", "aab"]
    with pytest.raises(RecipeError, match="hold only 2 pieces"):
        learn_tokens(Counter({"aab": 2, "ab": 1}), tokenizer=Tokenizer(byte_level()), num_new=3)


def test_ties_go_to_the_smaller_ids() -> None:
    learned = learn_tokens(Counter({"cd": 2, "ab": 2, "ba": 2}), tokenizer=Tokenizer(byte_level()), num_new=3)
    assert [token.text for token in learned] == ["ab", "ba", "cd"]


def test_a_character_of_many_bytes_is_worth_what_it_saves() -> None:
    """ж (2 bytes) four times saves 4 tokens; 世 (3 bytes) three times saves 6; ьu needs ь first."""
    tokenizer = Tokenizer(sentence_piece())
    learned = learn_tokens(Counter({"ж": 4, "世": 3, "ьu": 2}), tokenizer=tokenizer, num_new=4)
    assert [(token.text, token.is_merge) for token in learned] == [
        ("世", False), ("ж", False), ("ь", False), ("ьu", True),
    ]  # fmt: skip
    larger = extended(tokenizer, tokens=learned)
    assert [len(ids) for ids in larger.encode_text(["ж世ьu"])] == [1 + 3]


@pytest.mark.parametrize("tokenizer", [starter, Tokenizer(byte_level()), Tokenizer(sentence_piece())])
def test_what_is_read_afterwards_is_what_was_counted(tokenizer: Tokenizer) -> None:
    """Word by word or as a whole, a text has as many tokens."""
    lines = GERMAN.splitlines()
    words = count_words(lines, tokenizer=tokenizer)
    larger = extended(tokenizer, tokens=learn_tokens(words, tokenizer=tokenizer, num_new=40))
    bare = json.loads(larger.backend.to_str()) | {"pre_tokenizer": None, "normalizer": None, "added_tokens": []}
    spell = Backend.from_str(json.dumps(bare))
    assert sum(count * len(spell.encode(word).ids) for word, count in words.items()) == sum(
        map(len, larger.encode_text(lines))
    )


def test_the_order_of_the_texts_does_not_matter() -> None:
    lines = GERMAN.splitlines()
    shuffled = random.Random(3).sample(lines, len(lines))
    assert grown(starter, lines, num_new=40).digest == grown(starter, shuffled, num_new=40).digest


def test_words_are_counted_where_whole_texts_are_handed_on() -> None:
    words = count_words(["die die der\ndie  der"], tokenizer=Tokenizer(sentence_piece()))
    assert words["\u2581die"] == 2
    assert words["\u2581der\n"] == 1
    assert not any("\u2581" in word.lstrip("\u2581") for word in words)
    assert max(map(len, count_words(["x" * 5000], tokenizer=Tokenizer(sentence_piece())))) == 256


# ---------------------------------------------------------------------------------------------------- what is kept

german_starter = grown(starter, GERMAN.splitlines(), num_new=40)
german_bytes = grown(Tokenizer(byte_level([("e", "r")])), GERMAN.splitlines(), num_new=40)
german_marks = grown(Tokenizer(sentence_piece()), GERMAN.splitlines(), num_new=40)
PAIRS = {
    "starter": (starter, german_starter),
    "bytes": (Tokenizer(byte_level([("e", "r")])), german_bytes),
    "marks": (Tokenizer(sentence_piece()), german_marks),
}


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=100, deadline=None)
@given(text=any_text | st.text("".join(sorted(set(GERMAN))), max_size=60))
def test_any_text_comes_back(name: str, text: str) -> None:
    old, new = PAIRS[name]
    (before,), (after,) = old.encode_text([text]), new.encode_text([text])
    assert new.decode(after) == old.decode(before)
    assert new.decode(before) == old.decode(before)  # what was stored in old ids still reads the same
    assert len(after) <= len(before)


@pytest.mark.parametrize("name", PAIRS)
def test_every_old_id_keeps_its_meaning(name: str) -> None:
    old, new = PAIRS[name]
    before, after = old.backend.get_vocab(), new.backend.get_vocab()
    assert before.items() <= after.items()
    assert sorted(set(after.values()) - set(before.values())) == list(range(first_new_id(old), first_new_id(old) + 40))
    assert new.special_ids == old.special_ids
    for ids, index in zip(old_pieces(new, old=old), range(first_new_id(old), first_new_id(new)), strict=True):
        assert len(ids) > 1
        assert max(ids) < first_new_id(old)
        assert new.decode([index]) == old.decode(ids)


def test_a_pair_is_not_learned_that_is_a_token_already() -> None:
    """Special tokens come from templates alone, however often a text spells them."""
    larger = grown(starter, ["<|end|> <|user|> <|end|>"] * 50 + GERMAN.splitlines(), num_new=45)
    assert larger.special_ids == starter.special_ids
    (ids,) = larger.encode_text(["<|end|>"])
    assert not set(ids) & set(larger.special_ids.values())
    assert larger.decode(ids, skip_special_tokens=False) == "<|end|>"
    assert larger.encode_rendered(["<|end|>"]) == [[starter.special_ids["<|end|>"]]]


def test_text_that_looks_like_a_byte_does_not_become_one() -> None:
    texts = ["a <0x41> <0xff> <0x+7> b"] * 50
    larger = grown(Tokenizer(sentence_piece()), texts, num_new=20)
    assert larger.decode(larger.encode_text(texts[:1])[0]) == texts[0]


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_added_tokens_behind_the_vocabulary_keep_their_ids(ignore_merges: bool) -> None:
    """Llama 3's layout: the model does not know its special tokens, which come after it."""
    backend = byte_level([("e", "r")], ignore_merges=ignore_merges)
    backend.add_special_tokens([AddedToken("<|eot|>", special=True, normalized=False)])
    backend.add_tokens([AddedToken("[tool]", special=False, normalized=False)])
    old = Tokenizer(backend)
    new = grown(old, [*GERMAN.splitlines(), *["x [tool] [tool]y"] * 9], num_new=40)
    again = Tokenizer(Backend.from_str(new.backend.to_str()))
    for tokenizer in (new, again):
        assert tokenizer.special_ids == old.special_ids == {"<|eot|>": 257}
        assert tokenizer.backend.token_to_id("[tool]") == 258
        assert min(i for t, i in tokenizer.backend.get_vocab().items() if t not in old.backend.get_vocab()) == 259
        assert tokenizer.decode(tokenizer.encode_text(["a<|eot|>b"])[0], skip_special_tokens=False) == "a<|eot|>b"
        assert tokenizer.encode_rendered(["er<|eot|>"]) == [[256, 257]]
    learned = set(new.backend.get_vocab()) - set(old.backend.get_vocab())
    assert not any("tool" in text for text in learned)


def test_another_tokenizer_is_not_taken_for_an_extended_one() -> None:
    check_extends(german_starter, old=starter)
    for tokenizer in (Tokenizer(byte_level()), german_bytes):
        with pytest.raises(ModelError, match="keep the meaning") as error:
            check_extends(tokenizer, old=starter)
        assert error.value.hint


# ----------------------------------------------------------------------------------------------------- what it gains


def test_fertility_by_hand() -> None:
    found = fertility(["ab cd", "é"], tokenizer=Tokenizer(byte_level())).as_dict()
    assert found == {"words": 3, "bytes": 7, "tokens": 7, "tokens_per_word": 2.3333, "bytes_per_token": 1.0}
    assert fertility([], tokenizer=starter).as_dict()["tokens_per_word"] == 0


@pytest.mark.parametrize("name", PAIRS)
def test_fertility_falls_on_held_out_text_of_the_new_language(name: str) -> None:
    before, after = (fertility([GERMAN_HELD_OUT], tokenizer=t).as_dict() for t in PAIRS[name])
    assert after["tokens_per_word"] < 0.9 * before["tokens_per_word"]
    assert after["bytes_per_token"] > before["bytes_per_token"]


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.Unigram([("a", -1.0), ("b", -2.0)], 0, False), "Unigram"),
        (models.WordPiece({"[UNK]": 0, "a": 1}), "WordPiece"),
        (models.WordLevel({"a": 1}, unk_token="a"), "WordLevel"),
        (models.BPE(vocab={"a": 0, "b": 1}, merges=[]), "no tokens for bytes"),
        (models.BPE(vocab={"a": 0, "b": 1}, merges=[], byte_fallback=True), "no tokens for bytes"),
        (models.BPE(vocab={"a</w>": 0}, merges=[], end_of_word_suffix="</w>"), "marks the parts of a word"),
        (models.BPE(vocab={n: i for i, n in enumerate(ALPHABET)}, merges=[], dropout=0.1), "at random"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_cannot_be_extended_is_refused_by_name(model: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        check_extensible(Tokenizer(Backend(model), folder=Path("somewhere")))
    assert "new_tokens" in error.value.hint
    assert error.value.file == "somewhere"
