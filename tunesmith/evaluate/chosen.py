"""The metrics of an evaluation, each with what it needs from the settings read and checked."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from tunesmith.data.types import Example
from tunesmith.evaluate.adherence import compiled, read_schema
from tunesmith.evaluate.code import enforced_seconds
from tunesmith.evaluate.metric import Metric
from tunesmith.evaluate.metrics import METRICS
from tunesmith.evaluate.own import is_own, own_metric
from tunesmith.evaluate.settings import EvaluateSettings

READ: dict[str, Callable[[Any], Any]] = {
    "json_schema": read_schema,
    "pattern": compiled,
    "code_seconds": enforced_seconds,
    "pass_at": int,
}


def chosen(names: Iterable[str], *, settings: EvaluateSettings) -> dict[str, Metric]:
    """The metrics of these names, ready to score. RecipeError or NotFoundError where what one needs is not usable."""
    return {name: own_metric(name) if is_own(name) else _ready(METRICS[name], settings=settings) for name in names}


def _ready(metric: Metric, *, settings: EvaluateSettings) -> Metric:
    given = {name: READ[name](getattr(settings, name)) for name in metric.needs if name in READ}
    return replace(metric, score=partial(metric.score, **given)) if given else metric


def with_examples(metric: Metric, examples: list[Example]) -> dict[str, list[Example]]:
    """The keyword with the rows, for a metric that reads them."""
    return {"examples": examples} if "examples" in metric.needs else {}
