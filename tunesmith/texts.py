"""Results as text for a terminal."""

from typing import Any

from tunesmith.evaluate.statistics import decimals, p_text
from tunesmith.evaluate.texts import ALSO_CHOSE
from tunesmith.registry.compare import aligned


def _bytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def ledger_text(document: dict[str, Any]) -> str:
    """What `data prepare` did."""
    ledger = document["ledger"]
    lines = [f"{ledger['rows']:,} rows read"]
    for state, count in ledger["states"].items():
        if count:
            reasons = ", ".join(f"{k} {v}" for k, v in ledger["reasons"].get(state, {}).items())
            lines.append(f"  {state.replace('_', ' '):22} {count:>9,}" + (f"  ({reasons})" if reasons else ""))
    train = document["train"]
    lines.append(f"to train: {train['rows']:,} rows, {train['tokens']:,} tokens, {train['targets']:,} of them trained")
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
            f"{summary['tokens_per_second']:,.0f} tokens/s, {_bytes(summary['peak_memory_bytes'])} at most",
            f"  {summary['trainable_parameters']:,} of {summary['parameters']:,} parameters trained ({share:.2%})",
            f"next: tunesmith evaluate {summary['run']}",
        ]
    )


def evaluation_text(document: dict[str, Any]) -> str:
    """The comparison as a table: systems as columns, intervals below the values, then the differences."""
    systems = document["systems"]
    table = [["", *[s.replace("_", "-") for s in systems]]]
    for name, entry in document["metrics"].items():
        cells = []
        for system in systems:
            value = entry["systems"][system]
            places = max(2, decimals(value["high"] - value["low"]))
            cells.append(f"{value['value']:.{places}f} [{value['low']:.{places}f}, {value['high']:.{places}f}]")
        table.append([name, *cells])
    differences = [["", "difference", "95 % interval", "p", "better", "worse"]]
    for name, entry in document["metrics"].items():
        for pair, found in entry["differences"].items():
            places = max(2, decimals(found["high"] - found["low"]))
            differences.append(
                [
                    f"{name}: {pair}",
                    f"{found['value']:+.{places}f}",
                    f"{found['low']:+.{places}f} to {found['high']:+.{places}f}",
                    p_text(found["p"]).removeprefix("p "),
                    str(found["better_rows"]),
                    str(found["worse_rows"]),
                ]
            )
    left = f", {document['left_out_rows']} rows did not fit" if document.get("left_out_rows") else ""
    head = f"{document['run']} on {document['rows']:,} held-out rows ({document['data']}{left})"
    parts = [head, "", aligned(table), "", aligned(differences), "", document["sentence"]]
    return "\n".join([*parts, ALSO_CHOSE] if document["data"] == "validation" else parts)
