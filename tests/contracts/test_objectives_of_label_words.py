"""Classes told by their names, against every (row, class) alone through transformers' own model."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tunesmith.data.pack import Pack, build_pack, build_unit_packs
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.types import Example, Message, Origin, Sequence
from tunesmith.errors import RecipeError
from tunesmith.models.load import Model
from tunesmith.objectives.base import Readout, Totals
from tunesmith.objectives.contrastive import Contrastive
from tunesmith.objectives.label_words import LabelWords
from tunesmith.train.passes import forward

BuildModel = Callable[..., Model]
LABELS = ("hum/group", "hum/one", "loc", "location")
WORDS = LabelWords(labels=LABELS, several=False)
OBJECTIVES = {
    "plain": WORDS,
    "weighted": WORDS.model_copy(update={"class_weights": {"loc": 3.0, "hum/one": 0.5}}),
    "smoothed": WORDS.model_copy(update={"label_smoothing": 0.2}),
    "hierarchy": WORDS.model_copy(update={"hierarchy": "/"}),
}
LN2, LN3 = math.log(2), math.log(3)


@pytest.fixture(scope="module")
def template(toy_tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(toy_tokenizer)


def labelled(text: str, label: str, line: int = 1) -> Example:
    return Example(Origin("rows.jsonl", line), "labelled", text=text, label=label)


ROWS = [
    labelled("where?", "loc"),
    labelled("where? And who, and why so late in the evening?", "hum/one"),
    labelled("where? And who, and why so late in the morning?", "hum/group"),
    Example(
        Origin("rows.jsonl", 4),
        "chat",
        (Message("system", "Say it."), Message("user", "Who?"), Message("assistant", " location\n")),
    ),
    labelled("where?", "location"),
]


def units_of(objective: LabelWords, template: ChatTemplate) -> list[list[Sequence]]:
    units = objective.sequences(ROWS, template=template, max_tokens=1 << 20)
    return [[replace(s, row=row) for s in unit] for row, unit in enumerate(units)]


def naive(name: str, z_K: list[Tensor], truth: str) -> tuple[Tensor, float]:
    """Weighted loss and weight of a row."""
    total = torch.stack([z.exp() for z in z_K]).sum()
    chances = {label: z.exp() / total for label, z in zip(LABELS, z_K, strict=True)}
    own = -chances[truth].log()
    if name == "weighted":
        weight = {"loc": 3.0, "hum/one": 0.5}.get(truth, 1.0)
        return weight * own, weight
    if name == "smoothed":
        every = torch.stack([-p.log() for p in chances.values()]).sum()
        return 0.8 * own + 0.2 / 4 * every, 1.0
    if name == "hierarchy":
        above = [p for label, p in chances.items() if label.split("/")[0] == truth.split("/")[0]]
        return (own - torch.stack(above).sum().log()) / 2, 1.0
    return own, 1.0


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    ("architecture", "name"), [("llama", name) for name in OBJECTIVES] + [("gpt2", "plain"), ("mistral", "weighted")]
)
def test_loss_and_every_gradient_are_those_of_each_class_alone_however_rows_are_laid_out(
    build_model: BuildModel, eager_twin: Callable[[Model], Any], template: ChatTemplate, architecture: str, name: str
) -> None:
    objective = OBJECTIVES[name]
    model = build_model(architecture)
    twin = eager_twin(model)
    parts, weights, right = [], [], 0
    for row in ROWS:
        asked = row.messages[:-1] or (Message("user", row.text or ""),)
        truth = row.messages[-1].content.strip() if row.messages else str(row.label)
        prompt, z_K = template.prompt(list(asked)).ids, []
        for label in LABELS:
            answer = [*template.tokenizer.encode_text([label])[0], template.tokenizer.eos_id]
            logits = twin(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            z_K.append(torch.stack([logits[len(prompt) + i - 1, t] for i, t in enumerate(answer)]).sum())
        loss, weight = naive(name, z_K, truth)
        parts.append(loss)
        weights.append(weight)
        right += LABELS[int(torch.stack(z_K).argmax())] == truth
    expected = torch.stack(parts).sum() / sum(weights)
    expected.backward()
    gradients = {n: p.grad for n, p in twin.named_parameters()}

    units = units_of(objective, template)
    for max_tokens, ordered in ((1, units), (60, units[::-1]), (10_000, units)):
        packs = list(build_unit_packs(ordered, max_tokens=max_tokens))
        assert (len(packs) == 1) == (max_tokens == 10_000)
        count, totals = sum(objective.count(pack) for pack in packs), Totals()
        model.causal.zero_grad()
        for pack in packs:
            found = forward(model, pack, objective=objective)
            (found.sum / count).backward()
            totals.add("loss", sum=float(found.sum.detach()), count=found.count)
            totals.add("accuracy", sum=found.metrics["accuracy"][0], count=found.metrics["accuracy"][1])
        assert totals.mean("loss") == pytest.approx(float(expected.detach()), rel=1e-10)
        assert totals.counts == {"loss": pytest.approx(sum(weights)), "accuracy": len(ROWS)}
        assert totals.sums["accuracy"] == right
        for parameter_name, parameter in model.causal.named_parameters():
            assert torch.allclose(parameter.grad, gradients[parameter_name], rtol=1e-8, atol=1e-11), parameter_name


def unit(truth: int, *, row: int = 0) -> list[Sequence]:
    """One prompt, and two names of one and two tokens."""
    values = np.array([truth], np.float32)
    tokens = [([7, 8, 9], [0, 1, 1]), ([7, 6], [0, 1])]
    return [
        Sequence(np.array(t, np.int32), np.array(w, np.float32), row, values, choice=k)
        for k, (t, w) in enumerate(tokens)
    ]


def readout_of(pack: Pack, logprob_N: Tensor) -> Readout:
    weight_N = torch.from_numpy(pack.weight_N).to(logprob_N.dtype)
    return Readout(logprob_N, weight_N, torch.from_numpy(pack.sequence_N), len(pack.rows_S))


def test_a_hand_worked_number() -> None:
    """Names of probability 1/2 * 1/4 and 3/8 are classes of probability 1/4 and 3/4, with weights 2 and 1."""
    objective = LabelWords(labels=("a", "b"), several=False, class_weights={"a": 2.0})
    pack = build_pack([*unit(0, row=4), *unit(1, row=2)])
    assert pack.choice_S is not None
    chance = {(0, 8): 1 / 2, (0, 9): 1 / 4, (1, 6): 3 / 8}
    choice_N = pack.choice_S[pack.sequence_N]
    chances = [chance[int(k), int(t)] for k, t in zip(choice_N, pack.target_N, strict=True)]
    loss = objective.loss(readout_of(pack, torch.tensor(chances, dtype=torch.float64).log()), pack)
    assert loss.count == objective.count(pack) == 3
    assert float(loss.sum) / loss.count == pytest.approx((2 * 2 * LN2 + 2 * LN2 - LN3) / 3)
    assert loss.metrics == {"accuracy": (1.0, 2.0)}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradcheck(name: str) -> None:
    objective = OBJECTIVES[name]
    rows = [
        Sequence(np.array([5, 10 + k, 20 + k, 2][: 3 + k % 2], np.int32), np.array([0, 1, 1, 1][: 3 + k % 2], np.float32),
                 row, np.array([row], np.float32), choice=k)
        for row in range(3) for k in range(4)
    ]  # fmt: skip
    pack = build_pack(rows[::-1])
    logprob_N = torch.randn(
        len(pack.target_N), dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(3)
    )
    assert torch.autograd.gradcheck(lambda x: objective.loss(readout_of(pack, x), pack).sum, (logprob_N,))


def test_a_pack_without_all_answers_of_a_row_is_our_own_bug() -> None:
    pack = build_pack([unit(0, row=1)[0], unit(0, row=2)[0]])
    with pytest.raises(AssertionError, match="all answers of its rows"):
        LabelWords(labels=("a", "b"), several=False).loss(readout_of(pack, torch.zeros(len(pack.target_N))), pack)


# --------------------------------------------------------------------------------------------------- what is read


def test_every_name_stands_behind_the_prompt_with_the_token_that_ends_it(template: ChatTemplate) -> None:
    for example, unit in zip(ROWS, WORDS.sequences(ROWS, template=template, max_tokens=1 << 20), strict=True):
        asked = example.messages[:-1] or (Message("user", example.text or ""),)
        prompt = template.prompt(list(asked)).ids
        assert [s.choice for s in unit] == [0, 1, 2, 3]
        for label, sequence in zip(LABELS, unit, strict=True):
            answer = [*template.tokenizer.encode_text([label])[0], template.tokenizer.eos_id]
            assert sequence.tokens_T.tolist() == prompt + answer
            assert sequence.weight_T.tolist() == [0.0] * len(prompt) + [1.0] * len(answer)
            whole = Example(Origin("a", 1), "chat", (*asked, Message("assistant", label)))
            ((trained,),) = template.sequences([whole])
            assert trained.tokens_T.tolist() == sequence.tokens_T.tolist()
            truth = example.messages[-1].content.strip() if example.messages else example.label
            assert sequence.values is not None
            assert [LABELS[int(v)] for v in sequence.values] == [truth]
    assert WORDS.units(unit) == [unit]


def test_what_is_too_long_keeps_its_names_behind_one_prompt(template: ChatTemplate) -> None:
    (unit,) = WORDS.sequences([ROWS[1]], template=template, max_tokens=1 << 20)
    longest = max(len(s.tokens_T) for s in unit)
    assert WORDS.cut(unit, num_tokens=longest) == unit
    short = WORDS.cut(unit, num_tokens=longest - 9)
    assert max(len(s.tokens_T) for s in short) == longest - 9
    prompt = unit[0].tokens_T[: -unit[0].num_targets].tolist()
    for before, after in zip(unit, short, strict=True):
        start = len(after.tokens_T) - after.num_targets
        assert after.tokens_T[:start].tolist() == prompt[:-10] + prompt[-1:]
        assert after.tokens_T[start:].tolist() == before.tokens_T[len(prompt) :].tolist()
        assert after.weight_T.tolist() == [0.0] * start + [1.0] * after.num_targets
        assert (after.choice, after.values) == (before.choice, before.values)
    names = longest - len(prompt)
    assert len(WORDS.cut(unit, num_tokens=names + 1)[0].tokens_T) == unit[0].num_targets + 1
    assert WORDS.cut(unit, num_tokens=names) == []


def test_the_prompt_of_a_row_is_computed_once(template: ChatTemplate) -> None:
    (unit,) = WORDS.sequences([ROWS[1]], template=template, max_tokens=1 << 20)
    (pack,) = build_unit_packs([unit], max_tokens=1)
    prompt = len(unit[0].tokens_T) - unit[0].num_targets
    assert prompt > 16
    assert pack.num_computed_tokens == prompt + sum(s.num_targets for s in unit)
    assert pack.num_root_tokens == prompt


# ----------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (LabelWords, "several", True),
        (LabelWords, "pooling", "last"),
        (LabelWords, "head_rate_factor", 3.0),
        (Contrastive, "several", True),
        (Contrastive, "hierarchy", "/"),
        (Contrastive, "label_smoothing", 0.1),
        (Contrastive, "head_rate_factor", 3.0),
    ],
)
def test_settings_of_a_classification_that_are_idle_here_are_refused(kind: Any, name: str, value: Any) -> None:
    own = kind.model_fields["kind"].default
    with pytest.raises(ValueError, match=f"{name} has no effect on {own}; it belongs to objective: classification"):
        kind.model_validate({name: value})
    assert name in kind.idle


def test_rows_of_several_classes_are_refused_by_name() -> None:
    rows = [(Example(Origin("a", 1), "labelled", text="x", label=label), True) for label in (("a",), ("b",))]
    with pytest.raises(RecipeError, match="several has no effect on label_words") as error:
        LabelWords().fitted(rows)
    assert error.value.hint
    assert LabelWords(several=False).fitted(rows).labels == ("a", "b")


def test_classes_that_are_one_answer_are_refused(toy_tokenizer: Tokenizer) -> None:
    trimming = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}"
    trimming += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    template = ChatTemplate(toy_tokenizer, source=trimming)
    objective = LabelWords(labels=("a", "a "), several=False)
    with pytest.raises(RecipeError, match="'a' and 'a ' are the same answer") as error:
        objective.sequences([labelled("x", "a")], template=template, max_tokens=100)
    assert error.value.hint


def test_a_base_without_words_is_refused() -> None:
    with pytest.raises(RecipeError, match="'label_words' predicts the next token"):
        WORDS.for_model(encoder=True)
    with pytest.raises(RecipeError, match="'label_words' does not work on an encoder-decoder"):
        WORDS.check_base(encoder_decoder=True)
    assert WORDS.for_model(encoder=False) == WORDS
