"""Several seeds of one recipe: which runs belong together, and what they say."""

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.evaluate.seeds import seeds_of


def write_run(
    folder: Path,
    *,
    seed: int,
    value: float,
    name: str = "toy",
    rate: float = 0.1,
    rows: str = "ab",
    state: str = "finished",
) -> dict[str, Any]:
    """A run's folder, and its evaluation."""
    evaluation = {
        "primary": "exact_match", "rows_sha256": rows,
        "metrics": {"exact_match": {"systems": {"tuned": {"value": value}, "base": {"value": 0.1}}}},
    }  # fmt: skip
    recipe = {"name": name, "train": {"seed": seed, "learning_rate": rate}}
    documents = {"resolved": {"recipe": recipe, "hashes": {"data": "d"}}, "run": {"state": state}}
    folder.mkdir()
    for file, document in (documents | {"evaluation": evaluation}).items():
        (folder / f"{file}.json").write_text(json.dumps(document))
    return evaluation


def test_mean_and_deviation_of_the_seeds(tmp_path: Path) -> None:
    evaluation = write_run(tmp_path / "toy-1", seed=1, value=0.64)
    assert seeds_of(tmp_path / "toy-1", evaluation=evaluation) is None
    write_run(tmp_path / "toy-0", seed=0, value=0.61)
    write_run(tmp_path / "again-2", seed=2, value=0.58, name="again")
    found = seeds_of(tmp_path / "toy-1", evaluation=evaluation)
    assert found is not None
    assert [(entry["run"], entry["seed"]) for entry in found["runs"]] == [("toy-0", 0), ("toy-1", 1), ("again-2", 2)]
    assert found["mean"] == pytest.approx(0.61)
    assert found["standard_deviation"] == pytest.approx(0.03)
    assert found["sentence"] == ("exact_match of 3 seeds: 0.610, 0.640, 0.580; mean 0.610, standard deviation 0.030")


@pytest.mark.parametrize(
    "other", [{"rate": 0.2}, {"rows": "cd"}, {"state": "stopped"}, {"seed": 1}], ids=lambda other: next(iter(other))
)
def test_other_runs_do_not_count(tmp_path: Path, other: dict[str, Any]) -> None:
    evaluation = write_run(tmp_path / "toy-1", seed=1, value=0.64)
    write_run(tmp_path / "toy-0", **({"seed": 0, "value": 0.61} | other))
    (tmp_path / "toy-2").mkdir()
    (tmp_path / "toy-3").mkdir()
    (tmp_path / "toy-3" / "resolved.json").write_text("{torn")
    (tmp_path / "latest").write_text("toy-0")
    assert seeds_of(tmp_path / "toy-1", evaluation=evaluation) is None
