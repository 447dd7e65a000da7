"""Passages before the questions that are trained on: what is trained is what is asked, counted and known to the cache."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.data.prepare import prepare
from tunesmith.data.prepared import Prepared
from tunesmith.data.retrieval import look_up_passages, look_up_rows, read_passages
from tunesmith.data.settings import DataSettings, LookUpSettings
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.types import Example
from tunesmith.errors import DataError, NotFoundError
from tunesmith.objectives.causal import Causal
from tunesmith.objectives.instruction import Instruction

NUM_ROWS = 60
MAX_TOKENS = 2048
Make = Callable[..., Prepared]


@pytest.fixture(scope="session")
def template(toy_tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(toy_tokenizer)


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """A passage for each row's number, too long to be joined with the next."""
    folder = tmp_path / "library"
    folder.mkdir()
    for number in range(NUM_ROWS):
        (folder / f"{number:03}.txt").write_text(f"Number {number:03} is red. " + "filler " * 5)
    return folder


@pytest.fixture
def make(tmp_path: Path, template: ChatTemplate, documents: Path) -> Make:
    def make(rows: list[dict[str, Any]] | None = None, *, max_tokens: int = MAX_TOKENS, **given: Any) -> Prepared:
        path = tmp_path / "rows.jsonl"
        rows = rows or [{"prompt": f"Colour of {n:03}?", "completion": "red"} for n in range(NUM_ROWS)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        look_up = LookUpSettings(**{"documents": str(documents), "passages": 2} | given.pop("look_up", {}))
        objective = given.pop("objective", Instruction())
        settings = DataSettings(**{"train": str(path), "validation": 0.2, "look_up": look_up} | given)
        return prepare(
            settings, objective=objective, template=template, max_tokens=max_tokens, cache=tmp_path / "cache"
        )

    return make


def asked(prepared: Prepared, name: str, *, template: ChatTemplate) -> list[str]:
    """The prompts of a side as they are read, without the answer."""
    store = {"train": prepared.train, "validation": prepared.validation}[name]
    assert store is not None
    texts = []
    for unit in range(len(store)):
        ((sequence),) = store.unit(unit)
        texts.append(template.tokenizer.decode(sequence.tokens_T[sequence.weight_T == 0].tolist()))
    return texts


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_rows_have_what_is_found_or_other_passages_as_they_are_asked(make, template, documents, share):
    prepared = make(look_up={"share": share})
    lookup = look_up_passages(read_passages(documents), count=2, fits=lambda messages, example: True)

    def found(example: Example) -> str:
        return template.tokenizer.decode(template.prompt(lookup.prompt(example)).ids)

    rows = list(prepared.examples("train"))
    as_asked = [text == found(row) for row, text in zip(rows, asked(prepared, "train", template=template), strict=True)]
    counts = prepared.ledger["reasons"]["trained"]
    assert counts.get("with passages found") == sum(as_asked)
    assert counts.get("with other passages", 0) == len(rows) - sum(as_asked)
    assert sum(as_asked) == len(rows) if share == 1 else 0.3 * len(rows) < sum(as_asked) < 0.7 * len(rows)
    for row, text, helped in zip(rows, asked(prepared, "train", template=template), as_asked, strict=True):
        number = row.messages[0].content.removeprefix("Colour of ").removesuffix("?")
        assert text.count("is red.") == 2 if not helped else f"Number {number} is red." in text
        assert (f"Number {number} is red." in text) == helped
        assert len(row.messages) == 2  # what few-shot prompts are drawn from has no passages
        assert "filler" not in row.messages[0].content
    held = list(prepared.examples("validation"))
    assert held
    assert asked(prepared, "validation", template=template) == [found(row) for row in held]


def test_fewer_passages_stand_before_a_question_where_the_row_would_be_too_long(make, template):
    whole = make(look_up={"share": 0.5})
    lengths = [len(s.tokens_T) for unit in range(len(whole.train)) for s in whole.train.unit(unit)]
    for limit, most in ((max(lengths) - 1, 1), (40, 0)):
        shorter = make(look_up={"share": 0.5}, max_tokens=limit)
        assert shorter.train.longest() <= limit
        texts = asked(shorter, "train", template=template)
        assert max(text.count("is red.") for text in texts) >= most
        assert len(texts) == len(whole.train)
    assert shorter.ledger["reasons"]["trained"] == {"without passages": len(whole.train)}


def test_rows_keep_their_passages_whatever_is_added(make, template):
    before = make(look_up={"share": 0.5}, validation=None)
    rows = [{"prompt": f"Colour of {n:03}?", "completion": "red"} for n in range(NUM_ROWS)]
    after = make([{"prompt": "And of 999?", "completion": "none"}, *rows], look_up={"share": 0.5}, validation=None)
    assert asked(after, "train", template=template)[1:] == asked(before, "train", template=template)


def test_the_documents_are_part_of_what_is_prepared(make, documents):
    first = make()
    assert make().folder == first.folder
    assert len(first.files["look_up"]) == NUM_ROWS
    (documents / "000.txt").write_text("Number 000 is green.")
    assert make().folder != first.folder
    assert make(look_up={"share": 0.5}).folder != make(look_up={"share": 0.6}).folder


def test_rows_without_a_question_and_folders_without_texts_are_refused(make, tmp_path):
    texts = [{"text": f"Once there were {number} bears."} for number in range(5)]
    with pytest.raises(DataError, match="this row is plain text"):
        make(texts, objective=Causal())
    with pytest.raises(NotFoundError, match="no such folder"):
        make(look_up={"documents": str(tmp_path / "nowhere")})
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no text"):
        make(look_up={"documents": str(tmp_path / "empty")})


def test_selected_rows_have_their_passages(make, template):
    prepared = make(look_up={"share": 1.0}, select={"keep": 10, "by": "diversity"})
    assert prepared.ledger["reasons"]["trained"] == {"with passages found": 10}
    assert all("is red." in text for text in asked(prepared, "train", template=template))


def test_without_documents_other_rows_are_shown_as_they_are_asked_and_never_a_row_itself(make, template):
    rows = [{"prompt": f"Colour of {n % 30:03}, {n % 3} and {n % 5}?", "completion": f"red {n}"} for n in range(60)]
    prepared = make(rows, look_up={"documents": None, "passages": 3, "share": 0.7})
    examples = list(prepared.examples("train"))
    texts = asked(prepared, "train", template=template)

    def found(example: Example, *, among: list[Example]) -> str:
        lookup = look_up_rows(among, plain=False, count=3, fits=lambda messages, example: True)
        return template.tokenizer.decode(template.prompt(lookup.prompt(example)).ids)

    num_found = 0
    for example, text in zip(examples, texts, strict=True):
        others = [row for row in examples if row.prompt_key != example.prompt_key]
        num_found += text == found(example, among=others)
        answers = {row.messages[-1].content for row in examples if row.prompt_key == example.prompt_key}
        assert len(answers) == 2  # the prompt stands there twice
        assert text.count("red ") == 3
        assert not any(text.count(f"{answer}<") for answer in answers)
    counts = prepared.ledger["reasons"]["trained"]
    assert counts == {"with rows found": num_found, "with other rows": len(examples) - num_found}
    assert 0.5 * len(examples) < num_found < 0.9 * len(examples)
    held = list(prepared.examples("validation"))
    assert held
    assert asked(prepared, "validation", template=template) == [found(row, among=examples) for row in held]


def test_of_shown_rows_nothing_is_trained_and_only_selected_ones_are_shown(make, template):
    rows = [{"prompt": f"Colour of {n:03} and all?", "completion": f"answer{n:03}"} for n in range(40)]
    prepared = make(
        rows, look_up={"documents": None, "passages": 2, "share": 1.0}, select={"keep": 12, "by": "diversity"}
    )
    examples = list(prepared.examples("train"))
    assert prepared.ledger["reasons"]["trained"] == {"with rows found": 12}
    kept = {row.messages[-1].content for row in examples}
    for unit, row in enumerate(examples):
        ((sequence,),) = (prepared.train.unit(unit),)
        trained = template.tokenizer.decode(sequence.tokens_T[sequence.weight_T > 0].tolist())
        assert trained.startswith(row.messages[-1].content)
        assert trained.count("answer") == 1
    for text in asked(prepared, "train", template=template):
        shown = set(re.findall(r"answer\d+", text))
        assert len(shown) == 2
        assert shown < kept


def test_fewer_rows_are_shown_where_the_row_would_be_too_long(make, template):
    whole = make(look_up={"documents": None, "share": 1.0})
    longest = whole.train.longest()
    shorter = make(look_up={"documents": None, "share": 1.0}, max_tokens=longest - 1)
    assert shorter.train.longest() < longest
    alone = make(look_up={"documents": None, "share": 1.0}, max_tokens=longest // 3 + 2)
    assert alone.ledger["reasons"]["trained"] == {"without rows": len(whole.train)}
