"""Results as text for a terminal."""

from typing import Any

import numpy as np

from tunesmith.evaluate.statistics import decimals, p_text
from tunesmith.evaluate.texts import ALSO_CHOSE
from tunesmith.registry.compare import aligned
from tunesmith.train.memory import bytes_text

SHOWN_GROUPS = 20


def ledger_text(document: dict[str, Any]) -> str:
    """What `data prepare` did."""
    ledger = document["ledger"]
    lines = [f"{ledger['rows']:,} rows read"]
    for state, count in ledger["states"].items():
        if count:
            reasons = ", ".join(f"{k} {v}" for k, v in ledger["reasons"].get(state, {}).items())
            lines.append(f"  {state.replace('_', ' '):22} {count:>9,}" + (f"  ({reasons})" if reasons else ""))
    if findings := ledger.get("findings"):
        lines.append("checks found " + ", ".join(f"{kind} {count:,}" for kind, count in findings.items()))
    if ledger.get("masked"):
        lines.append(f"rows with placeholders for personal data: {ledger['masked']:,}")
    train = document["train"]
    lines.append(f"to train: {train['rows']:,} rows, {train['tokens']:,} tokens, {train['targets']:,} of them trained")
    if "vocabulary" in document:
        lines.append(_vocabulary_text(document["vocabulary"]).strip())
    lines.append(f"kept in {document['folder']}")
    return "\n".join(lines)


def train_text(summary: dict[str, Any]) -> str:
    """What `train` did."""
    best = f", validation loss {summary['validation_loss']:.4f}" if summary["validation_loss"] is not None else ""
    at = f" (best at step {summary['best_step']})" if summary["best_step"] is not None else ""
    share = summary["trainable_parameters"] / summary["parameters"]
    return "\n".join(
        [
            f"{summary['run']}: {summary['stopped']} after {summary['steps']:,} steps in {summary['seconds']:,.0f} s",
            f"  training loss {summary['train_loss']:.4f}{best}{at}",
            f"  {summary['tokens']:,} tokens of rows, {summary['computed_tokens']:,} computed, "
            f"{summary['tokens_per_second']:,.0f} tokens/s, {bytes_text(summary['peak_memory_bytes'])} at most",
            f"  {summary['trainable_parameters']:,} of {summary['parameters']:,} parameters trained ({share:.2%})",
            *([_vocabulary_text(summary["vocabulary"])] if "vocabulary" in summary else []),
            f"next: tunesmith evaluate {summary['run']}",
        ]
    )


def _vocabulary_text(document: dict[str, Any]) -> str:
    """What new tokens change."""
    before, after = document["before"], document["after"]
    words = f"{before['tokens_per_word']:.2f} -> {after['tokens_per_word']:.2f} tokens a word"
    size = f"{before['bytes_per_token']:.2f} -> {after['bytes_per_token']:.2f} bytes a token"
    return f"  {document['new_tokens']:,} new tokens: {words}, {size} ({document['measured_on']} rows)"


def evaluation_text(document: dict[str, Any]) -> str:
    """The comparison as a table: systems as columns, intervals below the values, then the differences."""
    systems = document["systems"]
    table = [["", *[s.replace("_", "-") for s in systems]]]
    for name, entry in document["metrics"].items():
        table.append([name, *(_value_cell(entry["systems"][system]) for system in systems)])
    differences = [["", "difference", "95 % interval", "p", "p (Holm)", "better", "worse"]]
    for name, entry in document["metrics"].items():
        for pair, found in entry["differences"].items():
            cells = _difference_cells(found)
            adjusted = p_text(found["p_holm"]).removeprefix("p ") if "p_holm" in found else ""
            differences.append([f"{name}: {pair}", *cells[:3], adjusted, *cells[3:]])
    left = f", {document['left_out_rows']} rows did not fit" if document.get("left_out_rows") else ""
    head = f"{document['run']} on {document['rows']:,} held-out rows ({document['data']}{left})"
    parts = [head, "", aligned(table), "", aligned(differences), "", document["sentence"]]
    parts += [document["corrected"]["sentence"]] if "corrected" in document else []
    parts += [document["seeds"]["sentence"]] if "seeds" in document else []
    parts += [f"few-shot: {document['few_shot_choice']['sentence']}"] if "few_shot_choice" in document else []
    parts += [ALSO_CHOSE] if document["data"] == "validation" else []
    if general := document.get("general"):
        parts += ["", f"general rows ({general['data']}, {general['rows']:,}): {general['sentence']}"]
        if general["right_before"]:
            where = ", ".join(flip["origin"] for flip in general["flips"][:5])
            parts.append(f"{general['right_before']:,} answers were right before and are wrong now: {where}")
    if judge := document.get("judge"):
        parts += ["", judge["sentence"]]
    parts += _honest_lines(document)
    if gate := document.get("gate"):
        rules = [["", "gate", "", "because"]]
        for rule in gate["rules"]:
            rules.append(["yes" if rule["passed"] else "NO", rule["metric"], rule["rule"], rule["because"]])
        parts += ["", aligned(rules), f"the gate {'lets it pass' if gate['passed'] else 'says no'}"]
    return "\n".join(parts)


def _honest_lines(document: dict[str, Any]) -> list[str]:
    """What was memorised, how the groups compare, what swapped words change, and whether the last step was the best."""
    parts: list[str] = []
    if memorised := document.get("memorised"):
        rows = memorised["rows"]
        parts += ["", f"{rows['train']:,} training rows beside {rows['held_out']:,} held-out ones:"]
        parts += [f"  {sentence}" for sentence in memorised["sentences"]]
    if groups := document.get("groups"):
        of = groups["metrics"][document["primary"]]["systems"]
        table = [["group", "rows", *document["systems"]]]
        for group, rows in list(groups["rows"].items())[:SHOWN_GROUPS]:
            cells = (_bench_cell(of[system]["groups"][group]) for system in document["systems"])
            table.append([group, f"{rows:,}", *cells])
        left = len(groups["rows"]) - SHOWN_GROUPS
        more = [f"{left} smaller groups are in evaluation.json"] if left > 0 else []
        parts += ["", f"{document['primary']} by {groups['by']}", aligned(table), *more, groups["sentence"]]
    if swaps := document.get("swaps"):
        where = ", ".join(flip["origin"] for flip in swaps["flips"] if flip["system"] == "tuned")
        parts += ["", swaps["sentence"], *([f"changed: {where}"] if where else [])]
        if base := swaps["systems"].get("base"):
            parts.append(f"base answers a share of {_bench_cell(base['flip_rate'])} otherwise")
    if stopping := document.get("stopping"):
        parts += ["", stopping["sentence"]]
    return parts


def bench_text(document: dict[str, Any]) -> str:
    """Each benchmark: its metrics with intervals, the difference where there are two systems, and its groups."""
    parts = []
    for entry in document["benchmarks"]:
        table = [["", *document["systems"], *(["difference"] if len(document["systems"]) > 1 else [])]]
        for name, metric in entry["metrics"].items():
            cells = [_bench_cell(metric["systems"][system]) for system in document["systems"]]
            found = metric.get("differences", {}).get("tuned - base")
            cells.append("" if found is None else f"{_bench_cell(found)}, {p_text(found['p'])}")
            table.append([name, *cells][: len(table[0])])
        parts += [f"{entry['name']}: {entry['kind'].replace('_', ' ')}, {entry['rows']:,} items", aligned(table)]
        if entry["groups"]:
            groups = [["group", *document["systems"]]]
            for name, by_system in entry["groups"].items():
                groups.append([name, *(f"{by_system[system]:.3f}" for system in document["systems"])])
            means = [np.mean([by[system] for by in entry["groups"].values()]) for system in document["systems"]]
            groups.append(["mean of groups", *(f"{mean:.3f}" for mean in means)])
            parts += ["", aligned(groups)]
        parts.append("")
    return "\n".join(parts).rstrip()


def _bench_cell(score: dict[str, float]) -> str:
    """A value with its interval, where it has one."""
    if "low" not in score:
        return f"{score['value']:.4g}"
    places = decimals(score["high"] - score["low"])
    value, low, high = (f"{score[key]:.{places}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def prediction_text(result: dict[str, Any]) -> str:
    """An answer; of a head also how sure it is."""
    found = result.get("prediction", {})
    if "probabilities" in found:
        likely = ", ".join(f"{label} {p:.2f}" for label, p in found["probabilities"].items())
        return f"{result['answer']}   ({likely})"
    if "low" in found:
        return f"{result['answer']}   ({found['low']:.4g} to {found['high']:.4g})"
    if "entities" in found:
        words = result["prompt"].split()
        return "\n".join(f"{kind}: {' '.join(words[a:b])}" for kind, a, b in found["entities"]) or "(nothing found)"
    return str(result["answer"])


def combination_text(document: dict[str, Any]) -> str:
    """What a combination costs: a row a task, a column a system; then the combination against each task's own run."""
    of = ", ".join(f"{run['run']} ({run['weight']:g})" for run in document["runs"])
    ranks = document["ranks"]
    what = f"a whole model, {document['layers']:,} of its tensors changed"
    if ranks:
        rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        what = f"rank {rank}, {document['lost_norm']:.2%} of the change's norm lost to it"
    parts = [f"{document['run']}: {document['how']} of {of}", what, ""]
    if document["tasks"]:
        table = [["task", "rows", "metric", *document["systems"]]]
        differences = [["task", "combination - own run", "95 % interval", "p", "better", "worse"]]
        for task in document["tasks"]:
            entry = task["metrics"][task["primary"]]
            cells = [_value_cell(entry["systems"][system]) for system in document["systems"]]
            table.append([task["task"], f"{task['rows']:,}", task["primary"], *cells])
            found = entry["differences"][f"combination - {task['task']}"]
            differences.append([task["task"], *_difference_cells(found)])
        parts += [aligned(table), "", aligned(differences), ""]
    parts += [f"left out: {task['task']}: {task['why']}" for task in document["left_out"]]
    return "\n".join([*parts, document["sentence"], f"next: tunesmith evaluate {document['run']}"])


def curve_text(document: dict[str, Any]) -> str:
    """The points as a table, and what they say."""
    places = max(2, *(decimals(point["high"] - point["low"]) for point in document["points"]))
    direction = "higher" if document["higher_is_better"] else "lower"
    table = [["share", "rows", document["metric"], "95 % interval"]]
    for point in document["points"]:
        between = f"{point['low']:.{places}f} to {point['high']:.{places}f}"
        table.append([f"{point['share']:.1%}", f"{point['rows']:,}", f"{point['value']:.{places}f}", between])
    twice = document["twice"]
    between = f"{twice['low']:.{places}f} to {twice['high']:.{places}f}"
    table.append(["twice", f"{twice['rows']:,}", f"{twice['value']:.{places}f}", between])
    head = f"{document['name']}: {document['metric']} of {document['rows']:,} held-out rows ({direction} is better)"
    return "\n".join([head, "", aligned(table), "", document["sentence"]])


def advice_text(advice: dict[str, Any]) -> str:
    """The ways as a table, the advice, and what would change it."""
    head = [
        "",
        advice["metric"],
        f"to {advice['best']}",
        "95 % interval",
        "p (Holm)",
        "tokens asked",
        "answered",
        "seconds",
    ]
    table = [head]
    for entry in advice["ways"]:
        found, costs = entry["to_best"], entry["costs"]
        compared = ["best", "", ""] if found is None else _difference_cells(found | {"p": entry["p"]})[:3]
        cost = [f"{costs['tokens_per_prompt']:.0f}", f"{costs['tokens_per_answer']:.0f}", f"{costs['seconds']:.0f}"]
        table.append([entry["way"].replace("_", "-"), f"{entry['value']:.3f}", *compared, *cost])
    parts = [f"{advice['run']} on {advice['rows']:,} held-out rows ({advice['data']})", "", aligned(table), ""]
    parts.append(f"advice: {advice['because']}")
    parts += [f"  - {text}" for text in advice["would_change"]]
    parts += [f"  - few-shot: {advice['few_shot']}"] if "few_shot" in advice else []
    parts += [f"  - {advice['more_rows']}"] if "more_rows" in advice else []
    return "\n".join(parts)


def _value_cell(value: dict[str, float]) -> str:
    """A score and its interval."""
    places = max(2, decimals(value["high"] - value["low"]))
    return f"{value['value']:.{places}f} [{value['low']:.{places}f}, {value['high']:.{places}f}]"


def _difference_cells(found: dict[str, Any]) -> list[str]:
    """A difference, its interval, p, and on how many rows the first is better and worse."""
    places = max(2, decimals(found["high"] - found["low"]))
    return [
        f"{found['value']:+.{places}f}",
        f"{found['low']:+.{places}f} to {found['high']:+.{places}f}",
        p_text(found["p"]).removeprefix("p "),
        str(found["better_rows"]),
        str(found["worse_rows"]),
    ]
