"""One recipe trained with several seeds: how much of a score is the chance of training.

    mean = 1/n sum_i x_i        standard deviation = sqrt(1/(n-1) sum_i (x_i - mean)^2)

Runs belong together where recipe and hashes are the same but for the name and `train.seed`, and the same rows were
evaluated.
"""

import contextlib
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import NotFoundError, StorageError
from tunesmith.evaluate.statistics import decimals
from tunesmith.storage import read_json


def seeds_of(run_folder: Path, *, evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """The tuned model's first metric of each seed, mean and standard deviation; None where no other seed was evaluated.

    `evaluation` is that of the run in `run_folder`; its neighbours are searched. Of each seed one run counts, the run itself
    of its own.
    """
    resolved = read_json(run_folder / "resolved.json")
    metric = evaluation.get("primary")
    rows = evaluation.get("rows_sha256")
    if metric is None or rows is None or "recipe" not in resolved:
        return None
    found = {resolved["recipe"]["train"]["seed"]: _entry(run_folder.name, resolved, evaluation, metric=metric)}
    for folder in sorted(path for path in run_folder.parent.iterdir() if path.name != run_folder.name):
        with contextlib.suppress(NotFoundError, StorageError):  # of a run that is not whole
            other = read_json(folder / "resolved.json")
            if _but_for_seed(other) != _but_for_seed(resolved):
                continue
            scored, run = read_json(folder / "evaluation.json"), read_json(folder / "run.json")
            if run.get("state") == "finished" and scored.get("rows_sha256") == rows and metric in scored["metrics"]:
                entry = _entry(folder.name, other, scored, metric=metric)
                found.setdefault(entry["seed"], entry)
    if len(found) < 2:
        return None
    runs = [found[seed] for seed in sorted(found)]
    values = [entry["value"] for entry in runs]
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    places = max(2, decimals(deviation))
    listed = ", ".join(f"{value:.{places}f}" for value in values)
    sentence = (
        f"{metric} of {len(runs)} seeds: {listed}; mean {mean:.{places}f}, standard deviation {deviation:.{places}f}"
    )
    return {"metric": metric, "runs": runs, "mean": mean, "standard_deviation": deviation, "sentence": sentence}


def _entry(name: str, resolved: Mapping[str, Any], evaluation: Mapping[str, Any], *, metric: str) -> dict[str, Any]:
    value = evaluation["metrics"][metric]["systems"]["tuned"]["value"]
    return {"run": name, "seed": resolved["recipe"]["train"]["seed"], "value": value}


def _but_for_seed(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs share where only chance tells them apart."""
    recipe = {key: value for key, value in resolved.get("recipe", {}).items() if key != "name"}
    train = {key: value for key, value in recipe.get("train", {}).items() if key != "seed"}
    return {"recipe": recipe | {"train": train}, "hashes": resolved.get("hashes")}
