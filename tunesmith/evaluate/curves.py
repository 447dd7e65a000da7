"""Coordinates of the report's drawings; the template turns them into SVG."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.evaluate.statistics import decimals
from tunesmith.evaluate.texts import number_text, read_lines


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps numbers low..high to coordinates start..end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(self.start + share * (self.end - self.start), 1)


def ticks(low: float, high: float, *, most: int = 6) -> list[float]:
    """Round numbers within low..high, at most `most`: steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / most
    if not raw > 1e-300:  # also where they differ by less than powers of ten can say
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (power * factor) <= most - 1)
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


CHART = {"width": 760, "height": 300, "left": 58, "right": 96, "top": 14, "bottom": 40}
LABEL_GAP = 20  # of the names at the lines' ends
MAX_POINTS = 600


def curves(path: Path, *, best_step: int | None) -> dict[str, Any] | None:
    """Training and validation loss against steps, and smaller curves of whatever else every step recorded."""
    steps: dict[int, dict[str, Any]] = {}
    for record in read_lines(path):  # a resumed run writes some steps twice; the later line is the one that counts
        steps.setdefault(record["step"], {}).update(record)
    training = _series(steps, "loss")
    validation = _series(steps, "validation_loss")
    if not training and not validation:
        return None
    smooth = _smoothed(training)
    heights = [y for _, y in smooth + validation]
    low, high = min(heights), max(heights)
    pad = 0.06 * (high - low) or 0.5
    c = CHART
    across = Scale(0, max(x for x, _ in training + validation), start=c["left"], end=c["width"] - c["right"])
    up = Scale(max(0.0, low - pad), high + pad, start=c["height"] - c["bottom"], end=c["top"])
    lines: list[dict[str, Any]] = []
    for kind, label, series in (("train", "training", smooth), ("validation", "validation", validation)):
        if series:
            points = _points(series, across=across, up=up)
            dots = points if kind == "validation" and len(points) <= 60 else []
            lines.append({"kind": kind, "label": label, "points": points, "dots": dots, "label_y": points[-1][1]})
    if len(lines) == 2 and abs(gap := lines[0]["label_y"] - lines[1]["label_y"]) < LABEL_GAP:
        shift = (LABEL_GAP - abs(gap)) / 2 * (1 if gap >= 0 else -1)
        lines[0]["label_y"] += shift
        lines[1]["label_y"] -= shift
    y_ticks = ticks(up.low, up.high)
    places = decimals((y_ticks[1] - y_ticks[0]) * 10) if len(y_ticks) > 1 else 2
    return {
        **c,
        "raw": _points(training, across=across, up=up),
        "lines": lines,
        "x_ticks": [(across(x), f"{x:,.0f}") for x in ticks(across.low, across.high) if x == int(x)],
        "y_ticks": [(up(y), f"{y:.{places}f}") for y in y_ticks],
        "best": across(best_step) if best_step is not None and validation else None,
        "small": [
            small for key, label in SMALL_CURVES.items() if (small := _small_curve(_series(steps, key), label=label))
        ],
    }


COLUMNS = CHART | {"height": 200, "right": 16}


def columns(bins: list[dict[str, int]], *, most: int) -> dict[str, Any]:
    """A histogram of {least, most, rows}: `most` columns of one width, and one for all beyond, if any."""
    c, width, first = COLUMNS, bins[0]["most"] + 1 - bins[0]["least"], bins[0]["least"]
    across = Scale(first, first + len(bins) * width, start=c["left"], end=c["width"] - c["right"])
    up = Scale(0, max(found["rows"] for found in bins), start=c["height"] - c["bottom"], end=c["top"])
    drawn = [
        {
            "x": across(first + number * width),
            "y": up(found["rows"]),
            "width": round(across(first + width) - across(first) - 1, 1),
            "height": round(up(0) - up(found["rows"]), 1),
            "text": f"{found['least']:,} to {found['most']:,} tokens: {found['rows']:,}",
            "over": number == most,
        }
        for number, found in enumerate(bins)
    ]
    return {
        **c,
        "columns": drawn,
        "x_ticks": [(across(x), f"{x:,.0f}") for x in ticks(first, first + min(len(bins), most) * width)],
        "y_ticks": [(up(y), f"{y:,.0f}") for y in ticks(0, up.high, most=5) if y == int(y)],
        "over": bins[most] if len(bins) > most else None,
    }


SMALL_CURVES = {
    "general_bits_per_byte": "bits a byte, general rows",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
}
SMALL = {"width": 220, "height": 56}


def _series(steps: Mapping[int, Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) in the order of steps; what is missing or not finite is left out."""
    found = ((step, steps[step].get(key)) for step in sorted(steps))
    return [(float(step), float(value)) for step, value in found if value is not None and math.isfinite(value)]


def _smoothed(series: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean of the points around each, about a twentieth of the run; a centred window does not lag behind."""
    half = len(series) // 40
    sums = np.concatenate([[0.0], np.cumsum([y for _, y in series])])
    smooth = []
    for place, (x, _) in enumerate(series):
        reach = min(half, place, len(series) - 1 - place)
        start, end = place - reach, place + reach + 1
        smooth.append((x, float(sums[end] - sums[start]) / (end - start)))
    return smooth


def _points(series: list[tuple[float, float]], *, across: Scale, up: Scale) -> list[tuple[float, float]]:
    """Coordinates of at most MAX_POINTS points; every n-th of a longer series, and its last."""
    stride = math.ceil(len(series) / MAX_POINTS)
    kept = series[::stride] if stride > 1 else series
    if stride > 1 and kept[-1] != series[-1]:
        kept = [*kept, series[-1]]
    return [(across(x), up(y)) for x, y in kept]


def _small_curve(series: list[tuple[float, float]], *, label: str) -> dict[str, Any] | None:
    if len(series) < 2:
        return None
    values = [y for _, y in series]
    across = Scale(series[0][0], series[-1][0], start=2, end=SMALL["width"] - 2)
    up = Scale(min(values), max(values), start=SMALL["height"] - 3, end=3)
    return {
        "label": label,
        "points": _points(series, across=across, up=up),
        "low": number_text(float(f"{min(values):.3g}")),
        "high": number_text(float(f"{max(values):.3g}")),
        **SMALL,
    }
