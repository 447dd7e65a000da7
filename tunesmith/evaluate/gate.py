"""`evaluate.gate`: what must hold before a run may be shipped, as rules that say why they let it pass or do not.

    exact_match: "> base"             better than the base: the interval of the difference excludes zero and p < 0.05
    exact_match: "> 0.8"              the whole interval of the score lies above
    log_loss: "< 0.5"                 or below
    exact_match: "not worse by 0.02"  non-inferior to the base; "not worse than few_shot by 0.02" to another system
    general: "not worse by 0.02"      the same on the rows of evaluate.general

All rules must hold, so no correction for their number is needed (an intersection-union test; Berger 1982).
"""

import re
from typing import Any

from tunesmith.errors import RecipeError
from tunesmith.evaluate.general import non_inferiority
from tunesmith.evaluate.metrics import METRICS
from tunesmith.evaluate.own import is_own
from tunesmith.evaluate.statistics import SIGNIFICANCE, decimals, p_text

GENERAL = "general"
NUMBER = r"(\d+(?:\.\d*)?|\.\d+)(?:e([+-]?\d+))?"
LIMIT = re.compile(rf"([<>])\s*(-?{NUMBER})")
BETTER = re.compile(r">\s*([a-z_]+)")
NOT_WORSE = re.compile(rf"not worse(?: than ([a-z_]+))? by ({NUMBER})")


def check_rule(metric: str, rule: str) -> None:
    """ValueError for a rule that means nothing."""
    if metric != GENERAL and metric not in METRICS and not is_own(metric):
        raise ValueError(f"there is no metric '{metric}'")
    if not (LIMIT.fullmatch(rule) or BETTER.fullmatch(rule) or NOT_WORSE.fullmatch(rule)):
        raise ValueError(f"'{rule}' is no rule; write '> base', '> 0.8', '< 0.5' or 'not worse by 0.02'")


def judged(document: dict[str, Any], gate: dict[str, str]) -> dict[str, Any]:
    """The document's entry `gate`: `{"passed", "rules": [{"metric", "rule", "passed", "because"}]}`.

    Raises RecipeError where a rule asks for what was not measured.
    """
    rules = []
    for metric, rule in gate.items():
        passed, because = _judge(document, metric=metric, rule=rule)
        rules.append({"metric": metric, "rule": rule, "passed": passed, "because": because})
    return {"passed": all(rule["passed"] for rule in rules), "rules": rules}


def _judge(document: dict[str, Any], *, metric: str, rule: str) -> tuple[bool, str]:
    entry = _entry(document, metric=metric)
    name = entry.get("metric", metric)
    if limit := LIMIT.fullmatch(rule):
        return _beyond(entry["systems"]["tuned"], above=limit[1] == ">", limit=float(limit[2]))
    if better := BETTER.fullmatch(rule):
        return _better(_difference(entry, metric=metric, system=better[1]), higher=entry["higher_is_better"])
    asked = NOT_WORSE.fullmatch(rule)
    assert asked is not None, "check_rule let it pass"
    system = asked[1] or "base"
    difference = _difference(entry, metric=metric, system=system)
    outcome, sentence = non_inferiority(
        difference, metric=name, higher=entry["higher_is_better"], margin=float(asked[2]), against=system
    )
    return outcome == "kept", sentence


def _entry(document: dict[str, Any], *, metric: str) -> dict[str, Any]:
    found: dict[str, Any] | None = document.get(GENERAL) if metric == GENERAL else document["metrics"].get(metric)
    if found is None:
        hint = "name a file in evaluate.general" if metric == GENERAL else f"add it to evaluate.metrics: {metric}"
        raise RecipeError(f"evaluate.gate: '{metric}' was not measured", hint=hint)
    return found


def _difference(entry: dict[str, Any], *, metric: str, system: str) -> dict[str, Any]:
    pairs = entry["differences"] if "differences" in entry else {"tuned - base": entry["difference"]}
    if f"tuned - {system}" not in pairs:
        there = ", ".join(pair.removeprefix("tuned - ") for pair in pairs)
        raise RecipeError(
            f"evaluate.gate: {metric} was not compared with '{system}'",
            hint=f"there are {there or 'no others'}; evaluate.against chooses",
        )
    found: dict[str, Any] = pairs[f"tuned - {system}"]
    return found


def _beyond(score: dict[str, float], *, above: bool, limit: float) -> tuple[bool, str]:
    places = max(2, decimals(score["high"] - score["low"]))
    told = f"{score['value']:.{places}f}, 95 % interval {score['low']:.{places}f} to {score['high']:.{places}f}"
    return (score["low"] > limit if above else score["high"] < limit), told


def _better(difference: dict[str, Any], *, higher: bool) -> tuple[bool, str]:
    low, high = difference["low"], difference["high"]
    places = max(2, decimals(high - low))
    decided = difference["p"] < SIGNIFICANCE and (low > 0 if higher else high < 0)
    told = f"difference {difference['value']:+.{places}f}, 95 % interval {low:+.{places}f} to {high:+.{places}f}"
    return decided, f"{told}, {p_text(difference['p'])}"
