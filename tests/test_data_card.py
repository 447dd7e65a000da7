"""The data card: its numbers are the ledger's, rows stay text, and nobody's data stands in it."""

import contextlib
import html.parser
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tunesmith import api, cli
from tunesmith.checks import check_data
from tunesmith.data.settings import DataSettings
from tunesmith.data_card import MAX_BARS, MAX_SHOWN, SAMPLE_ROWS, histogram, write_card
from tunesmith.errors import DataError, RecipeError, StorageError
from tunesmith.evaluate.curves import columns
from tunesmith.recipe import load_recipe
from tunesmith.registry.workspace import Workspace
from tunesmith.runs import check_unchanged

NASTY = '<script>alert("owned")</script><img src=x onerror=alert(1)> {{ 7*7 }} {% raw %} & \' </svg></style>'
QUEUES = ("billing", "delivery", "account")
DIGEST = re.compile("[0-9a-f]{64}")  # which may hold any three digits by chance
PRIVATE = {
    "an e-mail address": "jane.doe@example.com",
    "a phone number": "+1-415-555-0199",
    "a card number": "4111 1111 1111 1111",
    "an IP address": "203.0.113.77",
    "an access key": "ghp_" + "a1B2" * 9,
}
Card = tuple[dict[str, Any], str]
Make = Callable[..., Card]


def tickets(count: int = 60) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Ticket {i}: where is it?", "completion": QUEUES[i % 3], "license": "MIT"} for i in range(count)
    ]


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")


@pytest.fixture(scope="module")
def base(build_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build_model("llama", dtype=torch.float32, max_position_embeddings=512).save(folder)
    return folder


@pytest.fixture
def make(base: Path, tmp_path: Path) -> Make:
    """`make(rows, recipe={...}, **data settings)`: the document and the page of their card."""

    def make(rows: list[Any], *, recipe: dict[str, Any] | None = None, out: str = "card.html", **data: Any) -> Card:
        write(tmp_path / "rows.jsonl", rows)
        value = {"base": str(base), "data": {"train": "rows.jsonl"} | data} | (recipe or {})
        (tmp_path / "tickets.yaml").write_text(yaml.safe_dump(value))
        workspace = Workspace(tmp_path / ".tunesmith")
        document = write_card(tmp_path / "tickets.yaml", out=tmp_path / out, workspace=workspace)
        page = (tmp_path / out).read_text("utf-8")
        assert json.loads((tmp_path / out).with_suffix(".json").read_text("utf-8")) == document
        return document, page

    return make


class Page(html.parser.HTMLParser):
    """Elements, attributes and visible text of a page; `open` is what was never closed."""

    VOID = frozenset({"meta"})

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


# ------------------------------------------------------------------------------------------------------- what it says


def test_the_numbers_are_those_of_the_ledger(make: Make, tmp_path: Path) -> None:
    rows = [*tickets(), tickets()[0], tickets()[1], "{broken", {"prompt": "and this?", "completion": ""}]
    write(tmp_path / "test.jsonl", [{"prompt": f"Late {i}?", "completion": "billing"} for i in range(7)])
    document, text = make(rows, test="test.jsonl", bad_rows="drop", duplicates="drop", validation=0.2)
    ledger, splits = document["ledger"], document["splits"]
    prepared = json.loads(next((tmp_path / ".tunesmith").rglob("ledger.json")).read_text())
    assert {name: ledger[name] for name in ("rows", "states", "reasons")} == {
        name: prepared[name] for name in ("rows", "states", "reasons")
    }
    assert ledger["states"]["duplicate"] == ledger["states"]["bad"] == 2
    assert (splits["train"], splits["test"]) == (ledger["states"]["trained"], 7)
    assert 0 < splits["validation"] == ledger["states"]["held_out_validation"]
    files = [(entry["file"], entry["role"], entry["rows"]) for entry in document["files"]]
    assert files == [("rows.jsonl", "train", 64), ("test.jsonl", "test", 7)]
    assert sum(entry["rows"] for entry in document["files"]) == ledger["rows"] == document["rows"]
    largest = document["classes"]["largest"]
    assert sum(entry["rows"] for entry in largest) == sum(splits.values())
    assert all(sum(entry[side] for entry in largest) == splits[side] for side in ("train", "validation", "test"))
    assert sum(part["rows"] for part in document["tokens"]["histogram"]) == splits["train"]
    page = Page(text)
    assert not page.open
    assert document["sentence"] in page.text
    assert f"{splits['train']} to train on, {splits['validation']} held out for validation" in document["sentence"]
    assert document["sentence"].endswith("7 held out for testing, 4 left out.")


def test_what_the_recipe_says_is_told_and_the_rest_is_not_stated(make: Make) -> None:
    document, text = make(tickets(), origin="the help desk", licence="  ")
    assert (document["origin"], document["licence"], document["notes"]) == ("the help desk", None, None)
    assert Page(text).text.count("not stated") == 2
    assert document["row_licences"] == {"counts": {"MIT": 60}, "others": 0}
    assert document["columns"][2] == {"name": "license", "rows": 60, "used": False}


def test_what_describes_the_rows_prepares_nothing_anew(make: Make) -> None:
    plain, _ = make(tickets())
    described, _ = make(tickets(), out="other.html", origin="the help desk", licence="MIT", notes=NASTY)
    assert plain["version"] == described["version"]
    changed, _ = make(tickets(), out="third.html", duplicates="drop")
    assert plain["version"] != changed["version"]


def test_a_run_goes_on_after_its_data_was_described(tmp_path: Path) -> None:
    def resolved(**data: Any) -> dict[str, Any]:
        return {"recipe": {"data": DataSettings(train="a", **data).model_dump(mode="json")}, "hashes": {"data": "0"}}

    (tmp_path / "resolved.json").write_text(json.dumps(resolved()))
    check_unchanged(tmp_path, resolved(origin="the help desk", notes="as exported"))
    with pytest.raises(RecipeError, match=r"recipe\.data changed"):
        check_unchanged(tmp_path, resolved(duplicates="drop"))


def test_tokens_are_those_of_the_store(make: Make) -> None:
    rows = [{"prompt": "x" * n, "completion": "y"} for n in (1, 2, 3, 4, 90)]
    document, _ = make(rows, validation=None)
    frame = 6  # begin, user, end, assistant, the answer, end: a byte is a token
    tokens = document["tokens"]
    assert (tokens["total"], tokens["targets"]) == (100 + 5 * frame, 10)
    assert (tokens["median"], tokens["longest"]) == (3 + frame, 90 + frame)
    assert document["classes"]["largest"][0]["rows"] == 5


def test_many_classes_are_counted_and_prose_has_none(make: Make) -> None:
    rows = [{"text": f"text {i}", "label": f"class {i % 45}"} for i in range(300)]
    document, text = make(rows, recipe={"objective": "classification"}, validation=None)
    classes = document["classes"]
    assert (classes["classes"], len(classes["largest"])) == (45, MAX_SHOWN)
    assert classes["others"] == {"classes": 15, "rows": 15 * 6}
    assert "15 others" in Page(text).text
    prose, _ = make([{"prompt": f"{i}?", "completion": f"Answer number {i}."} for i in range(30)], out="b.html")
    assert prose["classes"] is None


def test_numbers_are_no_classes(make: Make) -> None:
    rows = [{"text": f"text {i}", "label": i / 4} for i in range(41)]
    document, text = make(rows, recipe={"objective": "regression"}, validation=None)
    assert document["classes"] is None
    assert document["numbers"] == {"least": 0.0, "p05": 0.5, "median": 5.0, "p95": 9.5, "largest": 10.0}
    assert "the median is 5" in Page(text).text


def test_findings_have_their_places(make: Make, tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", tickets()[4:5])
    document, text = make([*tickets(), tickets()[2], "{broken"], bad_rows="drop", test="test.jsonl")
    kinds = {found["kind"]: found for found in document["findings"]["kinds"]}
    assert [found["kind"] for found in document["findings"]["kinds"]][:2] == ["bad_row", "leak"]
    assert (kinds["exact_duplicate"]["count"], kinds["exact_duplicate"]["first"][0]["line"]) == (1, 61)
    assert kinds["exact_duplicate"]["first"][0]["message"] == "repeats an earlier row (rows.jsonl:3)"
    assert kinds["leak"]["first"][0]["message"].endswith("(test.jsonl:1)")
    assert "rows.jsonl:62 broken JSON" in Page(text).text
    assert str(tmp_path) not in text + json.dumps(document)  # a card is given away; where the files lie here is not


def test_the_same_rows_give_the_same_card(make: Make) -> None:
    cards = []
    for out in ("a.html", "b.html"):
        document, page = make(tickets(), out=out)
        cards.append((document | {"created": ""}, re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", page)))
    assert cards[0] == cards[1]


def test_the_sample_follows_the_content_and_not_the_order(make: Make) -> None:
    first, _ = make(tickets())
    second, text = make([*reversed(tickets()), *[tickets()[5]] * 40], out="b.html")
    texts = [[row["turns"] for row in document["sample"]] for document in (first, second)]
    assert len(texts[0]) == SAMPLE_ROWS
    assert texts[0] == texts[1]
    for row in second["sample"]:
        assert f"rows.jsonl:{row['line']}" in Page(text).text


# ------------------------------------------------------------------------------------------------------- what it hides


@pytest.mark.parametrize("personal", ["keep", "mask", "drop"])
def test_personal_data_is_counted_and_never_shown(make: Make, personal: str) -> None:
    call = {
        "function": {"name": "mail", "arguments": {"to": "carol@example.org", "dave@example.org": "\n+1-415-555-0123"}}
    }
    messages = [
        {"role": "user", "content": "Write."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    rows = [{"messages": messages, "license": "ask erin@example.com", "frank@example.com": 1}]
    rows += [
        {"messages": [{"role": "user", "content": f"Of {v}?"}, {"role": "assistant", "content": v}]}
        for v in PRIVATE.values()
    ]
    rows += [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}]} for i in range(4)
    ]
    document, page = make(rows, personal=personal, validation=None)
    shown = DIGEST.sub("", page + json.dumps(document, ensure_ascii=False))
    for value in (*PRIVATE.values(), "carol", "dave@", "erin", "frank@", "415-555", "4111"):
        assert value not in shown
    assert document["personal"]["rows"] == 6
    assert set(document["personal"]["by_sort"]) == set(PRIVATE)
    assert document["ledger"]["states"]["dropped"] == (6 if personal == "drop" else 0)
    assert document["ledger"]["masked"] == (6 if personal == "mask" else 0)
    assert len(document["sample"]) == (4 if personal == "drop" else 10)
    assert ("[EMAIL_1]" in json.dumps(document["sample"])) == (personal != "drop")


def test_labels_and_words_hide_personal_data_too(make: Make) -> None:
    rows = [{"text": f"text {i}", "label": f"jane{i % 2}@example.com"} for i in range(20)]
    document, page = make(rows, recipe={"objective": "classification"}, validation=None)
    assert "@example" not in page + json.dumps(document)
    assert document["sample"][0]["label"] == "[EMAIL_1]"
    words = [{"words": ["call", "+1", "415", "555", "0199"], "tags": ["O", "B", "B", "B", "B"]}] * 3
    document, page = make(words, recipe={"objective": "token_classification"}, validation=None, out="b.html")
    assert document["sample"][0]["turns"] == [{"role": "text", "text": "call [PHONE_1]"}]
    assert "555" not in DIGEST.sub("", page)


@pytest.fixture(scope="module")
def tagger(build_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Takes words with a capital for names, after it was trained on a few."""
    folder = tmp_path_factory.mktemp("tagger")
    build_model("bert", dtype=torch.float32).save(folder / "base")
    random = np.random.default_rng(2)
    names = [f"{initial}{end}" for initial in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" for end in ("ana", "elo", "ik")]
    plain = ["is", "it", "a", "box?", "by", "yes,", *(f"{number}:" for number in range(25))]
    drawn = [[str(random.choice(names if random.random() < 0.3 else plain)) for _ in range(10)] for _ in range(200)]
    tags = [["PER" if word[0].isupper() else "O" for word in words] for words in drawn]
    write(folder / "rows.jsonl", [{"words": words, "tags": tags} for words, tags in zip(drawn, tags, strict=True)])
    recipe = {"base": str(folder / "base"), "objective": "token_classification", "method": "full"}
    recipe |= {"data": {"train": str(folder / "rows.jsonl"), "validation": None, "too_long": "truncate"}}
    recipe |= {"train": {"max_steps": 80, "batch_rows": 32, "learning_rate": 0.01}}
    (folder / "tagger.yaml").write_text(yaml.safe_dump(recipe))
    workspace = Workspace(folder / "w")
    return api.export(
        api.tune(folder / "tagger.yaml", workspace=workspace), form="merged", out=folder / "out", workspace=workspace
    )


@pytest.mark.parametrize("personal", ["mask", "drop"])
def test_names_are_counted_and_hidden_where_the_recipe_names_a_model(make: Make, tagger: Path, personal: str) -> None:
    rows = [{"prompt": f"{i}: is it a box?", "completion": "yes, it is"} for i in range(20)]
    rows += [{"prompt": f"{i}: is it by Karsten Vo?", "completion": "yes, by it"} for i in range(5)]
    document, page = make(rows, personal=personal, names=str(tagger), validation=None)
    shown = page + json.dumps(document, ensure_ascii=False)
    assert "Karsten" not in shown
    assert "Vo?" not in shown
    assert document["personal"]["by_sort"]["a name"] == document["personal"]["rows"] == 5
    assert document["ledger"]["masked"] == (5 if personal == "mask" else 0)
    assert document["ledger"]["states"]["dropped"] == (0 if personal == "mask" else 5)
    assert any("names that the model of data.names overlooks" in text for text in document["not_told"])
    kinds = {kind["kind"]: kind["count"] for kind in document["findings"]["kinds"]}
    assert kinds["personal_data"] == 5


def test_data_check_reads_a_model_for_names(
    tmp_path: Path, tagger: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"{i}: is it a box?", "completion": "yes, it is"} for i in range(20)]
    write(tmp_path / "rows.jsonl", [*rows, {"prompt": "21: is it by Karsten Vo?", "completion": "yes"}])
    cases: list[tuple[list[str], list[int]]] = [([], []), (["--names", str(tagger)], [21])]
    for given, lines in cases:
        command = ["tunesmith", "data", "check", str(tmp_path / "rows.jsonl"), "--only", "personal", "--json", *given]
        monkeypatch.setattr("sys.argv", command)
        with contextlib.suppress(SystemExit):
            cli.main()
        found = json.loads(capsys.readouterr().out)["problems"]
        assert [problem["line"] for problem in found] == lines
    with pytest.raises(RecipeError, match="--names has no effect without the check 'personal'"):
        check_data(str(tmp_path / "rows.jsonl"), only=("quality",), names=str(tagger))


def test_rows_stay_text(make: Make) -> None:
    rows = [
        {"prompt": f"{NASTY} {i}", "completion": f"{NASTY[:40]} {i % 2}", "licence": NASTY, NASTY: 1} for i in range(20)
    ]
    document, text = make(rows, origin=NASTY, licence=NASTY, notes=NASTY)
    page = Page(text)
    tame = Page(make(tickets(), out="b.html", origin="a", licence="b", notes="c")[1])
    assert page.tags == tame.tags
    assert page.tags.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base", "form"})
    assert "<script" not in text
    assert text.count("</style>") == 1
    assert page.text.count('<script>alert("owned")</script>') >= 10
    assert "{{ 7*7 }} {% raw %}" in page.text
    assert document["notes"] == NASTY
    assert not [name for name, _ in page.attributes if name in ("src", "href", "action") or name.startswith("on")]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert not re.search(r"url\((?!#)|@import", text)


# -------------------------------------------------------------------------------------------------------- the command


def test_an_existing_file_is_never_replaced(make: Make, tmp_path: Path) -> None:
    make(tickets())
    (tmp_path / "card.html").unlink()
    with pytest.raises(StorageError, match=r"card\.json: the file exists already"):
        make(tickets())
    assert not (tmp_path / "card.html").exists()


def test_a_page_is_html(make: Make, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"ends with \.html"):
        make(tickets(), out="card.json")
    assert not (tmp_path / "card.json").exists()


def test_rows_that_cannot_be_prepared_leave_no_card(make: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:61"):
        make([*tickets(), "{broken"])
    assert not list(tmp_path.glob("card.*"))


def test_the_command_prints_the_document(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, _ = make(tickets())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["tunesmith", "data", "card", "tickets.yaml", "--json", "--set", "name=other"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    document = json.loads(capsys.readouterr().out)
    assert document | {"created": "", "name": ""} == expected | {"created": "", "name": ""}
    assert document["name"] == "other"
    assert (tmp_path / "data-card.html").is_file()


def test_half_a_character_is_refused_in_a_description(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text('data: {train: a.jsonl, notes: "\\ud800"}')
    with pytest.raises(RecipeError, match="surrogate"):
        load_recipe(tmp_path / "r.yaml")


# ------------------------------------------------------------------------------------------------------- the histogram


@pytest.mark.parametrize("longest", [1, 7, 39, 40, 41, 500, 100_000])
def test_every_length_is_in_one_column(longest: int) -> None:
    lengths = np.concatenate([np.random.default_rng(0).integers(1, 30, 400), [longest]])
    bins = histogram(lengths)
    assert len(bins) <= MAX_BARS + 1
    assert [sum(part["least"] <= n <= part["most"] for part in bins) for n in lengths.tolist()] == [1] * 401
    for part in bins:
        assert part["rows"] == np.count_nonzero((lengths >= part["least"]) & (lengths <= part["most"]))
    drawn = columns(bins, most=MAX_BARS)
    assert all(part["x"] >= 58 and part["x"] + part["width"] <= 744 for part in drawn["columns"])
    assert max(part["height"] for part in drawn["columns"]) == pytest.approx(146)
    assert (drawn["over"] is None) == (len(bins) <= MAX_BARS)
