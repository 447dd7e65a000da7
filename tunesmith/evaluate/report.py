"""One run as one page: `report.html`, self-contained, without scripts, for screen and paper, light and dark.

This file reads the run's folder and turns it into plain values: texts, numbers and coordinates. The template draws
them with autoescaping on, and nothing is ever marked as safe, so no row of data can become markup. The page also
carries a policy that forbids scripts and every request to the network.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tunesmith.errors import NotFoundError
from tunesmith.evaluate.correction import outcome
from tunesmith.evaluate.curves import Scale, curves
from tunesmith.evaluate.examples import Headline, examples
from tunesmith.evaluate.metrics import METRICS
from tunesmith.evaluate.seeds import seeds_of
from tunesmith.evaluate.statistics import NO_WIDTH, decimals, p_text
from tunesmith.evaluate.stopping import hindsight
from tunesmith.evaluate.texts import (
    ALSO_CHOSE,
    bytes_text,
    clip,
    duration_text,
    number_text,
    read_lines,
    read_optional,
    time_text,
)
from tunesmith.storage import read_json, write_text

MAX_FOLD = 600  # characters of a text shown before the rest is folded
MAX_DOCUMENT = 40_000  # characters of the recipe
MAX_LEDGER_DETAILS = 200
MAX_FLIPS = 10
MAX_GROUPS = 20


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run's folder and return its path.

    Reads run.json and resolved.json, and recipe.yaml, ledger.json, metrics.jsonl, evaluation.json and examples.jsonl
    where they exist. Raises NotFoundError if one of the first two is missing, StorageError if a file is damaged.
    """
    run_folder = Path(run_folder)
    try:
        run, resolved = read_json(run_folder / "run.json"), read_json(run_folder / "resolved.json")
    except NotFoundError as error:
        raise NotFoundError(
            f"{run_folder} is not a finished run: it holds no {Path(str(error.file)).name}",
            hint="`tunesmith runs` lists the runs; `tunesmith train RECIPE --resume` finishes one",
        ) from error
    evaluation = read_optional(run_folder / "evaluation.json")
    headline = Headline.of(evaluation)
    recipe = run_folder / "recipe.yaml"
    view = {
        "name": run.get("name") or run.get("run") or run_folder.name,
        "run": run,
        "created": time_text(run["created"]) if run.get("created") else "",
        "facts": _facts(run),
        "verdict": _verdict(evaluation, headline=headline, name=run.get("run") or run_folder.name),
        "scores": _scores(evaluation) if evaluation else None,
        "seeds": seeds_of(run_folder, evaluation=evaluation) if evaluation else None,
        "differences": _differences(evaluation, headline=headline) if evaluation else None,
        "judge": evaluation.get("judge") if evaluation else None,
        "general": _general(evaluation["general"]) if evaluation and "general" in evaluation else None,
        "gate": (evaluation or {}).get("gate"),
        "memorised": (evaluation or {}).get("memorised"),
        "groups": _groups(evaluation) if evaluation and "groups" in evaluation else None,
        "swaps": (evaluation or {}).get("swaps"),
        "stopping": hindsight(read_lines(run_folder / "metrics.jsonl"), best_step=run.get("best_step")),
        "curves": curves(run_folder / "metrics.jsonl", best_step=run.get("best_step")),
        "examples": examples(run_folder / "examples.jsonl", headline=headline),
        "ledger": ledger_view(read_optional(run_folder / "ledger.json")),
        "recipe": clip(recipe.read_text(encoding="utf-8"), MAX_DOCUMENT) if recipe.exists() else None,
        "versions": run.get("versions") or {},
        "settings": dict(_flatten(resolved)),
    }
    path = run_folder / "report.html"
    write_text(path, text=page("report.html", view=view))
    return path


def page(template: str, *, view: Mapping[str, Any]) -> str:
    """The HTML of a template of this folder. Whatever the view holds stays text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.globals["max_fold"] = MAX_FOLD
    return environment.get_template(template).render(view)


STOPPED = {"finished": "ran to the end", "early": "stopped early", "signal": "stopped by a signal"}


def _facts(run: Mapping[str, Any]) -> list[dict[str, str]]:
    """The key numbers: name, value and a note, of whatever run.json holds."""
    facts = []

    def fact(name: str, key: str, text: Any, note: str = "") -> None:
        if run.get(key) is not None:
            facts.append({"name": name, "value": text(run[key]), "note": note})

    share = 100 * run["trainable_parameters"] / run["parameters"] if run.get("parameters") else None
    best = f"best at step {run['best_step']:,}" if run.get("best_step") is not None else ""
    fact("training rows", "rows", number_text)
    fact("steps", "steps", number_text, STOPPED.get(run.get("stopped", ""), ""))
    fact("training loss", "train_loss", lambda value: f"{value:.4f}", "")
    fact("validation loss", "validation_loss", lambda value: f"{value:.4f}", best)
    fact("trained parameters", "trainable_parameters", number_text, f"{share:.3g} % of the model" if share else "")
    fact("tokens", "tokens", number_text, f"{run['target_tokens']:,} trained" if run.get("target_tokens") else "")
    fact(
        "time",
        "seconds",
        duration_text,
        f"{run['tokens_per_second']:,.0f} tokens/s" if run.get("tokens_per_second") else "",
    )
    fact("peak memory", "peak_memory_bytes", bytes_text)
    return facts


# ---- what the evaluation found ---------------------------------------------------------------------------------------


def _outcome(difference: Mapping[str, Any], *, higher_is_better: bool, decides: bool) -> str:
    """By p where the metric decides the verdict, else by p after correction where the document has it."""
    p = "p" if decides or "p_holm" not in difference else "p_holm"
    return outcome(difference, higher_is_better=higher_is_better, p=p)


def _verdict(evaluation: Mapping[str, Any] | None, *, headline: Headline | None, name: str) -> dict[str, Any]:
    """The word, the sentence, and how the same two systems compare on the other metrics."""
    if evaluation is None:
        sentence = f"Not evaluated. `tunesmith evaluate {name}` compares it with its base."
        return {"word": "unknown", "sentence": sentence, "others": [], "corrected": ""}
    others = []
    for metric, entry in evaluation["metrics"].items():
        if headline and metric != headline.metric and headline.pair in entry["differences"]:
            found, higher = entry["differences"][headline.pair], entry["higher_is_better"]
            others.append({"metric": metric, "outcome": _outcome(found, higher_is_better=higher, decides=False)})
    sentence = evaluation.get("corrected", {}).get("sentence", "")
    return {
        "word": evaluation["verdict"],
        "sentence": evaluation["sentence"],
        "others": others,
        "corrected": sentence[:1].upper() + sentence[1:],
    }


def _scores(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as rows, systems as columns: value and interval as texts."""
    rows = []
    for name, entry in evaluation["metrics"].items():
        widths = [score["high"] - score["low"] for score in entry["systems"].values()]
        places = max((decimals(width) for width in widths if width > NO_WIDTH), default=2)
        cells = {
            system: {
                "value": f"{score['value']:.{places}f}",
                "interval": f"{score['low']:.{places}f} to {score['high']:.{places}f}",
            }
            for system, score in entry["systems"].items()
        }
        direction = "higher" if entry["higher_is_better"] else "lower"
        description = METRICS[name].description if name in METRICS else ""
        rows.append({"metric": name, "cells": cells, "direction": direction, "description": description})
    return {
        "systems": evaluation["systems"],
        "rows": rows,
        "num_rows": evaluation["rows"],
        "kind": evaluation["data"] if evaluation["data"] in ("test", "validation") else "other",
        "note": ALSO_CHOSE if evaluation["data"] == "validation" else "",
        "few_shot": evaluation.get("few_shot_choice", {}).get("sentence", ""),
    }


def _general(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What tuning did to general rows: a sentence, both scores, and answers that were right before."""
    places = max(2, *(decimals(score["high"] - score["low"]) for score in entry["systems"].values()))
    flips = [
        {
            "question": flip["prompt"][-1]["content"] if flip["prompt"] else "",
            "reference": flip["reference"],
            "now": flip["outputs"].get("tuned", ""),
            "origin": flip["origin"],
        }
        for flip in entry["flips"][:MAX_FLIPS]
    ]
    return {
        "mark": {"kept": "better", "lost": "worse"}.get(entry["outcome"], "undecided"),
        "sentence": entry["sentence"][:1].upper() + entry["sentence"][1:],
        "data": Path(entry["data"]).name,
        "rows": entry["rows"],
        "metric": entry["metric"],
        "direction": "higher" if entry["higher_is_better"] else "lower",
        "base": f"{entry['systems']['base']['value']:.{places}f}",
        "tuned": f"{entry['systems']['tuned']['value']:.{places}f}",
        "right_before": entry["right_before"],
        "flips": flips,
    }


def _groups(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The first metric of the largest groups, one row each."""
    entry, metric = evaluation["groups"], evaluation["primary"]
    of = entry["metrics"][metric]["systems"]
    rows = [
        {
            "name": group,
            "count": count,
            "scores": [f"{of[s]['groups'][group]['value']:.3g}" for s in evaluation["systems"]],
        }
        for group, count in list(entry["rows"].items())[:MAX_GROUPS]
    ]
    told_apart = any(gap["told_apart"] for gap in (of["tuned"]["gap"],) if gap)
    return {
        "by": entry["by"],
        "metric": metric,
        "systems": evaluation["systems"],
        "rows": rows,
        "left_out": len(entry["rows"]) - len(rows),
        "sentence": entry["sentence"],
        "mark": "worse" if told_apart else "undecided",
    }


def _signed(value: float, places: int) -> str:
    return f"{value:+.{places}f}".replace("-", "−")


INTERVAL_PLOT = {"width": 220, "height": 28}


def _differences(evaluation: Mapping[str, Any], *, headline: Headline | None) -> dict[str, Any]:
    """The differences, grouped by pair of systems, each with the coordinates of its interval; better is to the right.

    Scores with bounds share one scale, as shares of their range; a score without bounds has its own.
    """
    drawn = []
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, metric in evaluation["metrics"].items():
        bounds = METRICS[name].aggregate.bounds if name in METRICS else None
        unit = (bounds[1] - bounds[0] if bounds else 1.0) * (1 if metric["higher_is_better"] else -1)
        for pair, found in metric["differences"].items():
            places = decimals(found["high"] - found["low"])
            smallest = found["detectable"]
            decides = headline is not None and (name, pair) == (headline.metric, headline.pair)
            row: dict[str, Any] = {
                "metric": name,
                "outcome": _outcome(found, higher_is_better=metric["higher_is_better"], decides=decides),
                "value": _signed(found["value"], places),
                "interval": f"{_signed(found['low'], places)} to {_signed(found['high'], places)}",
                "p": p_text(found["p"]),
                "p_holm": p_text(found["p_holm"]) if "p_holm" in found else "",
                "better_rows": found["better_rows"],
                "worse_rows": found["worse_rows"],
                "detectable": f"{smallest:.{decimals(smallest)}f}" if smallest else "–",
            }
            ends = sorted((found["low"] / unit, found["high"] / unit))
            drawn.append((row, bounds is not None, ends[0], found["value"] / unit, ends[1]))
            groups.setdefault(pair.replace(" - ", " − "), []).append(row)
    bounded = [(low, high) for _, is_bounded, low, _, high in drawn if is_bounded] or [(-1.0, 1.0)]
    left, right = max(-low for low, _ in bounded), max(high for _, high in bounded)
    left, right = max(left, 0.2 * right, 1e-9), max(right, 0.2 * left, 1e-9)  # zero stands at one place in all rows
    for row, is_bounded, low, middle, high in drawn:
        zoom = 1.06 * (1.0 if is_bounded else max(-low / left, high / right) or 1.0)
        scale = Scale(-zoom * left, zoom * right, start=0, end=INTERVAL_PLOT["width"])
        row["plot"] = {"low": scale(low), "middle": scale(middle), "high": scale(high), "zero": scale(0)}
        row["plot"].update(INTERVAL_PLOT)
    return {
        "groups": groups,
        "corrected": any(row["p_holm"] for row, *_ in drawn),
        "tests": sorted({d["test"] for m in evaluation["metrics"].values() for d in m["differences"].values()}),
    }


# ---- data and settings -----------------------------------------------------------------------------------------------


def ledger_view(
    document: Mapping[str, Any] | None, *, most: int = MAX_LEDGER_DETAILS, name: str = "ledger.json"
) -> dict[str, Any] | None:
    """States with their share of the rows, and the `most` first rows that were not simply trained or held out.

    `name` says where more of them are.
    """
    if document is None:
        return None
    rows = document["rows"]
    states = []
    for state, count in document["states"].items():
        reasons = [
            f"{count:,} {reason.replace('_', ' ')}" for reason, count in document["reasons"].get(state, {}).items()
        ]
        if state == "truncated" and document["tokens_cut"]:
            reasons.append(f"{document['tokens_cut']:,} tokens cut")
        name = state.replace("held_out_", "held out for ").replace("_", " ")
        states.append(
            {"name": name, "count": count, "share": 100 * count / rows if rows else 0.0, "reasons": ", ".join(reasons)}
        )
    shown = document["details"][:most]
    details = []
    for detail in shown:
        other = detail.get("other")
        notes = [detail.get("reason", "").replace("_", " "), f"of {other['file']}:{other['line']}" if other else ""]
        if detail.get("tokens_cut"):
            notes.append(f"{detail['tokens_cut']:,} tokens cut")
        place = f"{detail['file']}:{detail['line']}"
        details.append({"place": place, "state": detail["state"], "note": " ".join(filter(None, notes))})
    if masked := document.get("masked"):
        share = 100 * masked / rows if rows else 0.0
        states.append({"name": "with placeholders", "count": masked, "share": share, "reasons": "personal data masked"})
    left_out = document["details_left_out"] + len(document["details"]) - len(shown)
    return {"rows": rows, "states": states, "details": details, "left_out": left_out, "document": name}


def _flatten(value: Any, *, name: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values of a nested document."""
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from _flatten(child, name=f"{name}.{key}" if name else str(key))
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
