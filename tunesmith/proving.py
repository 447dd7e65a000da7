"""What a tuned model is compared with: the systems of an evaluation, for objectives that write text and for heads."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from tunesmith.data.answers import Answer
from tunesmith.data.types import Example, Message
from tunesmith.errors import RecipeError
from tunesmith.evaluate.heads import baseline, evaluate_heads, named_classes, systems_of, that_fit
from tunesmith.evaluate.judge import prove_judged
from tunesmith.evaluate.result import UNTUNED, Evaluation
from tunesmith.evaluate.retrieval import PassageLookup, RowLookup, read_passages
from tunesmith.evaluate.run import System, choose_shots, evaluate_systems, prompt_messages
from tunesmith.evaluate.settings import LOOKING_UP, EvaluateSettings
from tunesmith.objectives.classification import Classification
from tunesmith.objectives.headed import Headed
from tunesmith.objectives.label_words import in_words
from tunesmith.tuned import Tuned

WRITING = ("base", "few_shot", *LOOKING_UP)  # systems that write text
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
    """Answers and likelihoods of the tuned model, its base, and either with examples or with what was looked up."""
    against = ("base", "few_shot") if settings.against is None else settings.against
    if odd := [name for name in against if name not in WRITING]:
        raise RecipeError(
            f"evaluate.against: '{odd[0]}' writes no text to compare with", hint=f"there are {', '.join(WRITING)}"
        )
    shots: tuple[Example, ...] = ()
    if "few_shot" in against:
        room = tuned.model.room_tokens - settings.max_tokens
        shots = _shots(tuned, train(), settings=settings, examples=examples, room=room)
    systems = [System("tuned", tuned.model)]
    systems += [base] if "base" in against else []
    systems += [replace(base, name="few_shot", shots=shots)] if shots else []
    if looking_up := [name for name in against if name in LOOKING_UP]:
        room = tuned.model.room_tokens - settings.max_tokens
        if examples and examples[0].text is not None:
            raise RecipeError(
                f"evaluate.against: '{looking_up[0]}' needs questions, and these rows are plain text",
                hint="leave it out",
            )
        lookup = _lookup(tuned, train(), settings=settings, room=room)
        of = {"retrieval": base, "tuned_retrieval": systems[0]}
        systems += [replace(of[name], name=name, lookup=lookup) for name in looking_up]
    evaluation = evaluate_systems(
        systems,
        examples=examples,
        template=tuned.template,
        objective=tuned.run.recipe.objective,
        settings=settings,
        run=tuned.run.name,
        data=data,
        on_progress=on_progress,
    )
    if settings.judge is not None:
        assert base.answered is not None, "what the base says is kept in the workspace's cache"
        cache = base.answered.folder.with_name("judge")
        evaluation.document["judge"] = prove_judged(
            evaluation, settings=settings.judge, cache=cache, on_progress=on_progress
        )
    return evaluation


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
        if name in UNTUNED:
            room = tuned.model.room_tokens - LONGEST_NAME_TOKENS
            system = base
            if name == "few_shot":
                asked = [in_words(e) for e in examples]
                shots = _shots(tuned, map(in_words, train()), settings=settings, examples=asked, room=room)
                if not shots:
                    continue
                system, num_shots = replace(base, shots=shots), len(shots)
            elif name == "retrieval":
                worded = (in_words(row) for row in train())
                system = replace(base, lookup=_lookup(tuned, worded, settings=settings, room=room))
            assert isinstance(objective, Classification)
            systems[name] = partial(named_classes, system, objective=objective, template=tuned.template)
            fitting = that_fit(
                fitting,
                system=system,
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


def _lookup(
    tuned: Tuned, rows: Iterator[Example], *, settings: EvaluateSettings, room: int
) -> RowLookup | PassageLookup:
    """What finds rows or passages for a question, such that its prompt stays within `room` tokens."""
    template = tuned.template

    def fits(messages: list[Message], example: Example) -> bool:
        return len(template.prompt(messages, tools=example.tools).ids) <= room

    if settings.documents is not None:
        return PassageLookup(read_passages(Path(settings.documents)), count=settings.look_up, fits=fits)
    show = partial(_with_shots, plain=template.plain)
    return RowLookup(rows, count=settings.look_up, fits=fits, show=show)


def _with_shots(example: Example, shots: tuple[Example, ...], *, plain: bool) -> list[Message]:
    return prompt_messages(example, shots=shots, plain=plain)


def _shots(
    tuned: Tuned, train: Iterator[Example], *, settings: EvaluateSettings, examples: list[Example], room: int
) -> tuple[Example, ...]:
    return choose_shots(
        train, count=settings.few_shot, seed=settings.seed, template=tuned.template, examples=examples, room=room
    )


def _constant(name: str, rows: list[Example], *, objective: Headed, train: Callable[[], Iterator[Example]]) -> Answer:
    return baseline(name, rows, objective=objective, train=train())
