"""`check_file`: what it finds, what it counts, and the document it prints."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.data import check
from tunesmith.data.check import check_file
from tunesmith.data.formats import to_example
from tunesmith.data.ledger import STATES
from tunesmith.data.settings import DataSettings
from tunesmith.data.sources import read_rows
from tunesmith.data.split import side
from tunesmith.errors import DataError, NotFoundError, RecipeError, TemplateError

SHARED_DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def many(count):
    return [pair(f"What is {number} plus 1?", f"It is {number + 1}, of course.") for number in range(count)]


@pytest.fixture
def write(tmp_path):
    def write_rows(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write_rows


def found(report, kind):
    """[(line, line of the other place)] of one kind."""
    return [(p.line, p.other.line if p.other else None) for p in report.problems if p.kind == kind]


def count_words(examples):
    counts = []
    for example in examples:
        texts = [example.text] if example.text is not None else [message.content for message in example.messages]
        if "unrenderable" in texts[0]:
            raise TemplateError("the template refuses it", hint="mend the template")
        counts.append((sum(len(text.split()) for text in texts), len(texts[-1].split())))
    return counts


def test_a_good_file_has_no_problems(write):
    path = write(many(40))
    report = check_file(path)
    assert (report.form, report.rows, report.problems, report.num_errors) == ("prompt_completion", 40, [], 0)
    assert "no problems found" in report.as_text()


def test_the_document(write):
    path = write([*many(11), "{broken", pair("a?", "b"), pair("a?", "b")])
    document = check_file(path).as_dict()
    assert json.loads(json.dumps(document)) == document
    assert {"file", "form", "rows", "problems", "tokens", "ledger"} <= document.keys()
    assert (document["file"], document["form"], document["rows"]) == (str(path), "prompt_completion", 14)
    assert set(document["ledger"]) == set(STATES)
    assert sum(document["ledger"].values()) == 14
    assert document["problem_counts"] == {"bad_row": 1, "exact_duplicate": 1}
    bad, repeated = document["problems"]
    assert {"kind", "severity", "file", "line", "message"} <= bad.keys()
    assert (bad["kind"], bad["severity"], bad["line"]) == ("bad_row", "error", 12)
    assert repeated["other"] == {"file": str(path), "line": 13}


def test_the_ledger_is_what_the_split_does(write):
    path = write(many(60))
    settings = DataSettings(train=str(path), validation=0.3, test=0.2)
    examples = [to_example(row, settings=settings) for row in read_rows(path, on_bad=pytest.fail)]
    sides = [side(example.prompt_key, shares=settings.shares) for example in examples]
    ledger = check_file(path, settings=settings).ledger
    assert ledger["trained"] == sides.count("train")
    assert ledger["held_out_validation"] == sides.count("validation")
    assert ledger["held_out_test"] == sides.count("test")


# ------------------------------------------------------------------------------------------------------ tokens


def test_tokens_are_counted_and_long_rows_refused(write):
    path = write([*many(12), pair("one two three four", "five six seven")])
    report = check_file(path, count_tokens=count_words, max_tokens=8)
    assert report.tokens["targets"] == 12 * 5 + 3
    assert report.tokens["total"] == 12 * 10 + 7
    assert report.tokens["longest"] == 10
    assert found(report, "too_long") == [(line, None) for line in range(1, 13)]
    assert report.num_errors == 12
    assert report.ledger["bad"] == 12


@pytest.mark.parametrize(("policy", "state"), [("truncate", "truncated"), ("drop", "dropped"), ("refuse", "bad")])
def test_what_becomes_of_long_rows(write, policy, state):
    path = write([*many(20), pair("long " * 50, "answer")])
    settings = DataSettings(train=str(path), validation=None, max_tokens=30, too_long=policy)
    report = check_file(path, settings=settings, count_tokens=count_words)
    assert found(report, "too_long") == [(21, None)]
    assert {name: count for name, count in report.ledger.items() if count} == {"trained": 20, state: 1}
    assert (report.num_errors > 0) == (policy == "refuse")


def test_without_a_tokenizer_only_very_long_rows_are_told(write):
    report = check_file(write([*many(12), pair("word " * 30_000, "answer")]))
    assert [(p.line, p.severity) for p in report.problems if p.kind == "too_long"] == [(13, "warning")]


def test_rows_the_template_refuses_are_found_one_by_one(write):
    path = write([*many(12), pair("unrenderable", "x y"), *many(20)[12:]])
    report = check_file(path, count_tokens=count_words)
    assert found(report, "template") == [(13, None)]
    assert report.ledger["bad"] == 1
    assert report.tokens["targets"] == 20 * 5


# ----------------------------------------------------------------------------------------------------- repeats


def test_repeats_in_one_file(write):
    long = "the quick brown fox jumps over the lazy dog and then it sleeps beside the old stone wall"
    rows = [
        pair(f"Please summarise: {long}.", "A fox jumps and sleeps."),
        pair(f"Please summarise: {long}.", "A fox jumps and sleeps."),
        pair(f"please  summarise: {long.upper()}!", "a fox jumps and sleeps"),
        pair(f"Please summarise: {long.replace('quick', 'swift')}.", "A fox jumps and sleeps."),
        pair(f"Please summarise: {long.replace('dog', 'cat 7')}.", "A fox jumps and sleeps."),
        pair(f"Please summarise: {long.replace('old', 'new')}.", "A fox rests."),
        *many(12),
    ]
    report = check_file(write(rows))
    assert found(report, "exact_duplicate") == [(2, 1)]
    assert [line for line, _ in found(report, "near_duplicate")] == [3, 4]
    assert found(report, "contradiction") == []
    assert report.num_errors == 0


def test_dropped_duplicates_are_counted(write):
    path = write([*many(15), *many(3)])
    settings = DataSettings(train=str(path), validation=None, duplicates="drop")
    ledger = check_file(path, settings=settings).ledger
    assert (ledger["trained"], ledger["duplicate"]) == (15, 3)


def test_a_template_all_rows_share_makes_no_repeats(write):
    opening = "You are a careful assistant of a shop. Read the ticket below and answer with one of the labels. Ticket: "
    nouns = ["parcel", "invoice", "refund", "login", "password", "colour", "voucher", "delivery", "screen", "keyboard"]
    verbs = ["lost", "broke", "wants", "forgot", "changed", "cancelled", "returned"]
    rows = [pair(f"{opening}somebody {verb} the {noun} again", noun) for noun in nouns for verb in verbs]
    report = check_file(write(rows))
    assert found(report, "near_duplicate") == []


def test_signs_that_carry_meaning_make_another_row(write):
    rows = [pair("What is 5 - 3?", "It is 2."), pair("What is 5 + 3?", "It is 8."), pair("What is 5 * 3?", "It is 15.")]
    rows += [pair("Is 3.5 more than 2?", "Yes."), pair("Is 35 more than 2?", "Yes.")]
    report = check_file(write(rows))
    assert found(report, "near_duplicate") == found(report, "contradiction") == []


def test_one_prompt_with_two_answers_is_a_contradiction(write):
    rows = [*many(10), pair("When do you open?", "At nine."), pair("when do you open", "At ten.")]
    report = check_file(write(rows))
    assert found(report, "contradiction") == [(12, 11)]


def test_leaks_from_the_other_file(write):
    test = [
        pair("What freezes at zero degrees?", "Water does."),
        pair("Who wrote the play about the prince of Denmark and his uncle?", "Shakespeare wrote it."),
        pair("Name a colour.", "Blue."),
    ]
    train = [
        *many(10),
        test[0],
        pair("WHAT FREEZES at zero degrees??", "water does"),
        pair("Who wrote the play about the prince of Denmark and an uncle?", "Shakespeare wrote it."),
        pair("Name a colour.", "Red."),
    ]
    path, other = write(train), write(test, "test.jsonl")
    report = check_file(path, against=other)
    assert found(report, "leak") == [(11, 1), (12, 1), (13, 2), (14, 3)]
    assert {p.other.file for p in report.problems if p.kind == "leak"} == {str(other)}
    backwards = check_file(other, against=path)
    assert [line for line, _ in found(backwards, "leak")] == [1, 2, 3]
    assert report.rows == 14


def test_rows_repeated_in_the_other_file_only_are_no_repeats_here(write):
    path, other = write(many(12)), write(many(40)[20:30] * 2, "test.jsonl")
    assert check_file(path, against=other).problems == []


def test_bad_rows_of_the_other_file_are_mentioned(write):
    path, other = write(many(12)), write(["{broken"], "test.jsonl")
    assert [(p.kind, p.severity, p.file) for p in check_file(path, against=other).problems] == [
        ("quality", "warning", str(other))
    ]


def test_a_file_is_not_checked_against_itself(write):
    path = write(many(3))
    with pytest.raises(DataError, match="itself"):
        check_file(path, against=path.parent / "." / path.name)


# ------------------------------------------------------------------------------------------ labels and the rest


def test_labels_are_mapped_and_the_mapping_is_told(write):
    rows = [{"text": f"Ticket number {number} is late", "label": "late"} for number in range(20)]
    rows += [{"text": "It is broken in two", "label": "broken"}, {"text": "Where on earth is it", "label": "Late "}]
    report = check_file(write(rows))
    assert (report.form, report.mapping) == ("labelled", {"prompt": "text", "completion": "label"})
    assert found(report, "imbalance") == [(21, None)]
    assert found(report, "label_error") == [(22, 1)]
    assert "data.mapping: {prompt: text, completion: label}" in report.as_text()
    assert check_file(write(rows[:20])).problem_counts[("imbalance", "warning")] == 1


def test_words_with_tags_are_checked_like_texts(write):
    rows = [{"words": ["ticket", str(n), "of", "Ann"], "tags": ["O", "O", "O", "B-PER"]} for n in range(20)]
    rows += [rows[3], {"words": ["a"], "tags": ["O", "O"]}, {"words": ["mail", "ann@example.org"], "tags": ["O", "O"]}]
    report = check_file(write(rows))
    assert report.form == "tagged"
    assert found(report, "exact_duplicate") == [(21, 4)]
    assert found(report, "bad_row") == [(22, None)]
    assert found(report, "personal_data") == [(23, None)]


def test_labels_that_the_recipe_reads_are_looked_at(write):
    rows = [{"body": f"Ticket number {number} is late", "queue": "late"} for number in range(20)]
    rows += [{"body": "It is broken in two", "queue": "broken"}, {"body": "Where on earth is it", "queue": "Late "}]
    path = write(rows)
    report = check_file(path, settings=DataSettings(train=str(path), mapping={"text": "body", "label": "queue"}))
    assert report.form == "labelled"
    assert found(report, "imbalance") == [(21, None)]


def test_settings_are_followed_to_the_letter(write):
    path = write([{"text": "a b c", "label": "x"}, {"text": "d e f", "label": "y"}])
    report = check_file(path, settings=DataSettings(train=str(path), form="text"))
    assert (report.form, report.mapping, report.ledger["bad"]) == ("text", {}, 0)
    assert report.unused_columns == ["label"]


def test_free_answers_are_no_labels(write):
    rows = [pair(f"Say something about the number {number}", f"Well, {number} is a number") for number in range(30)]
    assert found(check_file(write(rows)), "imbalance") == []


def test_personal_data_is_named_and_not_repeated(write):
    report = check_file(write([*many(10), pair("I am jane.doe@example.com", "Noted.")]))
    assert found(report, "personal_data") == [(11, None)]
    assert "jane.doe" not in json.dumps(report.as_dict()) + report.as_text()


def test_preference_rows_are_looked_at_and_not_trained(write):
    rows = [{"prompt": f"q{n}", "chosen": f"yes {n}", "rejected": "no"} for n in range(11)]
    report = check_file(write([*rows, {"prompt": "q", "chosen": "same", "rejected": "same "}]))
    assert (report.form, report.rows, report.ledger["bad"]) == ("preference", 12, 12)
    assert [(p.line, p.severity) for p in report.problems] == [(1, "warning"), (12, "error")]


def test_a_share_that_stays_empty_is_told(write):
    path = write(many(1))
    messages = [problem.message for problem in check_file(path).problems]
    assert any("1 usable row;" in message for message in messages)
    assert any("held out for validation" in message for message in messages)


def test_an_empty_file_is_an_error(write):
    report = check_file(write([]))
    assert (report.rows, report.num_errors, report.form) == (0, 1, "unknown")


def test_details_are_bounded_and_counts_are_not(write, monkeypatch):
    monkeypatch.setattr(check, "MAX_PROBLEMS_A_KIND", 5)
    report = check_file(write(["{broken"] * 20 + many(20)))
    assert len(report.problems) == 5
    assert report.num_errors == 20
    assert "... and 17 more" in report.as_text()


def test_a_missing_file_is_not_a_problem_but_an_error(tmp_path):
    with pytest.raises(NotFoundError):
        check_file(tmp_path / "rows.jsonl")


def test_the_text_for_people(write):
    path = write([*many(12), pair("q", ""), pair("a@b.example is mine", "Noted.")])
    text = check_file(path, count_tokens=count_words).as_text()
    lines = text.splitlines()
    assert lines[0] == f"{path}: 14 rows, prompt/completion"
    assert any(line.startswith("error    empty_target   1  ") and f"{path}:13: " in line for line in lines)
    assert any(line.startswith("would be: ") for line in lines)
    assert any(line.startswith("tokens: ") for line in lines)
    assert "to do:" in lines


# -------------------------------------------------------------------------------------------------- properties

GOOD = [json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]})] * 3


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(st.data())
def test_mutated_files_are_reported_and_never_crash(tmp_path, data):
    content = bytearray("\n".join(GOOD).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=4))
        if not content:
            break
    path = tmp_path / "mutated.jsonl"
    path.write_bytes(bytes(content))
    try:
        report = check_file(path)
    except DataError:
        return
    assert sum(report.ledger.values()) == report.rows
    assert json.loads(json.dumps(report.as_dict())) is not None
    assert report.as_text()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), max_size=12))
def test_any_texts_are_checked(tmp_path, rows):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(pair(*row)) + "\n" for row in rows))
    report = check_file(path, against=None)
    assert report.rows == len(rows)
    assert sum(report.ledger.values()) == len(rows)
    assert report.ledger["bad"] == sum(not prompt.strip() or not answer.strip() for prompt, answer in rows)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data sets are not here")
@pytest.mark.parametrize(
    ("name", "form", "rows"),
    [
        ("openai_format/chat_train.jsonl", "chat", 500),
        ("openai_format/dpo_train.jsonl", "preference", 200),
        ("trec/derived.test.tsv", "unknown", 500),
        ("clinc150/validation.jsonl", "labelled", 3100),
        ("lima/train.jsonl", "chat", 1029),
        ("llamafactory_demo/original.json", "preference", 300),
        ("gsm8k/test.jsonl", "prompt_completion", 1319),
        ("lm_text/wikitext2.test.txt", "text", 1),
    ],
)
def test_real_files(name, form, rows):
    report = check_file(SHARED_DATA / name)
    assert (report.form, report.rows) == (form, rows)
    assert sum(report.ledger.values()) == rows


def test_each_check_runs_alone(tmp_path):
    rows = [{"prompt": f"Question number {i}?", "completion": "An answer that ends here."} for i in range(12)]
    rows += [rows[0], {"prompt": "Who?", "completion": "Write to jane@example.com, <|im_end|> please."}]
    rows += [{"prompt": "May I?", "completion": "I'm sorry, but I can't assist with that request."}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = {
        "duplicates": {"exact_duplicate"}, "personal": {"personal_data"}, "special_tokens": {"special_token"},
        "quality": {"quality"}, "labels": {"imbalance"}, "protected": set(),
    }  # fmt: skip
    found = {}
    for name, kinds in expected.items():
        report = check_file(path, only=(name,))
        assert report.checks == [name]
        found[name] = {problem.kind for problem in report.problems if problem.line > 1}
        assert found[name] == kinds
    whole = check_file(path)
    assert {problem.kind for problem in whole.problems if problem.line > 1} == set().union(*found.values())
    assert set(whole.checks) >= set(expected)
    assert set(whole.not_run) >= {"contamination", "semantic"}
    assert "not run:  contamination (name evaluation files" in whole.as_text()


def test_benchmarks_and_protected_texts_are_looked_for_where_they_are_named(tmp_path):
    passage = (
        "The quick brown fox jumps over the lazy dog while seven wizards boxed with five large jugs of liquor today"
    )
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "book.txt").write_text(f"{passage} and then they all went home to bed without any supper.")
    (tmp_path / "bench.jsonl").write_text(json.dumps({"question": passage, "answer": "42"}) + "\n")
    path = tmp_path / "rows.jsonl"
    whole = f"{passage} and then they all went home to bed without any supper."
    path.write_text("".join(json.dumps({"prompt": p, "completion": "Yes."}) + "\n" for p in ("Hello?", whole)))
    settings = DataSettings(
        train=str(path), benchmarks=[str(tmp_path / "bench.jsonl")], protected=str(tmp_path / "texts")
    )
    report = check_file(path, settings=settings, only=("contamination", "protected"))
    kinds = {problem.kind: problem for problem in report.problems if problem.line == 2}
    assert set(kinds) == {"contamination", "protected_text"}
    assert str(kinds["contamination"].other) == f"{tmp_path / 'bench.jsonl'}:1"
    assert str(kinds["protected_text"].other).startswith(str(tmp_path / "texts" / "book.txt"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"only": ("nothing",)}, "no check 'nothing'"),
        ({"only": ("contamination",)}, "'contamination' cannot run"),
        ({"only": ("quality",), "against": "other.jsonl"}, "--against has no effect"),
    ],
)
def test_checks_that_cannot_run_are_refused_by_name(tmp_path, given, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a?", "completion": "b"}\n')
    with pytest.raises(RecipeError, match=message) as caught:
        check_file(path, **given)
    assert caught.value.hint
