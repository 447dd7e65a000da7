"""`tunesmith init`: the recipe it writes can be read, means the file that was given, and fits what is in it."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith import api
from tunesmith.data.formats import examine
from tunesmith.data.sources import read_rows
from tunesmith.data.split import side
from tunesmith.data.types import Example
from tunesmith.errors import DataError, ModelError, NotFoundError, StorageError
from tunesmith.evaluate.metrics import METRICS
from tunesmith.init import write_recipe
from tunesmith.recipe import Recipe, load_recipe
from tunesmith.registry.workspace import Workspace

ROWS = {
    "chat": [
        {
            "messages": [
                {"role": "user", "content": f"Where is parcel {i}?"},
                {"role": "assistant", "content": "a " * 30},
            ]
        }
        for i in range(30)
    ],
    "prompt_completion": [{"prompt": f"colour of {i}?", "completion": "red"} for i in range(30)],
    "alpaca": [{"instruction": f"add 1 to {i}", "input": "", "output": f"{i + 1}"} for i in range(30)],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": f"hello {i}"}, {"from": "gpt", "value": "hello"}]}
        for i in range(30)
    ],
    "text": [{"text": f"Once upon a time there were {i} bears."} for i in range(30)],
    "labelled": [{"text": f"ticket {i}", "label": "billing"} for i in range(30)],
    "numbered": [{"text": f"ticket {i}", "label": i % 3} for i in range(30)],
    "amounts": [{"text": f"ticket {i}", "label": i / 4} for i in range(30)],
    "tagged": [{"tokens": [f"ticket{i}", "b"], "ner_tags": ["O", "B-X"]} for i in range(30)],
}


OBJECTIVES = {"text": "causal", "labelled": "classification", "numbered": "classification", "amounts": "regression"}
OBJECTIVES |= {"tagged": "token_classification"}


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def init(source: Path | None, *, out: Path, base: str = "starter") -> Recipe:
    write_recipe(source, out=out, base=base)
    return load_recipe(out)


@pytest.mark.parametrize("form", ROWS)
def test_every_row_is_usable_with_the_recipe_that_is_written(tmp_path, form):
    source = write_rows(tmp_path / "rows.jsonl", ROWS[form])
    recipe = init(source, out=tmp_path / "recipe.yaml")
    assert recipe.name == "rows"
    assert recipe.data.train_paths == [str(source)]
    examples = [examine(row, settings=recipe.data) for row in read_rows(source, on_bad=pytest.fail)]
    assert all(isinstance(example, Example) for example in examples)
    assert recipe.objective.kind == OBJECTIVES.get(form, "instruction")
    assert (examples[0].text is not None) == (form in OBJECTIVES and form != "tagged")
    assert all(METRICS[name].reads == "likelihood" or form != "text" for name in recipe.evaluate.metrics)


@pytest.mark.parametrize(
    ("answer", "first"),
    [('{"intent": "refund"}', "exact_match"), ("refund", "exact_match"), ("We are sorry to hear that. " * 3, "chrf")],
)
def test_the_metrics_fit_the_answers(tmp_path, answer, first):
    rows = [{"prompt": f"ticket {i}", "completion": answer} for i in range(20)]
    recipe = init(write_rows(tmp_path / "rows.jsonl", rows), out=tmp_path / "recipe.yaml")
    assert recipe.evaluate.metrics[0] == first
    assert ("json_fields" in recipe.evaluate.metrics) == answer.startswith("{")
    assert recipe.evaluate.max_tokens >= 32


def test_a_recipe_for_no_file_names_what_is_missing(tmp_path):
    found = write_recipe(None, out=tmp_path / "my.yaml")
    assert found["rows"] == 0
    assert load_recipe(tmp_path / "my.yaml").data.train_paths == [str(tmp_path / "FILE.jsonl")]
    assert load_recipe(tmp_path / "my.yaml").name == "my"


def test_what_was_found_is_told(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [*ROWS["chat"], {"messages": []}])
    found = write_recipe(source, out=tmp_path / "r.yaml")
    assert found["recipe"] == str(tmp_path / "r.yaml")
    assert (found["form"], found["rows"]) == ("chat", 31)
    assert "1 of them unusable" in found["why"]
    assert load_recipe(tmp_path / "r.yaml").data.bad_rows == "drop"


def test_the_recipe_may_lie_elsewhere(tmp_path, monkeypatch):
    source = write_rows(tmp_path / "rows.jsonl", ROWS["chat"])
    (tmp_path / "recipes").mkdir()
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "recipes")
    for out in (Path("a.yaml"), Path("../b.yaml"), tmp_path / "data" / "c.yaml"):
        recipe = init(Path("../rows.jsonl"), out=out)
        assert Path(recipe.data.train_paths[0]).resolve() == source.resolve()


def test_the_base_is_the_one_asked_for(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", ROWS["chat"])
    base = tmp_path / "my: base #1"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "llama"}')
    assert init(source, out=tmp_path / "r.yaml", base=str(base)).base == str(base)
    found = write_recipe(source, out=tmp_path / "s.yaml", base="owner/model")
    assert load_recipe(tmp_path / "s.yaml").base == "owner/model"
    assert "not here yet and taken for a decoder" in found["why"]
    for nothing in (str(tmp_path), "no-base", "a b/c"):
        with pytest.raises((ModelError, NotFoundError)) as caught:
            write_recipe(source, out=tmp_path / "t.yaml", base=nothing)
        assert caught.value.hint
    assert not (tmp_path / "t.yaml").exists()


# ----------------------------------------------------------------------------------------------- the kind of base

COLOURS = [{"prompt": f"colour of {i}?", "completion": ("red", "green")[i % 2]} for i in range(30)]
HOURS = [{"prompt": f"hours for {i}?", "completion": f"{i / 4}"} for i in range(120)]
LISTED = [{"text": f"ticket {i}", "label": ["red"] if i % 2 else ["red", "blue"]} for i in range(30)]
TAGGED = [{"tokens": [f"ticket{i}", "b"], "ner_tags": ["O", "B-X"]} for i in range(30)]


@pytest.fixture(scope="session")
def bases(build_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for kind in ("bert", "t5"):
        (folder / kind).mkdir()
        build_model(kind, dtype=torch.float32).save(folder / kind)
    (folder / "t5" / "chat_template.jinja").unlink()
    return folder


@pytest.mark.parametrize(
    ("kind", "rows", "objective", "metric"),
    [
        ("t5", COLOURS, "seq2seq", "exact_match"),
        ("t5", ROWS["numbered"], "seq2seq", "exact_match"),
        ("t5", [{"text": row["prompt"], "label": row["completion"]} for row in COLOURS], "seq2seq", "exact_match"),
        ("bert", COLOURS, "classification", "accuracy"),
        ("bert", HOURS, "regression", "mae"),
        ("bert", HOURS[:30], "regression", "mae"),
        ("bert", LISTED, "classification", "accuracy"),
        ("bert", TAGGED, "token_classification", "entity_f1"),
    ],
)
def test_the_recipe_trains_on_the_kind_of_base_it_was_written_for(bases, tmp_path, kind, rows, objective, metric):
    source = write_rows(tmp_path / "rows.jsonl", rows)
    recipe = init(source, out=tmp_path / "r.yaml", base=str(bases / kind))
    assert (recipe.objective.kind, recipe.evaluate.metrics[0]) == (objective, metric)
    assert ("coverage" in recipe.evaluate.metrics) == (rows is HOURS)  # of too few rows there is no interval
    workspace = Workspace(tmp_path / "w")
    run = api.tune(tmp_path / "r.yaml", workspace=workspace, overrides=["train.max_steps=1", "method.rank=2"])
    assert (run.finished, run.recipe.objective.kind) == (True, objective)
    settings = api.evaluation_settings(run, rows=2, against=["base"] if kind == "t5" else None)
    assert api.evaluate(run, settings=settings, workspace=workspace).document["primary"] == metric


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("t5", ROWS["text"], "these rows are of the form 'text'"),
        ("t5", TAGGED, "these rows are of the form 'tagged'"),
        ("bert", ROWS["text"], "these 30 rows have plain text"),
        ("bert", ROWS["prompt_completion"], "these 30 rows have 1 different answers"),
        ("bert", [row | {"completion": f"It is {i}."} for i, row in enumerate(COLOURS)], "30 different answers"),
    ],
)
def test_rows_that_no_objective_learns_on_such_a_base_are_refused(bases, tmp_path, kind, rows, message):
    source = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=message) as caught:
        write_recipe(source, out=tmp_path / "r.yaml", base=str(bases / kind))
    assert caught.value.hint
    assert not (tmp_path / "r.yaml").exists()


def test_without_a_file_the_objective_fits_the_base(bases, tmp_path):
    for kind, objective in (("t5", "seq2seq"), ("bert", "classification")):
        recipe = init(None, out=tmp_path / f"{kind}.yaml", base=str(bases / kind))
        assert recipe.objective.kind == objective


def test_comments_say_what_to_do_next(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", ROWS["chat"])
    write_recipe(source, out=tmp_path / "r.yaml")
    text = (tmp_path / "r.yaml").read_text()
    for command in ("data check", "train", "evaluate rows"):
        assert f"tunesmith {command}" in text
    assert set(yaml.safe_load(text)) == {"name", "base", "data", "objective", "method", "train", "evaluate"}


def test_an_existing_file_is_kept(tmp_path):
    (tmp_path / "r.yaml").write_text("mine")
    with pytest.raises(StorageError, match="exists already"):
        write_recipe(write_rows(tmp_path / "rows.jsonl", ROWS["chat"]), out=tmp_path / "r.yaml")
    assert (tmp_path / "r.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    "content", ["", "{broken\n", '{"messages": []}\n', '{"unknown": "columns"}\n', "[1, 2]\n[3]\n"]
)
def test_a_file_without_a_usable_row_is_refused_and_nothing_is_written(tmp_path, content):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(DataError) as caught:
        write_recipe(tmp_path / "rows.jsonl", out=tmp_path / "r.yaml")
    assert caught.value.hint
    assert caught.value.file == str(tmp_path / "rows.jsonl")
    assert not (tmp_path / "r.yaml").exists()


def test_a_file_that_is_not_there_is_refused(tmp_path):
    write_rows(tmp_path / "tickets.jsonl", ROWS["chat"])
    with pytest.raises(NotFoundError) as caught:
        write_recipe(tmp_path / "ticket.jsonl", out=tmp_path / "r.yaml")
    assert "tickets.jsonl" in caught.value.hint


@pytest.mark.parametrize("count", [*range(2, 12), 30, 200])
def test_the_validation_share_holds_rows_and_leaves_some(tmp_path, count):
    rows = [{"prompt": f"question {i}", "completion": "yes"} for i in range(count)]
    source = write_rows(tmp_path / f"{count}.jsonl", rows)
    recipe = init(source, out=tmp_path / "r.yaml")
    examples = [examine(row, settings=recipe.data) for row in read_rows(source, on_bad=pytest.fail)]
    sides = Counter(side(example.prompt_key, shares=recipe.data.shares) for example in examples)
    if recipe.data.validation is None:
        assert count < 12
        assert recipe.train.patience is None  # it would have no effect
    else:
        assert sides["validation"] >= 2  # one row cannot be evaluated
        assert sides["train"] >= 1
        assert recipe.train.patience == 3


@pytest.fixture(scope="session")
def anywhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("names")


NAMES = (
    st.sampled_from(
        ["123", "no", "true", "null", "~", "1e5", "2024-01-01", "latest", "a" * 90, "- a", "a: b", "a #b", "'", '"']
    )
    | st.text(min_size=1, max_size=12)
    | st.text(alphabet="ab-._ :#'\"{}[]&*!|>%@`,?\n\t", min_size=1, max_size=8)
).filter(
    lambda name: (
        "/" not in name and "\0" not in name and name not in (".", "..") and len(name.encode("utf-8", "replace")) < 200
    )
)


@settings(max_examples=60, deadline=None)
@given(name=NAMES, suffix=st.sampled_from([".jsonl", ""]))
def test_a_file_may_have_any_name(anywhere, name, suffix):
    source = anywhere / (name + suffix)
    try:
        write_rows(source, ROWS["alpaca"])
        next(iter(read_rows(source, on_bad=pytest.fail)))
    except (UnicodeEncodeError, DataError):  # no name of a file, or one of a kind that is not read
        return
    out = anywhere / "recipe.yaml"
    try:
        recipe = init(source, out=out)
    finally:
        out.unlink(missing_ok=True)
        source.unlink()
    assert recipe.data.train_paths == [str(source)]
    assert recipe.base == "starter"
