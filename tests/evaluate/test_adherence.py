"""JSON under a schema, and patterns: what is valid, what is refused before anything runs, and that nothing hangs."""

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tunesmith.errors import NotFoundError, RecipeError
from tunesmith.evaluate.adherence import compiled, read_schema
from tunesmith.evaluate.chosen import chosen
from tunesmith.evaluate.metrics import METRICS
from tunesmith.evaluate.settings import EvaluateSettings

TICKET = {
    "type": "object",
    "properties": {"desk": {"enum": ["ledger", "parcel"]}, "due": {"type": "string", "format": "date"}},
    "required": ["desk"],
    "additionalProperties": False,
}
TREE = {"$ref": "#/$defs/node", "$defs": {"node": {"type": "array", "items": {"$ref": "#/$defs/node"}}}}


def scores(schema: Any, *answers: str, folder: Path) -> list[float]:
    path = folder / "schema.json"
    path.write_text(json.dumps(schema))
    metric = chosen(["json_schema"], settings=EvaluateSettings(json_schema=str(path)))["json_schema"]
    return metric.score_rows(answers, [""] * len(answers)).tolist()


def test_an_answer_is_valid_under_the_schema_or_not(tmp_path):
    right = ['{"desk": "ledger"}', ' {"desk": "parcel", "due": "2026-01-31"}\n']
    wrong = [
        '{"desk": "attic"}',
        "{}",
        '{"desk": "ledger", "more": 1}',
        '{"desk": "ledger", "due": "soon"}',
        "[]",
        "desk",
    ]
    wrong += ['```json\n{"desk": "ledger"}\n```', '{"desk": NaN}']
    assert scores(TICKET, *right, *wrong, folder=tmp_path) == [1, 1] + [0] * len(wrong)


def test_nesting_without_end_is_not_valid_and_no_crash(tmp_path):
    deep = ["[" * depth + "]" * depth for depth in (3, 900, 100_000)]
    assert scores(TREE, *deep, folder=tmp_path)[::2] == [1, 0]


def test_the_draft_is_the_one_that_the_schema_names(tmp_path):
    old = {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "type": "integer",
        "maximum": 3,
        "exclusiveMaximum": True,
    }
    assert scores(old, "2", "3", "1.0", folder=tmp_path) == [1, 0, 0]
    assert scores({"type": "integer", "exclusiveMaximum": 3}, "2", "3", "1.0", folder=tmp_path) == [1, 0, 1]
    assert scores(True, "2", "x", folder=tmp_path) == [1, 0]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "not JSON"),
        ("[]", "a schema is an object"),
        ('{"type": "objekt"}', r"\$\.type: 'objekt'"),
        ('{"pattern": "("}', r"\$\.pattern: '\(' is not a 'regex'"),
        ('{"$schema": "https://example.org/mine"}', "example.org/mine"),
        ('{"$ref": "#/$defs/none"}', r"/\$defs/none', which is not in the file"),
        ('{"properties": {"a": {"$ref": "http://127.0.0.1:PORT/a.json"}}}', "nothing is fetched"),
        ('{"$id": "http://127.0.0.1:PORT/", "items": {"$ref": "a.json"}}', "nothing is fetched"),
        ('{"$ref": "file:///etc/passwd"}', "nothing is fetched"),
    ],
)
def test_what_is_no_schema_is_refused_by_file_and_reason(tmp_path, text, what):
    path = tmp_path / "schema.json"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        path.write_text(text.replace("PORT", str(server.getsockname()[1])))
        with pytest.raises(RecipeError, match=what) as caught:
            read_schema(str(path))
        with pytest.raises(BlockingIOError):  # nobody came
            server.accept()
    assert caught.value.file == str(path)
    with pytest.raises(NotFoundError):
        read_schema(str(tmp_path / "nowhere.json"))


def test_a_schema_may_refer_to_a_draft_and_to_its_own_parts(tmp_path):
    draft = {"$ref": "https://json-schema.org/draft/2020-12/schema"}
    assert scores(draft, '{"type": "object"}', '{"type": "objekt"}', folder=tmp_path) == [1, 0]
    within = {"$id": "http://x.example/a", "items": {"$ref": "b"}, "$defs": {"b": {"$id": "b", "type": "null"}}}
    assert scores(within, "[null]", "[1]", folder=tmp_path) == [1, 0]


def matched(pattern: str, *answers: str) -> list[float]:
    metric = chosen(["pattern_match"], settings=EvaluateSettings(pattern=pattern))["pattern_match"]
    return metric.score_rows(answers, [""] * len(answers)).tolist()


def test_a_pattern_matches_the_whole_answer():
    assert matched("yes|no|maybe", " yes\n", "maybe", "yes it is", "Yes", "") == [1, 1, 0, 0, 0]
    assert matched("^(yes|no)$", "no", "not") == [1, 0]
    assert matched(r"(?i)[a-z]\w*", "Été", "eté") == [0, 1]


def test_a_pattern_that_would_take_for_ever_is_refused_in_a_second():
    started = time.monotonic()
    with pytest.raises(RecipeError, match="on an answer of 5,001 characters"):
        matched("((a|aa)+)+b", "a" * 5000 + "c")
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"pattern": "("}, "no regular expression"),
        ({"metrics": ["pattern_match"]}, "metric 'pattern_match' needs pattern"),
        ({"metrics": ["json_schema"]}, "metric 'json_schema' needs json_schema"),
        ({"metrics": ["exact_match"], "pattern": "a"}, "pattern has no effect"),
        ({"metrics": ["exact_match"], "json_schema": "a.json"}, "json_schema has no effect"),
    ],
)
def test_a_setting_and_its_metric_go_together(given, what):
    with pytest.raises(ValidationError, match=what):
        EvaluateSettings(**given)


def test_a_setting_adds_its_metric():
    assert EvaluateSettings().added == ()
    assert EvaluateSettings(pattern="a", json_schema="b").added == ("json_schema", "pattern_match")
    assert compiled("a").fullmatch("a")
    assert {name for name, metric in METRICS.items() if metric.needs} >= {"json_schema", "pattern_match"}
