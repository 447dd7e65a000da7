"""Runs with a head as Python functions: what is served is what was trained, and what a comparison leaves out is counted."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from tunesmith import api
from tunesmith.chat import answer
from tunesmith.checks import check_data
from tunesmith.data.answers import NO_ANSWER, Classes, Numbers
from tunesmith.data.pack import build_pack
from tunesmith.data.types import Example, Message, Origin, Sequence
from tunesmith.errors import DataError, RecipeError, TemplateError
from tunesmith.evaluate.heads import named_classes
from tunesmith.evaluate.run import System
from tunesmith.evaluate.settings import EvaluateSettings
from tunesmith.generate.sampling import Sampling
from tunesmith.models.load import Model
from tunesmith.objectives.label_words import LabelWords
from tunesmith.recipe import load_recipe, parse_recipe
from tunesmith.registry.workspace import Workspace

COLOURS = ("red", "green")
TEXTS = [{"text": f"{i} looks {COLOURS[i % 2]}", "label": COLOURS[i % 2]} for i in range(30)]
TUNED = {"max_steps": 8, "batch_rows": 8, "learning_rate": 0.02}
Tune = Callable[..., api.Run]


@pytest.fixture
def tune(build_model: Callable[..., Model], tmp_path: Path) -> Tune:
    """`tune(rows, base=..., config=..., **sections)`: a run on a toy base."""

    def tune(rows: list[dict[str, Any]], *, base: str = "llama", **sections: Any) -> api.Run:
        (tmp_path / "base").mkdir()
        build_model(base, dtype=torch.float32, **sections.pop("config", {})).save(tmp_path / "base")
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        recipe = {
            "base": str(tmp_path / "base"),
            "objective": "classification",
            "method": {"kind": "lora", "rank": 4},
            "train": TUNED,
        }
        data = {"train": str(tmp_path / "rows.jsonl"), "validation": 0.4} | sections.pop("data", {})
        (tmp_path / "toy.yaml").write_text(json.dumps(recipe | {"data": data} | sections), "utf-8")
        return api.tune(tmp_path / "toy.yaml", workspace=Workspace(tmp_path / "w"))

    return tune


def evaluate(run: api.Run, **given: Any) -> dict[str, Any]:
    return api.evaluate(run, workspace=Workspace(run.path.parents[1]), **given).as_dict()


def probabilities(predicted: Classes | Numbers) -> np.ndarray:
    assert isinstance(predicted, Classes)
    return predicted.probability_BK


def test_a_text_is_served_as_the_conversations_that_were_trained(tune: Tune) -> None:
    rows = [{"prompt": row["text"], "completion": row["label"]} for row in TEXTS]
    tuned = api.load(tune(rows, data={"system": "Which colour?"}))
    turns = (Message("system", "Which colour?"), Message("user", "5 looks red"), Message("assistant", "red"))
    trained = tuned.predict_examples([Example(Origin("a", 1), "prompt_completion", turns)])
    assert np.array_equal(probabilities(tuned.predict(["5 looks red"])), probabilities(trained))
    plain = tuned.predict_examples([Example(Origin("a", 1), "text", text="5 looks red")])
    assert not np.array_equal(probabilities(plain), probabilities(trained))


def test_a_text_is_served_as_the_texts_that_were_trained(tune: Tune) -> None:
    tuned = api.load(tune(TEXTS))
    trained = tuned.predict_examples([Example(Origin("a", 1), "labelled", text="5 looks red", label="red")])
    assert np.array_equal(probabilities(tuned.predict(["5 looks red"])), probabilities(trained))


@pytest.mark.parametrize("objective", ["classification", "label_words", "regression"])
def test_what_frozen_blocks_gave_serves_a_head_as_well(tune: Tune, tmp_path: Path, objective: str) -> None:
    rows = [{"text": row["text"], "label": i % 5} for i, row in enumerate(TEXTS)]
    how = {"objective": objective, "method": {"kind": "layers", "last": 1}}
    kept = tune(rows, **how, train=TUNED | {"max_steps": 6})
    recipe = load_recipe(tmp_path / "toy.yaml", overrides=["train.reuse_frozen=off"])
    anew = api.tune(recipe, workspace=Workspace(tmp_path / "w"))
    losses = []
    for run in (kept, anew):
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text("utf-8").splitlines()]
        losses.append([line.get("loss", line.get("validation_loss")) for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert kept.summary["steps"] * 8 > kept.summary["rows"]  # rows are seen again


@pytest.mark.parametrize("base", ["bert", "modernbert"])
def test_an_encoder_reads_prompts_between_its_marks(tune: Tune, base: str) -> None:
    run = tune([{"prompt": row["text"], "completion": row["label"]} for row in TEXTS], base=base)
    tuned = api.load(run)
    turns = (Message("user", "5 looks red"), Message("assistant", "red"))
    asked = Example(Origin("a", 1), "prompt_completion", turns)
    objective = run.recipe.objective
    ((read,),) = objective.read([asked], template=tuned.template)  # type: ignore[attr-defined]
    tokenizer = tuned.template.tokenizer
    assert read.tokens_T.tolist() == tokenizer.backend.encode("5 looks red", add_special_tokens=True).ids
    assert np.array_equal(probabilities(tuned.predict(["5 looks red"])), probabilities(tuned.predict_examples([asked])))
    assert evaluate(run)["systems"] == ["tuned", "majority"]


def test_rows_that_the_base_cannot_be_asked_are_left_out_for_all_and_counted(tune: Tune) -> None:
    """GPT-2 has no place behind its context; the head alone would have read these rows."""
    rows = [{"text": f"{i} " + "x" * (110 + i % 14), "label": "abc"[i % 3] * 3} for i in range(40)]
    run = tune(rows, base="gpt2")
    document = evaluate(run, settings=EvaluateSettings(against=("base",)))
    whole = evaluate(run, settings=EvaluateSettings(against=("majority",)))
    assert whole["left_out_rows"] == 0
    assert document["left_out_rows"] > 0
    assert document["rows"] + document["left_out_rows"] == whole["rows"]


@pytest.mark.parametrize("objective", ["classification", "contrastive", "label_words"])
def test_the_rows_of_a_head_are_prepared_once(tune: Tune, objective: str) -> None:
    """What the objective took from the rows is part of the run's recipe, and the same rows are found with it."""
    run = tune(TEXTS, objective={"kind": objective, "class_weights": "balanced"})
    workspace = Workspace(run.path.parents[1])
    before = sorted((workspace.cache / "prepared").iterdir())
    api.evaluate(run, workspace=workspace)
    assert len(before) == 1
    assert sorted((workspace.cache / "prepared").iterdir()) == before


def test_what_the_validation_rows_say_is_saved_and_used(tune: Tune) -> None:
    run = tune(TEXTS, objective={"kind": "classification", "right_share": 0.6})
    document = json.loads((run.path / "model" / "head.json").read_text("utf-8"))
    assert document["calibration"].keys() == {"temperature", "threshold"}
    assert document["objective"]["labels"] == ["green", "red"]
    tuned = api.load(run)
    assert tuned.head["calibration"] == document["calibration"]
    sure = max(row.max() for row in probabilities(tuned.predict([row["text"] for row in TEXTS])))
    document["calibration"]["threshold"] = float(sure) + 1e-6
    (run.path / "model" / "head.json").write_text(json.dumps(document), "utf-8")
    assert set(api.load(run).predict([row["text"] for row in TEXTS]).texts()) == {NO_ANSWER}
    metrics = evaluate(run, settings=EvaluateSettings(against=("majority",), metrics=("answered", "accuracy")))[
        "metrics"
    ]
    assert metrics["answered"]["systems"]["tuned"]["value"] == metrics["accuracy"]["systems"]["tuned"]["value"] == 0.0
    assert metrics["answered"]["systems"]["majority"]["value"] == 1.0


def test_without_validation_rows_nothing_is_calibrated(tune: Tune) -> None:
    rows = [{"text": row["text"], "label": i} for i, row in enumerate(TEXTS)]
    run = tune(rows, objective="regression", data={"validation": None})
    tuned = api.load(run)
    assert tuned.head["calibration"] == {}
    (document,) = tuned.predict(["5 looks red"]).documents()
    assert document.keys() == {"estimate"}
    with pytest.raises(DataError, match="holds no rows back"):
        evaluate(run)


def test_a_share_of_right_answers_needs_validation_rows() -> None:
    text = "data: {train: a.jsonl, validation: null}\nobjective: {kind: classification, right_share: 0.9}\n"
    with pytest.raises(RecipeError, match=r"objective\.right_share has no effect because data\.validation is null"):
        parse_recipe(text, file=Path("toy.yaml"))


def test_rows_of_another_file_may_have_classes_that_are_not_known(tune: Tune, tmp_path: Path) -> None:
    run = tune(TEXTS)
    path = tmp_path / "other.jsonl"
    rows = [{"text": f"{i}?", "label": label} for i, label in enumerate(["red", "blue", "green", "blue"])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    document = evaluate(run, data=path, settings=EvaluateSettings(against=("majority",)))
    assert document["rows"] == 4
    assert document["metrics"]["accuracy"]["systems"]["tuned"]["value"] <= 0.5
    path.write_text('{"text": "1?"}\n{"text": "2?"}\n', "utf-8")
    with pytest.raises(DataError, match="a text and no label"):
        evaluate(run, data=path, settings=EvaluateSettings(against=("majority",)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (EvaluateSettings(against=("median",)), "'median'"),
        (EvaluateSettings(metrics=("perplexity",), against=("majority",)), "'perplexity' does not fit"),
        (EvaluateSettings(metrics=("mae",), against=("majority",)), "'mae' does not fit"),
    ],
)
def test_what_does_not_fit_a_head_is_refused_by_name(tune: Tune, settings: EvaluateSettings, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as error:
        evaluate(tune(TEXTS), settings=settings)
    assert error.value.hint


def test_only_a_run_with_a_head_predicts(tune: Tune) -> None:
    rows = [{"prompt": row["text"], "completion": row["label"]} for row in TEXTS]
    run = tune(rows, objective="instruction")
    with pytest.raises(RecipeError, match="'instruction' has no head to read"):
        api.load(run).predict(["a"])
    with pytest.raises(RecipeError, match="'majority' writes no text"):
        evaluate(run, settings=EvaluateSettings(against=("majority",)))
    settings = EvaluateSettings(metrics=("accuracy",), against=("base",))
    with pytest.raises(RecipeError, match="'accuracy' reads a head") as error:
        evaluate(run, settings=settings)
    assert error.value.hint


# ------------------------------------------------------------------------------------------------- classes in words


WORDED = {"objective": "label_words"}
ASKED = [{"prompt": row["text"], "completion": row["label"]} for row in TEXTS]


def examples(rows: list[dict[str, str]]) -> list[Example]:
    return [Example(Origin("a", i), "labelled", text=row["text"], label=row["label"]) for i, row in enumerate(rows)]


def test_what_is_trained_in_words_is_what_a_base_is_scored_by(tune: Tune) -> None:
    """Uncalibrated, the tuned model says of rows what the evaluation would read off it as a base."""
    run = tune(TEXTS, **WORDED, data={"validation": None})
    tuned = api.load(run)
    assert tuned.head["calibration"] == {}
    rows, objective = examples(TEXTS[:7]), run.recipe.objective
    assert isinstance(objective, LabelWords)
    scored = named_classes(System("tuned", tuned.model), rows, objective=objective, template=tuned.template)
    assert probabilities(tuned.predict_examples(rows)) == pytest.approx(scored.probability_BK, abs=1e-6)
    assert not (run.path / "model" / "head.safetensors").exists()


@pytest.mark.parametrize("rows", [TEXTS, ASKED], ids=["texts", "conversations"])
def test_a_run_in_words_predicts_and_still_writes(tune: Tune, tmp_path: Path, rows: Any) -> None:
    conversations = rows is ASKED
    run = tune(rows, **WORDED, train=TUNED | {"max_steps": 30}, data={"system": "Colour?"} if conversations else {})
    tuned = api.load(run)
    said = tuned.predict([row["text"] for row in TEXTS])
    assert np.mean([text == row["label"] for text, row in zip(said.texts(), TEXTS, strict=True)]) > 0.8
    assert run.resolved["recipe"]["objective"]["labels"] == ["green", "red"]
    assert tuned.head["conversations"] is conversations
    question = [Message("system", "Colour?")] * conversations + [Message("user", "5 looks red")]
    asked = Example(Origin("a", 1), "chat", (*question, Message("assistant", "")))
    assert np.array_equal(probabilities(tuned.predict(["5 looks red"])), probabilities(tuned.predict_examples([asked])))
    prompt = torch.tensor(tuned.template.prompt(question).ids)
    with torch.no_grad():  # the likeliest token of all, not of the names alone: that is not what is trained
        hidden_TD = tuned.model.hidden(
            tuned.model.attention(build_pack([Sequence(prompt.numpy(), np.zeros(len(prompt)))]))
        )
        first = int((hidden_TD[-1] @ tuned.model.head.weight.T).argmax())
    written = tuned.generate("5 looks red", sampling=Sampling(max_tokens=1))
    assert written == tuned.template.tokenizer.decode([first])
    shown = answer(
        run.name, prompt="5 looks red", system=None, sampling={}, base=False, workspace=Workspace(tmp_path / "w")
    )
    assert shown["answer"] == tuned.predict(["5 looks red"]).texts()[0]
    assert shown["prediction"]["probabilities"].keys() == set(COLOURS)
    document = evaluate(run)
    assert document["systems"] == ["base", "few_shot", "tuned", "majority"]
    accuracy = document["metrics"]["accuracy"]["systems"]
    assert accuracy["tuned"]["value"] > accuracy["majority"]["value"]
    chosen = evaluate(run, settings=EvaluateSettings(against=("few_shot",), few_shot="best"))
    assert chosen["few_shot_choice"]["examples"] == chosen["few_shot_examples"]
    assert chosen["few_shot_choice"]["from"] == "train"


def test_the_words_of_a_run_are_calibrated(tune: Tune) -> None:
    run = tune(TEXTS, objective={"kind": "label_words", "right_share": 0.6})
    tuned = api.load(run)
    assert tuned.head["calibration"].keys() == {"temperature", "threshold"}
    validation = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert any("validation_accuracy" in line for line in validation)
    rows = [row["text"] for row in TEXTS]
    temperature, z_BK = tuned.head["calibration"]["temperature"], np.log(probabilities(tuned.predict(rows)))
    assert temperature != 1
    flat = replace(tuned, head=tuned.head | {"calibration": {"temperature": 2 * temperature, "threshold": 0.0}})
    halved = np.exp(z_BK / 2) / np.exp(z_BK / 2).sum(1, keepdims=True)
    assert probabilities(flat.predict(rows)) == pytest.approx(halved, abs=1e-9)
    none = replace(tuned, head=tuned.head | {"calibration": {"temperature": 1.0, "threshold": 1.1}})
    assert set(none.predict(rows).texts()) == {NO_ANSWER}


@pytest.mark.parametrize("max_tokens", [1, 4096])
def test_a_row_whose_names_do_not_fit_a_micro_batch_trains_alike(tune: Tune, tmp_path: Path, max_tokens: int) -> None:
    run = tune(TEXTS, **WORDED, train=TUNED | {"micro_batch_tokens": max_tokens, "max_steps": 3})
    recipe = load_recipe(tmp_path / "toy.yaml", overrides=["train.micro_batch_tokens=100"])
    other = api.tune(recipe, workspace=Workspace(tmp_path / "w"))
    assert run.summary["train_loss"] == pytest.approx(other.summary["train_loss"], rel=1e-5)
    assert run.summary["validation_loss"] == pytest.approx(other.summary["validation_loss"], rel=1e-5)


def test_what_is_longer_than_the_context_is_cut_before_the_names(tune: Tune) -> None:
    tuned = api.load(tune(TEXTS, **WORDED, base="gpt2"))
    (chance,) = probabilities(tuned.predict(["5 looks red " * 30]))
    assert chance.sum() == pytest.approx(1)


def test_the_check_of_a_file_counts_names(tune: Tune, tmp_path: Path) -> None:
    template = api.load(tune(TEXTS, **WORDED)).template
    report = check_data(str(tmp_path / "rows.jsonl"), recipe=tmp_path / "toy.yaml")
    prompts = [len(template.prompt([Message("user", row["text"])]).ids) for row in TEXTS]
    name = len(template.tokenizer.encode_text(["green"])[0]) + 1
    assert report.tokens["longest"] == max(prompts) + name
    assert (report.tokens["total"], report.tokens["targets"]) == (sum(prompts) + 30 * name, 30 * name)
    assert report.num_errors == 0
    tight = json.loads((tmp_path / "toy.yaml").read_text("utf-8"))
    tight["data"]["max_tokens"] = max(prompts) + name - 1
    (tmp_path / "toy.yaml").write_text(json.dumps(tight), "utf-8")
    assert check_data(str(tmp_path / "rows.jsonl"), recipe=tmp_path / "toy.yaml").num_errors > 0
    with pytest.raises(DataError, match="tokens and"):
        api.tune(tmp_path / "toy.yaml", workspace=Workspace(tmp_path / "w"))


@pytest.mark.parametrize("form", ["merged", "peft"])
def test_words_go_along_as_a_plain_model_with_their_calibration(tune: Tune, tmp_path: Path, form: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = tune(TEXTS, **WORDED)
    tuned = api.load(run)
    out = api.export(run, form=form, out=tmp_path / "out", workspace=Workspace(tmp_path / "w"))
    document = json.loads((out / "head.json").read_text("utf-8"))
    model: Any = AutoModelForCausalLM.from_pretrained(out if form == "merged" else tmp_path / "base")
    model = (model if form == "merged" else PeftModel.from_pretrained(model, out)).eval()
    prompt, z_K = tuned.template.prompt([Message("user", "5 looks red")]).ids, []
    for label in document["objective"]["labels"]:
        name = [*tuned.template.tokenizer.encode_text([label])[0], tuned.template.tokenizer.eos_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + name])).logits[0].log_softmax(-1)
        z_K.append(sum(float(logits[len(prompt) + i - 1, t]) for i, t in enumerate(name)))
    chance = torch.tensor(z_K).div(document["calibration"]["temperature"]).softmax(-1).numpy()
    assert chance == pytest.approx(probabilities(tuned.predict(["5 looks red"]))[0], abs=1e-4)


def test_words_are_one_of_several_adapters_but_are_not_combined(tune: Tune) -> None:
    run = tune(TEXTS, **WORDED)
    workspace = Workspace(run.path.parents[1])
    second = api.tune(run.path / "recipe.yaml", workspace=workspace)
    several = api.load_several({"a": run, "b": second}, workspace=workspace)
    expected = probabilities(api.load(run).predict(["5 looks red"]))
    with several.using("a") as tuned:
        assert np.array_equal(probabilities(tuned.predict(["5 looks red"])), expected)
    with pytest.raises(RecipeError, match="label_words, and its calibration") as error:
        api.combine([run, second], how="linear", workspace=workspace)
    assert "load_several" in error.value.hint


# ---------------------------------------------------------------------------------------------------------- taking away


WORDS = [{"words": [str(i), COLOURS[i % 2]], "tags": ["O", "B-COLOUR"]} for i in range(30)]


HEADS: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "classification": (TEXTS, "classification"),
    "contrastive": (TEXTS, {"kind": "contrastive", "pairs": 2}),
    "regression": ([row | {"label": i / 4} for i, row in enumerate(TEXTS)], "regression"),
    "token_classification": (WORDS, "token_classification"),
}
TAGS = [("token_classification", base, method) for base, method in (("bert", "ia3"), ("gpt2", "lora"))]


@pytest.mark.parametrize(
    ("head", "base", "method"), [*((h, "llama", m) for h in HEADS for m in ("lora", "qlora", "full")), *TAGS]
)
def test_a_head_goes_along_as_transformers_own_class(
    tune: Tune, tmp_path: Path, head: str, base: str, method: str
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

    rows, objective = HEADS[head]
    run = tune(rows, base=base, objective=objective, method={"kind": method})
    tuned = api.load(run)
    out = api.export(run, form="merged", out=tmp_path / "out", workspace=Workspace(tmp_path / "w"))
    document = json.loads((out / "head.json").read_text("utf-8"))
    tokens = objective == "token_classification"
    model: Any = (AutoModelForTokenClassification if tokens else AutoModelForSequenceClassification).from_pretrained(
        out
    )
    text = "5 red" if tokens else "5 looks red"
    tokenizer = tuned.template.tokenizer
    ids = [*tokenizer.begin_ids, *tokenizer.encode_text([text])[0], *tokenizer.end_ids]
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits[0].double().numpy()
    said: Any = tuned.predict([text])
    if objective == "regression":
        knobs = document["objective"]
        assert logits[0] * knobs["spread"] + knobs["centre"] == pytest.approx(said.estimate_B[0], rel=1e-4)
    elif tokens:
        names = [model.config.id2label[int(k)] for k in logits.argmax(-1)]
        first = len(tokenizer.begin_ids)
        second = first + text.index("red") + (0 if tuned.model.is_encoder else 2)  # a word's first token, or its last
        assert (names[first], names[second]) == tuple(said.rows[0])
    else:
        chance = torch.from_numpy(logits / document["calibration"]["temperature"]).softmax(-1).numpy()
        assert dict(enumerate(said.labels)) == model.config.id2label
        assert chance == pytest.approx(said.probability_BK[0], abs=1e-4)
    assert AutoTokenizer.from_pretrained(out)


def test_what_transformers_would_read_otherwise_is_not_written(tune: Tune, tmp_path: Path) -> None:
    run = tune(TEXTS, objective={"kind": "classification", "pooling": "mean"})
    for form in ("merged", "peft"):
        with pytest.raises(RecipeError, match="reads a sequence at its last token") as error:
            api.export(run, form=form, out=tmp_path / "out", workspace=Workspace(tmp_path / "w"))
        assert error.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("base", "rows", "words"),
    [
        ("bert", TEXTS, "through another layer"),
        ("modernbert", WORDS, "no class that reads"),  # it has one, with a layer before the head
        ("gemma3_text", WORDS, "no class that reads"),
    ],
)
def test_a_head_that_transformers_has_no_class_for_is_not_exported(
    tune: Tune, tmp_path: Path, base: str, rows: Any, words: str
) -> None:
    run = tune(rows, base=base, objective="classification" if rows is TEXTS else "token_classification")
    for form in ("merged", "peft"):
        with pytest.raises(RecipeError, match=words) as error:
            api.export(run, form=form, out=tmp_path / "out", workspace=Workspace(tmp_path / "w"))
        assert error.value.hint
    assert not (tmp_path / "out").exists()


SEQUENCES = [("classification", "llama", method) for method in ("lora", "ia3", "vera", "prompt", "p_tuning", "prefix")]
SEQUENCES += [("regression", "gpt_neox", "ia3"), ("contrastive", "gpt2", "lora"), ("classification", "gpt2", "prefix")]
TAGGED = [("llama", "lora"), ("gpt2", "ia3"), ("qwen3", "prefix"), ("bert", "ia3"), ("roberta", "lora")]
TAGGED += [("xlm-roberta", "vera"), ("distilbert", "ia3"), ("electra", "lora")]
METHODS = {"prompt": {"num_tokens": 3}, "p_tuning": {"num_tokens": 3}, "prefix": {"num_tokens": 3}}
METHODS |= {"lora": {"rank": 4}, "vera": {"rank": 8}}


@pytest.mark.parametrize(
    ("head", "base", "method"), [*SEQUENCES, *(("token_classification", base, method) for base, method in TAGGED)]
)
def test_peft_reads_an_adapter_with_its_head_off_transformers_own_class(
    tune: Tune, tmp_path: Path, head: str, base: str, method: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    rows, objective = HEADS[head]
    run = tune(rows, base=base, objective=objective, method={"kind": method} | METHODS.get(method, {}))
    out = api.export(run, form="peft", out=tmp_path / "out", workspace=Workspace(tmp_path / "w"))
    assert json.loads((out / "head.json").read_text("utf-8")) == json.loads(
        (run.path / "model" / "head.json").read_text("utf-8")
    )
    tokens, tuned = rows is WORDS, api.load(run)
    kind: Any = AutoModelForTokenClassification if tokens else AutoModelForSequenceClassification
    loaded = kind.from_pretrained(tmp_path / "base", num_labels=run.recipe.objective.num_outputs)
    theirs: Any = PeftModel.from_pretrained(loaded, out).eval()
    for ids in ([1, 40, 41, 42, 2], [50, 51, 52, 50, 51, 52, 53], [60, 61]):
        weight_T = np.ones(len(ids), np.float32) if tokens else np.eye(1, len(ids), len(ids) - 1, np.float32)[0]
        pack = build_pack([Sequence(np.array(ids, np.int32), weight_T, values=np.zeros(0, np.float32))])
        mask = torch.ones(1, len(ids), dtype=torch.long)
        with torch.no_grad():
            expected = tuned.model.outputs_at(pack)
            found = theirs(input_ids=torch.tensor([ids]), attention_mask=mask).logits
        assert float(expected.abs().max()) > 0.01
        torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_with_a_head_says_so_as_peft_does(tune: Tune, tmp_path: Path) -> None:
    run = tune(WORDS, base="bert", objective="token_classification", method={"kind": "ia3", "quantise": "int8"})
    out = api.export(run, form="peft", out=tmp_path / "out", workspace=Workspace(tmp_path / "w"))
    config = json.loads((out / "adapter_config.json").read_text("utf-8"))
    assert (config["task_type"], config["modules_to_save"]) == ("TOKEN_CLS", ["classifier"])
    names = set(load_file(str(out / "adapter_model.safetensors")))
    head = {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    assert names > head
    assert all(name.startswith("base_model.model.bert.encoder.layer.") for name in names - head)


@pytest.mark.parametrize(
    ("rows", "sections", "words"),
    [
        (TEXTS, {"config": {"pad_token_id": 2}}, "pads with what ends a text"),
        (WORDS, {"method": {"kind": "prompt", "num_tokens": 3}}, "virtual tokens of method 'prompt'"),
        (WORDS, {"method": {"kind": "p_tuning", "num_tokens": 3}}, "virtual tokens of method 'p_tuning'"),
    ],
)
def test_what_peft_would_read_otherwise_is_not_written(
    tune: Tune, tmp_path: Path, rows: Any, sections: Any, words: str
) -> None:
    run = tune(rows, objective="classification" if rows is TEXTS else "token_classification", **sections)
    with pytest.raises(RecipeError, match=words) as error:
        api.export(run, form="peft", out=tmp_path / "out", workspace=Workspace(tmp_path / "w"))
    assert error.value.hint
    assert not (tmp_path / "out").exists()


def test_a_method_that_does_not_suit_the_base_leaves_no_run_behind(tune: Tune, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        tune(TEXTS, base="bert", method={"kind": "adapters", "parallel": True})
    assert error.value.hint
    assert not Workspace(tmp_path / "w").run_folders()


def other_marks(folder: Path) -> None:
    """Let the tokenizer in a folder put other tokens around a text; conversations are rendered as before."""
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    marks = [(name, backend.token_to_id(name)) for name in ("<|user|>", "<|end|>")]
    backend.post_processor = processors.TemplateProcessing(single="<|user|> $A <|end|>", special_tokens=marks)
    backend.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("objective", ["classification", "causal"])
def test_a_tokenizer_that_reads_texts_otherwise_is_found_at_load(tune: Tune, objective: str) -> None:
    rows = TEXTS if objective == "classification" else [{"text": row["text"]} for row in TEXTS]
    run = tune(rows, objective=objective, method="full")
    assert api.load(run).run.name == run.name
    other_marks(run.path / "model")
    with pytest.raises(TemplateError, match="token contract broken: text 1") as error:
        api.load(run)
    assert error.value.hint
    contract = json.loads((run.path / "token_contract.json").read_text("utf-8"))
    del contract["texts"]  # as runs of earlier versions have it
    (run.path / "token_contract.json").write_text(json.dumps(contract), "utf-8")
    api.load(run)


@pytest.mark.parametrize(
    ("form", "objective"), [("merged", "classification"), ("merged", "causal"), ("peft", "causal")]
)
def test_an_export_reads_the_texts_again_with_the_tokenizer_that_it_wrote(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, objective: str
) -> None:
    rows = TEXTS if objective == "classification" else [{"text": row["text"]} for row in TEXTS]
    run = tune(rows, objective=objective)
    saved = Model.save_tokenizer

    def changed(self: Model, folder: Path) -> None:
        saved(self, folder)
        other_marks(folder)

    workspace = Workspace(tmp_path / "w")
    api.export(run, form=form, out=tmp_path / "right", workspace=workspace)
    monkeypatch.setattr(Model, "save_tokenizer", changed)
    with pytest.raises(TemplateError, match="token contract broken: text 1"):
        api.export(run, form=form, out=tmp_path / "wrong", workspace=workspace)
    assert not (tmp_path / "wrong").exists()
