"""Regression: a number for a text, such as how long a ticket will take, with an interval.

    y' = (g(y) - c) / s,    g the identity or log(1 + y);   c, s mean and standard deviation of the training rows

    squared:   (z - y')^2 / 2          absolute: |z - y'|
    huber:     the first up to |z - y'| = d, beyond it d (|z - y'| - d/2)              (Huber 1964)
    quantile:  sum_q max(q (y' - z_q), (q - 1)(y' - z_q))                             (Koenker & Bassett 1978)

The interval is a conformal one: as wide as the validation rows need it to be for a share `coverage` of them to lie inside
(split conformal prediction, Lei et al. 2018, algorithm 2; of quantiles, Romano et al. 2019, eq. 6 to 8). It then holds that
share of new rows of the same kind on average, whatever the model is worth.

Shapes: B rows, S sequences, K outputs.
"""

import contextlib
import math
from collections.abc import Iterable
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from tunesmith.data.answers import Floats, Numbers
from tunesmith.data.pack import Pack
from tunesmith.data.types import Example
from tunesmith.errors import DataError
from tunesmith.objectives.base import Loss, Readout, row_error
from tunesmith.objectives.headed import Calibration, Headed, known, label_of


class Regression(Headed):
    """A number for a text, with an interval."""

    kind: Literal["regression"] = "regression"
    summary: ClassVar[str] = "a number for a text, such as a time, with an interval"
    metrics: ClassVar[tuple[str, ...]] = ("mae", "rmse", "coverage", "interval_width")
    baselines: ClassVar[tuple[str, ...]] = ("median", "mean")

    error: Literal["huber", "squared", "absolute", "quantile"] = Field(
        default="huber", description="what is minimised; quantile learns the interval too"
    )
    delta: float = Field(default=1.0, gt=0, description="where huber becomes linear, in standard deviations")
    scale: Literal["linear", "log"] = Field(default="linear", description="log: ratios count and not differences")
    coverage: float = Field(default=0.9, gt=0, lt=1, description="share of the numbers that intervals shall hold")
    centre: float | None = Field(default=None, description="mean of the scaled numbers; by default the training rows'")
    spread: float | None = Field(default=None, gt=0, description="their standard deviation; likewise")

    @model_validator(mode="after")
    def _no_idle_setting(self) -> Self:
        if "delta" in self.model_fields_set and self.error != "huber" and self.delta != 1.0:
            raise ValueError(f"delta has no effect on {self.error}; it belongs to error: huber")
        return self

    @property
    def num_outputs(self) -> int:
        """One, or low, middle and high."""
        return 3 if self.error == "quantile" else 1

    @property
    def quantiles(self) -> tuple[float, float, float]:
        """Low, middle and high."""
        return (1 - self.coverage) / 2, 0.5, (1 + self.coverage) / 2

    def fitted(self, examples: Iterable[tuple[Example, bool]]) -> Self:
        """Mean and standard deviation of the training rows."""
        if self.centre is not None and self.spread is not None:
            return self
        numbers = []
        for example, trained in examples:
            if trained:
                with contextlib.suppress(DataError):  # such a row is refused, or dropped, where it is rendered
                    numbers.append(self._scaled(example))
        centre = float(np.mean(numbers)) if numbers else 0.0
        spread = float(np.std(numbers)) if numbers else 1.0
        update = {"centre": self.centre if self.centre is not None else centre, "spread": self.spread or spread or 1.0}
        return self.model_copy(update=update)

    def number(self, example: Example) -> float:
        """The row's number. DataError where it has none."""
        label = label_of(example)
        try:
            value = float(label) if isinstance(label, str) else math.nan
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise row_error(example, f"the label is {label!r} and no number", hint="mend the row")
        if self.scale == "log" and value <= -1:
            raise row_error(example, f"the number {value:g} has no logarithm", hint="use objective.scale: linear")
        return value

    def _scaled(self, example: Example) -> float:
        value = self.number(example)
        return math.log1p(value) if self.scale == "log" else value

    def values(self, example: Example) -> list[float]:
        """The scaled number."""
        assert self.centre is not None, "fitted fills it in"
        assert self.spread is not None, "fitted fills it in"
        return [(self._scaled(example) - self.centre) / self.spread]

    def loss(self, readout: Readout, pack: Pack) -> Loss:
        """The error; with the mean absolute one, in standard deviations, as a metric."""
        output_SK = self.pooled(readout)
        truth_S1 = output_SK.new_tensor(np.array([v[0] for v in known(pack)]))[:, None]
        away_SK = truth_S1 - output_SK
        size_SK = away_SK.abs()
        if self.error == "quantile":
            q_K = output_SK.new_tensor(self.quantiles)
            each_S = torch.maximum(q_K * away_SK, (q_K - 1) * away_SK).sum(-1)
        elif self.error == "absolute":
            each_S = size_SK[:, 0]
        elif self.error == "squared":
            each_S = away_SK[:, 0] ** 2 / 2
        else:
            beyond_SK = self.delta * (size_SK - self.delta / 2)
            each_S = torch.where(size_SK <= self.delta, away_SK**2 / 2, beyond_SK)[:, 0]
        middle = size_SK.detach()[:, self.num_outputs // 2]
        return Loss(each_S.sum(), self.count(pack), {"mae": (float(middle.sum()), float(len(middle)))})

    def calibrated(self, output_BK: Floats, values: list[np.ndarray]) -> Calibration:
        """By how much the interval is widened on both sides, in standard deviations: the conformal quantile."""
        truth_B = np.array([v[0] for v in values], dtype=np.float64)
        low_B, high_B = self._bounds(output_BK)
        missed_B = np.maximum(low_B - truth_B, truth_B - high_B)
        rank = math.ceil((len(missed_B) + 1) * self.coverage)
        return {"margin": float(np.sort(missed_B)[rank - 1])} if rank <= len(missed_B) else {}

    def _bounds(self, output_BK: Floats) -> tuple[Floats, Floats]:
        ordered_BK = np.sort(np.asarray(output_BK, dtype=np.float64), axis=1)  # quantiles that cross are put in order
        return ordered_BK[:, 0], ordered_BK[:, -1]

    def predictions(self, output_BK: Floats, *, calibration: Calibration, counts: np.ndarray | None = None) -> Numbers:
        """Estimates on the scale of the rows; the interval is unknown where too few rows were there to calibrate it."""
        middle_B = np.sort(output_BK, axis=1)[:, self.num_outputs // 2]
        low_B, high_B = self._bounds(output_BK)
        margin = calibration.get("margin", math.nan)  # it may be below zero, but no interval is empty
        low_B, high_B = np.minimum(low_B - margin, middle_B), np.maximum(high_B + margin, middle_B)
        middle_B, low_B, high_B = (self._restored(x) for x in (middle_B, low_B, high_B))
        return Numbers(middle_B, low_B, high_B, coverage=self.coverage)

    def _restored(self, scaled_B: Floats) -> Floats:
        assert self.centre is not None
        assert self.spread is not None
        found = np.asarray(scaled_B, dtype=np.float64) * self.spread + self.centre
        return np.expm1(found) if self.scale == "log" else found
