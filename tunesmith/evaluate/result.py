"""What an evaluation says: scores, intervals, differences, the verdict, and every row beside its answers."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data.answers import Answer
from tunesmith.data.types import Example, Message
from tunesmith.errors import DataError
from tunesmith.evaluate.correction import corrected, with_holm
from tunesmith.evaluate.groups import by_group
from tunesmith.evaluate.metric import Metric
from tunesmith.evaluate.metrics import METRICS
from tunesmith.evaluate.own import is_own, own_digest
from tunesmith.evaluate.settings import EvaluateSettings
from tunesmith.evaluate.statistics import compare, interval, verdict
from tunesmith.storage import write_json, write_text

UNTUNED = ("base", "few_shot", "retrieval")  # systems in the order in which they are shown, before the others


@dataclass
class Answers:
    """What a system made of the rows: its answers, the likelihood of the references, or what its head says."""

    texts: list[str] | None = None
    samples: list[list[str]] | None = None
    nll_B: np.ndarray = field(default_factory=lambda: np.zeros(0))
    tokens_B: np.ndarray = field(default_factory=lambda: np.zeros(0))
    predicted: Answer | None = None
    prompt_tokens: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`. `document` is what `--json` prints and `evaluation.json` holds."""

    document: dict[str, Any]
    rows: list[dict[str, Any]] = field(repr=False, default_factory=list)
    scores: dict[str, dict[str, np.ndarray]] = field(
        repr=False, default_factory=dict
    )  # by metric and system, row by row
    metrics: dict[str, Metric] = field(repr=False, default_factory=lambda: METRICS)

    @property
    def verdict(self) -> str:
        """`better`, `worse` or `undecided`."""
        return str(self.document["verdict"])

    @property
    def sentence(self) -> str:
        """The verdict in words, with its evidence."""
        return str(self.document["sentence"])

    def value(self, metric: str, *, system: str = "tuned") -> float:
        """One score."""
        return float(self.document["metrics"][metric]["systems"][system]["value"])

    def as_dict(self) -> dict[str, Any]:
        """The document."""
        return self.document

    def write(self, folder: Path) -> None:
        """evaluation.json and examples.jsonl."""
        write_text(folder / "examples.jsonl", text="".join(json.dumps(r, ensure_ascii=False) + "\n" for r in self.rows))
        write_json(folder / "evaluation.json", value=self.document)


def concluded(
    answers: dict[str, Answers],
    scores: dict[str, dict[str, np.ndarray]],
    *,
    metrics: dict[str, Metric],
    examples: list[Example],
    prompts: list[list[Message]],
    references: list[str],
    settings: EvaluateSettings,
    run: str,
    data: str,
    num_shots: int,
    num_left_out: int,
    clusters: list[str] | None = None,
    looked_up: dict[str, list[list[str]]] | None = None,
) -> Evaluation:
    """The evaluation: `scores` by metric and system, the first metric and the first system at the head of the verdict."""
    compared = with_holm(
        {
            name: _compared(rows, metric=metrics[name], seed=settings.seed, clusters=clusters)
            for name, rows in scores.items()
        }
    )
    document = _document(
        compared, answers, run=run, data=data, primary=next(iter(scores)), rows=len(examples), seed=settings.seed
    )
    if settings.samples is not None:
        document["pass_at"] = settings.model_dump(include={"pass_at", "samples", "temperature"})
    if own := {name: own_digest(name) for name in scores if is_own(name)}:
        document["own_metrics"] = own
    pair = next(iter(compared[document["primary"]]["differences"]), None)
    if pair is not None and (found := corrected(compared, pair=pair)) is not None:
        document["corrected"] = found
    keys = "".join(example.key for example in examples)
    document["few_shot_examples"] = num_shots
    document["rows_sha256"] = hashlib.sha256(keys.encode()).hexdigest()  # what two runs must share to be compared
    document["left_out_rows"] = num_left_out
    if settings.groups is not None:
        document["groups"] = by_group(
            scores, metrics=metrics, examples=examples, settings=settings.groups, seed=settings.seed
        )
    values = {s: {name: metrics[name].row_values(rows[s]) for name, rows in scores.items()} for s in answers}
    rows = _row_table(examples, references, answers, values, prompts)
    for system, origins_B in (looked_up or {}).items():
        for row, origins in zip(rows, origins_B, strict=True):
            row.setdefault("looked_up", {})[system] = origins
    return Evaluation(document, rows, scores, metrics)


def drawn(examples: list[Example], *, settings: EvaluateSettings) -> list[Example]:
    """`settings.rows` of them by the seed, in order; all by default. DataError where there are fewer than two."""
    if len(examples) < 2:
        found = "no held-out row" if not examples else "one held-out row alone"
        raise DataError(
            f"{found} fits into the model's context, and one row says nothing about luck",
            hint="give more or shorter rows: --data FILE",
        )
    if settings.rows is None or len(examples) <= settings.rows:
        return examples
    chosen = np.random.default_rng(settings.seed).permutation(len(examples))[: settings.rows]
    return [examples[i] for i in sorted(chosen)]


def _compared(
    rows: dict[str, np.ndarray], *, metric: Metric, seed: int, clusters: list[str] | None = None
) -> dict[str, Any]:
    first, *others = rows
    drawing: dict[str, Any] = {"seed": seed, "clusters": clusters}
    return {
        "higher_is_better": metric.higher_is_better,
        "systems": {s: interval(r, aggregate=metric.aggregate, **drawing).as_dict() for s, r in rows.items()},
        "differences": {
            f"{first} - {other}": compare(rows[first], rows[other], metric=metric, **drawing) for other in others
        },
    }


def _document(
    metrics: dict[str, Any],
    answers: dict[str, Answers],
    *,
    run: str,
    data: str,
    primary: str,
    rows: int,
    seed: int,
) -> dict[str, Any]:
    names = list(answers)
    decided = ("undecided", "there is nothing to compare with")
    if len(names) > 1:
        decided = verdict(metrics, primary=primary, rows=rows, systems=(names[0], names[1]))
    order = [n for n in UNTUNED if n in names] + [n for n in names if n not in UNTUNED]
    return {
        "run": run,
        "data": data,
        "rows": rows,
        "systems": order,
        "primary": primary,
        "metrics": metrics,
        "verdict": decided[0],
        "sentence": decided[1],
        "seed": seed,
        "costs": {
            name: {
                "seconds": round(a.seconds, 3),
                "tokens_per_prompt": round(a.prompt_tokens / rows, 2),
                "tokens_per_answer": round(a.answer_tokens / rows, 2),
            }
            for name, a in answers.items()
        },
    }


def _row_table(
    examples: list[Example],
    references: list[str],
    answers: dict[str, Answers],
    values: dict[str, dict[str, np.ndarray]],
    prompts: list[list[Message]],
) -> list[dict[str, Any]]:
    table = []
    for i, example in enumerate(examples):
        prompt = [{"role": m.role, "content": m.content} for m in prompts[i]]
        table.append(
            {
                "row": i,
                "origin": str(example.origin),
                "prompt": prompt,
                "reference": references[i],
                "outputs": {s: a.texts[i] for s, a in answers.items() if a.texts is not None},
                "scores": {s: {name: float(v[i]) for name, v in by.items()} for s, by in values.items()},
            }
            | ({"columns": example.columns} if example.columns else {})
        )
    return table
