"""Every method with every objective, from a recipe to an evaluation: the grid is made from the two registries."""

import hashlib
import itertools
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith import api
from tunesmith.data.answers import Answer, Classes, Tags
from tunesmith.errors import Interrupted, RecipeError
from tunesmith.generate.sampling import Sampling
from tunesmith.methods import METHODS
from tunesmith.models.load import Model
from tunesmith.objectives import OBJECTIVES
from tunesmith.objectives.headed import Headed
from tunesmith.recipe import load_recipe
from tunesmith.registry.workspace import Workspace
from tunesmith.train.observers import Silent

KNOBS = {
    "lora": {"rank": 4},
    "prompt": {"num_tokens": 3},
    "p_tuning": {"num_tokens": 3, "width": 8},
    "vera": {"rank": 8},
}
KNOBS |= {"qlora": {"rank": 4}, "prefix": {"num_tokens": 3}, "adapters": {"reduction": 4}, "layers": {"last": 1}}
KNOBS |= {"regression": {"coverage": 0.8, "head_rate_factor": 1}}  # few rows are enough for such an interval
KNOBS |= {"contrastive": {"pairs": 2}, "distillation": {"teacher": "base", "share": 0.5}}
COLOURS = ("red", "green", "blue", "grey")
HEADED = [name for name, kind in OBJECTIVES.items() if issubclass(kind, Headed)]
SPEAKING = [name for name, kind in OBJECTIVES.items() if name not in HEADED and not kind.reads_source]
DIFFERENCE = {"value", "low", "high", "p", "test", "better_rows", "worse_rows", "detectable"}
DOCUMENT = {"run", "rows", "systems", "metrics", "verdict", "sentence"}
SYSTEMS = {"classification": ["base", "few_shot", "tuned", "majority"], "regression": ["tuned", "median", "mean"]}
SYSTEMS |= {"contrastive": SYSTEMS["classification"], "token_classification": ["tuned", "majority"]}
SYSTEMS |= {"label_words": SYSTEMS["classification"]}
ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "modernbert")
ON_ENCODERS = [
    (architecture, method)
    for architecture, method in itertools.product(ENCODERS, METHODS)
    if not METHODS[method]().num_virtual_tokens and (architecture, method) != ("modernbert", "bitfit")  # no biases
]


@pytest.fixture(scope="module")
def project(build_model: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with biases (so that every method suits), encoders, and rows for each objective."""
    folder = tmp_path_factory.mktemp("grid")
    (folder / "base").mkdir()
    build_model("qwen2", dtype=torch.float32).save(folder / "base")
    chats = [{"prompt": f"{n} {c}?", "completion": c} for n, c in itertools.product(range(6), COLOURS)]
    texts = [{"text": f"number {n} is {c}"} for n, c in itertools.product(range(6), COLOURS)]
    classes = [{"text": f"{n} {c}?", "label": c} for n, c in itertools.product(range(10), COLOURS)]
    numbers = [{"text": f"{n} {c}?", "label": len(c) + n / 10} for n, c in itertools.product(range(10), COLOURS)]
    for architecture in ENCODERS:
        (folder / architecture).mkdir()
        build_model(architecture, dtype=torch.float32).save(folder / architecture)
    tagged = [
        {"words": [str(n), c, "and", o], "tags": ["O", "B-COLOUR", "O", "B-COLOUR"]}
        for n, (c, o) in itertools.product(range(3), itertools.permutations(COLOURS, 2))
    ]
    rows_of = {"instruction": chats, "causal": texts, "classification": classes, "regression": numbers}
    rows_of |= {"contrastive": classes, "token_classification": tagged, "distillation": chats, "label_words": classes}
    for name, rows in rows_of.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


def written(project: Path, *, method: str, objective: str, base: str = "base", **sections: Any) -> Path:
    """A recipe of one cell."""
    recipe = {
        "name": f"{method}-{objective}-{base}".replace("_", "-"),
        "base": str(project / base),
        "data": {"train": str(project / f"{objective}.jsonl"), "validation": 0.2},
        "objective": {"kind": objective} | KNOBS.get(objective, {}),
        "method": {"kind": method} | KNOBS.get(method, {}),
        "train": {
            "epochs": 2,
            "batch_rows": 4,
            "learning_rate": 0.01,
            "precision": "bf16",
            "gradient_checkpointing": True,
        },
    }
    path = project / f"{recipe['name']}.yaml"
    path.write_text(json.dumps(recipe | sections), "utf-8")
    return path


def validations(run: api.Run) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line for line in lines if "validation_loss" in line]


@pytest.mark.parametrize("objective", SPEAKING)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_with_every_objective(project: Path, method: str, objective: str) -> None:
    workspace = Workspace(project / "w")
    compared = {"metrics": ["perplexity"], "against": ["base"]}
    run = api.tune(written(project, method=method, objective=objective, evaluate=compared), workspace=workspace)
    losses = [line["validation_loss"] for line in validations(run)]
    assert losses[-1] < losses[0]
    tuned = api.load(run)
    answer = tuned.generate("1 red?", sampling=Sampling(max_tokens=4))
    assert answer == tuned.generate("1 red?", sampling=Sampling(max_tokens=4))
    evaluation = api.evaluate(run, workspace=workspace)
    values = evaluation.as_dict()["metrics"]["perplexity"]["systems"]
    assert values["tuned"]["value"] < values["base"]["value"]
    check_exports(run, project=project, method=method)


def check_exports(run: api.Run, *, project: Path, method: str) -> None:
    """What writes text goes along in every form that its method has."""
    workspace = Workspace(project / "w")
    for form, possible in (("peft", METHODS[method].peft_type is not None), ("merged", METHODS[method].merges)):
        out = project / f"{run.name}-{form}"
        said: list[str] = []
        if possible:
            path = api.export(run, form=form, out=out, workspace=workspace, on_message=said.append)
            assert (path / "tokenizer.json").is_file()
            assert (path / "head.json").is_file() == isinstance(run.recipe.objective, Headed)
            assert len(said) == (form == "merged" and method == "qlora")
        else:
            with pytest.raises(RecipeError) as error:
                api.export(run, form=form, out=out, workspace=workspace)
            assert error.value.hint
            assert not out.exists()


def outputs(predicted: Answer) -> np.ndarray:
    """What a head says, as numbers."""
    if isinstance(predicted, Tags):
        return np.array([[ord(tag[0]) for tag in tags] for tags in predicted.rows])
    if isinstance(predicted, Classes):
        return np.concatenate([predicted.probability_BK, predicted.decided_BK], axis=1)
    return np.stack([predicted.estimate_B, predicted.low_B, predicted.high_B])


def check_headed(run: api.Run, *, workspace: Workspace, objective: str, systems: list[str]) -> None:
    """What every run with a head promises: it learns, loads to the same bits, and its evaluation has every field."""
    losses = [line["validation_loss"] for line in validations(run)]
    assert min(losses[1:]) < losses[0]
    metric = "validation_mae" if objective == "regression" else "validation_accuracy"
    assert all(math.isfinite(line[metric]) for line in validations(run))
    texts = [f"{n} {c}?" for n, c in itertools.product(range(3), COLOURS)]
    predicted = api.load(run).predict(texts)
    assert np.array_equal(outputs(predicted), outputs(api.load(run).predict(texts)), equal_nan=True)
    assert len(predicted.texts()) == len(predicted.documents()) == len(texts)
    evaluation = api.evaluate(run, workspace=workspace)
    document = json.loads((run.path / "evaluation.json").read_text("utf-8"))
    assert document == evaluation.as_dict()
    assert document.keys() >= DOCUMENT
    assert document["systems"] == systems
    assert list(document["metrics"]) == list(OBJECTIVES[objective].metrics)  # type: ignore[attr-defined]
    for scores in document["metrics"].values():
        assert scores["systems"].keys() == set(systems)
        assert scores["differences"].keys() == {f"tuned - {other}" for other in systems if other != "tuned"}
        assert all(difference.keys() >= DIFFERENCE for difference in scores["differences"].values())
        assert all(s["low"] <= s["value"] <= s["high"] for s in scores["systems"].values())
    rows = [json.loads(line) for line in (run.path / "examples.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == document["rows"] > 2
    assert all(row["outputs"].keys() == set(systems) and row["reference"] for row in rows)
    if run.recipe.objective.num_outputs:
        with pytest.raises(RecipeError, match="writes no text") as error:
            api.load(run).generate("1 red?")
        assert error.value.hint
    else:
        assert isinstance(api.load(run).generate("1 red?", sampling=Sampling(max_tokens=4)), str)


@pytest.mark.parametrize("objective", HEADED)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_with_every_head(project: Path, method: str, objective: str) -> None:
    workspace = Workspace(project / "w")
    run = api.tune(written(project, method=method, objective=objective), workspace=workspace)
    check_headed(run, workspace=workspace, objective=objective, systems=SYSTEMS[objective])
    if not run.recipe.objective.num_outputs:
        check_exports(run, project=project, method=method)


@pytest.mark.parametrize(("architecture", "method"), ON_ENCODERS)
def test_encoders_classify(project: Path, architecture: str, method: str) -> None:
    workspace = Workspace(project / "w")
    path = written(project, method=method, objective="classification", base=architecture)
    run = api.tune(path, workspace=workspace)
    check_headed(run, workspace=workspace, objective="classification", systems=["tuned", "majority"])


class Stopping(Silent):
    """Sends a signal after a step."""

    def step(self, record: dict[str, Any]) -> None:
        if record["step"] == 5:
            signal.raise_signal(signal.SIGTERM)


def bytes_of_model(run: api.Run) -> dict[str, str]:
    files = [p for p in sorted((run.path / "model").iterdir()) if p.suffix == ".safetensors" or p.name == "head.json"]
    assert {p.name for p in files} > {"head.json"}
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize(
    ("method", "objective", "base"),
    [
        *((method, "classification", "base") for method in METHODS),
        ("lora", "regression", "base"),
        ("lora", "label_words", "base"),
        ("full", "label_words", "base"),
        ("full", "classification", "bert"),
        ("lora", "regression", "modernbert"),
    ],
)
def test_a_run_with_a_head_resumes_to_the_same_bits(project: Path, method: str, objective: str, base: str) -> None:
    path = written(project, method=method, objective=objective, base=base)
    whole = api.tune(path, workspace=Workspace(project / "whole"))
    workspace = Workspace(project / "stopped")
    with pytest.raises(Interrupted):
        api.tune(path, workspace=workspace, observer=Stopping())
    resumed = api.tune(path, workspace=workspace, resume=True)
    assert resumed.summary["steps"] == whole.summary["steps"] > 6
    assert bytes_of_model(resumed) == bytes_of_model(whole)
    assert [line["validation_loss"] for line in validations(resumed)] == [
        line["validation_loss"] for line in validations(whole)
    ]


@pytest.mark.parametrize(
    ("method", "objective", "words"),
    [
        ("prompt", "classification", "virtual tokens"),
        ("prefix", "classification", "virtual tokens"),
        ("p_tuning", "regression", "virtual tokens"),
        ("lora", "instruction", "'instruction' predicts the next token"),
        ("full", "causal", "'causal' predicts the next token"),
        ("lora", "label_words", "'label_words' predicts the next token"),
    ],
)
@pytest.mark.parametrize("architecture", ENCODERS)
def test_what_does_not_suit_an_encoder_is_refused_before_it_is_loaded(
    project: Path, tmp_path: Path, architecture: str, method: str, objective: str, words: str
) -> None:
    """There are no weights to load, and none are missed."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_bytes((project / architecture / "config.json").read_bytes())
    path = written(project, method=method, objective=objective, base=architecture)
    recipe = load_recipe(path).model_copy(update={"base": str(tmp_path / "base")})
    with pytest.raises(RecipeError, match=words) as error:
        api.tune(recipe, workspace=Workspace(tmp_path / "w"))
    assert error.value.hint
    assert not Workspace(tmp_path / "w").run_folders()
