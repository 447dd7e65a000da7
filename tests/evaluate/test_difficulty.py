"""Scores of rows are transformers' own log-likelihoods, with and without the question, and only what is out is told of."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tunesmith.checks import check_data
from tunesmith.data.curate.difficulty import Difficulty, Scorer
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.types import Example, Message, Origin
from tunesmith.errors import ModelError, RecipeError
from tunesmith.evaluate.difficulty import scorer
from tunesmith.models.load import Model


@pytest.fixture(scope="session")
def template(toy_tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(toy_tokenizer)


@pytest.fixture(scope="session")
def base(build_model: Callable[..., Model]) -> Model:
    return build_model("llama", max_position_embeddings=128)


def row(*turns: str, line: int = 1, weights: tuple[float, ...] = ()) -> Example:
    roles = ("user", "assistant")
    weights = weights or (1.0,) * len(turns)
    messages = tuple(Message(roles[n % 2], text, weights[n]) for n, text in enumerate(turns))
    return Example(Origin("rows.jsonl", line), "chat", messages)


def nats(model: object, ids: list[int], *, num_targets: int) -> float:
    """The mean over the last tokens, in one plain forward pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    logprob_T = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]
    return -float(logprob_T[-num_targets:].mean())


def test_scores_are_the_likelihoods_of_the_last_answer_behind_its_question_and_alone(base, template, eager_twin):
    twin = eager_twin(base)
    rows = [
        row("Which colour?", "red"),
        row("Hello", "How can I help?", "Which colour?", "green"),
        row("Hello", "Hm", "Which colour?", "blue", weights=(1, 1, 1, 0)),  # not trained, and asked all the same
    ]
    text = Example(Origin("rows.jsonl", 4), "text", text="Once there was a bear.")
    nothing = Example(Origin("rows.jsonl", 5), "text", text="")
    long = row("word " * 100, "red")
    found_B2 = scorer(base, template=template)([rows[0], text, *rows[1:], nothing, long])
    tokenizer = template.tokenizer
    for example, (behind, alone) in zip(rows, found_B2[[0, 2, 3]], strict=True):
        prompt = template.prompt(list(example.messages[:-1])).ids
        answer = tokenizer.encode_rendered([f"{example.messages[-1].content}<|end|>"])[0]
        assert behind == pytest.approx(nats(twin, [*prompt, *answer], num_targets=len(answer)))
        assert alone == pytest.approx(nats(twin, [*tokenizer.begin_ids, *answer], num_targets=len(answer)))
    (ids,) = tokenizer.encode_text(["Once there was a bear."])
    assert found_B2[1, 0] == pytest.approx(nats(twin, [*tokenizer.begin_ids, *ids], num_targets=len(ids)))
    assert np.isnan(found_B2[[1, 4, 4, 5, 5], [1, 0, 1, 0, 1]]).all()


def test_without_a_mark_at_the_beginning_the_first_token_is_left_out_on_both_sides(
    base, make_tokenizer_folder, eager_twin
):
    source = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    folder = make_tokenizer_folder(("<|end|>", "<|pad|>"), template=source, eos="<|end|>", pad="<|pad|>")
    template = ChatTemplate(Tokenizer.from_folder(folder))
    assert not template.tokenizer.begin_ids
    ((behind, alone),) = scorer(base, template=template)([row("Which colour?", "red")])
    prompt, answer = template.tokenizer.encode_rendered(["Which colour?<|end|>", "red<|end|>"])
    twin = eager_twin(base)
    assert behind == pytest.approx(nats(twin, [*prompt, *answer], num_targets=len(answer) - 1))
    assert alone == pytest.approx(nats(twin, answer, num_targets=len(answer) - 1))


def test_models_that_do_not_read_from_left_to_right_are_refused(build_model, template):
    for architecture in ("bert", "t5"):
        with pytest.raises(ModelError, match="from left to right"):
            scorer(build_model(architecture), template=template)


def check(scores: list[tuple[float, float]]) -> tuple[Difficulty, list[tuple[int, str]]]:
    """The check over rows with these scores: the lines it tells of."""
    waiting = iter(scores)
    looking = Difficulty(Scorer(lambda rows: np.array([next(waiting) for _ in rows])))
    for line in range(1, len(scores) + 1):
        assert list(looking.look(row("a", "b", line=line))) == []
    return looking, [(problem.line, problem.message) for problem in looking.finish()]


def test_answers_that_the_question_does_not_explain_and_unlikely_ones_are_told_of():
    usual = [(2.0 + 0.01 * (n % 20), 3.0) for n in range(300)]  # more than are scored at once
    usual[7] = (2.9, 2.5)
    usual[270] = (9.0, 12.0)
    usual[280] = (float("nan"), float("nan"))
    usual[290] = (2.1, float("nan"))  # plain text
    looking, found = check(usual)
    assert [line for line, _ in found] == [8, 271]
    assert found[0][1].startswith("unlikely: perplexity 18, and 8 ")
    assert check([(2.0, 3.0)] * 10 + [(2.0, 1.6)])[1] == [
        (11, "the question makes the answer no likelier (instruction-following difficulty 1.25)")
    ]
    assert check([(2.0, 1.9)] * 8 + [(2.0, 3.0)] * 7)[1] == [
        (1, "the question makes the answer no likelier in 8 of 15 rows, this the first of them")
    ]  # which says more of the base than of the rows
    summary, rows = looking.summary(), list(looking.rows())
    assert summary["rows"] == 299
    assert summary["difficulty"]["median"] == pytest.approx(np.nanmedian([a / b for a, b in usual]))
    assert rows[270] == {"file": "rows.jsonl", "line": 271, "perplexity": np.exp(9.0), "difficulty": 0.75}
    assert rows[280]["perplexity"] is rows[280]["difficulty"] is rows[290]["difficulty"] is None
    assert check([])[0].summary() == {"rows": 0}


def test_a_file_is_scored_with_its_base_when_that_is_asked_for(build_model, tmp_path: Path):
    build_model("llama", dtype=torch.float32, max_position_embeddings=128).save(tmp_path / "base")
    lines = [{"prompt": f"Colour of {n}?", "completion": "red"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    file, base, scores = (str(tmp_path / name) for name in ("rows.jsonl", "base", "scores.jsonl"))
    report = check_data(file, base=base, only=("difficulty",), scores=Path(scores))
    assert report.checks == ["difficulty"]
    assert report.as_dict()["scores"]["rows"] == 12
    assert "\nperplexity: " in report.as_text()
    written = [json.loads(line) for line in Path(scores).read_text().splitlines()]
    assert [line["line"] for line in written] == list(range(1, 13))
    assert all(line["perplexity"] > 1 and line["difficulty"] > 0 for line in written)
    report = check_data(file, base=base)
    assert report.as_dict()["scores"] is None
    assert report.not_run["difficulty"].endswith("ask for it with --only difficulty")
    with pytest.raises(RecipeError, match="no effect without the check 'difficulty'"):
        check_data(file, base=base, scores=Path(scores))
