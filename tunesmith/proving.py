"""What a tuned model is compared with: the systems of an evaluation, for objectives that write text and for heads."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from tunesmith.data.answers import Answer
from tunesmith.data.types import Example
from tunesmith.errors import RecipeError
from tunesmith.evaluate.heads import baseline, evaluate_heads, named_classes, systems_of, that_fit
from tunesmith.evaluate.result import Evaluation
from tunesmith.evaluate.run import System, choose_shots, evaluate_systems
from tunesmith.evaluate.settings import EvaluateSettings
from tunesmith.objectives.classification import Classification
from tunesmith.objectives.headed import Headed
from tunesmith.objectives.label_words import in_words
from tunesmith.tuned import Tuned

LONGEST_NAME_TOKENS = 64  # of a class, kept free behind few-shot prompts


def prove_text(
    tuned: Tuned,
    base: System,
    *,
    settings: EvaluateSettings,
    train: Callable[[], Iterator[Example]],
    examples: list[Example],
    data: str,
    on_progress: Callable[[str], None],
) -> Evaluation:
    """Answers and likelihoods of the tuned model, its base, and the base with examples in its prompt."""
    against = ("base", "few_shot") if settings.against is None else settings.against
    if odd := [name for name in against if name not in ("base", "few_shot")]:
        raise RecipeError(
            f"evaluate.against: '{odd[0]}' writes no text to compare with", hint="there are base and few_shot"
        )
    shots: tuple[Example, ...] = ()
    if "few_shot" in against:
        room = tuned.model.room_tokens - settings.max_tokens
        shots = _shots(tuned, train(), settings=settings, examples=examples, room=room)
    systems = [System("tuned", tuned.model)]
    systems += [base] if "base" in against else []
    systems += [replace(base, name="few_shot", shots=shots)] if shots else []
    return evaluate_systems(
        systems,
        examples=examples,
        template=tuned.template,
        objective=tuned.run.recipe.objective,
        settings=settings,
        run=tuned.run.name,
        data=data,
        on_progress=on_progress,
    )


def prove_head(
    tuned: Tuned,
    base: System,
    *,
    settings: EvaluateSettings,
    train: Callable[[], Iterator[Example]],
    examples: list[Example],
    data: str,
    on_progress: Callable[[str], None],
) -> Evaluation:
    """What the tuned model says, what the base says in words where it can, and constants."""
    objective = tuned.run.recipe.objective
    assert isinstance(objective, Headed)
    against = systems_of(objective, settings=settings, speaks=not tuned.model.is_encoder)
    systems: dict[str, Callable[[list[Example]], Answer]] = {"tuned": tuned.predict_examples}
    num_shots, fitting = 0, examples
    for name in against:
        if name in ("base", "few_shot"):
            shots: tuple[Example, ...] = ()
            if name == "few_shot":
                room = tuned.model.room_tokens - LONGEST_NAME_TOKENS
                asked = [in_words(e) for e in examples]
                shots = _shots(tuned, map(in_words, train()), settings=settings, examples=asked, room=room)
                num_shots = len(shots)
                if not shots:
                    continue
            assert isinstance(objective, Classification)
            systems[name] = partial(
                named_classes, replace(base, shots=shots), objective=objective, template=tuned.template
            )
            fitting = that_fit(
                fitting,
                shots=shots,
                objective=objective,
                template=tuned.template,
                room_tokens=tuned.model.room_tokens,
            )
        else:
            systems[name] = partial(_constant, name, objective=objective, train=train)
    return evaluate_heads(
        systems,
        examples=fitting,
        objective=objective,
        settings=settings,
        run=tuned.run.name,
        data=data,
        num_shots=num_shots,
        num_left_out=len(examples) - len(fitting),
        on_progress=on_progress,
    )


def _shots(
    tuned: Tuned, train: Iterator[Example], *, settings: EvaluateSettings, examples: list[Example], room: int
) -> tuple[Example, ...]:
    return choose_shots(
        train, count=settings.few_shot, seed=settings.seed, template=tuned.template, examples=examples, room=room
    )


def _constant(name: str, rows: list[Example], *, objective: Headed, train: Callable[[], Iterator[Example]]) -> Answer:
    return baseline(name, rows, objective=objective, train=train())
