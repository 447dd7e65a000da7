"""A tuned head against what needs no tuning: its base asked in words, and constants.

The base answers a classification by the likelihood of the classes' names as the assistant's turn, with and without training
examples in the prompt; nothing but a name of a class can come out:

    p(k | x) = p(name_k | prompt(x)) / sum_j p(name_j | prompt(x))

`majority` answers with the shares of the classes among the training rows, `median` and `mean` with one number for all rows.

Shapes: B rows, K classes.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tunesmith.data.answers import Answer, Classes, Numbers, Tags
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example, Message, Sequence
from tunesmith.errors import RecipeError
from tunesmith.evaluate.chosen import chosen, with_examples
from tunesmith.evaluate.metrics import METRICS
from tunesmith.evaluate.own import is_own, settled
from tunesmith.evaluate.result import UNTUNED, Answers, Evaluation, concluded, drawn
from tunesmith.evaluate.run import PACK_TOKENS, System, only_last
from tunesmith.evaluate.settings import EvaluateSettings
from tunesmith.models.load import Model
from tunesmith.objectives.classification import Classification
from tunesmith.objectives.headed import Headed, label_of
from tunesmith.objectives.label_words import choices, in_words, names_of, prompt_of
from tunesmith.objectives.regression import Regression
from tunesmith.objectives.token_classification import TokenClassification

ROWS_AT_A_TIME = 64


def named_classes(
    system: System, examples: list[Example], *, objective: Classification, template: ChatTemplate
) -> Classes:
    """What the model says of rows when it can answer with nothing but a class's name."""
    assert objective.labels is not None
    names = names_of(objective.labels, template=template)
    prompts = [prompt_of(_asked(e, system=system, template=template), template=template) for e in examples]

    def ask() -> dict[str, Any]:
        logprob_BK = np.zeros((len(examples), len(names)))
        with system.switched():
            for start in range(0, len(examples), ROWS_AT_A_TIME):
                some = [choices(prompt, names=names) for prompt in prompts[start : start + ROWS_AT_A_TIME]]
                logprob_BK[start : start + len(some)] = _likelihoods(system.model, some)
        return {"logprobs": logprob_BK.tolist()}

    asked = [json.dumps([[name_T.tolist() for name_T in names], prompts]).encode()]
    found = ask() if system.answered is None else system.answered.get(asked, ask=ask)
    probability_BK = torch.tensor(found["logprobs"], dtype=torch.float64).softmax(-1).numpy()
    return objective.decided(probability_BK)


def that_fit(
    examples: list[Example],
    *,
    system: System,
    objective: Classification,
    template: ChatTemplate,
    room_tokens: int,
) -> list[Example]:
    """The rows whose prompt in words, with the name of every class behind it, fits into the context."""
    assert objective.labels is not None
    room = room_tokens - max(map(len, names_of(objective.labels, template=template)))
    prompts = (prompt_of(_asked(e, system=system, template=template), template=template) for e in examples)
    return [example for example, prompt in zip(examples, prompts, strict=True) if len(prompt) <= room]


def _asked(example: Example, *, system: System, template: ChatTemplate) -> Example:
    """The row in words, as the system is asked for it."""
    worded = in_words(example)
    return only_last(worded, system.prompt(worded, plain=template.plain))


def _likelihoods(model: Model, units: list[list[Sequence]]) -> np.ndarray:
    """log p(name | prompt), [B, K], of the answers to each prompt."""
    sequences = [replace(s, row=number) for number, s in enumerate(s for unit in units for s in unit)]
    total = model.row_logprobs(sequences, num_rows=len(sequences), max_tokens=PACK_TOKENS)
    return total.reshape(len(units), -1)


def baseline(name: str, rows: list[Example], *, objective: Headed, train: Iterable[Example]) -> Answer:
    """What a constant says of every row."""
    num_rows = len(rows)
    if isinstance(objective, Classification) and name == "majority":
        truth_BK = objective.truth(list(train))
        share_K = truth_BK.mean(0)
        return objective.decided(np.tile(share_K if objective.several else share_K / share_K.sum(), (num_rows, 1)))
    if isinstance(objective, Regression) and name in ("mean", "median"):
        numbers = np.array([objective.number(example) for example in train])
        middle = numbers.mean() if name == "mean" else np.median(numbers)
        low, _, high = np.quantile(numbers, objective.quantiles)
        middle_B, low_B, high_B = (np.full(num_rows, value) for value in (middle, low, high))
        return Numbers(middle_B, low_B, high_B, coverage=objective.coverage)
    if isinstance(objective, TokenClassification) and name == "majority":
        counts = Counter(tag for example in train for tag in example.label or ())
        tag = max(counts, key=lambda found: (counts[found], found))
        return Tags(tuple((tag,) * len(example.words) for example in rows))
    known = ", ".join(objective.baselines)
    raise RecipeError(
        f"evaluate.against: '{name}' is nothing to compare a {objective.kind_name} with", hint=f"there are {known}"
    )


def systems_of(objective: Headed, *, settings: EvaluateSettings, speaks: bool) -> tuple[str, ...]:
    """What the tuned model is compared with. RecipeError for what cannot be; `speaks`: the base predicts text."""
    in_words = isinstance(objective, Classification) and not objective.several and speaks
    if settings.against is None:
        return (("base", "few_shot") if in_words else ()) + objective.baselines
    for name in settings.against:
        if name in UNTUNED and not in_words:
            raise RecipeError(
                f"evaluate.against: '{name}' cannot answer here: this base has no head for a {objective.kind_name}",
                hint=f"there are {', '.join(objective.baselines)}",
            )
    return settings.against


def truth_of(objective: Headed, examples: list[Example]) -> Any:
    """[B, K] bool of a classification, [B] of a regression, the tags of each row of a token classification."""
    if isinstance(objective, TokenClassification):
        return [example.label for example in examples]
    if isinstance(objective, Regression):
        return np.array([objective.number(example) for example in examples])
    assert isinstance(objective, Classification)
    return objective.truth(examples)


def evaluate_heads(
    systems: dict[str, Callable[[list[Example]], Answer]],
    *,
    examples: list[Example],
    objective: Headed,
    settings: EvaluateSettings,
    run: str,
    data: str,
    num_shots: int = 0,
    num_left_out: int = 0,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Let every system say what it makes of every row, and compare the first with the others."""
    kept = drawn(examples, settings=settings)
    truth = truth_of(objective, kept)
    answers: dict[str, Answers] = {}
    for name, predict in systems.items():
        on_progress(f"{name}: {len(kept):,} rows")
        started = time.perf_counter()
        predicted = predict(kept)
        answers[name] = Answers(predicted.texts(), predicted=predicted, seconds=time.perf_counter() - started)
    references = [_written(e) for e in kept]
    scores: dict[str, dict[str, np.ndarray]] = {}
    metrics = chosen(_metrics(objective, settings=settings, answers=answers), settings=settings)
    for name, metric in metrics.items():
        scores[name] = {
            system: metric.score_rows(a.texts or [], references, **with_examples(metric, kept))
            if metric.reads == "text"
            else metric.score_rows(predicted=a.predicted, truth=truth)
            for system, a in answers.items()
        }
    metrics = {name: settled(metric, scores[name]) for name, metric in metrics.items()}
    return concluded(
        answers,
        scores,
        metrics=metrics,
        examples=kept,
        prompts=[_shown(example) for example in kept],
        references=references,
        settings=settings,
        run=run,
        data=data,
        num_shots=num_shots,
        num_left_out=num_left_out,
    )


def _written(example: Example) -> str:
    label = label_of(example)
    if isinstance(label, str):
        return label
    return " ".join(label) if example.words else ", ".join(sorted(label))


def _shown(example: Example) -> list[Message]:
    return list(example.asked[0]) if example.messages else [Message("user", example.plain_text or "")]


def _metrics(objective: Headed, *, settings: EvaluateSettings, answers: dict[str, Answers]) -> tuple[str, ...]:
    """The metrics of the recipe, or those of the objective for which everything is known."""
    reads = METRICS[objective.metrics[0]].reads
    if settings.metrics is not None:
        for name in settings.metrics:
            if not is_own(name) and METRICS[name].reads not in (reads, "text"):
                fitting = ", ".join(n for n, m in METRICS.items() if m.reads == reads)
                raise RecipeError(
                    f"evaluate.metrics: '{name}' does not fit a {objective.kind_name}", hint=f"there are {fitting}"
                )
        return settings.metrics
    unknown = {
        name
        for name in ("coverage", "interval_width")
        for a in answers.values()
        if isinstance(a.predicted, Numbers) and not np.isfinite(a.predicted.low_B).all()
    }
    return (*(name for name in objective.metrics if name not in unknown), *settings.added)
