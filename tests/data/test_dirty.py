"""The dirty files: every affected row is reported at its place, and no good row is called an error."""

import json
from pathlib import Path

import pytest

from tunesmith.data.check import check_file

DIRTY = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "dirty"
EXPECTED = json.loads((DIRTY / "expected.json").read_text()) if (DIRTY / "expected.json").is_file() else {}
OTHER_FILE = {"leak_train.jsonl": "leak_test.jsonl", "leak_test.jsonl": "leak_train.jsonl"}
KINDS = {
    "empty_assistant.jsonl": {"empty_target"},
    "long_row_200k.jsonl": {"too_long"},
    "special_tokens.jsonl": {"special_token"},
    "duplicates_exact.jsonl": {"exact_duplicate"},
    "duplicates_near.jsonl": {"near_duplicate"},
    "leak_train.jsonl": {"leak"},
    "leak_test.jsonl": {"leak"},
    "private_data.jsonl": {"personal_data", "secret"},
    "rare_class.jsonl": {"imbalance"},
    "bad_labels.jsonl": {"contradiction", "label_error", "empty_target", "bad_row"},
}
UNUSUAL = {"zero_bytes.jsonl": "quality", "utf16.jsonl": "quality", "one_class.jsonl": "imbalance"}
UNUSUAL |= {"one_row.jsonl": "quality", "openai_9_examples.jsonl": "quality"}

pytestmark = pytest.mark.skipif(not EXPECTED, reason="the shared dirty files are not here")


def check(name):
    return check_file(DIRTY / name, against=DIRTY / OTHER_FILE[name] if name in OTHER_FILE else None)


@pytest.mark.parametrize("name", EXPECTED)
def test_affected_rows_are_found_and_good_rows_are_not_refused(name):
    expected, report = EXPECTED[name], check(name)
    assert report.rows == expected["rows"]
    assert sum(report.ledger.values()) == expected["rows"]
    affected = set(expected["affected_rows"])
    kinds = KINDS.get(name, {"bad_row", "empty_target"})
    fitting = {p.line for p in report.problems if p.kind in kinds and p.file == str(DIRTY / name)}
    assert affected <= fitting
    if expected["rows"]:
        assert {p.line for p in report.problems if p.severity == "error"} <= affected
    assert len(report.as_text().splitlines()) > 2


@pytest.mark.parametrize("name", KINDS)
def test_good_rows_are_not_taken_for_these_kinds(name):
    found = {p.line for p in check(name).problems if p.kind in KINDS.get(name, set())} if EXPECTED else set()
    assert found == set(EXPECTED[name]["affected_rows"])


@pytest.mark.parametrize(("name", "kind"), UNUSUAL.items())
def test_files_that_are_odd_as_a_whole_are_told(name, kind):
    assert kind in {problem.kind for problem in check(name).problems}


def test_rows_that_are_text_on_unicode_line_ends_stay_whole():
    assert check("line_separators.jsonl").num_errors == 0


def test_the_limit_in_tokens_is_applied():
    report = check_file(
        DIRTY / "long_row_200k.jsonl",
        count_tokens=lambda examples: [(sum(len(m.content) for m in e.messages) // 4, 1) for e in examples],
        max_tokens=2048,
    )
    assert [(p.line, p.severity) for p in report.problems if p.kind == "too_long"] == [(2, "error")]
