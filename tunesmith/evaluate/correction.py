"""Several metrics of one comparison: p-values that hold together, and how many metrics are better or worse.

The metrics of one pair of systems are a family: their p-values are adjusted by Holm's method (1979), so that one false
finding or more among them comes up at most 5 % of the time, however the metrics depend on each other.
"""

from collections.abc import Mapping
from typing import Any

from tunesmith.evaluate.statistics import SIGNIFICANCE, holm


def with_holm(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The "metrics" of evaluation.json with `p_holm` beside every `p`."""
    pairs = dict.fromkeys(pair for entry in metrics.values() for pair in entry["differences"])
    adjusted: dict[tuple[str, str], float] = {}
    for pair in pairs:
        names = [name for name, entry in metrics.items() if pair in entry["differences"]]
        found = holm([metrics[name]["differences"][pair]["p"] for name in names])
        adjusted |= {(name, pair): p for name, p in zip(names, found, strict=True)}
    return {
        name: entry
        | {"differences": {pair: d | {"p_holm": adjusted[name, pair]} for pair, d in entry["differences"].items()}}
        for name, entry in metrics.items()
    }


def outcome(difference: Mapping[str, Any], *, higher_is_better: bool, p: str = "p") -> str:
    """`better`, `worse` or `undecided`: decided where the interval excludes 0 and `p` (`p` or `p_holm`) is below 0.05."""
    if difference[p] >= SIGNIFICANCE or difference["low"] <= 0 <= difference["high"]:
        return "undecided"
    return "better" if (difference["low"] > 0) == higher_is_better else "worse"


def corrected(metrics: Mapping[str, Any], *, pair: str) -> dict[str, Any] | None:
    """On which metrics the first system of `pair` is better and worse after correction; None for a single metric.

    metrics: as `with_holm` gives them.
    """
    shown = {name: entry for name, entry in metrics.items() if pair in entry["differences"]}
    if len(shown) < 2:
        return None
    found: dict[str, list[str]] = {"better": [], "worse": [], "undecided": []}
    for name, entry in shown.items():
        difference, higher = entry["differences"][pair], entry["higher_is_better"]
        found[outcome(difference, higher_is_better=higher, p="p_holm")].append(name)
    ours, _, theirs = pair.partition(" - ")
    counts = [f"{word} on {_counted(found[word])}" for word in ("better", "worse")]
    sentence = (
        f"after Holm's correction for {len(shown)} metrics, {ours} against {theirs} is {', '.join(counts)} "
        f"and undecided on {len(found['undecided'])}"
    )
    return {"pair": pair, **found, "sentence": sentence}


def _counted(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names)})" if names else "none"
