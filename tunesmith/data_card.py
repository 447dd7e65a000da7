"""`tunesmith data card`: what a version of the data is, as one page and as one document.

Counts are those of the preparation; the files are read once more for what preparation leaves out or masks, and `data
check` tells what is wrong with the training files. What only people know is what the recipe says (`data.origin`,
`data.licence`, `data.notes`); of the questions of "Datasheets for Datasets" (Gebru et al. 2021) no other is answered,
and the card says so.

Texts of rows stand here without personal data and secrets, whatever the recipe does with them. The same rows and recipe
give the same card but for `created`.
"""

import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.checks import check_data
from tunesmith.data.curate.labels import MAX_LABEL_CHARACTERS, MAX_LABELS, ROWS_A_LABEL
from tunesmith.data.curate.language import Language
from tunesmith.data.curate.masking import Masker
from tunesmith.data.curate.names import Names, with_names
from tunesmith.data.formats import examine
from tunesmith.data.ledger import Problem
from tunesmith.data.prepared import Prepared
from tunesmith.data.settings import DataSettings
from tunesmith.data.sources import read_rows, resolve
from tunesmith.data.types import Example, Row
from tunesmith.errors import MissingExtraError, RecipeError, StorageError
from tunesmith.evaluate.curves import columns
from tunesmith.evaluate.report import ledger_view, page
from tunesmith.evaluate.texts import bytes_text, clip, time_text
from tunesmith.models.load import load_model
from tunesmith.objectives.regression import Regression
from tunesmith.recipe import Recipe, load_recipe
from tunesmith.registry.workspace import Workspace
from tunesmith.runs import check_suits, models_of, prepare_data
from tunesmith.storage import write_json, write_text
from tunesmith.vocabulary import grow_tokenizer

SIDES = ("train", "validation", "test")
SAMPLE_ROWS, LANGUAGE_ROWS = 10, 2_000
MAX_SHOWN = 30  # classes, columns, licences, and rows that were left out
FIRST_A_KIND = 5
MAX_BARS = 40
LICENCE_COLUMNS = {"license", "licence", "licenses", "licences"}
MAX_VALUE_CHARACTERS = 80

PERSONAL = {
    "keep": "kept as they are: they are trained on",
    "mask": "replaced by placeholders such as [EMAIL_1]",
    "drop": "left out with their rows",
}
NOT_TOLD = (
    "Whether the rows are true, fair, or like the ones the model will meet.",
    "Who wrote them, whether these people agreed, and what the rows were collected for, beyond what is stated above.",
    "Whether the licence that is stated, or that rows name, is the right one.",
    "Personal data without a shape of its own: {unseen} are neither counted nor masked, so the sample may hold some.",
    "Repeats in other words: rows are compared by their wording, not by their meaning.",
    "What is wrong with held-out rows, and repeats across files: each training file is checked by itself, and compared"
    " with the held-out file where there is one.",
)


def write_card(
    recipe: Path,
    *,
    out: Path,
    workspace: Workspace,
    overrides: list[str] | None = None,
    on_message: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write the card's page `out`, FILE.html, and the same as FILE.json beside it; returns the document.

    RecipeError where `out` is no .html, StorageError where one of the two exists, and what `data prepare` raises.
    """
    if out.suffix != ".html":
        raise RecipeError(
            f"--out {out}: the page's name ends with .html, and the same as JSON is written beside it",
            hint="for example --out data-card.html",
        )
    document_path = out.with_suffix(".json")
    for path in (out, document_path):
        if path.exists():
            raise StorageError("the file exists already", file=path, hint="choose another name with --out")
    document = data_card(recipe, workspace=workspace, overrides=overrides, on_message=on_message)
    write_json(document_path, value=document)
    write_text(out, text=card_page(document))
    return document


def data_card(
    recipe: Path,
    *,
    workspace: Workspace,
    overrides: list[str] | None = None,
    on_message: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The card as a document. Files are named from the recipe's folder. Raises what `data prepare` raises."""
    loaded = load_recipe(recipe, overrides=overrides)
    check_suits(loaded)
    model = load_model(loaded.base)
    grow_tokenizer(loaded, model=model, workspace=workspace, on_message=on_message)
    models = models_of(loaded)
    persons = models.names
    prepared = prepare_data(loaded, model=model, workspace=workspace, models=models)
    names = _Names(recipe.absolute().parent)
    on_message("looking at the files")
    look = _Look.at(loaded.data, persons=persons)
    ledger = prepared.ledger | {"details": [names.in_place(detail) for detail in prepared.ledger["details"]]}
    document: dict[str, Any] = {
        "name": loaded.name,
        "sentence": "",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": prepared.digest,
        **{name: _stated(text) for name, text in loaded.data if name in ("origin", "licence", "notes")},
        "row_licences": _most(look.licences),
        "files": _files(loaded.data, prepared=prepared, look=look, names=names),
        "rows": prepared.ledger["rows"],
        "splits": _splits(ledger),
        "ledger": ledger,
        "tokens": _tokens(prepared),
        **_contents(prepared, numbers=isinstance(loaded.objective, Regression), names=names, persons=persons),
        "forms": dict(look.forms.most_common()),
        "columns": _columns(look),
        "personal": {
            "setting": loaded.data.personal,
            "rows": look.private_rows,
            "by_sort": _most(look.sorts)["counts"],
        },
    }
    on_message("checking the training rows")
    document["findings"] = _findings(loaded, names=names, persons=persons)
    unseen = (
        f"names{'' if persons is None else ' that the model of data.names overlooks'}, street addresses and birthdays"
    )
    document["not_told"] = [text.format(unseen=unseen) for text in NOT_TOLD]
    return document | {"sentence": _sentence(document)}


def _stated(text: str | None) -> str | None:
    return (text or "").strip() or None


def _sentence(document: dict[str, Any]) -> str:
    """What it is and what became of it, in one sentence."""
    splits, rows, num_files = document["splits"], document["rows"], len(document["files"])
    words = {"train": "to train on", "replay": "of general rows among them", "validation": "held out for validation"}
    words["test"] = "held out for testing"
    parts = [f"{splits[name]:,} {text}" for name, text in words.items() if splits[name]]
    left = rows - sum(splits.values())
    forms = " and ".join(name.replace("_", "/") for name in document["forms"])
    what = (
        f"{rows:,} {forms} {'row' if rows == 1 else 'rows'} of {'one file' if num_files == 1 else f'{num_files} files'}"
    )
    return f"{what}: {', '.join(parts)}, {f'{left:,}' if left else 'none'} left out."


class _Names:
    """Names of files as a reader with the recipe finds them: absolute ones become relative to its folder."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._seen: dict[str, str] = {}

    def of(self, name: str) -> str:
        shown = os.path.relpath(name, self._folder) if os.path.isabs(name) else name
        return self._seen.setdefault(name, os.fsencode(shown).decode("utf-8", "replace"))

    def in_place(self, place: dict[str, Any]) -> dict[str, Any]:
        """The same with the names of its `file`, and of that of its `other` place."""
        other = {"other": self.in_place(place["other"])} if "other" in place else {}
        return place | {"file": self.of(place["file"])} | other

    def in_text(self, text: str) -> str:
        """The text with the names seen so far in the place of the absolute ones."""
        for name in sorted(self._seen, key=len, reverse=True):
            text = text.replace(name, self._seen[name])
        return text


# ---- the files as they are -------------------------------------------------------------------------------------------


def _sources(data: DataSettings) -> Iterator[tuple[str, str]]:
    """(role, source) of all that is read."""
    for path in data.train_paths:
        yield "train", path
    for role, source in (("validation", data.validation), ("test", data.test), ("replay", data.replay)):
        if isinstance(source, str):
            yield role, source


@dataclass
class _Look:
    """What the files hold before anything is left out or masked; counts are of rows."""

    by_file: Counter[str] = field(default_factory=Counter)  # also the rows that cannot be used
    forms: Counter[str] = field(default_factory=Counter)
    columns: Counter[str] = field(default_factory=Counter)
    used: set[str] = field(default_factory=set)
    licences: Counter[str] = field(default_factory=Counter)
    sorts: Counter[str] = field(default_factory=Counter)  # of personal data and secrets
    private_rows: int = 0

    @classmethod
    def at(cls, data: DataSettings, *, persons: Names | None) -> "_Look":
        """Read everything once; `persons` finds the names."""
        look = cls()
        for role, source in _sources(data):
            settings = DataSettings(train=source) if role == "replay" else data
            rows = read_rows(source, on_bad=look._unreadable)
            examples = (e for row in rows if (e := look._add(row, settings=settings)) is not None)
            for example, found in with_names(examples, names=persons):
                masker = Masker(found)
                _turns(example, masker)
                look.private_rows += bool(masker.sorts)
                look.sorts.update(masker.sorts)
        return look

    def _unreadable(self, problem: Problem) -> None:
        self.by_file[problem.file] += problem.severity == "error"

    def _add(self, row: Row, *, settings: DataSettings) -> Example | None:
        self.by_file[row.origin.file] += 1
        self.columns.update(map(_value, row.value))
        self.licences.update(_value(v) for name, v in row.value.items() if v and name.lower() in LICENCE_COLUMNS)
        example = examine(row, settings=settings)
        if isinstance(example, Problem):
            return None
        self.forms[example.form] += 1
        self.used.update(_value(column) for column in row.value if column not in example.columns)
        return example


def _value(value: object) -> str:
    """A short text for a column's name or content, without personal data."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return clip(Masker().text(text), MAX_VALUE_CHARACTERS)


def _turns(example: Example, masker: Masker) -> list[dict[str, str]]:
    """A row as role and text of each turn, without personal data."""
    if example.plain_text is not None:  # words are masked together: a number may be written in several
        return [{"role": "text", "text": masker.text(example.plain_text)}]
    turns = []
    for message in example.messages:
        extra = masker.value(message.extra)
        called = masker.text(json.dumps(extra, ensure_ascii=False, default=str)) if extra else ""
        text = "\n".join(filter(None, (masker.text(message.content), called)))
        turns.append({"role": message.role, "text": text})
    return turns


def _files(data: DataSettings, *, prepared: Prepared, look: _Look, names: _Names) -> list[dict[str, Any]]:
    digests = dict(entry.rsplit(" ", 1) for entries in prepared.files.values() for entry in entries)
    return [
        {
            "role": role,
            "file": names.of(shown),
            "bytes": path.stat().st_size,
            "sha256": digests[shown],
            "rows": look.by_file[shown],
        }
        for role, source in _sources(data)
        for shown, path in resolve(source)
    ]


def _columns(look: _Look) -> list[dict[str, Any]]:
    shown = look.columns.most_common(MAX_SHOWN)
    return [{"name": name, "rows": rows, "used": name in look.used} for name, rows in shown]


def _most(counter: Counter[str]) -> dict[str, Any]:
    """The largest counts, and how many others there are."""
    shown = counter.most_common(MAX_SHOWN)
    return {"counts": dict(shown), "others": len(counter) - len(shown)}


# ---- the rows as prepared --------------------------------------------------------------------------------------------


def _splits(ledger: dict[str, Any]) -> dict[str, int]:
    """Rows by what they are for."""
    states, replayed = ledger["states"], ledger["reasons"].get("trained", {}).get("replayed", 0)
    return {
        "train": states["trained"] + states["truncated"] - replayed,
        "replay": replayed,
        "validation": states["held_out_validation"],
        "test": states["held_out_test"],
    }


def _tokens(prepared: Prepared) -> dict[str, Any]:
    """Lengths of what is trained on; of a long text each window is one."""
    store = prepared.train.rows()
    lengths = store.lengths()
    median, p95 = np.percentile(lengths, [50, 95], method="higher").tolist()
    return {
        "total": store.num_tokens,
        "targets": store.num_targets,
        "median": int(median),
        "p95": int(p95),
        "longest": int(lengths.max()),
        "histogram": histogram(lengths),
    }


def histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Counts of lengths from `least` to `most`: bins of one round width for 99 %, the last for all that is longer."""
    raw = (float(np.percentile(lengths, 99)) - lengths.min() + 1) / MAX_BARS
    power = 10 ** int(np.floor(np.log10(max(raw, 1))))
    width = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = int(lengths.min()) // width * width
    num_bins = (int(lengths.max()) - first) // width + 1
    places = np.minimum((lengths - first) // width, MAX_BARS)
    counts = np.bincount(places, minlength=min(num_bins, MAX_BARS)).tolist()
    bins = [{"least": first + i * width, "most": first + (i + 1) * width - 1, "rows": n} for i, n in enumerate(counts)]
    if len(bins) > MAX_BARS:
        bins[-1]["most"] = int(lengths.max())
    return bins


def _contents(prepared: Prepared, *, numbers: bool, names: _Names, persons: Names | None) -> dict[str, Any]:
    """Classes or numbers, languages, and a sample."""
    classes, values, drawn = _Classes(), array("d"), _Drawn(LANGUAGE_ROWS)
    for side in SIDES:
        for example in prepared.examples(side):
            if numbers:
                values.append(float(str(example.label)))
            else:
                classes.add(example, side=side)
            if side == "train":
                drawn.add(example)
    rows = drawn.rows()
    shown = with_names(rows[:SAMPLE_ROWS], names=persons)
    sample = [names.in_place(_shown(example, persons=found)) for example, found in shown]
    return {
        "classes": classes.as_dict(),
        "numbers": _numbers(values) if values else None,
        "languages": _languages(rows),
        "sample": sample,
    }


class _Classes:
    """Rows by class and side: of labels, or of answers that are few and short enough to be labels."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.certain, self.num_rows, self.given_up = True, 0, False

    def add(self, example: Example, *, side: str) -> None:
        """Count a row; of several labels each counts."""
        if self.given_up or (example.label is None and not example.messages):
            return
        label = example.label
        self.certain = self.certain and label is not None
        self.num_rows += 1
        for name in (example.asked[1].content,) if label is None else (label,) if isinstance(label, str) else label:
            self.counts.setdefault(name, Counter())[side] += 1
            too_long = label is None and len(name) > MAX_LABEL_CHARACTERS
            self.given_up = self.given_up or too_long or len(self.counts) > MAX_LABELS

    def as_dict(self) -> dict[str, Any] | None:
        """The largest classes and how many others there are; None where there are no classes."""
        if self.given_up or not self.counts or (not self.certain and len(self.counts) * ROWS_A_LABEL > self.num_rows):
            return None
        order = sorted(self.counts.items(), key=lambda item: (-item[1].total(), item[0]))
        shown, others = order[:MAX_SHOWN], order[MAX_SHOWN:]
        return {
            "classes": len(order),
            "largest": [{"name": _value(name), "rows": c.total()} | {s: c[s] for s in SIDES} for name, c in shown],
            "others": {"classes": len(others), "rows": sum(count.total() for _, count in others)},
        }


class _Drawn:
    """The rows with the smallest keys, each content once: a sample that neither order nor repeats move."""

    def __init__(self, count: int):
        self._count = count
        self._kept: dict[str, Example] = {}

    def add(self, example: Example) -> None:
        """Take a row, which stays if its key is among the smallest."""
        self._kept.setdefault(example.key, example)
        if len(self._kept) > 2 * self._count:
            self._kept = {example.key: example for example in self.rows()}

    def rows(self) -> list[Example]:
        """The rows in the order of their keys."""
        return [self._kept[key] for key in sorted(self._kept)[: self._count]]


def _shown(example: Example, *, persons: tuple[str, ...]) -> dict[str, Any]:
    """A row for the sample, in which these names stand."""
    masker = Masker(persons)
    label = example.label
    row: dict[str, Any] = {"file": example.origin.file, "line": example.origin.line}
    row["turns"] = [turn | {"text": clip(turn["text"])} for turn in _turns(example, masker)]
    if label is not None:
        row["label"] = clip(masker.text(label if isinstance(label, str) else " ".join(label)))
    return row


def _numbers(values: "array[float]") -> dict[str, float]:
    quantiles = np.quantile(np.frombuffer(values), [0, 0.05, 0.5, 0.95, 1]).tolist()
    return dict(zip(("least", "p05", "median", "p95", "largest"), quantiles, strict=True))


def _languages(rows: list[Example]) -> dict[str, Any] | None:
    """Rows by language among those drawn; None without py3langid."""
    try:
        language = Language()
    except MissingExtraError:
        return None
    for example in rows:
        assert not list(language.look(example))  # a row alone says nothing
    return {"rows": len(rows), "counts": language.counts()}


# ---- what is wrong with them -----------------------------------------------------------------------------------------


def _findings(recipe: Recipe, *, names: _Names, persons: Names | None) -> dict[str, Any]:
    """What `data check` says of the training files, by kind, with the first places; errors first."""
    data = recipe.data
    against = next((path for path in (data.test, data.validation) if isinstance(path, str)), None)
    counts: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in data.train_paths:
        report = check_data(path, against=against, recipe=recipe, names=persons)
        counts.update(report.problem_counts)
        for problem in report.problems:
            found = first.setdefault((problem.kind, problem.severity), [])
            if len(found) < FIRST_A_KIND:
                place = names.in_place({"file": problem.file, "line": problem.line})
                if problem.other is not None:
                    names.of(problem.other.file)  # which its message tells
                found.append(place | {"message": Masker().text(names.in_text(problem.message))})
    order = sorted(counts.items(), key=lambda item: (item[0][1], -item[1], item[0][0]))
    return {
        "checked": [names.of(path) for path in data.train_paths],
        "against": None if against is None else names.of(against),
        "kinds": [{"kind": kind, "severity": s, "count": n, "first": first[kind, s]} for (kind, s), n in order],
    }


# ---- the page --------------------------------------------------------------------------------------------------------


def card_page(document: dict[str, Any]) -> str:
    """The document as HTML."""
    counts = {(found["kind"], found["severity"]): found["count"] for found in document["findings"]["kinds"]}
    view = document | {
        "created": time_text(document["created"]),
        "facts": _facts(document, counts=counts),
        "ledger": ledger_view(document["ledger"], most=MAX_SHOWN, name="the JSON document beside this page"),
        "lengths": columns(document["tokens"]["histogram"], most=MAX_BARS),
        "policy": PERSONAL[document["personal"]["setting"]],
        "repeats": {kind: counts.get((kind, "warning"), 0) for kind in ("exact_duplicate", "near_duplicate")},
    }
    view["files"] = [entry | {"size": bytes_text(entry["bytes"])} for entry in document["files"]]
    return page("data_card.html", view=view)


def _facts(document: dict[str, Any], *, counts: dict[tuple[str, str], int]) -> list[dict[str, str]]:
    """The key numbers: name, value and a note."""
    tokens, personal, splits, rows = (document[name] for name in ("tokens", "personal", "splits", "rows"))
    errors = sum(count for (_, severity), count in counts.items() if severity == "error")
    repeats = sum(counts.get((kind, "warning"), 0) for kind in ("exact_duplicate", "near_duplicate"))
    held_out = splits["validation"] + splits["test"]
    facts = [
        ("rows to train on", splits["train"], f"of {rows:,} read"),
        ("rows held out", held_out, f"{splits['test']:,} of them for testing" if held_out else ""),
        ("rows left out", rows - sum(splits.values()), ""),
        ("tokens to train on", tokens["total"], f"{tokens['targets']:,} of them targets"),
        ("rows with personal data", personal["rows"], PERSONAL[personal["setting"]] if personal["rows"] else ""),
        ("repeats", repeats, "in the training files, exact or nearly"),
        ("errors", errors, "in the training files"),
        ("warnings", sum(counts.values()) - errors, "in the training files"),
    ]
    return [{"name": name, "value": f"{value:,}", "note": note} for name, value, note in facts]
