"""Did the run end at its best step? Told from its validation losses, once all of them are known."""

from collections.abc import Iterable, Mapping
from typing import Any


def hindsight(records: Iterable[Mapping[str, Any]], *, best_step: int | None) -> dict[str, Any] | None:
    """What the lines of metrics.jsonl say:
    `{"best_step", "best_loss", "last_step", "last_loss", "worse", "steps_after", "sentence"}`.

    `best_step` is the one whose weights the run kept. None without two validations, or where that step was not validated.
    """
    losses: dict[int, float] = {}
    for record in records:  # a resumed run writes some steps twice; the later line is the one that counts
        if "validation_loss" in record:
            losses[record["step"]] = record["validation_loss"]
    if len(losses) < 2 or best_step not in losses:
        return None
    last_step = max(losses)
    entry: dict[str, Any] = {
        "best_step": best_step,
        "best_loss": losses[best_step],
        "last_step": last_step,
        "last_loss": losses[last_step],
        "worse": losses[last_step] - losses[best_step],
        "steps_after": last_step - best_step,
    }
    if best_step == last_step:
        said = f"validation was best at the last step, {last_step:,}: more steps might help"
    else:
        said = (
            f"validation was best at step {best_step:,} of {last_step:,} (loss {losses[best_step]:.4f}), whose weights were "
            f"kept; those of the last step are {entry['worse']:.4f} worse"
        )
    return entry | {"sentence": said}
