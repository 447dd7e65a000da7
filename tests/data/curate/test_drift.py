"""Training against production: what differs is found and told where it stands, and prompts are read in every form."""

import json
import sys

import numpy as np
import pytest

from tunesmith.data.curate.drift import MIN_ROWS, compare_sets, drift_of
from tunesmith.data.settings import DataSettings
from tunesmith.errors import DataError, MissingExtraError

SUBJECTS = ["my parcel", "the order", "a refund", "the invoice", "my card", "the address", "a voucher", "the shop"]
VERBS = ["is late", "was refused", "never came", "is wrong", "has to change", "was lost", "is missing", "looks odd"]
ENDS = ["please help", "what now", "since monday", "again", "in the app", "at the counter", "for my sister", "today"]


def questions(count, seed=0):
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(part) for part in (SUBJECTS, VERBS, ENDS)) for _ in range(count)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def test_the_same_rows_on_both_sides_show_no_difference():
    drift = compare_sets(questions(300), questions(300, seed=1))
    assert drift.verdict == "no difference found"
    assert drift.apart.detectable == pytest.approx(0.5 + 2.8 * np.sqrt(2.25 / (6 * 300)), abs=0.01)
    assert f"from {drift.apart.detectable:.2f} on it would have been found" in drift.sentence
    assert drift.rows == drift.more_in_production == drift.more_in_training == []
    assert drift.unknown_words == 0
    assert drift.labels is None


def test_what_was_planted_is_what_is_told():
    planted = [f"book a table for {number} people in lisbon tonight" for number in range(120)]
    drift = compare_sets(questions(400), [*questions(240, seed=1), *planted])
    assert drift.verdict == "different"
    assert drift.sentence.startswith("training rows do not look like production")
    assert 0.05 < drift.apart.share_unlike <= 1 / 3
    assert {row.origin.line for row in drift.rows} <= set(range(241, 361))
    assert len(drift.rows) == 10
    assert {"book", "table", "lisbon", "tonight"} <= {word.word for word in drift.more_in_production}
    assert {"book", "table", "lisbon", "tonight"} & set(drift.topics[0].words)
    assert drift.topics[0].low > 0
    assert drift.unknown_words > 0.1 > drift.unknown_expected
    assert drift.lengths.p < 0.001
    document = json.loads(json.dumps(drift.as_dict()))
    assert document["rows"][0]["file"] == "production"
    assert document["verdict"] == "different"
    text = drift.as_text()
    assert text.startswith(drift.sentence)
    assert f"production:{drift.rows[0].origin.line}: " in text


def test_the_result_is_the_same_again_and_hides_personal_data():
    production = [f"call {number} and write to jane{number}@example.com" for number in range(200)]
    first, second = (compare_sets(questions(100), production) for _ in range(2))
    assert first == second
    assert all("[EMAIL_1]" in row.excerpt and "jane" not in row.excerpt for row in first.rows)


def test_shares_of_the_labels(tmp_path):
    train = [{"text": text, "label": "late"} for text in questions(80)]
    train += [{"text": text, "label": "lost"} for text in questions(20, seed=1)]
    production = [{"text": text, "label": "lost"} for text in questions(100, seed=2)]
    drift = drift_of(write(tmp_path / "a.jsonl", train), write(tmp_path / "b.jsonl", production))
    assert drift.labels is not None
    assert drift.labels.total_variation == pytest.approx(0.8)
    assert drift.labels.shares == {"late": (0.8, 0.0), "lost": (0.2, 1.0)}
    assert drift.labels.by_chance == pytest.approx(np.sqrt(0.4 * 0.6 * 0.02) * np.sqrt(2 / np.pi))


FORMS = [
    lambda text: {"prompt": text},
    lambda text: {"prompt": text, "completion": None},
    lambda text: {"question": text},
    lambda text: {"instruction": text},
    lambda text: {"text": text},
    lambda text: {"text": text, "channel": "mail"},
    lambda text: {"subject": text},
    lambda text: {"subject": text, "queue": "a"},
    lambda text: {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]},
    lambda text: {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]},
    lambda text: {"conversations": [{"from": "human", "value": text}]},
]


@pytest.mark.parametrize("form", range(len(FORMS)))
def test_production_may_have_any_form_and_no_answer(tmp_path, form):
    texts = questions(60)
    train = write(tmp_path / "train.jsonl", [{"subject": text, "queue": "a"} for text in texts])
    production = write(tmp_path / "production.jsonl", map(FORMS[form], texts))
    settings = DataSettings(train=train, mapping={"prompt": "Subject: {subject}", "completion": "queue"})
    drift = drift_of(train, production, settings=settings)
    assert (drift.train_rows, drift.production_rows, drift.num_unread) == (60, 60, 0)
    mapped = "subject" in FORMS[form]("")
    assert drift.lengths.production_median == drift.lengths.train_median - (not mapped)  # `Subject:` is a word


def test_a_text_file_has_a_prompt_a_line_and_rows_without_answers_train_nothing(tmp_path):
    texts = questions(60)
    train = write(tmp_path / "train.jsonl", [{"prompt": text, "completion": "yes"} for text in texts])
    lines = ["", *texts[:30], "", *[f"{number} planted {number}" for number in range(60)]]
    (tmp_path / "production.txt").write_text("\n".join(lines), "utf-8")
    drift = drift_of(train, str(tmp_path / "production.txt"))
    assert drift.production_rows == 90
    assert {lines[row.origin.line - 1].split()[1] for row in drift.rows} == {"planted"}
    unanswered = write(tmp_path / "bad.jsonl", [{"prompt": text} for text in texts])
    with pytest.raises(DataError, match="columns 'prompt' are no form"):
        drift_of(unanswered, train)


def test_rows_that_cannot_be_read_are_counted(tmp_path):
    rows = [{"prompt": text, "completion": "yes"} for text in questions(60)]
    train = write(tmp_path / "a.jsonl", rows)
    drift = drift_of(train, write(tmp_path / "b.jsonl", [*rows, 7, {"prompt": 3}]))
    assert (drift.production_rows, drift.num_unread) == (60, 2)
    assert "2 that could not be read" in drift.as_text()


def test_too_few_rows_are_refused(tmp_path):
    rows = [{"prompt": text, "completion": "yes"} for text in questions(MIN_ROWS)]
    train, few = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[1:])
    with pytest.raises(DataError, match=f"{MIN_ROWS - 1} rows are too few") as caught:
        drift_of(train, few)
    assert caught.value.file == few
    assert drift_of(train, train).verdict == "no difference found"


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError) as caught:
        compare_sets(questions(40), questions(40))
    assert caught.value.hint == "pip install 'tunesmith[curate]'"
