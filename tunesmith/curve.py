"""`tunesmith curve`: would more rows help?

The recipe is trained on 1/8, 1/4, 1/2 and all of its training rows, each share within the next, and every run is scored on
the same held-out rows. What is missing to a perfect score falls about as a power of the number of rows (Hestness et al.
2017, "Deep Learning Scaling is Predictable, Empirically"):

    missing(n) = a n^-c,   so twice the rows give   missing(2n) = missing(n) 2^-c

with c the slope of a straight line through the logarithms. Intervals are those of the score and of c together: the rows (and
the seeds, where there are several) are drawn again, and all is computed anew. They hold as far as the power does.

Shapes: P shares, K seeds, R resamples.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from tunesmith import api
from tunesmith.data.answers import Floats
from tunesmith.errors import RecipeError
from tunesmith.evaluate.metric import Aggregate
from tunesmith.evaluate.result import Evaluation
from tunesmith.evaluate.statistics import NO_WIDTH, RESAMPLES, decimals, resampled, student_tail
from tunesmith.recipe import Recipe
from tunesmith.registry.workspace import CURVES, Workspace
from tunesmith.storage import write_json
from tunesmith.train.loop import Observer

LEAST_MISSING = 1e-6  # of which a logarithm is taken


def learning_curve(
    recipe: Recipe,
    *,
    workspace: Workspace,
    parts: int = 4,
    seeds: int = 1,
    progress: Callable[[], AbstractContextManager[Observer]],
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train and score every share with every seed; the document says what twice the rows would give.

    Raises RecipeError where nothing is held out to score on, and what `tune` and `evaluate` raise.
    """
    if recipe.data.validation is None and recipe.data.test is None:
        raise RecipeError("the recipe holds no rows out to score on", hint="set data.test or data.validation")
    shares = [0.5**power for power in reversed(range(parts))]
    found: list[list[tuple[api.Run, Evaluation]]] = [[] for _ in shares]
    for seed in range(seeds):
        for share, scored in zip(shares, found, strict=True):
            say(f"{share:.1%} of the training rows" + (f", seed {seed + 1} of {seeds}" if seeds > 1 else ""))
            part = _part(recipe, share=share, seed=recipe.train.seed + seed)
            with progress() as observer:
                run = api.tune(part, workspace=workspace, observer=observer)
            settings = recipe.evaluate.model_copy(update={"against": (), "gate": None, "general": None})
            scored.append((run, api.evaluate(run, settings=settings, workspace=workspace)))
    document = fitted(recipe.name, shares=shares, found=found)
    write_json(workspace.path / CURVES / f"{recipe.name}.json", value=document)
    return document


def _part(recipe: Recipe, *, share: float, seed: int) -> Recipe:
    """The recipe on a share of its rows, and of those that `data.select` keeps."""
    name = recipe.name if share == 1 else f"{recipe.name}-1of{round(1 / share)}"
    update: dict[str, Any] = {"train_share": share * recipe.data.train_share}
    select = recipe.data.select
    if select is not None and select.keep > 1:
        update["select"] = select.model_copy(update={"keep": max(2, round(share * select.keep))})
    data = recipe.data.model_copy(update=update)
    return recipe.model_copy(
        update={"name": name, "data": data, "train": recipe.train.model_copy(update={"seed": seed})}
    )


def fitted(name: str, *, shares: list[float], found: list[list[tuple[api.Run, Evaluation]]]) -> dict[str, Any]:
    """The document of the curve: a point a share, and what twice the rows would give."""
    first = found[0][0][1].document
    metric = found[0][0][1].metrics[first["primary"]]
    systems = [evaluation.scores[metric.name]["tuned"] for scored in found for _, evaluation in scored]
    scores_PKR = resampled(systems, aggregate=metric.aggregate).reshape(len(found), -1, RESAMPLES)
    scores_PR = _over_seeds(scores_PKR)
    rows_P = np.array([np.mean([run.summary["rows"] for run, _ in scored]) for scored in found])
    value_P = np.array([np.mean([e.value(metric.name) for _, e in scored]) for scored in found])
    tail = student_tail(first["rows"])
    low_P, high_P = np.quantile(scores_PR, [tail, 1 - tail], axis=1)
    points = [
        {
            "share": share,
            "rows": round(float(rows)),
            "runs": [run.name for run, _ in scored],
            "value": float(value),
            "low": min(float(value), float(low)),
            "high": max(float(value), float(high)),
        }
        for share, rows, scored, value, low, high in zip(shares, rows_P, found, value_P, low_P, high_P, strict=True)
    ]
    best = _best(metric.aggregate, higher_is_better=metric.higher_is_better)
    twice = float(twice_of(value_P[:, None], rows_P=rows_P, best=best)[0])
    twice_R = twice_of(scores_PR, rows_P=rows_P, best=best)
    gain_R = (twice_R - scores_PR[-1]) * (1 if metric.higher_is_better else -1)
    low, high, least, most = (float(q) for r in (twice_R, gain_R) for q in np.quantile(r, [tail, 1 - tail]))
    gain = (twice - value_P[-1]) * (1 if metric.higher_is_better else -1)
    document = {
        "name": name,
        "metric": metric.name,
        "higher_is_better": metric.higher_is_better,
        "rows": first["rows"],
        "points": points,
        "twice": {"rows": 2 * points[-1]["rows"], "value": twice, "low": min(twice, low), "high": max(twice, high)},
        "gain": {"value": float(gain), "low": min(float(gain), least), "high": max(float(gain), most)},
    }
    return document | {"sentence": sentence(document)}


def _over_seeds(scores_PKR: Floats) -> Floats:
    """The mean [P, R] over seeds, which are drawn again in each resample where there are several."""
    num_seeds = scores_PKR.shape[1]
    if num_seeds == 1:
        return scores_PKR[:, 0]
    drawn_PKR = np.random.default_rng(0).integers(0, num_seeds, scores_PKR.shape)
    mean_PR: Floats = np.take_along_axis(scores_PKR, drawn_PKR, axis=1).mean(1)
    return mean_PR


def _best(aggregate: Aggregate, *, higher_is_better: bool) -> float:
    """The perfect score; 0 of what may fall without end."""
    if not higher_is_better:
        return 0.0 if aggregate.bounds is None else aggregate.bounds[0]
    if aggregate.bounds is None:
        raise RecipeError("the first metric has no best score", hint="put one first that has: evaluate.metrics")
    return aggregate.bounds[1]


def twice_of(scores_PR: Floats, *, rows_P: Floats, best: float) -> Floats:
    """The scores [R] that twice the rows of the last share would give."""
    missing_PR = np.maximum(np.abs(best - scores_PR), LEAST_MISSING)
    x_P = np.log2(rows_P) - np.log2(rows_P).mean()
    slope_R = x_P @ np.log2(missing_PR) / (x_P @ x_P)
    change_R = missing_PR[-1] * (np.exp2(slope_R) - 1)  # of what is missing
    twice_R: Floats = scores_PR[-1] + np.where(best >= scores_PR[-1], -change_R, change_R)
    return twice_R


def sentence(document: dict[str, Any]) -> str:
    """What the curve says, with its evidence."""
    gain, twice, now = document["gain"], document["twice"], document["points"][-1]
    places = max(2, decimals(twice["high"] - twice["low"]))
    told = (
        f"{twice['rows']:,} rows would give {twice['value']:.{places}f} {document['metric']} (95 % interval "
        f"{twice['low']:.{places}f} to {twice['high']:.{places}f}) where {now['rows']:,} give {now['value']:.{places}f}"
    )
    if gain["low"] > NO_WIDTH:
        return f"more rows help: {told}, if the curve goes on as it does"
    if gain["high"] < -NO_WIDTH:
        return f"more rows of this kind do harm: {told}, if the curve goes on as it does"
    return f"it is not shown that more rows help: {told}"
