"""`tunesmith advise`: tune, prompt, look up, or both, and what would change that.

All ways answer the same held-out rows: the base alone, with examples in its prompt, and with what was looked up for each
row; the tuned model, alone and with what was looked up. The examples are those of the best prompt of several, chosen on
other rows. Advised is the cheapest way that is not shown to be worse than the best one, in the order of WAYS: nothing to
keep up comes before examples, these before an index, and tuning last. Pairs of ways are compared on the rows, and p-values
are Holm's over all ways (Holm 1979), since the best was picked by looking.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith import api
from tunesmith.errors import RecipeError
from tunesmith.evaluate.result import Evaluation
from tunesmith.evaluate.statistics import SIGNIFICANCE, compare, decimals, holm
from tunesmith.objectives.headed import Headed
from tunesmith.recipe import load_recipe
from tunesmith.registry.workspace import CURVES, Workspace
from tunesmith.storage import read_json

WAYS = {
    "base": "use the base as it is: neither examples nor tuning are shown to help",
    "few_shot": "prompt: examples in the prompt do as well as anything that was tried",
    "retrieval": "look up: what is looked up for each question does as well as anything that was tried",
    "tuned": "tune: no way without tuning does as well",
    "tuned_retrieval": "tune and look up: the two together do better than either",
}


def find_named(name: str, *, workspace: Workspace) -> api.Run:
    """A run by its name, or the newest finished one of a recipe's file."""
    is_recipe = name.endswith((".yaml", ".yml")) and Path(name).is_file()
    return api.find_run(load_recipe(Path(name)).name if is_recipe else name, workspace=workspace, finished=True)


def advise(
    run: api.Run,
    *,
    workspace: Workspace,
    rows: int | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Evaluate all ways on the run's held-out rows and say which to take. RecipeError for a run that writes no text."""
    if isinstance(run.recipe.objective, Headed):
        raise RecipeError(
            f"{run.name} was tuned for {run.recipe.objective.kind_name} and writes no text that could be looked up",
            hint=f"tunesmith evaluate {run.name} compares it with what needs no tuning",
        )
    update: dict[str, Any] = {"against": tuple(way for way in WAYS if way != "tuned"), "few_shot": "best"}
    settings = run.recipe.evaluate.model_copy(update=update | ({} if rows is None else {"rows": rows}))
    evaluation = api.evaluate(run, settings=settings, workspace=workspace, on_progress=on_progress)
    curve = workspace.path / CURVES / f"{run.recipe.name}.json"
    return advised(evaluation, curve=read_json(curve) if curve.is_file() else None)


def advised(evaluation: Evaluation, *, curve: dict[str, Any] | None = None) -> dict[str, Any]:
    """The document: the way that is advised, every way beside the best one, and what would change it."""
    document = evaluation.document
    metric = evaluation.metrics[document["primary"]]
    scores = evaluation.scores[metric.name]
    sign = 1 if metric.higher_is_better else -1
    value = {way: evaluation.value(metric.name, system=way) for way in WAYS if way in scores}
    best = max(value, key=lambda way: sign * value[way])
    against_best = {way: compare(scores[way], scores[best], metric=metric) for way in value if way != best}
    p = dict(zip(against_best, holm([float(found["p"] or 0.0) for found in against_best.values()]), strict=True))
    ways = []
    for way in value:
        found = against_best.get(way)
        shown_worse = found is not None and p[way] < SIGNIFICANCE and not _holds_zero(found)
        ways.append(
            {
                "way": way,
                "value": value[way],
                "to_best": found,
                "p": p.get(way),
                "shown_worse": shown_worse,
                "costs": document["costs"][way],
            }
        )
    chosen = next(entry["way"] for entry in ways if not entry["shown_worse"])
    advice = {
        "run": document["run"],
        "data": document["data"],
        "rows": document["rows"],
        "metric": metric.name,
        "higher_is_better": metric.higher_is_better,
        "advised": chosen,
        "because": WAYS[chosen],
        "best": best,
        "ways": ways,
        "would_change": _would_change(ways, chosen=chosen, best=best, rows=document["rows"]),
    }
    if "few_shot_choice" in document:
        advice["few_shot"] = document["few_shot_choice"]["sentence"]
    if curve is not None:
        advice["more_rows"] = curve["sentence"]
    return advice


def _holds_zero(found: dict[str, Any]) -> bool:
    return bool(found["low"] <= 0 <= found["high"])


def _would_change(ways: list[dict[str, Any]], *, chosen: str, best: str, rows: int) -> list[str]:
    """What could make another way the advised one."""
    entry = next(entry for entry in ways if entry["way"] == chosen)
    found = []
    if chosen != best:
        difference = entry["to_best"]
        gap, could = abs(difference["value"]), difference["detectable"]
        needed = f"; about {int(np.ceil(rows * (could / gap) ** 2)):,} would, if it is real" if gap and could else ""
        shown = f"{gap:.{decimals(gap)}f}" if gap else "no"
        found.append(f"{best} scored {shown} better, which {rows:,} held-out rows do not show{needed}")
    untuned = [entry for entry in ways if not entry["way"].startswith("tuned")]
    if chosen.startswith("tuned") and untuned:
        rival = min(untuned, key=lambda entry: abs(entry["to_best"]["value"]))
        gap = abs(rival["to_best"]["value"])
        found.append(
            f"{rival['way']} comes nearest without tuning, {gap:.{decimals(gap)}f} behind; a larger base, better examples "
            "or documents may close that"
        )
    elif chosen != "base":
        found.append("longer prompts cost with every answer: where tokens or seconds count, weigh them against tuning")
    return found
