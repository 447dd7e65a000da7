"""Names of persons: what a small tagger learned is found in other sentences, exactly, and as transformers reads it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

from tunesmith import api
from tunesmith.data.curate.names import Names
from tunesmith.errors import ModelError
from tunesmith.models.load import Model, NewBase, load_model
from tunesmith.models.names import BETWEEN, WORD, find_names, load_names
from tunesmith.registry.workspace import Workspace

PLAIN = [
    "we",
    "met",
    "and",
    "then",
    "about",
    "new",
    "lamp",
    "those",
    "old",
    "parts",
    "she",
    "saw",
    "near",
    "some",
    "house",
]
PLAIN += [",", ".", ";", "(", ")"]
FIRST, LAST = (  # begin with A to M, and with N to Z
    [f"{initial}{ending}" for initial in initials for ending in ("ana", "elo", "urik")]
    for initials in ("ABCDEFGHIJKLM", "NOPQRSTUVWXYZ")
)
Tagger = Callable[..., Path]


def tagged(random: np.random.Generator, *, tags: dict[str, str], spelt: Callable[[str], str] = str) -> dict[str, Any]:
    """A row of plain words and of names, some of two words, some beside each other."""
    words: list[str] = []
    found: list[str] = []
    for _ in range(6):
        words += list(random.choice(PLAIN, size=random.integers(1, 3)))
        found += ["O"] * (len(words) - len(found))
        if random.random() < 0.7:
            words += [spelt(random.choice(FIRST))]
            found += [tags["first"]]
            if random.random() < 0.6:
                words += [spelt(random.choice(LAST))]
                found += [tags["last"]]
    return {"words": [*words, str(random.choice(PLAIN))], "tags": [*found, "O"]}


@pytest.fixture(scope="module")
def tagger(build_model: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Tagger:
    """`tagger(architecture, first=TAG, last=TAG)`: the folder of a small one, trained and exported by tunesmith."""

    def train(
        architecture: str, *, base: Path | None = None, steps: int = 60, spelt: Callable[[str], str] = str, **tags: str
    ) -> Path:
        folder = tmp_path_factory.mktemp("tagger")
        if base is None:
            base = folder / "base"
            base.mkdir()
            build_model(architecture, dtype=torch.float32).save(base)
        random = np.random.default_rng(3)
        rows = [tagged(random, tags=tags, spelt=spelt) for _ in range(200)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        recipe = {
            "base": str(base),
            "objective": "token_classification",
            "method": "full",
            "data": {"train": str(folder / "rows.jsonl"), "validation": None, "too_long": "truncate"},
            "train": {"max_steps": steps, "batch_rows": 32, "learning_rate": 0.01},
        }
        (folder / "tagger.yaml").write_text(json.dumps(recipe), "utf-8")
        workspace = Workspace(folder / "w")
        run = api.tune(folder / "tagger.yaml", workspace=workspace)
        return api.export(run, form="merged", out=folder / "out", workspace=workspace)

    return train


@pytest.fixture(scope="module")
def folder(tagger: Tagger) -> Path:
    return tagger("bert", first="B-PER", last="I-PER")


@pytest.fixture(scope="module")
def names(folder: Path) -> Names:
    return load_names(str(folder))


def spans(folder: Path, texts: list[str]) -> list[list[tuple[int, int]]]:
    """What the tagger in a folder finds."""
    kinds = {number: 2 if label[0] == "B" else 1 for number, label in labels(folder).items() if label != "O"}
    return find_names(load_model(str(folder), tags=True), texts, kinds=kinds, first=True)


def labels(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / "config.json").read_text("utf-8"))["id2label"]
    return found


UNSEEN = {
    "and then Clara Quist saw her": ("Clara Quist",),
    "about Gustav, near Olga Hedvig Vogt's house": ("Gustav", "Hedvig Vogt"),
    "(Dario) and «Jorun Påhlsson-Rask»": ("Dario", "Jorun Påhlsson-Rask"),
    "he met Frida Kasper Sund": ("Frida", "Kasper Sund"),
    "nobody was there": (),
    "": (),
}


def test_names_that_were_never_seen_are_found_whole(names: Names) -> None:
    texts = {text: found for text, found in UNSEEN.items() if "Olga" not in text}
    assert dict(zip(texts, names.in_texts(list(texts)), strict=True)) == texts


@pytest.mark.parametrize(("first", "last"), [("PERSON", "PERSON"), ("S-per", "S-per")])
def test_tags_without_a_beginning_join_what_they_may(tagger: Tagger, first: str, last: str) -> None:
    """Of tags without B- words beside each other are one name; S- is a name of its own."""
    found = load_names(str(tagger("bert", first=first, last=last))).in_texts(["she met Clara Quist, Dario Sund"])
    one = ("Clara Quist", "Dario Sund")
    assert found == [one if first == "PERSON" else ("Clara", "Quist", "Dario", "Sund")]


@pytest.mark.parametrize(("architecture", "spelt"), [("gpt2", str.swapcase), ("xlm-roberta", str), ("distilbert", str)])
def test_a_word_is_read_where_it_was_trained(tagger: Tagger, architecture: str, spelt: Callable[[str], str]) -> None:
    """A decoder's words at their last byte, which tells a name here, an encoder's at their first."""
    texts, expected = ["then Clara Quist saw some parts", "a new lamp near Dario"], [("Clara Quist",), ("Dario",)]
    found = load_names(str(tagger(architecture, spelt=spelt, first="PER", last="PER"))).in_texts(
        list(map(spelt, texts))
    )
    assert found == [tuple(map(spelt, names)) for names in expected]


def test_a_long_text_has_the_spans_of_its_parts(tagger: Tagger) -> None:
    """The context is 64 tokens, a token a byte: names stand at every place of a window, its edges among them."""
    folder = tagger("bert", first="PER", last="PER")
    parts = [text for text in UNSEEN if text] * 6
    text = "; ".join(parts)
    assert len(text.encode()) > 12 * 64
    expected: list[tuple[int, int]] = []
    start = 0
    for part, found in zip(parts, spans(folder, parts), strict=True):
        expected += [(start + a, start + b) for a, b in found]
        start += len(part) + 2
    assert spans(folder, [text, "with Clara"]) == [expected, [(5, 10)]]


def test_texts_do_not_depend_on_those_beside_them(folder: Path) -> None:
    texts = [*UNSEEN, "x " * 100 + "Clara Quist"]
    assert spans(folder, texts) == [spans(folder, [text])[0] for text in texts]


def test_spans_are_those_of_the_pipeline_of_transformers(tagger: Tagger, tmp_path: Path) -> None:
    """A token a word, so that no word has two tags; words that are not known are names by what stands before them."""
    from transformers import pipeline

    known = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *PLAIN, *FIRST, *LAST, ",", "(", ")", "."]
    backend = Backend(models.WordLevel({word: number for number, word in enumerate(dict.fromkeys(known))}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(known[:4])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    made = {"model_type": "bert", "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    made |= {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(made), "utf-8")
    load_model(NewBase(config=str(tmp_path / "config.json"), tokenizer=str(tmp_path), seed=1)).save(tmp_path / "base")
    folder = tagger("bert", base=tmp_path / "base", steps=150, first="B-PER", last="I-PER")
    random = np.random.default_rng(5)
    rows = [tagged(random, tags={"first": "B-PER", "last": "I-PER"}) for _ in range(40)]
    texts = [" ".join(row["words"]).replace(" and", ", and") + "." for row in rows]
    texts += ["we met Clara Quist.", "she saw (Eelo Turik), Iana"]
    asked = pipeline("token-classification", model=str(folder), aggregation_strategy="simple", device="cpu")
    expected = [[(found["start"], found["end"]) for found in some] for some in asked(texts)]
    assert spans(folder, texts) == expected
    assert sum(map(len, expected)) > 60
    assert sum(" " in text[a:b] for text, found in zip(texts, expected, strict=True) for a, b in found) > 20


def test_labels_without_a_person_are_refused_with_those_that_there_are(tagger: Tagger, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="its labels are B-LOC, I-LOC, O") as error:
        load_names(str(tagger("bert", steps=1, first="B-LOC", last="I-LOC")))
    assert "PER or PERSON" in error.value.hint
    with pytest.raises(ModelError, match="its labels are none"):
        load_names("starter")


def test_a_base_without_a_head_is_no_tagger(build_model: Callable[..., Model], tmp_path: Path) -> None:
    """transformers would make the head up at random."""
    build_model("bert", dtype=torch.float32).save(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text("utf-8"))
    named = {"id2label": {"0": "O", "1": "PER"}, "label2id": {"O": 0, "PER": 1}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | named), "utf-8")
    with pytest.raises(ModelError, match=r"lack classifier\.bias"):
        load_names(str(tmp_path / "base")).in_texts(["a text"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("O'Brien's, Jean-Luc: J. R.", ["O'Brien", "Jean-Luc", "J", "R"]),
        ("<anna_roth@x> „Łukasz“ 'Zoë'…", ["anna", "roth", "x", "Łukasz", "Zoë"]),
        ("山田さん अनीता Mu\u0308ller😀", ["山", "田", "さ", "ん", "अनीता", "Mu\u0308ller"]),
        ("d’Alembert’s", ["d’Alembert"]),
    ],
)
def test_words_are_told_from_the_text(text: str, words: list[str]) -> None:
    assert WORD.findall(text) == words


def test_what_may_stand_between_the_words_of_a_name() -> None:
    text = "J. Roth. Ida\nZorn"
    assert BETWEEN.fullmatch(text, 1, 3)
    assert not BETWEEN.fullmatch(text, 7, 9)
    assert not BETWEEN.fullmatch(text, 12, 13)


def test_what_it_is_read_from_changes_with_the_model(names: Names, folder: Path) -> None:
    before = load_names(str(folder)).files
    assert before == names.files
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    after = load_names(str(folder)).files
    assert [a.rpartition("/")[2].split()[0] for a, b in zip(after, before, strict=True) if a != b] == [weights.name]
