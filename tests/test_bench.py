"""`tunesmith bench`: files and tasks of the harness, for a base alone and for a run beside its base."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith import api
from tunesmith.bench import bench
from tunesmith.errors import DataError, NotFoundError, RecipeError
from tunesmith.evaluate.harness import harness_model, run_harness, text_logprobs
from tunesmith.models.load import Model, load_model
from tunesmith.registry.workspace import Workspace
from tunesmith.texts import bench_text

TASK = """\
task: toy_choices
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true},
  {metric: acc_norm, aggregation: mean, higher_is_better: true}]
---
"""
ROLLING = """\
task: toy_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
UNTIL = """\
task: toy_until
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def project(build_model: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    build_model("llama", dtype=torch.float32, max_position_embeddings=128).save(folder / "base")
    random = np.random.default_rng(0)
    words = ["red", "green", "blue", "one", "two", "three", "who", "what", "where", "cat", "dog"]

    def text(count: int) -> str:
        return " ".join(random.choice(words, count))

    rows = {
        "choices": [{"question": f"{text(4)}?", "choices": [text(2), text(3)], "answer": i % 2} for i in range(12)],
        "pairs": [{"sentence_good": text(4), "sentence_bad": text(4), "UID": "ab"[i % 2]} for i in range(12)],
        "last": [{"context": text(5), "continuation": text(1)} for _ in range(12)],
        "texts": [{"text": text(90)}, {"text": text(300)}],
        "rows": [{"prompt": f"{text(4)}?", "completion": text(1)} for _ in range(40)],
    }
    for name, values in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    for name, task in (("choices", TASK), ("rolling", ROLLING), ("until", UNTIL)):
        (folder / f"{name}.yaml").write_text(task.replace("FOLDER", str(folder)).replace("---\n", ""))
    return folder


@pytest.fixture(scope="module")
def run(project: Path) -> api.Run:
    (project / "toy.yaml").write_text(
        "{base: base, data: {train: rows.jsonl}, method: {kind: lora, rank: 4}, train: {max_steps: 8, learning_rate: 2e-2}}"
    )
    return api.tune(project / "toy.yaml", workspace=Workspace(project / "w"))


def measure(project: Path, name: str, *files: str, **given: Any) -> dict[str, Any]:
    paths = [project / f"{file}.jsonl" for file in files]
    return bench(name, files=paths, workspace=Workspace(project / "w"), **({"tasks": []} | given))


def test_a_run_stands_beside_its_base_with_a_paired_difference(project: Path, run: api.Run) -> None:
    document = measure(project, run.name, "choices", "pairs", "last")
    assert document["systems"] == ["tuned", "base"]
    choices, pairs, last = document["benchmarks"]
    assert [entry["kind"] for entry in (choices, pairs, last)] == ["multiple_choice", "minimal_pairs", "last_words"]
    assert list(choices["metrics"]) == ["accuracy", "accuracy_by_length"]
    assert list(last["metrics"]) == ["accuracy", "perplexity"]
    for entry in document["benchmarks"]:
        for metric in entry["metrics"].values():
            values = {system: metric["systems"][system]["value"] for system in ("tuned", "base")}
            found = metric["differences"]["tuned - base"]
            assert found["value"] == pytest.approx(values["tuned"] - values["base"])
    assert last["metrics"]["perplexity"]["differences"]["tuned - base"]["value"] != 0
    assert set(pairs["groups"]) == {"a", "b"}
    both = [np.mean([group[system] for group in pairs["groups"].values()]) for system in document["systems"]]
    assert both[1] == pytest.approx(pairs["metrics"]["accuracy"]["systems"]["base"]["value"])
    shown = bench_text(document)
    assert "pairs.jsonl: minimal pairs, 12 items" in shown
    assert "mean of groups" in shown
    alone = measure(project, str(project / "base"), "choices", "pairs", "last")
    assert alone["systems"] == ["base"]
    for entry, other in zip(alone["benchmarks"], document["benchmarks"], strict=True):
        for name, metric in entry["metrics"].items():
            assert metric["systems"]["base"] == pytest.approx(other["metrics"][name]["systems"]["base"])


def test_the_harness_gets_the_numbers_that_its_own_model_gives(project: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = ["toy_choices", "toy_until"]
    theirs = simple_evaluate(
        model=HFLM(pretrained=str(project / "base"), device="cpu", batch_size=1, dtype="float32", add_bos_token=True),
        tasks=names,
        task_manager=TaskManager(include_path=str(project)),
        bootstrap_iters=0,
    )
    assert theirs is not None
    ours = run_harness(load_model(str(project / "base")), tasks=names, include=project)
    for name in names:
        for metric, value in ours[name]["metrics"].items():
            assert value == theirs["results"][name][f"{metric},none"], (name, metric)
    lm = harness_model(load_model(str(project / "base")))
    for sample in theirs["samples"]["toy_choices"]:
        context, choices = f"Question: {sample['doc']['question']}\nAnswer:", sample["doc"]["choices"]
        asked = [type("Request", (), {"args": (context, f" {choice}")}) for choice in choices]
        found = lm.loglikelihood(asked)
        expected = [response[0] for response in sample["resps"]]
        assert [logprob for logprob, _ in found] == pytest.approx([float(logprob) for logprob, _ in expected], abs=1e-3)
        assert [str(greedy) for _, greedy in found] == [str(greedy) for _, greedy in expected]


def test_whole_texts_are_read_as_the_harness_reads_them(project: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    texts = [json.loads(line)["text"] for line in (project / "texts.jsonl").read_text().splitlines()]
    requests = [type("Request", (), {"args": (text,)}) for text in texts]
    model = load_model(str(project / "base"))
    longest = model.room_tokens - 1  # of what is read: the last token is only predicted
    theirs = HFLM(pretrained=str(project / "base"), device="cpu", batch_size=1, dtype="float32", max_length=longest)
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert text_logprobs(model, texts) == pytest.approx(expected, abs=1e-2)


def test_tasks_of_the_harness_stand_beside_files(project: Path, run: api.Run) -> None:
    document = measure(project, run.name, "pairs", tasks=["toy_choices", "toy_rolling"], include=project, rows=6)
    pairs, choices, rolling = document["benchmarks"]
    assert (pairs["rows"], choices["rows"], choices["kind"]) == (6, 6, "harness")
    assert set(choices["metrics"]) == {"acc", "acc_norm"}
    assert choices["metrics"]["acc"]["differences"]["tuned - base"]["test"]
    values = rolling["metrics"]["bits_per_byte"]["systems"]
    assert values["tuned"]["value"] != values["base"]["value"]
    assert "toy_rolling: harness, 2 items" in bench_text(document)


def test_what_cannot_be_measured_is_refused_by_name(project: Path) -> None:
    base = str(project / "base")
    with pytest.raises(RecipeError, match="nothing to measure"):
        measure(project, base)
    with pytest.raises(RecipeError, match="--include has no effect"):
        measure(project, base, "pairs", include=project)
    with pytest.raises(NotFoundError, match="no task 'toy_nothing'"):
        measure(project, base, tasks=["toy_nothing"], include=project)
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        measure(project, base, "rows")
    with pytest.raises(NotFoundError):
        measure(project, "no-such-run", "pairs")
