"""What a tuned model is compared with: the systems of an evaluation, for objectives that write text and for heads."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith.data.answers import Answer
from tunesmith.data.retrieval import (
    Bm25,
    Embedded,
    Indexer,
    Lookup,
    Passage,
    look_up_passages,
    look_up_rows,
    read_passages,
)
from tunesmith.data.types import Example, Message
from tunesmith.errors import RecipeError
from tunesmith.evaluate.heads import baseline, evaluate_heads, named_classes, systems_of, that_fit
from tunesmith.evaluate.judge import prove_judged
from tunesmith.evaluate.memorised import both_sides, prove_memorised
from tunesmith.evaluate.result import UNTUNED, Evaluation, drawn
from tunesmith.evaluate.run import System, choose_shots, evaluate_systems
from tunesmith.evaluate.settings import LOOKING_UP, EvaluateSettings
from tunesmith.evaluate.shots import best_shots
from tunesmith.evaluate.stopping import hindsight
from tunesmith.evaluate.swaps import check_swaps, counterfactuals
from tunesmith.evaluate.texts import read_lines
from tunesmith.models.embed import load_embedder
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
    validation: Callable[[], Iterator[Example]],
    examples: list[Example],
    data: str,
    on_progress: Callable[[str], None],
) -> Evaluation:
    """Answers and likelihoods of the tuned model, its base, and either with examples or with what was looked up."""
    against = ("base", "few_shot") if settings.against is None else settings.against
    if settings.swaps is not None:
        check_swaps(settings.swaps, objective=tuned.run.recipe.objective)
    if odd := [name for name in against if name not in WRITING]:
        raise RecipeError(
            f"evaluate.against: '{odd[0]}' writes no text to compare with", hint=f"there are {', '.join(WRITING)}"
        )
    sides = None if settings.memorised is None else both_sides(train(), examples, settings=settings)
    room = tuned.model.room_tokens - settings.max_tokens
    systems = [System("tuned", tuned.model)]
    systems += [base] if "base" in against else []
    choice = None
    if "few_shot" in against:
        few_shot, choice = _few_shot(
            tuned, base, settings=settings, train=train(), validation=validation(), examples=examples, room=room
        )
        systems += [] if few_shot is None else [few_shot]
    if looking_up := [name for name in against if name in LOOKING_UP]:
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
        examples=with_columns(examples, tuned=tuned, settings=settings),
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
    evaluation = _with_choice(evaluation, choice)
    again = partial(prove_text, tuned, base, train=train, validation=validation, data="train", on_progress=on_progress)
    return _with_training(evaluation, again, tuned, base, settings=settings, sides=sides, writes=True)


def prove_head(
    tuned: Tuned,
    base: System,
    *,
    settings: EvaluateSettings,
    train: Callable[[], Iterator[Example]],
    validation: Callable[[], Iterator[Example]],
    examples: list[Example],
    data: str,
    on_progress: Callable[[str], None],
) -> Evaluation:
    """What the tuned model says, what the base says in words where it can, and constants."""
    objective = tuned.run.recipe.objective
    assert isinstance(objective, Headed)
    against = systems_of(objective, settings=settings, speaks=not tuned.model.is_encoder)
    systems: dict[str, Callable[[list[Example]], Answer]] = {"tuned": tuned.predict_examples}
    sides = None if settings.memorised is None else both_sides(train(), examples, settings=settings)
    num_shots, fitting, choice = 0, examples, None
    for name in against:
        if name in UNTUNED:
            room = tuned.model.room_tokens - LONGEST_NAME_TOKENS
            system = base
            if name == "few_shot":
                few_shot, choice = _few_shot(
                    tuned,
                    base,
                    settings=settings,
                    train=map(in_words, train()),
                    validation=map(in_words, validation()),
                    examples=[in_words(e) for e in examples],
                    room=room,
                )
                if few_shot is None:
                    continue
                system, num_shots = few_shot, len(few_shot.shots)
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
    evaluation = evaluate_heads(
        systems,
        examples=with_columns(fitting, tuned=tuned, settings=settings),
        objective=objective,
        settings=settings,
        run=tuned.run.name,
        data=data,
        num_shots=num_shots,
        num_left_out=len(examples) - len(fitting),
        on_progress=on_progress,
    )
    evaluation = _with_choice(evaluation, choice)
    if settings.swaps is not None:
        on_progress("tuned and base: rows with words swapped")
        both = {name: predict for name, predict in systems.items() if name in ("tuned", "base")}
        evaluation.document["swaps"] = _with_swaps(both, tuned, base, settings=settings, examples=fitting)
    again = partial(prove_head, tuned, base, train=train, validation=validation, data="train", on_progress=on_progress)
    return _with_training(evaluation, again, tuned, base, settings=settings, sides=sides, writes=False)


def _with_swaps(
    systems: dict[str, Callable[[list[Example]], Answer]],
    tuned: Tuned,
    base: System,
    *,
    settings: EvaluateSettings,
    examples: list[Example],
) -> dict[str, Any]:
    """The document's entry `swaps`, of the rows that were evaluated."""
    objective = tuned.run.recipe.objective
    assert settings.swaps is not None
    check_swaps(settings.swaps, objective=objective)
    assert isinstance(objective, Classification)
    room = tuned.model.room_tokens
    in_base = partial(that_fit, system=base, objective=objective, template=tuned.template, room_tokens=room)
    return counterfactuals(
        systems,
        examples=drawn(examples, settings=settings),
        fits=in_base if "base" in systems else list,
        objective=objective,
        settings=settings,
    )


def with_columns(examples: list[Example], *, tuned: Tuned, settings: EvaluateSettings) -> list[Example]:
    """The rows with those of their columns that the recipe or the evaluation keeps."""
    data = tuned.run.recipe.data.keeping(settings.columns)
    return [replace(example, columns=data.kept(example.columns)) for example in examples]


def _with_training(
    evaluation: Evaluation,
    again: Callable[..., Evaluation],
    tuned: Tuned,
    base: System,
    *,
    settings: EvaluateSettings,
    sides: dict[str, list[Example]] | None,
    writes: bool,
) -> Evaluation:
    """The evaluation with what training rows say (`again` asks rows alike), and the course of the training."""
    if sides is not None:
        evaluation.document["memorised"] = prove_memorised(
            lambda how, rows: again(settings=how.model_copy(update={"judge": None}), examples=rows),
            asked=sides,
            primary=evaluation.document["primary"],
            systems=[System("tuned", tuned.model), base],
            settings=settings,
            template=tuned.template,
            writes=writes,
        )
    run = tuned.run
    stopping = hindsight(read_lines(run.path / "metrics.jsonl"), best_step=run.summary.get("best_step"))
    if stopping is not None:
        evaluation.document["stopping"] = stopping
    return evaluation


def _lookup(
    tuned: Tuned, rows: Iterator[Example], *, settings: EvaluateSettings, room: int
) -> Lookup[Example] | Lookup[Passage]:
    """What finds rows or passages for a question, such that its prompt stays within `room` tokens."""
    template = tuned.template

    def fits(messages: list[Message], example: Example) -> bool:
        return len(template.prompt(messages, tools=example.tools).ids) <= room

    trained = tuned.run.recipe.data.look_up
    documents = trained.documents if settings.documents is None and trained is not None else settings.documents
    indexer: Indexer = Bm25
    if settings.embedder is not None:
        indexer = partial(Embedded, embed=load_embedder(settings.embedder, device=str(tuned.model.device)))
    if documents is not None:
        passages = read_passages(Path(documents))
        return look_up_passages(passages, count=settings.look_up, fits=fits, indexer=indexer)
    return look_up_rows(rows, plain=template.plain, count=settings.look_up, fits=fits, indexer=indexer)


def _few_shot(
    tuned: Tuned,
    base: System,
    *,
    settings: EvaluateSettings,
    train: Iterator[Example],
    validation: Iterator[Example],
    examples: list[Example],
    room: int,
) -> tuple[System | None, dict[str, Any] | None]:
    """The base with examples, None where none can be shown; and how they were chosen, where they were."""
    if settings.few_shot == "best" and examples[0].text is None:
        choice = best_shots(
            base,
            train=train,
            validation=validation,
            examples=examples,
            template=base.template or tuned.template,
            seed=settings.seed,
            room=room,
        )
        return replace(base, name="few_shot", shots=choice.shots), choice.document
    count = 0 if settings.few_shot == "best" else settings.few_shot
    shots = choose_shots(train, count=count, seed=settings.seed, template=tuned.template, examples=examples, room=room)
    return (replace(base, name="few_shot", shots=shots) if shots else None), None


def _with_choice(evaluation: Evaluation, choice: dict[str, Any] | None) -> Evaluation:
    if choice is not None:
        evaluation.document["few_shot_choice"] = choice
    return evaluation


def _constant(name: str, rows: list[Example], *, objective: Headed, train: Callable[[], Iterator[Example]]) -> Answer:
    return baseline(name, rows, objective=objective, train=train())
