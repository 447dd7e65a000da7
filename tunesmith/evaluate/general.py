"""What tuning cost elsewhere: base and tuned on general rows, which have nothing to do with the task.

Texts are cut into passages, questions are asked as they are. The loss is called small where the whole interval of the
difference lies within the margin (non-inferiority), and forgetting where all of it lies beyond.
"""

from collections.abc import Callable
from typing import Any

from tunesmith.data.formats import read_examples
from tunesmith.data.settings import DataSettings
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example
from tunesmith.errors import DataError
from tunesmith.evaluate.metrics import METRICS
from tunesmith.evaluate.result import Evaluation
from tunesmith.evaluate.run import System, evaluate_systems
from tunesmith.evaluate.settings import EvaluateSettings
from tunesmith.evaluate.statistics import decimals
from tunesmith.objectives.base import Objective
from tunesmith.objectives.causal import Causal
from tunesmith.objectives.instruction import Instruction

PASSAGE_CHARACTERS = 1200
MAX_FLIPS = 50


def read_general(path: str) -> list[Example]:
    """The rows of a file: conversations as they are, texts in passages, which keep the place of their text.

    Raises DataError where a row cannot be read, or texts and questions stand in one file.
    """
    rows = read_examples(path, settings=DataSettings(train=path))
    if len({row.text is None for row in rows}) > 1:
        raise DataError(
            "texts and questions stand in one file", file=path, hint="give evaluate.general one kind of row"
        )
    return [part for row in rows for part in ([row] if row.text is None else _passages(row))]


def _passages(row: Example) -> list[Example]:
    """A text in pieces that end with a line, where it has lines."""
    assert row.text is not None
    pieces, held = [], ""
    for line in row.text.splitlines(keepends=True):
        while len(line) > PASSAGE_CHARACTERS:
            pieces.append(held + line[: PASSAGE_CHARACTERS - len(held)])
            line, held = line[PASSAGE_CHARACTERS - len(held) :], ""
        if len(held) + len(line) > PASSAGE_CHARACTERS:
            pieces.append(held)
            held = ""
        held += line
    return [Example(row.origin, "text", text=piece) for piece in [*pieces, held] if piece.strip()]


def prove_general(
    tuned: System,
    base: System,
    examples: list[Example],
    *,
    settings: EvaluateSettings,
    template: ChatTemplate,
    run: str,
    on_progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The document's entry `general`: what base and tuned make of the rows of `settings.general`."""
    objective: Objective = Causal() if examples and examples[0].text is not None else Instruction()
    places = [str(example.origin) for example in examples]
    found = evaluate_systems(
        [tuned, base],
        examples=examples,
        template=template,
        objective=objective,
        settings=EvaluateSettings(
            rows=settings.general_rows,
            max_tokens=settings.max_tokens,
            batch_rows=settings.batch_rows,
            seed=settings.seed,
        ),
        run=run,
        data=str(settings.general),
        cluster_of=(lambda example: str(example.origin)) if 1 < len(set(places)) < len(places) else None,
        on_progress=lambda text: on_progress(f"general, {text}"),
    )
    return entry_of(found, margin=settings.general_margin)


def entry_of(found: Evaluation, *, margin: float) -> dict[str, Any]:
    """The first metric's difference against the margin, and the rows that were right before."""
    document = found.document
    metric = document["primary"]
    entry = document["metrics"][metric]
    difference = entry["differences"]["tuned - base"]
    outcome, sentence = non_inferiority(difference, metric=metric, margin=margin)
    flips = []
    if METRICS[metric].right_or_wrong:
        scored = ((row, *(row["scores"][system][metric] for system in ("base", "tuned"))) for row in found.rows)
        flips = [
            {"origin": row["origin"], "prompt": row["prompt"], "reference": row["reference"], "outputs": row["outputs"]}
            for row, before, after in scored
            if before > after
        ]
    return {
        "data": document["data"],
        "rows": document["rows"],
        "metric": metric,
        "higher_is_better": entry["higher_is_better"],
        "systems": entry["systems"],
        "difference": difference,
        "margin": margin,
        "outcome": outcome,
        "sentence": sentence,
        "right_before": len(flips),
        "flips": flips[:MAX_FLIPS],
    }


def non_inferiority(
    difference: dict[str, Any], *, metric: str, margin: float, against: str = "base"
) -> tuple[str, str]:
    """("kept" | "lost" | "undecided", a sentence): whether tuned is worse than another by no more than the margin.

    Decided by the 95 % interval of the difference, which is a one-sided test at 2.5 %.
    """
    sign = -1.0 if METRICS[metric].higher_is_better else 1.0
    worse = sorted(sign * difference[end] for end in ("low", "high"))
    places = max(decimals(worse[1] - worse[0]), decimals(margin))
    value, low, high = (f"{difference[key]:+.{places}f}" for key in ("value", "low", "high"))
    evidence = f"{metric} {value}, 95 % interval {low} to {high}"
    if worse[1] <= margin:
        return "kept", f"tuned is not worse than {against} by more than {margin:g} ({evidence})"
    if worse[0] > margin:
        return "lost", f"tuned is worse than {against} by more than {margin:g} ({evidence})"
    return "undecided", f"whether tuned is worse than {against} by more than {margin:g} is not decided ({evidence})"
