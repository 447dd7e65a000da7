"""Preparation: every row ends in one counted state, the cache is never stale, and what is held out stays out."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tunesmith.data.curate.checks import Models
from tunesmith.data.curate.names import Names
from tunesmith.data.prepare import prepare
from tunesmith.data.prepared import Prepared
from tunesmith.data.settings import DataSettings
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import DataError, NotFoundError, TemplateError
from tunesmith.objectives.causal import Causal
from tunesmith.objectives.classification import Classification
from tunesmith.objectives.instruction import Instruction
from tunesmith.objectives.regression import Regression

END = 2  # <|end|>
FRAME_TOKENS = 5  # begin, user, end, assistant, end around a prompt and an answer
Make = Callable[..., Prepared]


def row(prompt: str, completion: str = "red") -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


def write(path: Path, rows: list[Any]) -> str:
    lines = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in rows]
    path.write_text("".join(line + "\n" for line in lines), "utf-8")
    return str(path)


@pytest.fixture(scope="session")
def template(toy_tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(toy_tokenizer)


@pytest.fixture
def make(tmp_path: Path, template: ChatTemplate) -> Make:
    """`make(rows, **data settings)`: prepares `rows`, in train.jsonl, for instruction tuning."""

    def make(rows: list[Any] | str, **given: Any) -> Prepared:
        how = {"objective": Instruction(), "template": template, "max_tokens": 128, "cache": tmp_path / "cache"}
        how |= {name: given.pop(name) for name in list(given) if name in how or name == "on_rows"}
        how["models"] = Models(names=given.pop("finder", None))
        train = rows if isinstance(rows, str) else write(tmp_path / "train.jsonl", rows)
        return prepare(DataSettings(**{"train": train, "validation": None} | given), **how)

    return make


def prompts(prepared: Prepared, side: str) -> list[str]:
    return [example.messages[0].content for example in prepared.examples(side)]


def states(prepared: Prepared) -> dict[str, int]:
    return {state: count for state, count in prepared.ledger["states"].items() if count}


# ----------------------------------------------------------------------------------------------- what is prepared


def test_each_row_becomes_a_unit_with_its_answer_and_stop_token_trained(make, toy_tokenizer):
    prepared = make([row(f"colour of {i}?", "blue" * i) for i in range(1, 6)])
    assert len(prepared.train) == 5
    for index in range(5):
        (sequence,) = prepared.train.unit(index)
        target = sequence.tokens_T[sequence.weight_T > 0].tolist()
        assert toy_tokenizer.decode(target, skip_special_tokens=False) == "blue" * (index + 1) + "<|end|>"
        assert (prepared.train.origin(index).line, sequence.row) == (index + 1, index)
    assert states(prepared) == {"trained": 5}
    assert prepared.validation is None
    assert prepared.held_out() == ("none", [])


def test_the_answer_of_a_prompt_begins_where_the_prompt_ends_at_inference(make, template):
    prepared = make([row(f"Grüße {i}, <|end|> and\n\u2028", " a  b ") for i in range(4)])
    for index, example in enumerate(prepared.examples("train")):
        (sequence,) = prepared.train.unit(index)
        prompt = template.prompt(list(example.messages[:1])).ids
        assert sequence.tokens_T[: len(prompt)].tolist() == prompt
        assert np.flatnonzero(sequence.weight_T)[0] == len(prompt)
        assert Counter(sequence.tokens_T.tolist())[END] == 2  # the two of the template, none from the text


def test_examples_come_back_as_they_were(make):
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": {"id": 3}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello \u2028 \U0001f600"},
        {"role": "assistant", "content": "no", "weight": 0},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "found", "tool_call_id": "c1"},
        {"role": "assistant", "content": "yes"},
    ]
    prepared = make([{"messages": messages, "tools": [{"type": "function", "function": {"name": "find"}}]}])
    (example,) = prepared.examples("train")
    shown = [m.as_dict() for m in example.messages]
    assert shown == [{k: v for k, v in m.items() if k != "weight"} for m in messages]
    assert [m.weight for m in example.messages if m.role == "assistant"] == [0.0, 1.0, 1.0]
    assert example.tools[0]["function"]["name"] == "find"
    assert example.origin.line == 1


def test_plain_text_becomes_windows_that_train_each_token_once(make, toy_tokenizer):
    texts = ["x" * 300, "short", "y" * 63]
    prepared = make([{"text": text} for text in texts], objective=Causal(), max_tokens=64)
    windows = [sequence for unit in range(len(prepared.train)) for sequence in prepared.train.unit(unit)]
    assert all(len(window.tokens_T) <= 64 for window in windows)
    assert len(prepared.train) == len(windows)  # each window is a row of a step
    assert sum(window.num_targets for window in windows) == sum(len(text) + 1 for text in texts)
    trained = [token for window in windows for token in window.tokens_T[window.weight_T > 0].tolist()]
    assert toy_tokenizer.decode(trained, skip_special_tokens=False) == "".join(text + "<|end|>" for text in texts)
    assert states(prepared) == {"trained": 3}


@pytest.mark.parametrize(
    ("objective", "rows", "needed"),
    [
        (Causal(), [{"text": "a"}, row("b")], "instruction"),
        (Instruction(), [row("b"), {"text": "a"}], "causal"),
    ],
)
def test_rows_that_the_objective_cannot_use_are_refused_by_line(make, objective, rows, needed):
    with pytest.raises(DataError) as caught:
        make(rows, objective=objective)
    assert caught.value.line == 2
    assert f"objective: {needed}" in caught.value.hint
    assert len(make(rows, objective=objective, bad_rows="drop").train) == 1


# ---------------------------------------------------------------------------------------------------------- cache


def test_the_same_again_is_read_from_the_cache(make):
    first = make([row(f"{i}?") for i in range(20)], validation=0.2)
    (first.folder / "mark").write_text("kept")
    again = make([row(f"{i}?") for i in range(20)], validation=0.2)
    assert (again.folder, again.digest) == (first.folder, first.digest)
    assert (again.folder / "mark").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"validation": 0.3},
        {"test": 0.1},
        {"system": "Be brief."},
        {"max_tokens": 100},
        {"too_long": "drop"},
        {"too_long": "truncate"},
        {"duplicates": "drop"},
        {"bad_rows": "drop"},
        {"form": "prompt_completion"},
        {"mapping": {"prompt": "completion", "completion": "prompt"}},
    ],
    ids=str,
)
def test_another_setting_is_another_preparation(make, change):
    rows = [row(f"{i}?") for i in range(20)]
    assert make(rows, **change).digest != make(rows).digest


def test_other_bytes_are_another_preparation(make, tmp_path):
    rows = [row(f"{i}?") for i in range(20)]
    test = write(tmp_path / "test.jsonl", [row("test?")])
    first = make(rows, test=test)
    changed = make([*rows[:-1], row("19?", "bed")], test=test)
    write(tmp_path / "test.jsonl", [row("test!")])
    other_test = make(rows, test=test)
    assert len({first.digest, changed.digest, other_test.digest}) == 3
    assert [prompts(p, "test") for p in (first, other_test)] == [["test?"], ["test!"]]
    assert [e.messages[1].content for e in changed.examples("train")][-1] == "bed"


def test_another_template_or_tokenizer_is_another_preparation(make, template, make_tokenizer_folder):
    rows = [row("a?")]
    other = ChatTemplate(template.tokenizer, source=template.source.replace("<|begin|>", ""))
    special = ("<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|system|>", "<|assistant|>")  # two changed places
    swapped = Tokenizer.from_folder(make_tokenizer_folder(special, template=template.source, eos="<|end|>"))
    prepared = [make(rows, template=t) for t in (template, other, ChatTemplate(swapped))]
    assert len({p.digest for p in prepared}) == 3
    assert len({tuple(p.train.unit(0)[0].tokens_T.tolist()) for p in prepared}) == 3


def test_another_objective_is_another_preparation(make):
    rows = [{"text": "a text"}, row("a?")]
    causal, instruction = (make(rows, objective=o, bad_rows="drop") for o in (Causal(), Instruction()))
    assert causal.digest != instruction.digest
    assert [causal.train.origin(0).line, instruction.train.origin(0).line] == [1, 2]


def test_the_hashes_of_the_files_are_kept(make, tmp_path):
    test = write(tmp_path / "test.jsonl", [row("test?")])
    files = make([row("a?")], test=test).files
    assert set(files) == {"train", "test"}
    name, digest = files["test"][0].rsplit(" ", 1)
    assert name == test
    assert len(digest) == 64


@pytest.mark.parametrize("at", [0, 700])
def test_a_preparation_that_is_stopped_leaves_nothing(make, tmp_path, at):
    def stop(num_rows: int) -> None:
        if num_rows > at:
            raise KeyboardInterrupt

    rows = [row(f"{i}?") for i in range(1500)]
    with pytest.raises(KeyboardInterrupt):
        make(rows, on_rows=stop)
    assert list((tmp_path / "cache" / "prepared").iterdir()) == []
    counted: list[int] = []
    assert len(make(rows, on_rows=counted.append).train) == 1500
    assert counted == sorted(counted)
    assert counted[-1] == 1500


def test_what_another_process_prepared_meanwhile_is_kept(make):
    rows = [row(f"{i}?") for i in range(20)]
    others: list[Prepared] = []

    def meanwhile(num_rows: int) -> None:
        others.append(make(rows))
        (others[0].folder / "mark").write_text("it is being read")

    prepared = make(rows, on_rows=meanwhile)
    assert prepared.folder == others[0].folder
    assert (prepared.folder / "mark").exists()
    assert [entry.name for entry in prepared.folder.parent.iterdir()] == [prepared.folder.name]


# ---------------------------------------------------------------------------------------------------------- split

QUESTIONS = st.lists(
    st.tuples(st.integers(0, 30).map(lambda i: f"question {i}"), st.sampled_from(["yes", "no", "maybe"])),
    min_size=1,
    max_size=40,
)
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SHARES = {"validation": 0.3, "test": 0.2}


def sides(make: Make, pairs: list[tuple[str, str]]) -> dict[str, set[str]]:
    """Prompts by side, with enough rows added that no side can be empty."""
    prepared = make([row(p, c) for p, c in [*pairs, *((f"filler {i}", "yes") for i in range(40))]], **SHARES)
    found = {name: prompts(prepared, name) for name in ("train", "validation", "test")}
    assert sum(map(len, found.values())) == len(pairs) + 40
    assert len(prepared.validation) == len(found["validation"])
    return {name: set(texts) for name, texts in found.items()}


@pytest.mark.parametrize("by", ["random", "diversity", "quality", "quality+diversity"])
def test_rows_that_are_not_selected_are_counted_and_held_out_rows_are_not_touched(make, by):
    rows = [row(f"question {i} of {i % 7}", f"answer {i}") for i in range(120)]
    whole = make(rows, **SHARES)
    prepared = make(rows, **SHARES, select={"keep": 20, "by": by})
    counts = states(prepared)
    assert counts["trained"] == len(prepared.train) == len(list(prepared.examples("train"))) == 20
    assert sum(counts.values()) == 120
    assert prepared.ledger["reasons"] == {"dropped": {"not selected": states(whole)["trained"] - 20}}
    assert set(prompts(prepared, "train")) < set(prompts(whole, "train"))
    for name in ("validation", "test"):
        assert list(prepared.examples(name)) == list(whole.examples(name))


def test_rows_that_would_not_be_trained_are_no_candidates(make):
    held = {"validation": 0.2, "max_tokens": 40}
    dropping = {"duplicates": "drop", "personal": "drop", "too_long": "drop", "bad_rows": "drop", "train_share": 0.8}
    rows: list[Any] = [row(f"q{i}") for i in range(60)]
    rows += [*rows, row("x" * 50), row("write to jane@example.com"), {"prompt": "no answer"}]
    counts = states(make(rows, **held, **dropping))
    prepared = make(rows, **held, **dropping, select={"keep": counts["trained"] - 1, "by": "random"})
    reasons = prepared.ledger["reasons"]
    assert states(prepared) == counts | {"trained": counts["trained"] - 1, "dropped": counts["dropped"] + 1}
    assert reasons["dropped"]["not selected"] == 1
    assert {"personal_data", "too_long", "train_share"} < set(reasons["dropped"])
    with pytest.raises(DataError, match=f"there are {counts['trained']} rows to choose from"):
        make(rows, **held, **dropping, select={"keep": counts["trained"]})


def test_rows_at_fault_are_told_before_there_is_too_little_to_select(make):
    with pytest.raises(DataError) as caught:
        make([row("a"), {"prompt": "b"}, row("c")], select={"keep": 5})
    assert caught.value.line == 2


@QUICK
@given(pairs=QUESTIONS, more=QUESTIONS)
def test_a_row_stays_on_its_side_whatever_is_added_and_no_prompt_stands_on_two(make, pairs, more):
    before, after = sides(make, pairs), sides(make, [*more, *reversed(pairs)])
    for name, texts in before.items():
        assert texts <= after[name]
    for found in (before, after):
        assert sum(map(len, found.values())) == len(set().union(*found.values()))


def test_shares_are_about_what_was_asked(make):
    prepared = make([row(f"question {i}") for i in range(1000)], **SHARES)
    counts = states(prepared)
    assert 240 < counts["held_out_validation"] < 360
    assert 150 < counts["held_out_test"] < 250
    assert sum(counts.values()) == 1000


def test_changing_one_share_moves_no_row_of_the_other(make):
    rows = [row(f"question {i}") for i in range(200)]
    small, large = make(rows, validation=0.1, test=0.2), make(rows, validation=0.4, test=0.2)
    assert prompts(small, "test") == prompts(large, "test")
    assert set(prompts(small, "validation")) < set(prompts(large, "validation"))


def test_rows_of_a_held_out_file_are_taken_out_of_training_and_counted(make, tmp_path):
    test = write(tmp_path / "test.jsonl", [row("q3", "a3"), row("q5", "a5"), row("new", "x")])
    validation = write(tmp_path / "validation.jsonl", [row("q7", "a7"), row("q5", "a5")])
    prepared = make([row(f"q{i}", f"a{i}") for i in range(10)], test=test, validation=validation)
    assert prompts(prepared, "train") == ["q0", "q1", "q2", "q4", "q6", "q8", "q9"]
    assert prompts(prepared, "validation") == ["q7", "q5"]
    assert prompts(prepared, "test") == ["q3", "new"]  # q5 has already chosen the best step
    assert states(prepared) == {"trained": 7, "duplicate": 4, "held_out_validation": 2, "held_out_test": 2}
    assert prepared.ledger["reasons"]["duplicate"] == {"also in validation": 3, "also in test": 1}
    assert prepared.held_out()[0] == "test"


def test_repeated_rows_are_kept_unless_asked(make):
    rows = [row("a"), row("b"), row("a"), row("a", "blue"), row("a")]
    assert states(make(rows)) == {"trained": 5}
    dropped = make(rows, duplicates="drop")
    assert states(dropped) == {"trained": 3, "duplicate": 2}
    assert dropped.ledger["reasons"]["duplicate"] == {"repeated": 2}
    assert [d["line"] for d in dropped.ledger["details"]] == [3, 5]


@pytest.mark.parametrize("treated", ["keep", "mask", "drop"])
def test_personal_data_is_kept_masked_or_dropped_and_counted(make, treated):
    rows = [
        row("Who is jane@example.com?", "Ask jane@example.com"),
        row("What colour?"),
        row("Why?", "+1-415-555-0199"),
    ]
    prepared = make(rows, personal=treated)
    kept = [(e.messages[0].content, e.messages[1].content) for e in prepared.examples("train")]
    whole = [("Who is jane@example.com?", "Ask jane@example.com"), ("What colour?", "red"), ("Why?", "+1-415-555-0199")]
    masked = [("Who is [EMAIL_1]?", "Ask [EMAIL_1]"), ("What colour?", "red"), ("Why?", "[PHONE_1]")]
    assert kept == {"keep": whole, "mask": masked, "drop": whole[1:2]}[treated]
    assert prepared.ledger["masked"] == (2 if treated == "mask" else 0)
    assert states(prepared) == ({"trained": 1, "dropped": 2} if treated == "drop" else {"trained": 3})
    assert prepared.ledger["reasons"] == ({"dropped": {"personal_data": 2}} if treated == "drop" else {})
    if treated != "keep":
        written = b"".join(path.read_bytes() for path in prepared.folder.rglob("*") if path.is_file())
        assert b"jane" not in written
        assert b"555-0199" not in written


def capitals(texts: list[str]) -> list[list[tuple[int, int]]]:
    """Finds words in capitals."""
    return [[match.span() for match in re.finditer(r"[A-Z]{2,}", text)] for text in texts]


@pytest.mark.parametrize("treated", ["mask", "drop"])
def test_names_are_masked_or_dropped_where_a_model_finds_them(make, treated):
    rows = [row("Who is ANNA?", "Ask ANNA or OLGA"), row("What colour?"), row("Why?", "a@example.com")] * 200
    rows += ["{broken", row("Is it OLGA?")]
    names = Names(capitals, files=["tagger/config.json 1"])
    given = {"names": "tagger", "personal": treated, "bad_rows": "drop"}
    prepared = make(rows, finder=names, **given)
    kept = {(e.messages[0].content, e.messages[1].content) for e in prepared.examples("train")}
    masked = {("Who is [NAME_1]?", "Ask [NAME_1] or [NAME_2]"), ("Why?", "[EMAIL_1]"), ("Is it [NAME_1]?", "red")}
    assert kept == {("What colour?", "red")} | (masked if treated == "mask" else set())
    assert states(prepared)["trained"] == (601 if treated == "mask" else 200)
    assert prepared.ledger["masked"] == (401 if treated == "mask" else 0)
    assert prepared.files["names"] == names.files
    written = b"".join(path.read_bytes() for path in prepared.folder.rglob("*.jsonl"))
    assert not re.search(rb"ANNA|OLGA", written)
    assert make(rows, finder=names, **given).folder == prepared.folder
    other = make(rows, finder=Names(capitals, files=["tagger/config.json 2"]), **given)
    assert other.folder != prepared.folder


def test_classes_are_not_taken_from_rows_that_are_dropped_for_a_name(make):
    rows = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(6)] + [{"text": "of ANNA", "label": "c"}]
    found = make(
        rows,
        names="tagger",
        personal="drop",
        finder=Names(capitals, files=[]),
        objective=Classification(pooling="mean"),
        duplicates="drop",
        leave_out=["near_duplicate"],
    )
    assert found.objective["labels"] == ["a", "b"]


def test_general_rows_are_trained_on_with_the_weight_of_a_row_and_counted(make, tmp_path):
    task = [row(f"question {i}") for i in range(30)]
    general = [{"text": f"General text {i}. " * (i + 1)} for i in range(8)] + [
        row("Who wrote it?", "Nobody knows who.")
    ]
    path = write(tmp_path / "general.jsonl", general)
    plain = make(task)
    replayed = make(task, replay=path, replay_share=0.2)
    num_task = plain.train.num_units
    num_general = round(0.2 / 0.8 * num_task)
    assert replayed.train.num_units == num_task + num_general
    for i in range(num_task):
        assert [s.weight_T.tolist() for s in replayed.train.unit(i)] == [
            s.weight_T.tolist() for s in plain.train.unit(i)
        ]

    def weight(unit: int) -> float:
        return sum(float(s.weight_T.sum()) for s in replayed.train.unit(unit))

    task_weight = sum(map(weight, range(num_task)))
    for unit in range(num_task, num_task + num_general):
        assert weight(unit) == pytest.approx(task_weight / num_task, rel=1e-5)
        assert replayed.train.origin(unit).file == path
    assert list(replayed.examples("train")) == list(plain.examples("train"))  # what few-shot prompts are drawn from
    ledger = replayed.ledger
    assert ledger["rows"] == len(task) + len(general)
    assert ledger["reasons"]["trained"] == {"replayed": num_general}
    assert ledger["reasons"]["dropped"] == {"not drawn for replay": len(general) - num_general}
    assert path in "".join(replayed.files["replay"])


def test_a_general_row_that_is_too_long_is_settled_as_any_other(make, tmp_path):
    task = [row(f"question {i}") for i in range(30)]
    path = write(tmp_path / "general.jsonl", [row("Tell me all.", "word " * 400), {"text": "word " * 4000}])
    with pytest.raises(DataError, match="tokens and 200 are allowed"):
        make(task, replay=path, replay_share=0.5, max_tokens=200)
    found = make(task, replay=path, replay_share=0.5, max_tokens=200, too_long="drop")
    assert found.ledger["reasons"]["dropped"] == {"too_long": 1}
    assert found.ledger["reasons"]["trained"] == {"replayed": 1}  # a text becomes windows
    assert found.train.longest() <= 200


def test_general_rows_are_drawn_as_they_are_trained_on(make, tmp_path):
    """Masked rows are drawn by what is left of them, so as many as without personal data."""
    task = [{"prompt": f"Colour of {n}?", "completion": "red"} for n in range(8)]
    general = [{"prompt": f"Mail {n}?", "completion": f"To jane.doe{n}@example.com, {n}"} for n in range(20)]
    path = write(tmp_path / "general.jsonl", general)
    for personal in ("keep", "mask"):
        found = make(task, replay=path, replay_share=0.5, personal=personal)
        assert found.ledger["reasons"]["trained"] == {"replayed": 8}
    general += [{"prompt": f"And {n}?", "completion": "Nothing."} for n in range(12)]
    found = make(task, replay=write(tmp_path / "more.jsonl", general), replay_share=0.5, personal="drop")
    assert found.ledger["reasons"]["trained"] == {"replayed": 8}  # of those that stay
    assert found.ledger["reasons"]["dropped"] == {"personal_data": 20, "not drawn for replay": 4}


def test_classes_are_taken_from_the_rows_that_stay(make):
    rows = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(6)] + [{"text": "me@example.com", "label": "c"}]
    for treated, labels in (("mask", ["a", "b", "c"]), ("drop", ["a", "b"])):
        assert make(rows, personal=treated, objective=Classification(pooling="mean")).objective["labels"] == labels


@pytest.mark.parametrize("side", ["validation", "test"])
def test_a_file_that_is_named_twice_is_refused(make, tmp_path, side):
    train = write(tmp_path / "train.jsonl", [row(f"{i}?") for i in range(10)])
    again = f"{tmp_path}/./train.jsonl"
    (tmp_path / "folder").mkdir()
    inside = write(tmp_path / "folder" / "part.jsonl", [row("part?")])
    for given_files in ({side: again}, {"train": [train, again]}, {"train": [str(tmp_path / "folder"), inside]}):
        with pytest.raises(DataError, match="twice") as caught:
            make(train, **given_files)
        assert caught.value.hint


# -------------------------------------------------------------------------------------------------------- too long


def test_a_row_that_is_too_long_stops_the_run_with_the_numbers(make, tmp_path):
    rows = [row("ok"), row("p" * 60, "c" * 60), row("p" * 100, "c" * 100), row("ok again")]
    with pytest.raises(DataError) as caught:
        make(rows, max_tokens=80)
    error = caught.value
    assert (error.file, error.line) == (str(tmp_path / "train.jsonl"), 2)
    assert f"{120 + FRAME_TOKENS} tokens and 80 are allowed" in error.message
    assert f"2 rows are too long, the longest has {200 + FRAME_TOKENS}" in error.message
    assert "truncate or drop" in error.hint
    assert list((tmp_path / "cache" / "prepared").iterdir()) == []


def test_a_row_that_is_too_long_stops_the_run_even_where_bad_rows_are_dropped(make):
    with pytest.raises(DataError) as caught:
        make(["{broken", row("ok"), row("p" * 60, "c" * 60)], max_tokens=80, bad_rows="drop")
    assert caught.value.line == 3


def test_a_row_that_is_exactly_as_long_as_allowed_is_trained_whole(make):
    rows = [row("p" * 30, "c" * (50 - FRAME_TOKENS))]
    assert states(make(rows, max_tokens=80)) == {"trained": 1}
    with pytest.raises(DataError):
        make(rows, max_tokens=79)


def test_cut_rows_are_counted_with_their_tokens(make):
    rows = [row("ok"), row("p" * 60, "c" * 60), row("p" * 100, "c" * 5)]
    prepared = make(rows, max_tokens=80, too_long="truncate")
    assert states(prepared) == {"trained": 1, "truncated": 1, "dropped": 1}
    assert prepared.ledger["tokens_cut"] == 120 + FRAME_TOKENS - 80
    assert prepared.ledger["reasons"]["dropped"] == {"nothing left to train after truncation": 1}
    assert prepared.train.longest() == 80
    (sequence,) = prepared.train.unit(1)
    assert sequence.num_targets == 80 - 60 - 4


def test_dropped_rows_are_counted(make):
    prepared = make([row("ok"), row("p" * 60, "c" * 60)], max_tokens=80, too_long="drop")
    assert states(prepared) == {"trained": 1, "dropped": 1}
    assert prepared.ledger["reasons"]["dropped"] == {"too_long": 1}
    (detail,) = prepared.ledger["details"]
    assert (detail["line"], detail["reason"]) == (2, "too_long")


# ---------------------------------------------------------------------------------------------------- bad rows


def test_a_bad_row_stops_the_run_at_its_line(make, tmp_path):
    with pytest.raises(DataError) as caught:
        make([row("ok"), "{broken", row("", ""), row("ok")])
    error = caught.value
    assert (error.file, error.line) == (str(tmp_path / "train.jsonl"), 2)
    assert "2 rows are at fault" in error.message
    assert "bad_rows: drop" in error.hint


def test_bad_rows_are_left_out_and_counted_where_asked(make):
    prepared = make([row("ok"), "{broken", row("x", ""), "[1]", row("ok 2")], bad_rows="drop")
    assert states(prepared) == {"trained": 2, "bad": 3}
    assert prepared.ledger["reasons"]["bad"] == {"bad_row": 2, "empty_target": 1}


def test_a_conversation_that_the_template_refuses_is_a_row_at_fault(make, toy_tokenizer):
    picky = ChatTemplate(
        toy_tokenizer,
        source="{% if 'no' in messages[0].content %}{{ raise_exception('not this one') }}{% endif %}"
        + (toy_tokenizer.chat_template or ""),
    )
    rows = [row(f"{i}?") for i in range(600)] + [row("no!")]
    with pytest.raises(TemplateError, match="not this one") as caught:
        make(rows, template=picky)
    assert caught.value.line == 601
    prepared = make(rows, template=picky, bad_rows="drop")
    assert states(prepared) == {"trained": 600, "bad": 1}
    assert prepared.ledger["reasons"]["bad"] == {"template": 1}


def test_nothing_left_to_train_on_is_refused(make, tmp_path):
    test = write(tmp_path / "test.jsonl", [row("a")])
    for rows, given_settings in (([row("a")], {"test": test}), (["{broken"], {"bad_rows": "drop"}), ([], {})):
        with pytest.raises(DataError, match="no row is left to train on"):
            make(rows, **given_settings)


def test_a_validation_without_rows_is_refused_where_it_was_asked_for(make, tmp_path):
    with pytest.raises(DataError, match="validation holds no row"):
        make([row("a"), row("b")], validation=1e-9)
    empty = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(DataError, match="validation holds no row"):
        make([row("a"), row("b")], validation=empty)


def test_a_file_that_is_not_there_is_named(make, tmp_path):
    write(tmp_path / "tickets.jsonl", [row("a")])
    with pytest.raises(NotFoundError) as caught:
        make(str(tmp_path / "ticket.jsonl"))
    assert "tickets.jsonl" in caught.value.hint


# --------------------------------------------------------------------------------------------------------- ledger

LINES = st.one_of(
    st.integers(0, 9).map(lambda i: row(f"question {i}", "yes")),
    st.integers(0, 9).map(lambda i: row(f"question {i}", "no" * 40)),
    st.integers(0, 9).map(lambda i: row(f"{i}" * 90, "no")),
    st.sampled_from(
        ["{broken", "[]", "3", '{"prompt": "a"}', row("x", ""), row("x", " "), row("", "x"), {"text": "t"}]
    ),
    st.just(row("<|end|>", "<|assistant|>")),
    st.text(min_size=1, max_size=8).map(lambda text: row(text, text)),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(LINES, max_size=25),
    held=st.lists(LINES, max_size=5),
    given_settings=st.fixed_dictionaries(
        {
            "too_long": st.sampled_from(["refuse", "truncate", "drop"]),
            "bad_rows": st.sampled_from(["drop", "drop", "refuse"]),
            "duplicates": st.sampled_from(["keep", "drop"]),
            "validation": st.sampled_from([None, 0.1, 0.5]),
            "system": st.sampled_from([None, "Be brief."]),
        }
    ),
)
def test_every_row_ends_in_exactly_one_state(make, tmp_path, lines, held, given_settings):
    assume(["[]"] not in (lines, held))  # a file that is an empty list holds no row
    test = write(tmp_path / "test.jsonl", held)
    try:
        prepared = make(lines, test=test, max_tokens=80, **given_settings)
    except (DataError, TemplateError) as error:
        assert error.file in (str(tmp_path / "train.jsonl"), test)
        assert error.hint
        return
    ledger, counts = prepared.ledger, Counter(prepared.ledger["states"])
    assert ledger["rows"] == counts.total() == len(lines) + len(held)
    assert counts["trained"] + counts["truncated"] == len(prepared.train) == len(prompts(prepared, "train"))
    assert counts["held_out_validation"] == len(prompts(prepared, "validation"))
    assert counts["held_out_test"] == len(prompts(prepared, "test"))
    for state in ("bad", "dropped", "duplicate"):
        assert sum(ledger["reasons"].get(state, {}).values()) == counts[state]
    assert len(ledger["details"]) == sum(counts[s] for s in ("truncated", "dropped", "duplicate", "bad"))
    for index in range(len(prepared.train)):
        (sequence,) = prepared.train.unit(index)
        assert sequence.num_targets > 0
        assert len(sequence.tokens_T) <= 80
    held_out = {e.key for e in [*prepared.examples("test"), *prepared.examples("validation")]}
    assert not held_out & {e.key for e in prepared.examples("train")}


# ---------------------------------------------------------------------------------------------------- labelled rows


def labelled(text: str, label: Any) -> dict[str, Any]:
    return {"text": text, "label": label}


def test_texts_become_sequences_with_the_number_of_their_class(make, toy_tokenizer):
    colours = ["red", "green", "blue", "red"]
    prepared = make([labelled(f"text {c}", c) for c in colours], objective=Classification(pooling="mean"))
    assert prepared.objective["labels"] == ["blue", "green", "red"]
    assert prepared.objective["several"] is False
    for index, colour in enumerate(colours):
        (sequence,) = prepared.train.unit(index)
        assert toy_tokenizer.decode(sequence.tokens_T.tolist()) == f"text {colour}"
        assert sequence.values.tolist() == [["blue", "green", "red"].index(colour)]
        assert sequence.values.dtype == np.float32
        assert sequence.weight_T.all()
    examples = list(prepared.examples("train"))
    assert [(e.form, e.text, e.label) for e in examples] == [("labelled", f"text {c}", c) for c in colours]


def test_several_classes_and_numbers_survive_the_store(make):
    several = [["a", "b"], [], ["b"], ["c", "a"]]
    rows = [labelled(f"text {i}", label) for i, label in enumerate(several)]
    prepared = make(rows, objective=Classification(pooling="last"))
    values = [prepared.train.unit(i)[0].values.tolist() for i in range(4)]
    assert values == [[0, 1], [-1], [1], [2, 0]]
    assert [e.label for e in prepared.examples("train")] == [tuple(label) for label in several]
    hours = make([labelled(f"text {i}", i) for i in (1, 3)], objective=Regression(pooling="last"))
    assert (hours.objective["centre"], hours.objective["spread"]) == (2.0, 1.0)
    assert [hours.train.unit(i)[0].values.tolist() for i in range(2)] == [[-1.0], [1.0]]


def test_the_scale_is_that_of_the_training_rows_and_the_classes_those_of_all(make, tmp_path):
    held = write(tmp_path / "held.jsonl", [labelled("held", "100")])
    rows = [labelled("one", "1"), labelled("three", "3")]
    numbers = make(rows, objective=Regression(pooling="last"), validation=held)
    assert numbers.objective["centre"] == 2.0
    assert numbers.validation.unit(0)[0].values.tolist() == [98.0]
    assert make(rows, objective=Classification(pooling="last"), validation=held).objective["labels"] == [
        "1",
        "100",
        "3",
    ]


def test_other_labels_are_other_data(make):
    one = make([labelled("a", "x"), labelled("b", "y")], objective=Classification(pooling="last"))
    assert make([labelled("a", "x"), labelled("b", "y")], objective=Classification(pooling="last")).digest == one.digest
    assert make([labelled("a", "y"), labelled("b", "x")], objective=Classification(pooling="last")).digest != one.digest


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_text_that_is_cut_keeps_its_last_token(make, pooling):
    rows = [labelled("x" * 50, "a"), labelled("short", "b")]
    prepared = make(rows, objective=Classification(pooling=pooling), max_tokens=20, too_long="truncate")
    assert states(prepared) == {"trained": 1, "truncated": 1}
    (sequence,) = prepared.train.unit(0)
    assert len(sequence.tokens_T) == 20
    assert sequence.tokens_T[-1] == END
    assert np.flatnonzero(sequence.weight_T).tolist() == ([19] if pooling == "last" else list(range(20)))
    assert prepared.ledger["tokens_cut"] == 50 + 2 - 20
    with pytest.raises(DataError, match="52 tokens and 20 are allowed"):
        make(rows, objective=Classification(pooling=pooling), max_tokens=20)


@pytest.mark.parametrize("objective", [Classification(pooling="last"), Regression(pooling="last")])
@pytest.mark.parametrize("bad", [{"text": "plain"}, labelled("odd", ""), labelled(" ", "1")])
def test_a_row_without_a_text_or_a_label_is_refused_by_line_or_dropped(make, objective, bad):
    rows = [labelled("a", "1"), labelled("b", "2"), bad]
    with pytest.raises(DataError) as caught:
        make(rows, objective=objective)
    assert caught.value.line == 3
    assert states(make(rows, objective=objective, bad_rows="drop")) == {"trained": 2, "bad": 1}


def test_the_same_text_with_two_labels_is_no_duplicate(make):
    rows = [labelled("a", "x"), labelled("a", "y"), labelled("a", "x")]
    prepared = make(rows, objective=Classification(pooling="last"), duplicates="drop")
    assert states(prepared) == {"trained": 2, "duplicate": 1}


# ------------------------------------------------------------------------------------------------- what is left out

LONG = "The parcel left the warehouse on Monday and will be with you on Thursday at the latest, said the colleague"


def test_rows_are_left_out_for_what_the_checks_find_and_held_out_rows_never(make, tmp_path):
    rows = [row(f"question number {i}", f"{i} answers") for i in range(40)]
    rows += [row(f"{LONG} number {i}", "yes") for i in ("one", "two")]  # of near rows one stays
    test = [row(f"{LONG} number one, please", "yes"), row("what else", "nothing")]
    bench = [
        {"question": "When did the ship that carried the grain of the whole valley reach the harbour of the town?"}
    ]
    rows += [
        row(bench[0]["question"], "on Friday"),
        row("May I ask?", "I'm sorry, but I can't assist with that request."),
    ]
    paths = {name: write(tmp_path / f"{name}.jsonl", values) for name, values in (("t", test), ("b", bench))}
    common = {"test": paths["t"], "validation": None, "max_tokens": 400}
    plain = make(rows, **common)
    assert plain.ledger["findings"] == {}
    told = make(rows, **common, benchmarks=[paths["b"]])
    assert told.ledger["findings"] == {"contamination": 1}  # looked for, told, and kept
    assert states(told)["trained"] == states(plain)["trained"] == len(rows)
    given = {"leave_out": ["near_duplicate", "contamination", "quality"], "benchmarks": [paths["b"]]}
    found = make(rows, **common, **given)
    ledger = found.ledger
    assert ledger["rows"] == len(rows) + len(test)
    assert ledger["reasons"]["dropped"] == {"contamination": 1, "quality": 1}
    assert ledger["reasons"]["duplicate"] == {"near": 2}  # both are near the test row
    assert states(found)["held_out_test"] == 2
    assert {d["other"]["file"] for d in ledger["details"] if d.get("reason") == "near"} <= {
        paths["t"],
        rows_file(found),
    }
    assert set(prompts(found, "train")) == {f"question number {i}" for i in range(40)}
    assert any("b.jsonl" in name for name in found.files["benchmarks"])


def rows_file(prepared: Prepared) -> str:
    return prepared.files["train"][0].rsplit(" ", 1)[0]


def test_other_bytes_of_a_benchmark_are_another_preparation(make, tmp_path):
    bench = tmp_path / "b.jsonl"
    folders = []
    for text in (
        "one two three four five six seven eight nine ten",
        "ten nine eight seven six five four three two one",
    ):
        bench.write_text(json.dumps({"text": text}) + "\n")
        folders.append(make([row(f"question {i}") for i in range(20)], benchmarks=[str(bench)]).folder)
    assert folders[0] != folders[1]


def test_leaving_out_what_nothing_looks_for_is_refused():
    with pytest.raises(ValueError, match="no effect without `benchmarks`"):
        DataSettings(train="rows.jsonl", leave_out=("contamination",))


def test_columns_that_are_asked_for_stay_with_the_rows(make: Make) -> None:
    rows = [row(f"q{i}") | {"region": ["north", None][i % 2], "id": i, "more": {"a": 1}} for i in range(4)]
    prepared = make(rows, keep_columns=["region", "completion"], validation=0.5)
    kept = [example for side in ("train", "validation") for example in prepared.examples(side)]
    assert sorted(example.origin.line for example in kept) == [1, 2, 3, 4]
    for example in kept:
        assert example.columns == {"region": rows[example.origin.line - 1]["region"], "completion": "red"}
    assert [example.columns for example in make(rows).examples("train")] == [{}] * 4


def test_columns_that_no_row_has_are_refused(make: Make) -> None:
    with pytest.raises(DataError, match="no row has the column 'regoin'") as caught:
        make([row("a"), row("b")], keep_columns=["regoin"])
    assert "evaluate.groups" in caught.value.hint


def test_a_label_that_is_kept_as_a_column_is_still_the_label(make: Make) -> None:
    rows = [{"text": text, "label": label} for text, label in (("a", "x"), ("b", "y"))]
    prepared = make(rows, keep_columns=["label"], objective=Classification(pooling="last"))
    assert [(e.label, e.columns) for e in prepared.examples("train")] == [("x", {"label": "x"}), ("y", {"label": "y"})]
