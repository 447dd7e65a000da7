"""Looking back: all runs as a table, one run in full, two runs side by side.

All three read what the runs left in their folders and the index; nothing is computed again. Two runs are laid beside
each other, each with its own intervals; whether one is better than the other is for an evaluation on the same rows.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import NotFoundError, StorageError
from tunesmith.registry.index import Index, Lineage
from tunesmith.registry.workspace import Workspace, recipe_name
from tunesmith.storage import read_json

MAX_CELL = 60  # characters of one value in a text for people; as_dict() has all


@dataclass(frozen=True, slots=True)
class SettingDifference:
    """A setting of resolved.json by its dotted name. None: null or not there."""

    name: str
    a: Any
    b: Any


@dataclass(frozen=True, slots=True)
class Result:
    """A number of both runs, None where a run has none; intervals (low, high) are 95 %."""

    name: str
    a: float | str | None
    b: float | str | None
    a_interval: tuple[float, float] | None = None
    b_interval: tuple[float, float] | None = None
    higher_is_better: bool | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs: the settings in which they differ, and their results side by side."""

    run_a: str
    run_b: str
    settings: list[SettingDifference]
    results: list[Result]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """As `compare --json` prints it."""
        return asdict(self)

    def as_text(self) -> str:
        """Aligned tables for people."""
        settings = [(s.name, _value(s.a), _value(s.b)) for s in self.settings]
        results = [(r.name, _number(r.a, r.a_interval), _number(r.b, r.b_interval)) for r in self.results]
        parts = [
            aligned([("a", self.run_a), ("b", self.run_b)]),
            aligned([("settings that differ", "a", "b"), *settings]) if settings else "no setting differs",
            aligned([("results", "a", "b"), *results]) if results else "neither run has results",
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n\n".join(parts)


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A run as one line of a table. `state` is `missing` where the run's folder is gone."""

    run: str
    recipe: str
    created: str
    state: str
    base: str | None
    rows: int | None
    steps: int | None
    train_loss: float | None
    validation_loss: float | None
    verdict: str | None
    path: str

    def as_dict(self) -> dict[str, Any]:
        """As `runs --json` prints it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class RunDetails:
    """A run in full. `files`: the bytes of each entry of its folder; what is None was not recorded or not done."""

    run: str
    path: str
    summary: dict[str, Any]
    lineage: Lineage | None
    ledger: dict[str, Any] | None
    sentence: str | None
    files: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """As `show --json` prints it."""
        return asdict(self)

    def as_text(self) -> str:
        """For people: numbers, data, result, lineage, files."""
        facts = {"run": self.run, "path": self.path}
        for name, value in self.summary.items():
            if isinstance(value, str | int | float):
                facts.setdefault(name, _number(value))
        states = (self.ledger or {}).get("states", {})
        counted = ", ".join(f"{count:,} {state.replace('_', ' ')}" for state, count in states.items() if count)
        parts = [
            aligned(list(facts.items())),
            f"rows: {counted or 'no ledger'}",
            self.sentence or f"not evaluated: `tunesmith evaluate {self.run}` does it",
            aligned([("lineage", "name", "digest", "bytes", "path"), *_lineage_rows(self.lineage)])
            if self.lineage
            else "lineage: not recorded in this workspace",
            aligned([("files", "bytes"), *((name, f"{size:,}") for name, size in self.files.items())]),
        ]
        return "\n\n".join(parts)


def compare_runs(run_a: Path, run_b: Path) -> Comparison:
    """Lay two run folders side by side. Raises NotFoundError, StorageError if a file is not there or damaged."""
    settings = [
        SettingDifference(name, a, b)
        for name, (a, b) in _paired(*(_flattened(read_json(run / "resolved.json")) for run in (run_a, run_b))).items()
        if a != b
    ]
    evaluations = [_evaluation(run) for run in (run_a, run_b)]
    train = _paired(*(_train_results(read_json(run / "run.json")) for run in (run_a, run_b)))
    measured = _paired(*(_evaluation_results(evaluation) for evaluation in evaluations))
    results = [Result(name, a, b) for name, (a, b) in train.items()]
    for name, (a, b) in measured.items():
        first, second = a or {}, b or {}
        results.append(
            Result(
                name,
                first.get("value"),
                second.get("value"),
                a_interval=_interval(first),
                b_interval=_interval(second),
                higher_is_better=(a or b)["higher_is_better"],
            )
        )
    notes = []
    rows_a, rows_b = (evaluation.get("rows") for evaluation in evaluations)
    same = rows_a == rows_b and len({evaluation.get("rows_sha256") for evaluation in evaluations}) == 1
    if all(evaluations) and not same:
        notes.append(
            f"the runs were not evaluated on the same rows ({rows_a} and {rows_b}): their results cannot be compared; "
            "`tunesmith evaluate RUN --data FILE` evaluates each on the same file"
        )
    return Comparison(run_a=run_a.name, run_b=run_b.name, settings=settings, results=results, notes=notes)


def runs_table(index: Index) -> list[RunSummary]:
    """Every run of the workspace that `index` belongs to, newest first, recorded or only found in its folder."""
    summaries = []
    for run in index.runs():
        folder = index.located(run.path)
        state = run.state if folder.is_dir() else "missing"
        document = {**(run.summary or {}), "created": run.created, "state": state}
        evaluation = run.evaluation or {}
        summaries.append(_summary(folder, document=document, evaluation=evaluation, base=run.base.name))
    known = {summary.run for summary in summaries}
    for folder in Workspace(index.path.parent).run_folders():
        if folder.name not in known:
            with contextlib.suppress(StorageError):  # a damaged run must not hide the others
                document, evaluation = read_json(folder / "run.json"), _evaluation(folder)
                summaries.append(_summary(folder, document=document, evaluation=evaluation, base=None))
    return sorted(summaries, key=lambda summary: summary.created, reverse=True)


def runs_text(runs: Sequence[RunSummary]) -> str:
    """The table of `runs_table` for people."""
    if not runs:
        return "no runs yet"
    shown = ("state", "base", "rows", "steps", "train_loss", "validation_loss", "verdict")
    rows = [[r.run, r.created[:16].replace("T", " "), *(_number(getattr(r, name)) for name in shown)] for r in runs]
    return aligned([["run", "created (UTC)", *(name.replace("_", " ") for name in shown)], *rows])


def show_run(run: Path, index: Index, *, verify: bool = True) -> RunDetails:
    """Everything about the run in the folder `run`; `verify` as in `Index.lineage`.

    Raises NotFoundError, StorageError if its run.json is not there or damaged.
    """
    lineage = None
    with contextlib.suppress(NotFoundError):
        lineage = index.lineage(run.name, verify=verify)
    return RunDetails(
        run=run.name,
        path=str(run),
        summary=read_json(run / "run.json"),
        lineage=lineage,
        ledger=read_json(run / "ledger.json") if (run / "ledger.json").exists() else None,
        sentence=_evaluation(run).get("sentence"),
        files={entry.name + ("/" if entry.is_dir() else ""): _num_bytes(entry) for entry in sorted(run.iterdir())},
    )


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, columns aligned to the left, two spaces between."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _evaluation(run: Path) -> dict[str, Any]:
    """The evaluation.json of a run folder; empty where the run was not evaluated."""
    return read_json(run / "evaluation.json") if (run / "evaluation.json").exists() else {}


def _flattened(value: dict[str, Any], *, before: str = "") -> dict[str, Any]:
    """Nested settings by dotted name; lists and empty sections are values."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= (
            _flattened(inner, before=f"{before}{key}.") if isinstance(inner, dict) and inner else {before + key: inner}
        )
    return flat


def _paired(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name -> (value of a, value of b), names in the order of a and then of b."""
    return {name: (a.get(name), b.get(name)) for name in [*a, *(name for name in b if name not in a)]}


def _train_results(summary: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a run.json, and how the run ended."""
    numbers = {k: v for k, v in summary.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return numbers | {k: summary[k] for k in ("state", "stopped") if k in summary}


def _evaluation_results(evaluation: dict[str, Any]) -> dict[str, Any]:
    """`exact_match (tuned)`, `exact_match (tuned - base)`, ... -> value, low, high, higher_is_better."""
    return {
        f"{metric} ({system})": {**numbers, "higher_is_better": entry["higher_is_better"]}
        for metric, entry in evaluation.get("metrics", {}).items()
        for system, numbers in [*entry["systems"].items(), *entry.get("differences", {}).items()]
    }


def _interval(numbers: dict[str, Any]) -> tuple[float, float] | None:
    low, high = numbers.get("low"), numbers.get("high")
    return None if low is None or high is None else (low, high)


def _summary(folder: Path, *, document: dict[str, Any], evaluation: dict[str, Any], base: str | None) -> RunSummary:
    return RunSummary(
        run=folder.name,
        recipe=recipe_name(folder.name),
        created=str(document.get("created", "")),
        state=document.get("state", "finished"),
        base=base,
        **{name: document.get(name) for name in ("rows", "steps", "train_loss", "validation_loss")},
        verdict=evaluation.get("verdict"),
        path=str(folder),
    )


def _lineage_rows(lineage: Lineage) -> list[tuple[str, ...]]:
    """The run, its data by role, its base, and then the same of its parents."""
    data = [(f"{role} data", node) for role, node in lineage.datasets.items()]
    own = [("run", lineage.run), *data, ("base", lineage.base)]
    rows = [(what, node.name, (node.digest or "-")[:12], node.state, node.path) for what, node in own]
    return rows + (_lineage_rows(lineage.parent) if lineage.parent else [])


def _num_bytes(entry: Path) -> int:
    return sum(f.stat().st_size for f in (entry.rglob("*") if entry.is_dir() else [entry]) if f.is_file())


def _value(value: Any) -> str:
    """A setting as one short text."""
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= MAX_CELL else text[: MAX_CELL - 1] + "…"


def _number(value: float | str | None, interval: tuple[float, float] | None = None) -> str:
    """A result as text, with its interval."""
    if value is None or isinstance(value, str):
        return value or "-"
    if interval:
        return f"{_number(value)} [{_number(interval[0])}, {_number(interval[1])}]"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
