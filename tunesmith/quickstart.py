"""`tunesmith quickstart`: the whole path on the starter model and the sample data."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tunesmith import api
from tunesmith.recipe import load_recipe
from tunesmith.registry.workspace import Workspace
from tunesmith.train.loop import Observer

RECIPE = Path(__file__).resolve().parent / "starter" / "quickstart.yaml"


def quickstart(
    *, workspace: Workspace, progress: Callable[[], AbstractContextManager[Observer]], say: Callable[[str], None]
) -> dict[str, Any]:
    """Tune the starter on the sample tickets and prove it. Returns the evaluation's document with `report`."""
    say("1/3 tuning the starter model on the sample tickets (LoRA)")
    with progress() as observer:
        run = api.tune(load_recipe(RECIPE), workspace=workspace, observer=observer)
    say("2/3 answering the held-out tickets: tuned, base, and base with examples in the prompt")
    evaluation = api.evaluate(run, workspace=workspace, on_progress=lambda text: say(f"    {text}"))
    say(f"3/3 done; try: tunesmith chat {run.name}\n")
    return evaluation.document | {"report": str(run.path / "report.html")}
