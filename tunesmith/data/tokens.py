"""Sequences on disk: flat arrays, memory-mapped, so memory does not grow with the data.

A *unit* is what is shuffled and counted as a row by the loop: all sequences of one row (a conversation, later a
preference pair), or one window of a long text.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data.types import Origin, Sequence

ARRAYS = {
    "tokens": np.int32,
    "weights": np.float32,
    "sequence_start": np.int64,
    "unit_start": np.int64,
    "unit_file": np.int32,
    "unit_line": np.int64,
}


class TokenWriter:
    """Appends units to the files of a folder; `close` makes it readable."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._files = {name: (folder / f"{name}.bin").open("wb") for name in ARRAYS}
        self._names: dict[str, int] = {}
        self.num_units = self.num_sequences = self.num_tokens = self.num_targets = 0

    def _append(self, name: str, values: Any) -> None:
        self._files[name].write(np.ascontiguousarray(values, dtype=ARRAYS[name]).tobytes())

    def add(self, sequences: Iterable[Sequence], *, origin: Origin) -> None:
        """Append one unit."""
        self._append("unit_start", [self.num_sequences])
        self._append("unit_file", [self._names.setdefault(origin.file, len(self._names))])
        self._append("unit_line", [origin.line])
        for sequence in sequences:
            self._append("sequence_start", [self.num_tokens])
            self._append("tokens", sequence.tokens_T)
            self._append("weights", sequence.weight_T)
            self.num_tokens += len(sequence.tokens_T)
            self.num_targets += sequence.num_targets
            self.num_sequences += 1
        self.num_units += 1

    def close(self) -> None:
        """Write the last borders and the sizes."""
        self._append("sequence_start", [self.num_tokens])
        self._append("unit_start", [self.num_sequences])
        for file in self._files.values():
            file.close()
        meta = {
            "units": self.num_units,
            "sequences": self.num_sequences,
            "tokens": self.num_tokens,
            "targets": self.num_targets,
            "files": list(self._names),
        }
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")


class TokenStore:
    """Units read back from a folder that a TokenWriter closed."""

    def __init__(self, folder: Path):
        self.folder = folder
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        self.num_units: int = meta["units"]
        self.num_tokens: int = meta["tokens"]
        self.num_targets: int = meta["targets"]
        self.files: list[str] = meta["files"]
        self._arrays = {name: self._open(name, dtype) for name, dtype in ARRAYS.items()}

    def _open(self, name: str, dtype: type) -> np.ndarray:
        path = self.folder / f"{name}.bin"
        return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)

    def __len__(self) -> int:
        return self.num_units

    def unit(self, index: int) -> list[Sequence]:
        """The sequences of one unit, numbered by it."""
        a, b = self._arrays["unit_start"][index : index + 2]
        starts = self._arrays["sequence_start"]
        tokens, weights = self._arrays["tokens"], self._arrays["weights"]
        return [
            Sequence(np.array(tokens[starts[s] : starts[s + 1]]), np.array(weights[starts[s] : starts[s + 1]]), index)
            for s in range(int(a), int(b))
        ]

    def origin(self, index: int) -> Origin:
        """Where the unit's row stands."""
        return Origin(self.files[self._arrays["unit_file"][index]], int(self._arrays["unit_line"][index]))

    def longest(self) -> int:
        """Tokens of the longest sequence."""
        starts = self._arrays["sequence_start"]
        return int(np.diff(starts).max()) if len(starts) > 1 else 0
