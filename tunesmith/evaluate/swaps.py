"""Is a text classified otherwise when words in it are swapped, such as he and she?

Each text with one of the words is asked again with all of them swapped. The flip rate is the share of these rows whose
answer changes; beside it stands how far the probability of the true class moves. A model that does not depend on the words
has 0 for both (counterfactual token fairness: Garg et al. 2019, "Counterfactual fairness in text classification").

Shapes: B rows with one of the words, K classes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from tunesmith.data.answers import Answer, Classes, Floats
from tunesmith.data.types import Example
from tunesmith.errors import DataError, RecipeError
from tunesmith.evaluate.metric import MEAN
from tunesmith.evaluate.settings import EvaluateSettings
from tunesmith.evaluate.statistics import decimals, interval, mcnemar, paired_bootstrap
from tunesmith.evaluate.words import read_swaps, swapped
from tunesmith.objectives.base import Objective
from tunesmith.objectives.classification import Classification

LEAST_ROWS = 2
MAX_FLIPS = 50


def check_swaps(path: str, *, objective: Objective) -> dict[str, str]:
    """What is swapped. RecipeError where the run tells no classes, and the errors of `read_swaps`."""
    if not isinstance(objective, Classification):
        raise RecipeError(
            f"evaluate.swaps asks whether a class changes, and objective '{objective.kind_name}' tells none",
            hint="leave it out, or use objective: classification or label_words",
        )
    return read_swaps(path)


def counterfactuals(
    systems: dict[str, Callable[[list[Example]], Answer]],
    *,
    examples: list[Example],
    fits: Callable[[list[Example]], list[Example]],
    objective: Classification,
    settings: EvaluateSettings,
) -> dict[str, Any]:
    """The document's entry `swaps`: every system asked without and with the words swapped, the first against the others.

    `fits` gives those of the rows that every system can be asked. Raises DataError where fewer than two rows have a word.
    """
    assert settings.swaps is not None
    swaps = check_swaps(settings.swaps, objective=objective)
    found = [other for example in examples if (other := swapped(example, swaps=swaps)) is not None]
    after = fits(found)
    if len(after) < LEAST_ROWS:
        raise DataError(
            f"{len(after)} of {len(examples)} held-out rows have one of the words of {settings.swaps}",
            file=examples[0].origin.file,
            hint="give other words in evaluate.swaps, or more rows",
        )
    by_origin = {example.origin: example for example in examples}
    before = [by_origin[other.origin] for other in after]
    truth_BK = objective.truth(before)
    flipped: dict[str, Floats] = {}
    entries: dict[str, Any] = {}
    flips: list[dict[str, Any]] = []
    for name, predict in systems.items():
        answers = predict(before), predict(after)
        texts = [answer.texts() for answer in answers]
        flipped[name] = np.array([a != b for a, b in zip(*texts, strict=True)], dtype=np.float64)
        entries[name] = {"flip_rate": interval(flipped[name], seed=settings.seed).as_dict()}
        entries[name] |= _moved(answers, truth_BK=truth_BK, seed=settings.seed)
        flips += [
            {"system": name, "origin": str(before[row].origin), "before": texts[0][row], "after": texts[1][row]}
            for row in np.flatnonzero(flipped[name])[:MAX_FLIPS]
        ]
    first, *others = flipped
    differences = {f"{first} - {other}": _difference(flipped[first], flipped[other], settings) for other in others}
    return {
        "words": settings.swaps,
        "rows": len(after),
        "without_word": len(examples) - len(found),
        "left_out_rows": len(found) - len(after),
        "systems": entries,
        "differences": differences,
        "flips": flips,
        "sentence": _sentence(first, entries[first]["flip_rate"], flipped[first]),
    }


def _moved(answers: tuple[Answer, Answer], *, truth_BK: np.ndarray, seed: int) -> dict[str, Any]:
    """The mean change of the probability of the true class (of several, their mean), with and without its sign.

    Over the rows whose class is known to the model; nothing where fewer than two are.
    """
    before, after = answers
    assert isinstance(before, Classes)
    assert isinstance(after, Classes)
    known_B = truth_BK.any(axis=1)
    if known_B.sum() < LEAST_ROWS:
        return {}
    moved_BK = np.where(truth_BK, after.probability_BK - before.probability_BK, 0.0)[known_B]
    change_B = moved_BK.sum(axis=1) / truth_BK[known_B].sum(axis=1)
    return {
        "change": interval(change_B, aggregate=MEAN, seed=seed).as_dict(),
        "absolute_change": interval(np.abs(change_B), aggregate=MEAN, seed=seed).as_dict(),
    }


def _difference(ours: Floats, theirs: Floats, settings: EvaluateSettings) -> dict[str, float]:
    return paired_bootstrap(ours, theirs, seed=settings.seed).as_dict() | {"p": mcnemar(ours, theirs)}


def _sentence(system: str, rate: dict[str, float], flipped_B: Floats) -> str:
    places = decimals(rate["high"] - rate["low"])
    value, low, high = (f"{rate[key]:.{places}f}" for key in ("value", "low", "high"))
    counted = f"{int(flipped_B.sum()):,} of {len(flipped_B):,} rows"
    return (
        f"with words swapped, {system} answers {counted} otherwise (a share of {value}, 95 % interval {low} to {high})"
    )
