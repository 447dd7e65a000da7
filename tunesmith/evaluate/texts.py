"""Texts and files of the report: numbers for people, bounded texts, JSON read with errors that name the place."""

import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tunesmith.errors import StorageError
from tunesmith.storage import read_json

MAX_TEXT = 4_000  # characters of one prompt, answer or reference; thirty examples stay well below a megabyte


ALSO_CHOSE = (
    "These rows also chose the best step, so the tuned model's score may be a little high; data.test names rows that only "
    "the evaluation sees."
)


def read_optional(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None if there is no such file."""
    return read_json(path) if path.exists() else None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, none if there is no such file. A torn last line, left by a crash, is skipped."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except ValueError as error:
                if not line.endswith("\n"):
                    return
                raise StorageError(
                    f"damaged: {error}", file=path, line=number, hint="evaluate or train the run again"
                ) from error


def number_text(value: float) -> str:
    """A number for people: whole ones with separators, others with four significant digits."""
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:.4g}" if 1e-4 <= abs(value) < 1e6 else f"{value:.2e}"


def duration_text(seconds: float) -> str:
    """`48 s`, `2 min 14 s`, `3 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def time_text(moment: str) -> str:
    """An ISO 8601 time to the minute, as `2026-11-20 10:04 UTC`; anything else as it is."""
    try:
        return f"{datetime.fromisoformat(moment).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return moment


def bytes_text(size: float) -> str:
    """`512 B`, `1.9 GiB`."""
    exponent = min(4, int(math.log2(size) // 10)) if size >= 1 else 0
    return f"{size / 1024**exponent:.{0 if exponent == 0 else 1}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[exponent]}"


def clip(text: str, most: int = MAX_TEXT) -> str:
    """`text`, or its beginning and how much is left out."""
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"


def as_text(value: Any) -> str:
    """The value itself if it is text, else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
