"""The recipe: what is refused is refused with its line and the nearest name, and nothing is refused by a traceback."""

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.settings import DataSettings
from tunesmith.errors import NotFoundError, RecipeError
from tunesmith.evaluate.settings import RESOLVED, EvaluateSettings
from tunesmith.methods.full import Full
from tunesmith.methods.lora import Lora
from tunesmith.models.base import NewBase
from tunesmith.objectives.causal import Causal
from tunesmith.objectives.instruction import Instruction
from tunesmith.recipe import Recipe, load_recipe, parse_recipe
from tunesmith.train.settings import TrainSettings

FILE = Path("support.yaml")
WHOLE = """\
name: triage
base: starter
data:
  train: rows.jsonl
  validation: 0.2
objective: {kind: instruction}
method:
  kind: lora
  rank: 8
train:
  epochs: 2
  learning_rate: 2e-4
evaluate:
  metrics: [exact_match, json_fields]
"""


def parse(text: str, *overrides: str) -> Recipe:
    return parse_recipe(text, file=FILE, overrides=list(overrides))


def refusal(text: str, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        parse(text, *overrides)
    error = caught.value
    assert error.message
    assert error.hint
    return error


# ------------------------------------------------------------------------------------------------- what is read


def test_a_recipe_is_read():
    recipe = parse(WHOLE)
    assert recipe.name == "triage"
    assert recipe.base == "starter"
    assert recipe.data.validation == 0.2
    assert isinstance(recipe.objective, Instruction)
    assert isinstance(recipe.method, Lora)
    assert recipe.method.rank == 8
    assert (recipe.train.epochs, recipe.train.learning_rate) == (2.0, 2e-4)
    assert recipe.evaluate.metrics == ("exact_match", "json_fields")


def test_everything_but_the_rows_has_a_default():
    recipe = parse("data: {train: rows.jsonl}")
    assert recipe.name == "support"  # from the file's name
    assert recipe.base == "starter"
    assert recipe.objective == Instruction()
    assert recipe.method == Lora()
    assert recipe.train == TrainSettings()
    assert recipe.evaluate == EvaluateSettings()
    assert (recipe.data.validation, recipe.data.too_long, recipe.data.bad_rows) == (0.1, "refuse", "refuse")


@pytest.mark.parametrize(
    ("file", "name"), [("my recipe!.yaml", "my-recipe"), ("-x-.yml", "x"), ("日本.yaml", "run"), ("a" * 90, "a" * 64)]
)
def test_the_name_comes_from_the_file_where_it_is_not_given(file, name):
    assert parse_recipe("data: {train: rows.jsonl}", file=Path(file)).name == name


def test_a_name_alone_stands_for_a_method_or_an_objective():
    recipe = parse("data: {train: t.txt}\nmethod: full\nobjective: causal")
    assert recipe.method == Full()
    assert recipe.objective == Causal()


def test_a_new_base_is_trained_in_full():
    recipe = parse("base: {config: c.json, tokenizer: tok, seed: 3}\ndata: {train: t.txt}\nmethod: full")
    assert isinstance(recipe.base, NewBase)
    assert recipe.base.seed == 3


@pytest.mark.parametrize("text", ["off", "'off'"])
def test_off_is_a_word_and_no_truth_value(text):
    value = f"data: {{train: a.jsonl}}\ntrain: {{reuse_frozen: {text}}}\n"
    assert parse_recipe(value, file=Path("toy.yaml")).train.reuse_frozen == "off"


@pytest.mark.parametrize(
    ("text", "number"),
    [("2e-4", 2e-4), ("1e3", 1000.0), ("3.", 3.0), (".5", 0.5), ("+1E-2", 0.01), ("5", 5.0), ("0.25", 0.25)],
)
def test_numbers_are_numbers(text, number):
    rate = parse(f"data: {{train: a}}\ntrain: {{learning_rate: {text}}}").train.learning_rate
    assert isinstance(rate, float)
    assert rate == number
    assert parse("data: {train: a}", f"train.learning_rate={text}").train.learning_rate == number


def test_whole_numbers_stay_whole_and_quoted_numbers_stay_text():
    recipe = parse('name: "2e4"\ndata: {train: "1e5", system: "0.5"}\ntrain: {batch_rows: 16, max_steps: 1_000}')
    assert (recipe.name, Path(recipe.data.train_paths[0]).name, recipe.data.system) == ("2e4", "1e5", "0.5")
    assert (recipe.train.batch_rows, recipe.train.max_steps) == (16, 1000)
    assert isinstance(recipe.train.batch_rows, int)


# ----------------------------------------------------------------------------------------------- what is refused

BROKEN = {
    "an unknown section": ("trian: {}\ndata: {train: a}", 1, ["'trian'"], ["'train'"]),
    "an unknown setting": ("data: {train: a}\ntrain:\n  epoch: 3", 3, ["'train.epoch'"], ["'train.epochs'"]),
    "a setting of another section": (
        "data:\n  train: a\n  epochs: 3",
        3,
        ["'data.epochs'"],
        ["'epochs' belongs into the section 'train'"],
    ),
    "an unknown setting of a section in a section": (
        "data:\n  train: a\n  select: {keep: 500, bye: random}",
        3,
        ["'data.select.bye'"],
        ["'data.select.by'"],
    ),
    "nothing like it": ("data: {train: a}\ntrain: {zzzzzz: 1}", 2, ["'train.zzzzzz'"], ["epochs", "learning_rate"]),
    "a setting of another method": (
        "data: {train: a}\nmethod:\n  kind: full\n  rank: 8",
        4,
        ["'method.rank' belongs to method lora, qlora, vera and has no effect on full"],
        ["{kind: lora}"],
    ),
    "a setting that is idle in some objectives": (
        "data: {train: a}\nobjective:\n  kind: instruction\n  head_rate_factor: 8",
        4,
        ["belongs to objective classification, token_classification, regression and has no effect on instruction"],
        ["{kind: classification}"],
    ),
    "an unknown setting of a method": ("data: {train: a}\nmethod: {kind: lora, rnk: 8}", 2, ["'method.rnk'"], ["rank"]),
    "an unknown method": ("data: {train: a}\nmethod: loar", 2, ["no method 'loar'", "lora, full"], ["'lora'"]),
    "an unknown objective": ("data: {train: a}\nobjective: causl", 2, ["no objective 'causl'"], ["'causal'"]),
    "a method without its kind": ("data: {train: a}\nmethod: {rank: 8}", 2, ["method.kind", "lora, full"], []),
    "no data": ("name: x", None, ["'data' is missing"], []),
    "no rows": ("name: x\ndata: {validation: 0.1}", 2, ["'data.train' is missing"], []),
    "half a new base": ("data: {train: a}\nmethod: full\nbase: {config: c}", 3, ["base.tokenizer", "missing"], []),
    "a new base with an adapter": ("data: {train: a}\nbase: {config: c, tokenizer: t}", None, ["'lora'"], []),
    "an unknown setting of a new base": (
        "data: {train: a}\nmethod: full\nbase: {config: c, tokenizer: t, sed: 1}",
        3,
        ["'base.sed'"],
        ["'base.seed'"],
    ),
    "a key twice": ("data: {train: a}\nname: x\nname: y", 3, ["'name' stands here twice"], []),
    "a key twice below": ("data:\n  train: a\n  train: b", 3, ["'train' stands here twice"], []),
    "a key that is no name": ("1: x", 1, ["1 is not a name"], []),
    "a wrong type": ("data: {train: a}\ntrain:\n  epochs: many", 3, ["train.epochs", "number", "'many'"], []),
    "text for a section": ("data: {train: a}\ntrain: fast", 2, ["train", "'fast'"], []),
    "a number too small": ("data: {train: a}\ntrain: {batch_rows: 0}", 2, ["train.batch_rows", "1", "found 0)"], []),
    "not a number": ("data: {train: a}\ntrain: {learning_rate: .nan}", 2, ["train.learning_rate"], []),
    "infinity": ("data: {train: a}\ntrain: {epochs: .inf}", 2, ["train.epochs"], []),
    "a seed that is too large": (f"data: {{train: a}}\ntrain: {{seed: {1 << 64}}}", 2, ["train.seed"], []),
    "no layer": ("data: {train: a}\nmethod: {kind: lora, targets: []}", 2, ["method.targets"], []),
    "a scale without bounds": ("data: {train: a}\nmethod: {kind: lora, alpha: 1e300}", 2, ["method.alpha"], []),
    "half a character": ('data: {train: a, system: "\\ud83d"}', 1, ["data.system"], []),
    "a choice that is none": ("data: {train: a, too_long: cut}", 1, ["data.too_long", "truncate"], []),
    "an unknown metric": ("data: {train: a}\nevaluate: {metrics: [exact]}", 2, ["'exact'", "'exact_match'"], []),
    "a share of everything": ("data: {train: a, validation: 1}", 1, ["the share is 1"], []),
    "a share that is yes": (
        "data: {train: a, validation: true}",
        1,
        ["data.validation", "true and false are no shares"],
        [],
    ),
    "shares that leave nothing": ("data: {train: a, validation: 0.5, test: 0.5}", 1, ["nothing to train on"], []),
    "a test that is trained on": ("data: {train: a, test: a}", 1, ["also trained on"], []),
    "a patience without validation": (
        "data: {train: a, validation: null}\ntrain: {patience: 3}",
        None,
        ["train.patience has no effect", "data.validation"],
        [],
    ),
    "validations without rows for them": (
        "data: {train: a, validation: null}\ntrain: {validate_every: 3}",
        None,
        ["train.validate_every has no effect"],
        [],
    ),
    "few shots without their system": (
        "data: {train: a}\nevaluate: {against: [base], few_shot: 2}",
        2,
        ["few_shot has no effect"],
        [],
    ),
    "half a step of warm-up": ("data: {train: a}\ntrain: {warmup: 1.5}", 2, ["warmup"], []),
    "a name that is a path": ("name: ../x\ndata: {train: a}", 1, ["name"], []),
    "a name with a meaning": ("name: latest\ndata: {train: a}", 1, ["latest"], []),
    "no YAML": ("data: {train: a\nname: x: y", 2, ["no valid YAML"], []),
    "a tab": ("data:\n\ttrain: a", 2, ["no valid YAML"], []),
    "an alias to itself": ("name: x\ndata: &d {train: *d}", 2, ["no valid YAML"], []),
    "a date that is none": ("name: 2024-99-99\ndata: {train: a}", None, ["no valid YAML"], []),
    "a Python object": ("data: {train: !!python/object/apply:os.getcwd []}", 1, ["no valid YAML"], []),
    "a list": ("- data", None, ["mapping of sections"], []),
    "nothing": ("", None, ["mapping of sections"], []),
    "brackets without end": ("[" * 5_000, None, ["no valid YAML"], []),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_recipe_is_refused_where_it_is_broken(name):
    text, line, message, hint = BROKEN[name]
    error = refusal(text)
    assert error.file == str(FILE)
    assert error.line == line
    assert [part for part in message if part not in error.message] == []
    assert [part for part in hint if part not in error.hint] == []


def test_the_number_of_further_complaints_is_told():
    error = refusal("data: {train: a}\ntrain: {epochs: -1, batch_rows: 0, seed: -1}")
    assert "2 more complaints" in error.hint


def test_an_error_is_a_value_error_for_scripts():
    with pytest.raises(ValueError, match=r"support.yaml:2: there is no setting 'nam'"):
        parse("data: {train: a}\nnam: x")


def test_aliases_within_aliases_are_not_written_out():
    lines = ["l0: &l0 [a, a, a, a, a, a, a, a, a, a]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 5)]
    tracemalloc.start()
    error = refusal("\n".join([*lines, "name: *l4", "data: {train: a}"]))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(str(error)) < 300
    assert peak_bytes < 400_000  # a hundred thousand items, each of five characters


# -------------------------------------------------------------------------------------------------------- files


def test_paths_are_relative_to_the_recipe(tmp_path):
    folder = tmp_path / "recipes"
    (folder / "toy").mkdir(parents=True)
    (folder / "here").mkdir()
    for name in ("rows.jsonl", "more.jsonl", "t.jinja", "val.jsonl"):
        (folder / name).write_text("")
    text = (
        "base: toy\ndata: {train: [rows.jsonl, ./more.jsonl, here/later.jsonl, owner/name, /abs/x.jsonl],"
        " validation: val.jsonl, test: ../t.jsonl, template: t.jinja}"
    )
    (folder / "r.yaml").write_text(text)
    recipe = load_recipe(folder / "r.yaml")
    assert recipe.base == str(folder / "toy")
    assert recipe.data.train_paths[:2] == [str(folder / "rows.jsonl"), str(folder / "more.jsonl")]
    assert recipe.data.train_paths[3:] == ["owner/name", "/abs/x.jsonl"]
    assert recipe.data.validation == str(folder / "val.jsonl")
    assert Path(str(recipe.data.test)).resolve() == (tmp_path / "t.jsonl").resolve()
    assert recipe.data.template == str(folder / "t.jinja")


def test_what_a_recipe_names_does_not_depend_on_the_folder_it_is_read_from(tmp_path, monkeypatch):
    (tmp_path / "toy").mkdir()
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "r.yaml").write_text("base: toy\ndata: {train: rows.jsonl}")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(Path("r.yaml"))
    assert Path(str(recipe.base)).is_absolute()
    assert Path(recipe.data.train_paths[0]).is_absolute()
    assert recipe == load_recipe(tmp_path / "r.yaml")


def test_a_name_of_the_hub_stays_one():
    assert parse("base: owner/model\ndata: {train: owner/rows}").base == "owner/model"
    assert parse("base: starter\ndata: {train: a}").base == "starter"


@pytest.mark.parametrize("name", ["x" * 300, "~nosuchuser-x/rows.jsonl", '"a\\0b"', "/" + "y/" * 200])
@pytest.mark.parametrize("setting", ["base", "data.train", "data.validation", "data.template"])
def test_a_path_that_cannot_be_one_is_no_traceback(setting, name):
    recipe = parse("data: {train: rows.jsonl}", f"{setting}={name}")
    value: Any = recipe
    for part in setting.split("."):
        value = getattr(value, part)
    assert value


def test_a_missing_recipe_names_the_nearest(tmp_path):
    (tmp_path / "triage.yaml").write_text(WHOLE)
    with pytest.raises(NotFoundError) as caught:
        load_recipe(tmp_path / "triag.yaml")
    assert str(tmp_path / "triage.yaml") in caught.value.hint
    with pytest.raises(NotFoundError) as caught:
        load_recipe(tmp_path / "nothing" / "like.yaml")
    assert "tunesmith init" in caught.value.hint


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"data: {train: \xe9}", None])
def test_a_file_that_is_no_text_is_refused(tmp_path, content):
    path = tmp_path / "r.yaml"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.hint


# ---------------------------------------------------------------------------------------------------- overrides


def test_overrides_change_settings():
    recipe = parse(WHOLE, "train.epochs=5", "method.rank=4", "data.test=0.1", "evaluate.metrics=[chrf, bleu]", "name=b")
    assert (recipe.train.epochs, recipe.method.rank, recipe.data.test, recipe.name) == (5.0, 4, 0.1, "b")
    assert recipe.evaluate.metrics == ("chrf", "bleu")
    assert recipe.train.learning_rate == 2e-4  # the rest of a section stays


def test_overrides_make_what_is_not_there():
    recipe = parse("data: {train: a}\nmethod: lora", "method.rank=4", "train.seed=7", "data.system=a=b")
    assert (recipe.method.rank, recipe.train.seed, recipe.data.system) == (4, 7, "a=b")
    assert parse("data: {train: a, test: 0.1}", "data.test=null").data.test is None


def test_the_last_override_counts():
    assert parse(WHOLE, "train.epochs=5", "train.epochs=6").train.epochs == 6


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "not of the form a.b=value"),
        ("=3", "not of the form a.b=value"),
        ("train.epoch=3", "'train.epoch'"),
        ("name.first=x", "'name' is no section"),
        ("train.epochs=[", "no YAML value"),
        ("train.epochs=2024-99-99", "train.epochs"),
        ("train.epochs=0x_", "train.epochs"),
        ("train.epochs=" + "[" * 5_000, "train.epochs"),
        ("data.train=!!python/object:os.system x", "no YAML value"),
        ("a..b=1", "'a'"),
    ],
)
def test_a_wrong_override_is_refused(override, message):
    assert message in str(refusal(WHOLE, override))


# ------------------------------------------------------------------------------------------------- what is saved


@pytest.mark.parametrize(
    "more",
    [
        "",
        "evaluate: {against: [base]}",
        "evaluate: {against: []}",
        "evaluate: {against: [few_shot], few_shot: 2, metrics: [chrf]}",
        "method: {kind: lora, targets: [q_proj, v_proj]}",
        "train: {patience: 2, warmup: 10, trackers: [tensorboard]}",
        "objective: causal\nmethod: full\nbase: {config: c.json, tokenizer: t}",
    ],
)
def test_a_recipe_comes_back_from_what_is_saved_with_the_run(more):
    recipe = parse(f"data: {{train: [a, b], test: 0.2}}\n{more}")
    assert Recipe.model_validate(recipe.model_dump(mode="json"), context=RESOLVED) == recipe
    assert parse(recipe.as_yaml()) == recipe


# --------------------------------------------------------------------------------------------------------- fuzz

SECTIONS = {
    "data": DataSettings,
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
    "method": Lora,
    "objective": Instruction,
    "base": NewBase,
}
NAMES = sorted({name for model in SECTIONS.values() for name in model.model_fields} | {"kind", "name", *SECTIONS})
WORDS = st.sampled_from([*NAMES, "lora", "full", "causal", "instruction", "cosine", "refuse", "few_shot", "a.jsonl"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 1 << 70)
    | st.floats()
    | st.sampled_from([0.1, 0.5, 1, 2, 16])
    | WORDS
    | st.text(max_size=12)
    | st.dates()
    | st.binary(max_size=4)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=3)
)


def sections() -> st.SearchStrategy[dict[str, Any]]:
    """Mostly sensible recipes: known sections with known keys, and anything as a value."""

    def section(name: str) -> st.SearchStrategy[Any]:
        keys = st.sampled_from([*SECTIONS[name].model_fields, "kind", "typo"])
        return st.dictionaries(keys, VALUES, max_size=3) | VALUES

    known = st.fixed_dictionaries({}, optional={name: section(name) for name in SECTIONS} | {"name": VALUES})
    return known | st.dictionaries(WORDS | st.text(max_size=6), VALUES, max_size=4)


def read_or_refused(text: str, *overrides: str) -> None:
    try:
        recipe = parse(text, *overrides)
    except RecipeError as error:
        assert error.message
        assert error.hint
        assert len(str(error)) < 2_000
        assert error.line is None or 1 <= error.line <= text.count("\n") + 1
    else:
        assert isinstance(recipe, Recipe)


@settings(max_examples=200, deadline=None)
@given(value=sections(), rows=st.booleans())
def test_any_values_are_read_or_refused(value, rows):
    if rows and isinstance(value.get("data", {}), dict):
        value["data"] = {"train": "rows.jsonl"} | value.get("data", {})
    read_or_refused(yaml.safe_dump(value, allow_unicode=True))


@settings(max_examples=150, deadline=None)
@given(
    lines=st.lists(
        st.tuples(
            st.sampled_from(["", "  ", "    ", "- ", "\t"]),
            WORDS,
            st.sampled_from([":", ": ", ": &a ", ": *a", ": !!int ", ": {", ": [", " ", ": |\n"]),
            SCALARS.map(str),
        ).map("".join)
        | st.text(alphabet="abc:-[]{}&*!|>'\"%@`#, \n\t0x1.e", max_size=20),
        max_size=6,
    )
)
def test_any_text_is_read_or_refused(lines):
    read_or_refused("\n".join(lines))


@settings(max_examples=150, deadline=None)
@given(
    path=st.lists(WORDS | st.text(max_size=4), max_size=3),
    equals=st.sampled_from(["=", "", "=="]),
    value=st.text(alphabet="abc:-[]{}&*!|>'\"%@`#, \n\t0x1.e_", max_size=12) | SCALARS.map(str),
)
def test_any_override_is_read_or_refused(path, equals, value):
    read_or_refused(WHOLE, ".".join(path) + equals + value)
