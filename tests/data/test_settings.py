"""DataSettings: defaults, and the combinations that are refused by name."""

import pytest
from pydantic import ValidationError

from tunesmith.data.settings import DataSettings, SelectSettings


def test_defaults_refuse_rather_than_lose():
    settings = DataSettings(train="a.jsonl")
    assert (settings.too_long, settings.duplicates, settings.bad_rows) == ("refuse", "keep", "refuse")
    assert settings.train_paths == ["a.jsonl"]
    assert settings.shares == {"validation": 0.1}


def test_files_are_no_shares():
    settings = DataSettings(train=["a.jsonl", "b.jsonl"], validation="v.jsonl", test=0.2)
    assert settings.train_paths == ["a.jsonl", "b.jsonl"]
    assert settings.shares == {"test": 0.2}


@pytest.mark.parametrize(
    ("mapping", "form"),
    [
        ({"prompt": "q", "completion": "a", "system": "s"}, "prompt_completion"),
        ({"text": "{title}\n{body}"}, "text"),
        ({"text": "body", "label": "queue"}, "labelled"),
        ({"words": "tokens", "tags": "ner"}, "tagged"),
        ({"messages": "turns"}, "chat"),
        ({}, None),
    ],
)
def test_mapped_form(mapping, form):
    assert DataSettings(train="a", mapping=mapping).mapped_form == form


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"validation": 0.0}, "between 0 and 1"),
        ({"validation": 1}, "between 0 and 1"),
        ({"test": float("nan")}, "finite number"),
        ({"validation": 0.5, "test": 0.5}, "nothing to train on"),
        ({"train": []}, "names no file"),
        ({"train": ["a", "a"]}, "'a' twice"),
        ({"test": "a"}, "also trained on"),
        ({"test": "b", "validation": "b"}, "both 'b'"),
        ({"names": "tagger"}, "`names` has no effect where `personal` is keep"),
        ({"mapping": {"prompt": "q"}}, "`prompt` and `completion` together"),
        ({"mapping": {"answer": "q"}}, "'answer'"),
        ({"mapping": {"prompt": "q", "completion": " "}}, "mapping.completion"),
        ({"mapping": {"prompt": "q", "completion": "a", "text": "t"}}, "exactly one"),
        ({"mapping": {"text": "t", "system": "s"}}, "mapping.system"),
        ({"mapping": {"messages": "{m}"}}, "not a pattern"),
        ({"mapping": {"words": "{w}", "tags": "t"}}, "`mapping.words` is a column name, not a pattern"),
        ({"mapping": {"words": "w"}}, "`words` and `tags` together"),
        ({"mapping": {"label": "l"}}, "exactly one of prompt, text, words, messages"),
        ({"mapping": {"prompt": "q", "completion": "a", "label": "l"}}, "`mapping.label` goes with `text` only"),
        ({"mapping": {"text": "t", "label": "l"}, "form": "text"}, "`mapping` makes labelled"),
        ({"form": "labelled", "system": "Be brief."}, "`system` has no effect"),
        ({"form": "tagged", "template": "t.jinja"}, "`template` has no effect"),
        ({"mapping": {"text": "t"}, "form": "chat"}, "`mapping` makes text"),
        ({"form": "text", "system": "Be brief."}, "`system` has no effect"),
        ({"mapping": {"text": "t"}, "template": "t.jinja"}, "`template` has no effect"),
        ({"max_tokens": 1}, "max_tokens"),
        ({"max_length": 512}, "max_length"),
    ],
)
def test_impossible_combinations_are_refused_by_name(fields, words):
    with pytest.raises(ValidationError) as caught:
        DataSettings(**({"train": "a"} | fields))
    assert words in str(caught.value)


def test_settings_are_frozen():
    settings = DataSettings(train="a")
    with pytest.raises(ValidationError):
        settings.train = "b"


def test_every_field_is_described():
    for name, field in DataSettings.model_fields.items():
        assert field.description, name


@pytest.mark.parametrize("keep", [0, -3, 1, 1.0, 2.5, True, "many"])
def test_what_is_no_number_of_rows_to_keep_is_refused(keep):
    with pytest.raises(ValidationError, match=r"give|valid number"):
        SelectSettings(keep=keep)


@pytest.mark.parametrize(
    ("keep", "rows", "kept"), [(2, 10, 2), (500, 10, 10), (0.25, 10, 2), (0.99, 10, 9), (0.01, 10, 1)]
)
def test_how_many_rows_are_kept(keep, rows, kept):
    assert SelectSettings(keep=keep).num_kept(rows) == kept
