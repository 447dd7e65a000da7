"""Every method with every objective, from a recipe to an evaluation: the grid is made from the two registries."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tunesmith import api
from tunesmith.errors import RecipeError
from tunesmith.generate.sampling import Sampling
from tunesmith.methods import METHODS
from tunesmith.models.load import Model
from tunesmith.objectives import OBJECTIVES
from tunesmith.registry.workspace import Workspace

KNOBS = {
    "lora": {"rank": 4},
    "prompt": {"num_tokens": 3},
    "p_tuning": {"num_tokens": 3, "width": 8},
    "vera": {"rank": 8},
}
KNOBS |= {"qlora": {"rank": 4}, "prefix": {"num_tokens": 3}, "adapters": {"reduction": 4}, "layers": {"last": 1}}
COLOURS = ("red", "green", "blue", "grey")


@pytest.fixture(scope="module")
def project(build_model: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with biases (so that every method suits), rows to answer and rows of plain text."""
    folder = tmp_path_factory.mktemp("grid")
    (folder / "base").mkdir()
    build_model("qwen2", dtype=torch.float32).save(folder / "base")
    chats = [{"prompt": f"{n} {c}?", "completion": c} for n, c in itertools.product(range(6), COLOURS)]
    texts = [{"text": f"number {n} is {c}"} for n, c in itertools.product(range(6), COLOURS)]
    for name, rows in (("instruction", chats), ("causal", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_with_every_objective(project: Path, method: str, objective: str) -> None:
    workspace = Workspace(project / "w")
    recipe = {
        "name": f"{method}-{objective}".replace("_", "-"),
        "base": str(project / "base"),
        "data": {"train": str(project / f"{objective}.jsonl"), "validation": 0.2},
        "objective": objective,
        "method": {"kind": method} | KNOBS.get(method, {}),
        "train": {
            "epochs": 2,
            "batch_rows": 4,
            "learning_rate": 0.01,
            "precision": "bf16",
            "gradient_checkpointing": True,
        },
        "evaluate": {"metrics": ["perplexity"], "against": ["base"]},
    }
    path = project / f"{method}-{objective}.yaml"
    path.write_text(json.dumps(recipe), "utf-8")
    run = api.tune(path, workspace=workspace)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert losses[-1] < losses[0]
    tuned = api.load(run)
    answer = tuned.generate("1 red?", sampling=Sampling(max_tokens=4))
    assert answer == tuned.generate("1 red?", sampling=Sampling(max_tokens=4))
    evaluation = api.evaluate(run, workspace=workspace)
    values = evaluation.as_dict()["metrics"]["perplexity"]["systems"]
    assert values["tuned"]["value"] < values["base"]["value"]
    for form, possible in (("peft", METHODS[method].peft_type is not None), ("merged", METHODS[method].merges)):
        out = project / f"{run.name}-{form}"
        said: list[str] = []
        if possible:
            path = api.export(run, form=form, out=out, workspace=workspace, on_message=said.append)
            assert (path / "tokenizer.json").is_file()
            assert len(said) == (form == "merged" and method == "qlora")
        else:
            with pytest.raises(RecipeError) as error:
                api.export(run, form=form, out=out, workspace=workspace)
            assert error.value.hint
            assert not out.exists()
