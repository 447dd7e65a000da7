"""What tuning cost elsewhere: base and tuned on general rows, which have nothing to do with the task.

Texts are cut into passages, questions are asked as they are. The loss is called small where the whole interval of the
difference lies within the margin (non-inferiority), and forgetting where all of it lies beyond.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tunesmith.data.general import read_general
from tunesmith.data.pack import build_packs
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example, Sequence
from tunesmith.evaluate.metrics import METRICS
from tunesmith.evaluate.result import Evaluation, drawn
from tunesmith.evaluate.run import System, evaluate_systems, reference_of
from tunesmith.evaluate.settings import EvaluateSettings
from tunesmith.evaluate.statistics import decimals
from tunesmith.models.load import Model
from tunesmith.models.readout import target_divergences
from tunesmith.objectives.base import Objective
from tunesmith.objectives.causal import Causal
from tunesmith.objectives.instruction import Instruction

WATCHED_ROWS = 32  # read at a time; a signal is looked for between
PACK_TOKENS = 4096
MAX_FLIPS = 50


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
    objective = _objective(examples)
    places = [str(example.origin) for example in examples]
    found = evaluate_systems(
        [tuned, base],
        examples=examples,
        template=template,
        objective=objective,
        settings=_settings(settings),
        run=run,
        data=str(settings.general),
        cluster_of=(lambda example: str(example.origin)) if 1 < len(set(places)) < len(places) else None,
        on_progress=lambda text: on_progress(f"general, {text}"),
    )
    entry = entry_of(found, margin=settings.general_margin)
    if base.template is None:  # else the two have different tokens
        rows = _sequences(examples, model=tuned.model, template=template, settings=settings)
        entry["divergence"] = divergence(tuned, base, [sequence for row in rows for sequence in row[1]])
    return entry


def _objective(examples: list[Example]) -> Objective:
    """What reads general rows, whatever the run was tuned for."""
    return Causal() if examples and examples[0].text is not None else Instruction()


def _settings(settings: EvaluateSettings) -> EvaluateSettings:
    """How general rows are chosen and answered."""
    return EvaluateSettings(
        rows=settings.general_rows, max_tokens=settings.max_tokens, batch_rows=settings.batch_rows, seed=settings.seed
    )


def _sequences(
    examples: list[Example], *, model: Model, template: ChatTemplate, settings: EvaluateSettings
) -> list[tuple[Example, list[Sequence]]]:
    """The rows that are read, with their sequences; questions that do not fit into the context are left out."""
    room = model.room_tokens
    found = _objective(examples).sequences(examples, template=template, max_tokens=room)
    by_row = {id(example): sequences for example, sequences in zip(examples, found, strict=True)}
    fitting = [e for e in examples if max(s.num_context_tokens for s in by_row[id(e)]) <= room]
    return [(e, by_row[id(e)]) for e in drawn(fitting, settings=_settings(settings))]


def divergence(tuned: System, base: System, sequences: list[Sequence]) -> float:
    """KL(base || tuned) in nats, the mean over all targets: how far tuning moved what comes next."""
    total, count = 0.0, 0
    with tuned.model.evaluating(), base.model.evaluating(), torch.no_grad():
        for pack in build_packs(sequences, max_tokens=PACK_TOKENS):
            with base.switched():
                before_ND = base.model.hidden_at(pack)
            moved_N = target_divergences(
                tuned.model.hidden_at(pack),
                head=tuned.model.head,
                softcap=tuned.model.softcap,
                teacher_ND=before_ND,
                teacher_head=base.model.head,
                teacher_softcap=base.model.softcap,
                temperature=1.0,
                reverse=False,
            )
            total, count = total + float(moved_N.double().sum()), count + len(moved_N)
    return total / count


class Watched:
    """The bits a byte that general rows cost a model while it is tuned: what train/loop.py watches."""

    def __init__(self, model: Model, *, settings: EvaluateSettings, template: ChatTemplate):
        assert settings.general is not None
        self.model = model
        rows = _sequences(read_general(settings.general), model=model, template=template, settings=settings)
        self._rows = [sequences for _, sequences in rows]
        self._bytes = sum(max(1, len(reference_of(example, template=template).encode())) for example, _ in rows)

    def __call__(self, stop: Callable[[], bool]) -> float | None:
        """Bits a byte; None where `stop` said so."""
        nats = 0.0
        with self.model.evaluating():
            for start in range(0, len(self._rows), WATCHED_ROWS):
                if stop():
                    return None
                some = [replace(s, row=0) for sequences in self._rows[start : start + WATCHED_ROWS] for s in sequences]
                nats -= float(self.model.row_logprobs(some, num_rows=1, max_tokens=PACK_TOKENS)[0])
        return nats / self._bytes / float(np.log(2))


def entry_of(found: Evaluation, *, margin: float) -> dict[str, Any]:
    """The first metric's difference against the margin, and the rows that were right before."""
    document = found.document
    metric = document["primary"]
    entry = document["metrics"][metric]
    difference = entry["differences"]["tuned - base"]
    outcome, sentence = non_inferiority(difference, metric=metric, higher=entry["higher_is_better"], margin=margin)
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
    difference: dict[str, Any], *, metric: str, higher: bool, margin: float, against: str = "base"
) -> tuple[str, str]:
    """("kept" | "lost" | "undecided", a sentence): whether tuned is worse than another by no more than the margin.

    Decided by the 95 % interval of the difference, which is a one-sided test at 2.5 %. `higher`: a higher score is better.
    """
    sign = -1.0 if higher else 1.0
    worse = sorted(sign * difference[end] for end in ("low", "high"))
    places = max(decimals(worse[1] - worse[0]), decimals(margin))
    value, low, high = (f"{difference[key]:+.{places}f}" for key in ("value", "low", "high"))
    evidence = f"{metric} {value}, 95 % interval {low} to {high}"
    if worse[1] <= margin:
        return "kept", f"tuned is not worse than {against} by more than {margin:g} ({evidence})"
    if worse[0] > margin:
        return "lost", f"tuned is worse than {against} by more than {margin:g} ({evidence})"
    return "undecided", f"whether tuned is worse than {against} by more than {margin:g} is not decided ({evidence})"
