"""Base and tuned on the same rows: the numbers are those of a naive computation, and the base is exactly the base."""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.data.pack import Pack
from tunesmith.data.retrieval import prompt_messages
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.types import CodeTests, Example, Message, Origin
from tunesmith.errors import DataError, ModelError, RecipeError
from tunesmith.evaluate.run import Evaluation, System, choose_shots, default_metrics, evaluate_systems
from tunesmith.evaluate.sandbox import check_enforced
from tunesmith.evaluate.settings import EvaluateSettings
from tunesmith.methods.lora import Lora, LoraLinear
from tunesmith.models.load import Model
from tunesmith.objectives.causal import Causal
from tunesmith.objectives.instruction import Instruction

CONTEXT_TOKENS = 256
FRAME_TOKENS = 5
Build = Callable[..., Model]
DIFFERENCE = {"value", "low", "high", "p", "p_holm", "test", "better_rows", "worse_rows", "detectable"}


def example(*turns: str, line: int = 1, system: str | None = None) -> Example:
    """Turns of user and assistant in turn."""
    messages = [Message("system", system)] if system else []
    messages += [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(turns)]
    return Example(Origin("rows.jsonl", line), "chat", tuple(messages))


ROWS = [example(f"What colour has number {i}?", ["red", "green"][i % 2], line=i + 1) for i in range(6)]
SHOTS = tuple(example(f"And the colour of {i}?", "blue", line=i + 1) for i in range(3))
TEXTS = [Example(Origin("texts.txt", i + 1), "text", text=f"Once there were {i} bears. " * (i + 1)) for i in range(4)]


@pytest.fixture(scope="session")
def template(toy_tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(toy_tokenizer)


def build(build_model: Build) -> Model:
    return build_model("llama", dtype=torch.float32, max_position_embeddings=CONTEXT_TOKENS)


@pytest.fixture(scope="session")
def base(build_model: Build) -> Model:
    return build(build_model)


@pytest.fixture(scope="session")
def tuned(build_model: Build) -> Model:
    """The base with an adapter that moves every layer."""
    model = build(build_model)
    LORA.apply(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.causal.modules():
            if isinstance(layer, LoraLinear):
                layer.lora_B += 0.1 * torch.randn(layer.lora_B.shape, generator=generator)
    return model


LORA = Lora(rank=4)


def evaluate(systems: list[System], template: ChatTemplate, examples: list[Example] = ROWS, **given: Any) -> Evaluation:
    objective = Causal() if examples[0].text is not None else Instruction()
    settings = EvaluateSettings(**{"max_tokens": 6} | given)
    return evaluate_systems(
        systems, examples=examples, template=template, objective=objective, settings=settings, run="toy-1", data="test"
    )


def tuned_and_base(tuned: Model) -> list[System]:
    return [System("tuned", tuned), System("base", tuned, lambda: LORA.disabled(tuned))]


# ----------------------------------------------------------------------------------------------------- document


def test_the_document_has_the_promised_fields(tuned, template, tmp_path):
    systems = [*tuned_and_base(tuned), System("few_shot", tuned, lambda: LORA.disabled(tuned), SHOTS)]
    evaluation = evaluate(systems, template, metrics=("exact_match", "token_f1", "perplexity"))
    document = evaluation.as_dict()
    assert document["systems"] == ["base", "few_shot", "tuned"]
    assert (document["run"], document["rows"], document["data"], document["left_out_rows"]) == ("toy-1", 6, "test", 0)
    assert list(document["metrics"]) == ["exact_match", "token_f1", "perplexity"]
    for name, entry in document["metrics"].items():
        assert entry["higher_is_better"] == (name != "perplexity")
        assert set(entry["systems"]) == {"base", "few_shot", "tuned"}
        assert set(entry["differences"]) == {"tuned - base", "tuned - few_shot"}
        for numbers in entry["systems"].values():
            assert numbers["low"] <= numbers["value"] <= numbers["high"]
        for numbers in entry["differences"].values():
            assert set(numbers) >= DIFFERENCE
            assert 0 <= numbers["p"] <= 1
            assert numbers["better_rows"] + numbers["worse_rows"] <= 6
        assert entry["differences"]["tuned - base"]["value"] == pytest.approx(
            entry["systems"]["tuned"]["value"] - entry["systems"]["base"]["value"]
        )
    assert document["verdict"] in ("better", "worse", "undecided")
    assert evaluation.sentence
    assert document["few_shot_examples"] == 3
    evaluation.write(tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == document
    lines = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    assert [line["origin"] for line in lines] == [f"rows.jsonl:{i + 1}" for i in range(6)]
    for line, row in zip(lines, ROWS, strict=True):
        assert line["reference"] == row.messages[-1].content
        assert line["prompt"] == [{"role": "user", "content": row.messages[0].content}]
        assert set(line["outputs"]) == set(line["scores"]) == {"base", "few_shot", "tuned"}
        assert set(line["scores"]["tuned"]) == {"exact_match", "token_f1", "perplexity"}


def test_without_a_second_system_nothing_is_claimed(tuned, template):
    evaluation = evaluate([System("tuned", tuned)], template, metrics=("perplexity",), against=())
    assert evaluation.verdict == "undecided"
    assert evaluation.document["metrics"]["perplexity"]["differences"] == {}


# ------------------------------------------------------------------------------------------------------ numbers


def naive_nll(twin: Any, template: ChatTemplate, row: Example, shots: tuple[Example, ...] = ()) -> tuple[float, int]:
    """Sum over the answer's tokens of -log p, one row alone, by transformers' own attention."""
    prompt = template.prompt(prompt_messages(row, shots=shots, plain=False)).ids
    ids = prompt + template.tokenizer.encode_text([row.messages[-1].content])[0] + [2]
    with torch.no_grad():
        logprobs = torch.log_softmax(twin(torch.tensor([ids])).logits[0].double(), dim=-1)
    targets = ids[len(prompt) :]
    found = [float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(targets)]
    return -sum(found), len(targets)


@pytest.mark.parametrize("shots", [(), SHOTS], ids=["alone", "few_shot"])
def test_perplexity_is_that_of_each_row_read_alone(base, template, eager_twin, shots):
    evaluation = evaluate([System("tuned", base, shots=shots)], template, metrics=("perplexity",))
    twin = eager_twin(base)
    sums = [naive_nll(twin, template, row, shots) for row in ROWS]
    expected = math.exp(sum(nll for nll, _ in sums) / sum(count for _, count in sums))
    assert evaluation.value("perplexity") == pytest.approx(expected, rel=1e-5)


def test_only_the_last_answer_is_scored(base, template, eager_twin):
    rows = [example("first?", "one", "second?", "two", system="Be brief.", line=i + 1) for i in range(3)]
    evaluation = evaluate([System("tuned", base)], template, rows, metrics=("perplexity",))
    nll, count = naive_nll(eager_twin(base), template, rows[0])
    assert count == len("two") + 1
    assert evaluation.value("perplexity") == pytest.approx(math.exp(nll / count), rel=1e-5)


def test_answers_are_greedy(base, template, eager_twin):
    evaluation = evaluate([System("tuned", base)], template, metrics=("exact_match",), max_tokens=5)
    twin = eager_twin(base)
    for row, shown in zip(ROWS, evaluation.rows, strict=True):
        prompt = template.prompt(list(row.messages[:1])).ids
        with torch.no_grad():
            ids = twin.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False, eos_token_id=2)[0].tolist()
        answer = [token for token in ids[len(prompt) :] if token != 2]
        assert shown["outputs"]["tuned"] == template.tokenizer.decode(answer)


def test_texts_are_scored_by_their_likelihood(base, template, eager_twin):
    evaluation = evaluate([System("tuned", base)], template, TEXTS)
    assert list(evaluation.document["metrics"]) == ["bits_per_byte", "perplexity"]
    twin, nll, num_bytes = eager_twin(base), 0.0, 0
    for text in TEXTS:
        ids = [1, *template.tokenizer.encode_text([text.text])[0], 2]
        with torch.no_grad():
            logprobs = torch.log_softmax(twin(torch.tensor([ids])).logits[0].double(), dim=-1)
        nll -= sum(float(logprobs[i, token]) for i, token in enumerate(ids[1:]))
        num_bytes += len(text.text.encode())
    assert evaluation.value("bits_per_byte") == pytest.approx(nll / math.log(2) / num_bytes, rel=1e-5)
    assert evaluation.rows[0]["outputs"] == {}


def test_the_adapter_switched_off_is_the_untouched_base_to_the_bit(tuned, base, template):
    names = ("exact_match", "chrf", "perplexity")
    off = evaluate(tuned_and_base(tuned), template, metrics=names)
    apart = evaluate([System("tuned", tuned), System("base", base)], template, metrics=names)
    assert off.document["metrics"] == apart.document["metrics"]
    assert off.rows == apart.rows
    assert off.value("perplexity", system="tuned") != off.value("perplexity", system="base")
    assert any(row["outputs"]["tuned"] != row["outputs"]["base"] for row in off.rows)


def test_an_adapter_that_moves_nothing_scores_as_the_base(build_model, template):
    model = build(build_model)
    LORA.apply(model, seed=0)  # B is zero
    evaluation = evaluate([System("tuned", model), System("base", model, lambda: LORA.disabled(model))], template)
    for entry in evaluation.document["metrics"].values():
        assert entry["systems"]["tuned"] == entry["systems"]["base"]
        assert entry["differences"]["tuned - base"]["value"] == 0
    assert evaluation.verdict == "undecided"


def test_the_better_model_is_told_from_the_worse(base, build_model, template):
    uniform = build(build_model)
    with torch.no_grad():
        uniform.head.weight.zero_()
    rows = [example(f"number {i}?", f"answer {i}", line=i + 1) for i in range(20)]
    for first, second, verdict in ((uniform, base, "better"), (base, uniform, "worse")):
        systems = [System("tuned", first), System("base", second)]
        evaluation = evaluate(systems, template, rows, metrics=("perplexity",))
        assert evaluation.verdict == verdict
        difference = evaluation.document["metrics"]["perplexity"]["differences"]["tuned - base"]
        assert difference["better_rows" if verdict == "better" else "worse_rows"] == 20
        assert difference["p"] < 0.01
    assert evaluation.value("perplexity", system="base") == pytest.approx(264, rel=1e-4)


def test_a_tool_call_is_scored_as_what_would_be_written(base, toy_tokenizer):
    template = ChatTemplate(
        toy_tokenizer,
        source=(toy_tokenizer.chat_template or "").replace(
            "{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
        ),
    )
    call = [{"type": "function", "function": {"name": "find", "arguments": {"id": 3}}}]
    messages = (Message("user", "where is 3?"), Message("assistant", "", 1.0, {"tool_calls": call}))
    rows = [Example(Origin("rows.jsonl", i + 1), "chat", messages) for i in range(3)]
    silent = [dataclasses.replace(row, messages=(messages[0], Message("assistant", ""))) for row in rows]
    scores = [
        evaluate([System("tuned", base)], template, r, metrics=("perplexity",)).value("perplexity")
        for r in (rows, silent)
    ]
    assert scores[0] != scores[1]


def test_a_model_that_is_broken_is_refused(build_model, template):
    model = build(build_model)
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    with pytest.raises(ModelError, match="not finite"):
        evaluate([System("tuned", model)], template, metrics=("perplexity",))


# --------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("shots", [(), SHOTS])
def test_a_row_is_rendered_once_for_each_prompt_that_shows_it(tuned, template, monkeypatch, shots):
    """Whether it fits, and what every system with the same prompt is given."""
    rendered = []
    sequences = ChatTemplate.sequences

    def counted(self, examples):
        rendered.extend(examples)
        return sequences(self, examples)

    monkeypatch.setattr(ChatTemplate, "sequences", counted)
    systems = [*tuned_and_base(tuned), System("few_shot", tuned, lambda: LORA.disabled(tuned), shots)]
    evaluate(systems, template, metrics=("perplexity",))
    assert len(rendered) == len(ROWS) * (2 if shots else 1)


def test_a_text_is_read_once_for_all_systems(tuned, template, monkeypatch):
    read = []
    sequences = Causal.sequences

    def counted(self, examples, **given):
        read.extend(examples)
        return sequences(self, examples, **given)

    monkeypatch.setattr(Causal, "sequences", counted)
    rows = [Example(Origin("t", i), "text", text=f"the text number {i}") for i in range(4)]
    evaluate(tuned_and_base(tuned), template, rows)
    assert len(read) == 4


def test_some_rows_are_drawn_by_the_seed(base, template):
    rows = [example(f"number {i}?", "x", line=i + 1) for i in range(30)]

    def drawn(seed: int) -> list[str]:
        evaluation = evaluate([System("tuned", base)], template, rows, metrics=("perplexity",), rows=5, seed=seed)
        assert evaluation.document["rows"] == 5
        assert evaluation.document["left_out_rows"] == 0  # they would have fitted
        return [row["origin"] for row in evaluation.rows]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_rows_that_do_not_fit_are_counted(base, template):
    long = "x" * (CONTEXT_TOKENS - FRAME_TOKENS - len("ok"))
    rows = [*ROWS, example(long, "ok", line=7), example(long + "x", "ok", line=8)]
    evaluation = evaluate([System("tuned", base)], template, rows, metrics=("exact_match", "perplexity"))
    assert (evaluation.document["rows"], evaluation.document["left_out_rows"]) == (7, 1)
    with_shots = [System("tuned", base), System("few_shot", base, shots=SHOTS)]
    evaluation = evaluate(with_shots, template, rows, metrics=("perplexity",))
    assert (evaluation.document["rows"], evaluation.document["left_out_rows"]) == (6, 2)  # the same rows for each
    with pytest.raises(DataError, match="no held-out row fits"):
        evaluate([System("tuned", base)], template, rows[7:])


def test_one_row_is_refused_before_anything_is_computed(base, template):
    said: list[str] = []
    with pytest.raises(DataError, match="one row"):
        evaluate_systems(
            [System("tuned", base)],
            examples=ROWS[:1],
            template=template,
            objective=Instruction(),
            settings=EvaluateSettings(),
            run="toy-1",
            data="test",
            on_progress=said.append,
        )
    assert said == []


def test_a_metric_of_answers_is_refused_for_plain_text(base, template):
    with pytest.raises(DataError, match="'chrf' needs answers") as caught:
        evaluate([System("tuned", base)], template, TEXTS, metrics=("perplexity", "chrf"))
    assert "bits_per_byte" in caught.value.hint


@pytest.mark.parametrize(
    ("answers", "first"),
    [
        (['{"a": 1}', '[{"a": 2}]'], "exact_match"),
        (["billing", "refund"], "exact_match"),
        (["word " * 30, "a"], "chrf"),
    ],
)
def test_metrics_fit_the_answers_by_default(answers, first):
    names = default_metrics([example("q", answer) for answer in answers])
    assert names[0] == first
    assert ("json_fields" in names) == answers[0].startswith("{")


# ----------------------------------------------------------------------------------------------------- few shots


class Counting(Model):
    """Counts the tokens that go through the model from packs."""

    computed_tokens = 0

    def attention(self, pack: Pack) -> Any:
        self.computed_tokens += len(pack.tokens_T)
        return super().attention(pack)


def test_the_shots_are_computed_once_for_all_rows(base, template):
    model = Counting(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)})
    evaluate([System("tuned", model, shots=SHOTS)], template, metrics=("perplexity",))
    alone = [len(template.prompt(prompt_messages(row, shots=SHOTS, plain=False)).ids) for row in ROWS]
    assert model.computed_tokens < 0.4 * sum(alone)


def test_shots_stand_between_the_system_prompt_and_the_question():
    row = example("third?", "3", "fourth?", "4", system="Be brief.")
    shown = [(m.role, m.content) for m in prompt_messages(row, shots=SHOTS[:1], plain=False)]
    assert shown == [
        ("system", "Be brief."),
        ("user", "And the colour of 0?"),
        ("assistant", "blue"),
        ("user", "third?"),
        ("assistant", "3"),
        ("user", "fourth?"),
    ]
    assert prompt_messages(row, shots=(), plain=False) == list(row.messages[:-1])


def test_without_a_chat_template_shots_are_text():
    (message,) = prompt_messages(ROWS[0], shots=SHOTS[:2], plain=True)
    assert message.content == ("And the colour of 0?\nblue\n\nAnd the colour of 1?\nblue\n\nWhat colour has number 0?")


def test_shots_are_drawn_by_the_seed_and_fit(template):
    train = [example(f"question {i}?", "yes", line=i + 1) for i in range(30)]

    def chosen(*, room: int = 250, seed: int = 0, count: int = 4, examples: list[Example] = ROWS) -> list[int]:
        shots = choose_shots(iter(train), count=count, seed=seed, template=template, examples=examples, room=room)
        longest = max(len(template.prompt(prompt_messages(e, shots=shots, plain=False)).ids) for e in examples)
        assert longest <= room or not shots
        return [shot.origin.line for shot in shots]

    assert len(chosen()) == 4
    assert chosen() == chosen()
    assert chosen() != chosen(seed=1)
    assert chosen(room=100) == chosen()[: len(chosen(room=100))]
    assert 0 < len(chosen(room=100)) < 4
    assert chosen(room=10) == []
    assert len(chosen(count=40, room=10_000)) == 30


def test_there_are_no_shots_for_plain_text_or_without_rows(template):
    how: dict[str, Any] = {"count": 2, "seed": 0, "template": template, "room": 100}
    assert choose_shots(iter(TEXTS), examples=TEXTS, **how) == ()
    assert choose_shots(iter([]), examples=ROWS, **how) == ()


def test_the_costs_of_each_system_are_told(base, template):
    document = evaluate([System("tuned", base)], template, metrics=("exact_match",), max_tokens=5).document
    assert 0 < document["costs"]["tuned"]["tokens_per_answer"] <= 5
    assert document["costs"]["tuned"]["seconds"] >= 0
    assert not np.isnan(document["costs"]["tuned"]["seconds"])


def test_a_setting_adds_its_metric_behind_the_default_ones(tuned, template):
    document = evaluate(tuned_and_base(tuned), template, pattern="red|green|.*").document
    assert list(document["metrics"]) == ["exact_match", "token_f1", "perplexity", "pattern_match"]
    assert document["metrics"]["pattern_match"]["systems"]["base"]["value"] <= 1
    chosen = evaluate(tuned_and_base(tuned), template, metrics=("pattern_match",), pattern="(?s).*").document
    assert chosen["metrics"]["pattern_match"]["systems"]["tuned"]["value"] == 1
    assert (chosen["primary"], chosen["verdict"]) == ("pattern_match", "undecided")
    with pytest.raises(DataError, match="'pattern_match' needs answers"):
        evaluate(tuned_and_base(tuned), template, examples=TEXTS, pattern="a")


def test_a_metric_of_ones_own_decides_the_verdict(tuned, template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_run.py").write_text(
        "def short(p, r):\n    return -len(p)\n\n\ndef said(p, r, row):\n    return p != ''\n"
    )
    names = ("own_run:short", "own_run:said")
    evaluation = evaluate(tuned_and_base(tuned), template, metrics=names)
    document = evaluation.document
    assert (document["primary"], list(document["metrics"])) == (names[0], list(names))
    assert [document["metrics"][n]["differences"]["tuned - base"]["test"] for n in names] == ["permutation", "mcnemar"]
    assert set(document["own_metrics"]) == set(names)
    for row in evaluation.rows:
        for system in ("base", "tuned"):
            assert row["scores"][system] == {
                names[0]: -len(row["outputs"][system]),
                names[1]: row["outputs"][system] != "",
            }


def test_rows_with_tests_are_code_and_several_answers_may_be_drawn(tuned, template):
    try:
        check_enforced()
    except RecipeError as error:
        pytest.skip(error.message)
    # The answer stands in a comment: it passes but where it has a second line that is no code.
    rows = [dataclasses.replace(e, tests=CodeTests("# ", "assert True")) for e in ROWS]
    evaluation = evaluate(tuned_and_base(tuned), template, rows, samples=3, pass_at=2, temperature=1.5)
    assert list(evaluation.document["metrics"]) == ["code_passes", "chrf", "perplexity", "pass_at_k"]
    assert evaluation.document["pass_at"] == {"samples": 3, "pass_at": 2, "temperature": 1.5}
    for row in evaluation.rows:
        for system in ("base", "tuned"):
            one_line = "\n" not in row["outputs"][system].strip() and "\r" not in row["outputs"][system].strip()
            assert row["scores"][system]["code_passes"] == 1 or not one_line
            assert row["scores"][system]["pass_at_k"] in (0, 2 / 3, 1)
    again = evaluate(tuned_and_base(tuned), template, rows, samples=3, pass_at=2, temperature=1.5)
    assert again.document["metrics"] == evaluation.document["metrics"]
    with pytest.raises(DataError, match="no tests") as caught:
        evaluate(tuned_and_base(tuned), template, [*rows[:3], ROWS[3]], metrics=("code_passes",))
    assert caught.value.line == 4
