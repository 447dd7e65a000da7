"""The first steps of the quickstart on the starter model, against committed losses.

These numbers must not move without a line in docs/decisions.md that says why. They depend on the starter's weights, the
sample rows, the template, the order of rows, the adapter's start and the optimiser.
"""

import json
from pathlib import Path

import pytest

from tunesmith import api
from tunesmith.models.base import STARTER
from tunesmith.quickstart import RECIPE
from tunesmith.recipe import load_recipe
from tunesmith.registry.workspace import Workspace

GOLDEN = Path(__file__).parent / "quickstart.json"
RELATIVE = 2e-4  # of losses; float32 sums differ a little between processors


def trajectory(folder: Path) -> dict[str, list[float]]:
    """Losses and gradient norms of the first steps, and the validation loss after them."""
    recipe = load_recipe(RECIPE, overrides=["train.max_steps=6", "train.validate_every=6", "train.warmup=2"])
    run = api.tune(recipe, workspace=Workspace(folder))
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {
        "loss": [line["loss"] for line in lines if "loss" in line],
        "grad_norm": [line["grad_norm"] for line in lines if "loss" in line],
        "validation_loss": [line["validation_loss"] for line in lines if "validation_loss" in line],
    }


@pytest.mark.skipif(not (STARTER / "model.safetensors").is_file(), reason="the starter's weights are not here")
def test_the_first_steps_are_the_committed_ones(tmp_path: Path) -> None:
    found, golden = trajectory(tmp_path), json.loads(GOLDEN.read_text("utf-8"))
    assert set(found) == set(golden)
    for name, values in golden.items():
        assert found[name] == pytest.approx(values, rel=RELATIVE * (10 if name == "grad_norm" else 1)), name
