"""The report of a made-up but realistic run: what it says, that data stays text, and what it does without files."""

import html.parser
import json
import math
import random
import re

import numpy as np
import pytest

from tunesmith.data.ledger import Ledger
from tunesmith.data.types import Origin
from tunesmith.errors import NotFoundError, StorageError
from tunesmith.evaluate.correction import corrected, with_holm
from tunesmith.evaluate.metrics import METRICS
from tunesmith.evaluate.report import write_report
from tunesmith.evaluate.statistics import compare, interval, verdict
from tunesmith.evaluate.texts import ALSO_CHOSE
from tunesmith.texts import evaluation_text

SYSTEM_PROMPT = (
    "You sort the tickets of Larkfield Sensors. Answer with one JSON object and nothing else.\n"
    "desk: ledger (charges and invoices), keyring (sign-in), parcel (delivery), pixel (the app's screens).\n"
    "level: red (work has stopped), amber (a nuisance), green (no hurry).\n"
) * 3
DESKS = {
    "ledger": "You charged me twice",
    "keyring": "I cannot sign in",
    "parcel": "My sensor never came",
    "pixel": "The map is blank",
}
LEVELS = {"red": "Everything stands still here.", "amber": "It is a bother.", "green": "No hurry at all."}
NASTY = '<script>alert("owned")</script><img src=x onerror=alert(1)> {{ 7*7 }} {% raw %} & "quotes" \' </svg></style>'
NUM_STEPS, NUM_ROWS = 162, 126


def outputs_of(desk, level, chance):
    """The answers of three systems: a base that chats, few-shot that guesses, a tuned one that is mostly right."""
    guess = {"desk": chance.choice(list(DESKS)), "level": chance.choice(list(LEVELS))}
    slip = chance.random() < 0.12
    tuned = {"desk": chance.choice(list(DESKS)) if slip else desk, "level": level}
    base = chance.choice(
        ["I am sorry to hear that. Could you tell me more?", "The ticket is about a problem.", json.dumps(guess)]
    )
    return {"base": base, "few_shot": json.dumps(guess), "tuned": json.dumps(tuned)}


def rows_of(chance, *, nasty):
    rows = []
    for number in range(NUM_ROWS):
        desk, level = chance.choice(list(DESKS)), chance.choice(list(LEVELS))
        name, order = chance.choice(["Amara", "Jonas", "Inés", "Wei"]), chance.randrange(1000, 9999)
        text = f"Hello,\n{DESKS[desk]} for order {order}. {LEVELS[level]}\nThanks, {name}"
        outputs = outputs_of(desk, level, chance)
        if number % 40 == 7:
            outputs["base"], outputs["tuned"] = json.dumps({"desk": desk, "level": level}), outputs["few_shot"]
        if nasty and number % 3 == 0:
            text, outputs["tuned"] = NASTY + text, NASTY
        reference = json.dumps({"desk": desk, "level": level})
        prompt = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": text}]
        rows.append(
            {
                "row": number,
                "origin": f"tickets-test.jsonl:{number + 1}",
                "prompt": prompt,
                "reference": reference,
                "outputs": outputs,
            }
        )
    return rows


def evaluation_of(rows, *, generator):
    """evaluation.json, and the rows' scores entered into `rows`."""
    systems = ["base", "few_shot", "tuned"]
    names = ["exact_match", "json_valid", "json_fields", "chrf", "perplexity"]
    scores = {}
    for name in names:
        for place, system in enumerate(systems):
            if name == "perplexity":
                tokens = generator.integers(12, 20, len(rows)).astype(float)
                found = METRICS[name].score_rows(
                    negative_log_likelihood=tokens * generator.gamma(4, (3 - place) / 6, len(rows)), tokens=tokens
                )
            else:
                found = METRICS[name].score_rows(
                    [row["outputs"][system] for row in rows], [row["reference"] for row in rows]
                )
            scores[name, system] = found
            for row, value in zip(rows, METRICS[name].row_values(found), strict=True):
                row.setdefault("scores", {}).setdefault(system, {})[name] = float(value)
    metrics = {
        name: {
            "higher_is_better": METRICS[name].higher_is_better,
            "systems": {s: interval(scores[name, s], aggregate=METRICS[name].aggregate).as_dict() for s in systems},
            "differences": {
                f"{a} - {b}": compare(scores[name, a], scores[name, b], metric=METRICS[name])
                for a, b in (("tuned", "base"), ("tuned", "few_shot"), ("few_shot", "base"))
            },
        }
        for name in names
    }
    metrics = with_holm(metrics)
    word, sentence = verdict(metrics, primary="exact_match", rows=len(rows))
    return {
        "run": "ticket-triage-3f9a1c07",
        "rows": len(rows),
        "data": "test",
        "systems": systems,
        "metrics": metrics,
        "verdict": word,
        "sentence": sentence,
        "corrected": corrected(metrics, pair="tuned - base"),
    }


def metrics_lines(generator):
    """metrics.jsonl of a run that was resumed once, so steps 81 to 85 stand there twice."""
    lines, start = [], 1763629200.0
    for step in [*range(1, 86), *range(81, NUM_STEPS + 1)]:
        loss = 0.08 + 2.9 * math.exp(-step / 22) + abs(generator.normal(0, 0.07 + 0.3 * math.exp(-step / 30)))
        rate = 2e-4 * min(step / 8, 0.5 + 0.5 * math.cos(math.pi * max(0, step - 8) / (NUM_STEPS - 8)))
        record = {"step": step, "time": start + step, "loss": loss, "learning_rate": rate, "tokens": 1500 * step}
        lines.append(
            record
            | {
                "tokens_per_second": 5200 + generator.normal(0, 150),
                "grad_norm": 0.4 + 2 * math.exp(-step / 15) + abs(generator.normal(0, 0.1)),
            }
        )
        if step % 16 == 0:
            lines.append(
                {"step": step, "validation_loss": 0.14 + 2.7 * math.exp(-step / 20) + 0.0004 * max(0, step - 96)}
            )
    return "".join(json.dumps(line) + "\n" for line in lines)


def make_run(folder, *, nasty=False):
    """Fill a run's folder as training and evaluation leave it; `nasty` puts markup into every text."""
    chance, generator = random.Random(1), np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    text = NASTY if nasty else ""
    rows = rows_of(chance, nasty=nasty)
    evaluation = evaluation_of(rows, generator=generator)
    evaluation["sentence"] += text
    ledger = Ledger()
    for line in range(1, 433):
        origin = Origin(text + "tickets.jsonl", line)
        if line % 97 == 0:
            ledger.record(origin, state="duplicate", other=Origin(text + "tickets.jsonl", line - 96))
        elif line % 150 == 0:
            ledger.record(origin, state="bad", reason="empty_target")
        else:
            ledger.record(origin, state="held_out_validation" if line % 10 == 3 else "trained")
    run = {
        "run": "ticket-triage-3f9a1c07",
        "path": str(folder),
        "name": "ticket-triage",
        "created": "2026-11-20T10:04:11+00:00",
        "steps": NUM_STEPS,
        "rows": 383,
        "tokens": 243_000,
        "computed_tokens": 98_400,
        "target_tokens": 21_888,
        "seconds": 46.7,
        "tokens_per_second": 5203.4,
        "peak_memory_bytes": 611_000_000,
        "trainable_parameters": 294_912,
        "parameters": 4_231_104,
        "train_loss": 0.1312,
        "validation_loss": 0.1571,
        "best_step": 128,
        "stopped": "finished",
        "versions": {"tunesmith": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.12.4" + text},
        "command": "tunesmith train tickets.yaml --set train.epochs=3",
    }
    resolved = {
        "name": "ticket-triage",
        "base": "starter",
        "objective": {"kind": "instruction"},
        "method": {"kind": "lora", "rank": 16, "alpha": 32, "targets": ["q_proj", "v_proj"]},
        "train": {"epochs": 3.0, "learning_rate": 2e-4, "batch_rows": 16, "seed": 0, "max_steps": None},
        "digests": {"train": "9f" * 32, "base": "0c" * 32, "template": "77" * 32},
        "note": text,
    }
    recipe = f"""name: ticket-triage
base: starter
data:
  train: tickets.jsonl
  validation: 0.1
# {text}
objective: instruction
method: {{kind: lora, rank: 16}}
"""
    documents = {"run": run, "resolved": resolved, "ledger": ledger.as_dict(), "evaluation": evaluation}
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    (folder / "metrics.jsonl").write_text(metrics_lines(generator), encoding="utf-8")
    (folder / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


class Page(html.parser.HTMLParser):
    """Elements, attributes and visible text of a page; `unbalanced` names what was not closed as it was opened."""

    VOID = frozenset({"meta", "line", "circle", "rect", "path", "polyline", "br"})

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text, self.open, self.unbalanced = set(), [], "", [], []
        self.feed(text)
        self.unbalanced += self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


def report_of(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_report_says_what_the_files_say(run_folder):
    text = report_of(run_folder)
    page = Page(text)
    evaluation = json.loads((run_folder / "evaluation.json").read_text())
    assert not page.unbalanced
    assert evaluation["sentence"] in page.text
    assert page.text.index("Better") < page.text.index(evaluation["sentence"]) < page.text.index("Scores")
    for shown in (
        "better on json_fields",
        "few_shot",
        "tuned − base",
        "383",
        "582.7 MiB",
        "best at step 128",
        "47 s",
    ):
        assert shown in page.text
    for shown in ("held out for validation", "tickets.jsonl:150", "of tickets.jsonl:1", "2 empty target", "rank: 16"):
        assert shown in page.text
    for shown in ("method.targets", "9f" * 32, "tunesmith train tickets.yaml", "5.23.0", "2026-11-20 10:04 UTC"):
        assert shown in page.text
    assert len(text) < 400_000


def test_values_of_the_tables_are_those_of_the_evaluation(run_folder):
    page = Page(report_of(run_folder))
    difference = json.loads((run_folder / "evaluation.json").read_text())["metrics"]["perplexity"]["differences"][
        "tuned - base"
    ]
    assert difference["value"] < 0
    assert f"−{-difference['value']:.1f}−{-difference['low']:.1f} to −{-difference['high']:.1f}" in page.text
    assert f"{difference['better_rows']} / {difference['worse_rows']}" in page.text


def test_p_is_shown_with_its_correction_where_there_is_one(tmp_path):
    run_folder = make_run(tmp_path)
    text = report_of(run_folder)
    path = run_folder / "evaluation.json"
    evaluation = json.loads(path.read_text())
    found = evaluation["metrics"]["json_valid"]["differences"]["few_shot - base"]
    assert text.count("<small>corrected p ") == 15
    sentence = evaluation["corrected"]["sentence"]
    assert sentence[0].upper() + sentence[1:] in Page(text).text
    assert sentence in evaluation_text(evaluation)
    plain = report_of(run_folder).count('class="better"')
    found |= {"p": 0.01, "p_holm": 0.2}  # better before the correction and not after it
    path.write_text(json.dumps(evaluation))
    assert report_of(run_folder).count('class="better"') == plain - 1
    for entry in evaluation["metrics"].values():  # as it was written before there was a correction
        for difference in entry["differences"].values():
            del difference["p_holm"]
    del evaluation["corrected"]
    path.write_text(json.dumps(evaluation))
    older = report_of(run_folder)
    assert "orrected" not in Page(older).text
    assert older.count('class="better"') == plain
    assert "Holm's" not in evaluation_text(evaluation)


def test_words_only_in_the_answer_or_the_reference_are_marked(tmp_path):
    make_run(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"reference": "send it to the <desk>", "outputs": {"tuned": "send it to <pixel> & the <desk>"}}
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "send it to <ins>&lt;pixel&gt; &amp; </ins>the &lt;desk&gt;" in report_of(tmp_path)


def test_rows_that_also_chose_the_best_step_are_called_so(run_folder):
    page = Page(report_of(run_folder))
    assert f"{NUM_ROWS} test rows, the same for every system" in page.text
    assert ALSO_CHOSE not in page.text
    path = run_folder / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data": "validation"}))
    page = Page(report_of(run_folder))
    assert f"{NUM_ROWS} validation rows, the same for every system" in page.text
    assert ALSO_CHOSE in page.text
    assert ALSO_CHOSE in evaluation_text(json.loads(path.read_text()))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data": "others.jsonl"}))
    assert "other rows, the same" in Page(report_of(run_folder)).text


def test_shared_prompt_is_shown_once(run_folder):
    text = report_of(run_folder)
    assert text.count("You sort the tickets of Larkfield Sensors") == 3  # the prompt itself says it three times
    evaluation = json.loads((run_folder / "evaluation.json").read_text())
    worse = evaluation["metrics"]["exact_match"]["differences"]["tuned - base"]["worse_rows"]
    assert 0 < worse < 10
    assert text.count('class="example"') == 10 + worse + 10


def test_page_is_self_contained(run_folder):
    page = Page(report_of(run_folder))
    assert page.tags.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base", "form"})
    assert not [name for name, _ in page.attributes if name in ("src", "href", "action") or name.startswith("on")]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert not re.search(r"url\((?!#)|@import", report_of(run_folder))


def test_data_stays_text(tmp_path):
    folder = make_run(tmp_path, nasty=True)
    text = report_of(folder)
    page = Page(text)
    assert not page.unbalanced
    assert page.tags == Page(report_of(make_run(tmp_path / "tame"))).tags
    assert "<script" not in text
    assert page.text.count('<script>alert("owned")</script>') >= 10
    assert "{{ 7*7 }} {% raw %}" in page.text
    assert text.count("</style>") == 1


def test_only_run_and_resolved_are_needed(tmp_path):
    make_run(tmp_path)
    for name in ("recipe.yaml", "ledger.json", "metrics.jsonl", "evaluation.json", "examples.jsonl"):
        (tmp_path / name).unlink()
    (tmp_path / "run.json").write_text("{}")
    page = Page(report_of(tmp_path))
    assert not page.unbalanced
    assert f"Not evaluated. `tunesmith evaluate {tmp_path.name}`" in page.text
    assert "Scores" not in page.text
    assert "Training" not in page.text


@pytest.mark.parametrize("name", ["run.json", "resolved.json"])
def test_a_folder_that_is_no_run(tmp_path, name):
    make_run(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(NotFoundError, match=f"holds no {name}"):
        write_report(tmp_path)


@pytest.mark.parametrize(("name", "line"), [("evaluation.json", 3), ("examples.jsonl", 1)])
def test_damaged_files_are_named(tmp_path, name, line):
    make_run(tmp_path)
    (tmp_path / name).write_text('{"run": \n{}\n')
    with pytest.raises(StorageError) as caught:
        write_report(tmp_path)
    assert caught.value.file == str(tmp_path / name)
    assert caught.value.line == line


@pytest.mark.parametrize("word", ["worse", "undecided"])
def test_other_verdicts(tmp_path, word):
    make_run(tmp_path)
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    evaluation["verdict"] = word
    if word == "undecided":
        for entry in evaluation["metrics"].values():
            for difference in entry["differences"].values():
                difference |= {"value": 0.0, "low": 0.0, "high": 0.0, "p": 1.0, "p_holm": 1.0, "detectable": None}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    text = report_of(tmp_path)
    assert f'<section class="verdict {word}"' in text
    assert ("undecided on chrf" in Page(text).text) == (word == "undecided")


def test_plain_texts(tmp_path):
    make_run(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    rows = [row | {"prompt": [], "outputs": {}, "reference": f"Chapter {row['row']}"} for row in rows]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(report_of(tmp_path))
    assert not page.unbalanced
    assert "Chapter " in page.text
    assert "empty prompt" not in page.text


def test_large_runs_stay_small_pages(tmp_path):
    make_run(tmp_path)
    row = json.loads((tmp_path / "examples.jsonl").read_text().splitlines()[0])
    long = "word " * 20_000
    rows = [
        row | {"row": i, "prompt": f"{i} {long}", "outputs": dict.fromkeys(row["outputs"], long)} for i in range(60)
    ]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {s}, "loss": 1.0}}\n' for s in range(1, 30_001)))
    assert 100_000 < len(report_of(tmp_path).encode()) < 1_500_000
