"""Every row ends in exactly one state; counts are exact, details are bounded."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.ledger import MAX_DETAILS, STATES, Ledger, Problem
from tunesmith.data.types import Origin
from tunesmith.errors import DataError

origins = st.builds(Origin, st.sampled_from(["a.jsonl", "b.jsonl"]), st.integers(1, 500))


@given(st.dictionaries(origins, st.sampled_from(STATES)))
def test_counts_are_those_of_the_rows(states):
    ledger = Ledger()
    for origin, state in states.items():
        assert ledger.state_of(origin) is None
        ledger.record(origin, state=state, tokens_cut=3 * (state == "truncated"))
    ledger.assert_complete(len(states))
    document = ledger.as_dict()
    assert document["rows"] == sum(document["states"].values()) == len(states)
    assert all(ledger.state_of(origin) == state for origin, state in states.items())
    assert document["tokens_cut"] == 3 * list(states.values()).count("truncated")
    assert json.loads(json.dumps(document)) == document


def test_a_row_is_entered_once():
    ledger = Ledger()
    ledger.record(Origin("a", 3), state="trained")
    with pytest.raises(AssertionError, match="a:3 is already trained, not dropped"):
        ledger.record(Origin("a", 3), state="dropped", reason="too_long")
    ledger.record(Origin("b", 3), state="trained")
    with pytest.raises(AssertionError, match="3 rows were read and 2"):
        ledger.assert_complete(3)


def test_states_reasons_and_details():
    ledger = Ledger()
    ledger.record(Origin("a", 1), state="trained")
    ledger.record(Origin("a", 2), state="held_out_validation")
    ledger.record(Origin("a", 3), state="truncated", reason="too_long", tokens_cut=40)
    ledger.record(Origin("a", 4), state="duplicate", other=Origin("a", 1))
    ledger.record_problem(Problem("empty_target", "error", "a", 5, "the answer is empty"))
    ledger.record_problem(Problem("quality", "warning", "a", 6, "few rows"))
    document = ledger.as_dict()
    assert document["reasons"] == {"truncated": {"too_long": 1}, "bad": {"empty_target": 1}}
    assert document["details"] == [
        {"state": "truncated", "file": "a", "line": 3, "reason": "too_long", "tokens_cut": 40},
        {"state": "duplicate", "file": "a", "line": 4, "other": {"file": "a", "line": 1}},
        {"state": "bad", "file": "a", "line": 5, "reason": "empty_target"},
    ]
    assert ledger.summary() == (
        "5 rows: 1 trained, 1 truncated (too_long 1, 40 tokens cut), 1 duplicate, 1 held out for validation,"
        " 1 bad (empty_target 1)"
    )
    assert Ledger().summary() == "0 rows"


def test_details_are_bounded_and_counts_are_not():
    ledger = Ledger()
    for line in range(1, MAX_DETAILS + 501):
        ledger.record(Origin("a", line), state="dropped", reason="too_long")
    document = ledger.as_dict()
    assert len(document["details"]) == MAX_DETAILS
    assert document["details_left_out"] == 500
    assert document["states"]["dropped"] == MAX_DETAILS + 500


def test_cut_tokens_go_with_truncated_rows_only():
    with pytest.raises(AssertionError):
        Ledger().record(Origin("a", 1), state="trained", tokens_cut=1)
    with pytest.raises(AssertionError):
        Ledger().record(Origin("a", 1), state="truncated")


def test_a_problem_is_a_document_and_an_error():
    problem = Problem("leak", "error", "a", 2, "the same row", other=Origin("b", 4), hint="remove one")
    assert problem.as_dict() == {
        "kind": "leak",
        "severity": "error",
        "file": "a",
        "line": 2,
        "message": "the same row",
        "other": {"file": "b", "line": 4},
        "hint": "remove one",
    }
    error = problem.as_error()
    assert isinstance(error, DataError)
    assert (str(error), error.hint) == ("a:2: the same row", "remove one")
