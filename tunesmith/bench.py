"""`tunesmith bench`: a run and its base, or one model, on benchmarks that need no answers to be judged.

Files are scored by likelihood (tasks/likelihood.py), with the extra `bench` tasks of lm-evaluation-harness too. Base and
tuned read the same items, so their difference is paired.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith import api
from tunesmith.data.answers import Floats
from tunesmith.errors import NotFoundError, RecipeError
from tunesmith.evaluate.harness import run_harness
from tunesmith.evaluate.metric import FRACTION, MEAN, Metric
from tunesmith.evaluate.metrics import METRICS, likelihood_rows
from tunesmith.evaluate.run import System
from tunesmith.evaluate.statistics import compare, interval
from tunesmith.models.load import load_model
from tunesmith.registry.workspace import Workspace
from tunesmith.tasks.likelihood import Item, at_most, read_items, score


def _fraction(name: str, description: str) -> Metric:
    return Metric(name, description, lambda: np.zeros(0), FRACTION, right_or_wrong=True)


OWN_METRICS = {
    metric.name: metric
    for metric in (
        _fraction("accuracy", "the likeliest continuation is the right one"),
        _fraction("accuracy_by_length", "the likeliest by its log-likelihood a character is the right one"),
        METRICS["perplexity"],  # of last words, a word each
    )
}


def bench(
    name: str,
    *,
    files: list[Path],
    tasks: list[str],
    include: Path | None = None,
    rows: int | None = None,
    workspace: Workspace,
    on_progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The document of `bench`: each file and each task of the harness, with the scores of `tuned` and `base`.

    `name` is a run, or else a base: `starter`, a folder, a hub name. `rows` bounds each benchmark. Raises RecipeError where
    there is nothing to do, NotFoundError where `name` is neither, and what the readers raise.
    """
    if not files and not tasks:
        raise RecipeError("there is nothing to measure", hint="name files with --file, or tasks with --harness")
    if include is not None and not tasks:
        raise RecipeError("--include has no effect without --harness", hint="name tasks with --harness")
    read = {str(path): at_most(read_items(path), rows=rows) for path in files}
    systems = _systems(name, workspace=workspace)
    found: list[dict[str, Any]] = []
    for file, items in read.items():
        entry: dict[str, Any] = {"name": Path(file).name, "file": file, "kind": items[0].kind, "rows": len(items)}
        by_metric: dict[str, dict[str, Floats]] = {}
        for system in systems:
            on_progress(f"{entry['name']}, {system.name}: {len(items):,} items")
            with system.switched():
                for metric, values in _scored(system, items).items():
                    by_metric.setdefault(metric, {})[system.name] = values
        entry["metrics"] = {metric: _compared(OWN_METRICS[metric], of) for metric, of in by_metric.items()}
        found.append(entry | {"groups": _groups(items, by_metric["accuracy"])})
    if tasks:
        found += _of_harness(systems, tasks=tasks, include=include, rows=rows, on_progress=on_progress)
    return {"model": name, "systems": [system.name for system in systems], "benchmarks": found}


def _systems(name: str, *, workspace: Workspace) -> list[System]:
    """A run's model and its base, or a base alone."""
    try:
        run = api.find_run(name, workspace=workspace, finished=True)
    except NotFoundError as missing:
        try:
            model = load_model(name)
        except NotFoundError:
            raise missing from None
        return [_able(System("base", model))]
    tuned, base = api.tuned_and_base(run, workspace=workspace)
    return [_able(System("tuned", tuned.model)), base]


def _able(system: System) -> System:
    if system.model.is_encoder or system.model.is_encoder_decoder:
        raise RecipeError(
            "this base does not go on with a text", hint="benchmarks need a model that predicts the next token"
        )
    return system


def _scored(system: System, items: list[Item]) -> dict[str, Floats]:
    """What a system scores on each item, by metric."""
    scores = score(system.model, items=items)
    if items[0].kind == "minimal_pairs":
        return {"accuracy": scores.right_B}
    if items[0].kind == "multiple_choice":
        return {"accuracy": scores.right_B, "accuracy_by_length": scores.right_by_length_B}
    words = likelihood_rows(negative_log_likelihood=-scores.logprob_B, words=np.ones(len(items)))
    return {"accuracy": scores.right_B, "perplexity": words}


def _compared(metric: Metric, scores: dict[str, Floats]) -> dict[str, Any]:
    """Scores with intervals, and the paired difference where there are two systems."""
    entry: dict[str, Any] = {
        "higher_is_better": metric.higher_is_better,
        "systems": {name: interval(rows, aggregate=metric.aggregate).as_dict() for name, rows in scores.items()},
    }
    if "tuned" in scores:
        entry["differences"] = {"tuned - base": compare(scores["tuned"], scores["base"], metric=metric)}
    return entry


def _groups(items: list[Item], right: dict[str, Floats]) -> dict[str, dict[str, float]]:
    """The share of right items of each group, by system; nothing where there is one group."""
    names = sorted({item.group for item in items})
    if len(names) < 2:
        return {}
    member = {name: np.array([item.group == name for item in items]) for name in names}
    return {name: {s: float(rows[member[name]].mean()) for s, rows in right.items()} for name in names}


def _of_harness(
    systems: list[System],
    *,
    tasks: list[str],
    include: Path | None,
    rows: int | None,
    on_progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Each task of the harness: its own scores, with intervals and differences where a metric has a value a row."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for system in systems:
        on_progress(f"lm-evaluation-harness, {system.name}: {', '.join(tasks)}")
        with system.switched():
            for name, scores in run_harness(system.model, tasks=tasks, include=include, rows=rows).items():
                found.setdefault(name, {})[system.name] = scores
    return [_harness_entry(name, by_system) for name, by_system in found.items()]


def _harness_entry(name: str, by_system: dict[str, dict[str, Any]]) -> dict[str, Any]:
    first = next(iter(by_system.values()))
    metrics: dict[str, Any] = {}
    for key, higher in first["higher_is_better"].items():
        values = {system: np.array(scores["by_row"].get(key, [])) for system, scores in by_system.items()}
        if all(len(rows) for rows in values.values()):
            binary = all(np.isin(rows, (0, 1)).all() for rows in values.values())
            metric = Metric(key, "", lambda: np.zeros(0), FRACTION if binary else MEAN, higher, right_or_wrong=binary)
            metrics[key] = _compared(metric, values)
        else:  # of all rows together, such as a perplexity of words
            shown = {system: {"value": scores["metrics"][key]} for system, scores in by_system.items()}
            metrics[key] = {"higher_is_better": higher, "systems": shown}
    return {
        "name": name,
        "kind": "harness",
        "version": first["version"],
        "rows": first["rows"],
        "metrics": metrics,
        "groups": {},
    }
