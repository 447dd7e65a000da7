"""What the checks find in all rows of a recipe, and which training rows are left out for it."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tunesmith.data.curate.checks import LEFT_OUT_BY, choose
from tunesmith.data.ledger import Problem
from tunesmith.data.settings import DataSettings
from tunesmith.data.types import Example, Origin

PAIRS = ("near_duplicate", "contradiction")  # of which the other place is a row of the recipe too

Rows = Callable[[], Iterable[tuple[Example, bool]]]  # every usable row, and whether it is on the side of training


@dataclass
class Found:
    """`counts` of the findings by kind, in all rows; `left_out` training rows by place, with the finding it is for."""

    counts: Counter[str] = field(default_factory=Counter)
    left_out: dict[Origin, Problem] = field(default_factory=dict)


def look(rows: Rows, *, settings: DataSettings) -> Found:
    """What `settings.leave_out`, `benchmarks` and `protected` ask for; nothing where none does.

    A held-out row is never left out: where it nearly repeats a training row, that one is. RecipeError and
    MissingExtraError as `choose` raises them.
    """
    names = [LEFT_OUT_BY[kind] for kind in settings.leave_out]
    names += ["contamination"] if settings.benchmarks else []
    names += ["protected"] if settings.protected is not None else []
    found = Found()
    if not names:
        return found
    wanted = {kind for kind, name in LEFT_OUT_BY.items() if name in names}
    chosen = choose(settings, again=lambda: (example for example, _ in rows()), only=tuple(names))
    held: set[Origin] = set()

    def note(problems: Iterable[Problem]) -> None:
        for problem in problems:
            if problem.kind not in wanted or (problem.kind == "near_duplicate" and problem.other is None):
                continue
            found.counts[problem.kind] += 1
            if problem.kind in settings.leave_out:
                place = problem.origin
                if place in held and problem.kind in PAIRS and problem.other is not None:
                    place = problem.other
                if place not in held:
                    found.left_out.setdefault(place, problem)

    for example, trained in rows():
        if not trained:
            held.add(example.origin)
        for check in chosen.checks.values():
            note(check.look(example))
    for check in chosen.checks.values():
        note(check.finish())
    return found
