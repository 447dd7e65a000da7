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

NO_CHOICE = -1
ARRAYS = {
    "tokens": np.int32,
    "weights": np.float32,
    "values": np.float32,
    "encoder": np.int32,
    "choice": np.int32,
    "sequence_start": np.int64,
    "value_start": np.int64,
    "encoder_start": np.int64,
    "unit_start": np.int64,
    "unit_file": np.int32,
    "unit_line": np.int64,
    "groups": np.int64,
}


class TokenWriter:
    """Appends units to the files of a folder; `close` makes it readable."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._files = {name: (folder / f"{name}.bin").open("wb") for name in ARRAYS}
        self._names: dict[str, int] = {}
        self.num_units = self.num_sequences = self.num_tokens = self.num_targets = 0
        self.num_values = self.num_encoder_tokens = 0

    def _append(self, name: str, values: Any) -> None:
        self._files[name].write(np.ascontiguousarray(values, dtype=ARRAYS[name]).tobytes())

    def add(self, sequences: Iterable[Sequence], *, origin: Origin) -> None:
        """Append one unit."""
        self._append("unit_start", [self.num_sequences])
        self._append("unit_file", [self._names.setdefault(origin.file, len(self._names))])
        self._append("unit_line", [origin.line])
        for sequence in sequences:
            self._append("sequence_start", [self.num_tokens])
            self._append("value_start", [self.num_values])
            self._append("tokens", sequence.tokens_T)
            self._append("weights", sequence.weight_T)
            if sequence.values is not None:
                self._append("values", sequence.values)
                self.num_values += len(sequence.values)
            self._append("choice", [NO_CHOICE if sequence.choice is None else sequence.choice])
            self._append("encoder_start", [self.num_encoder_tokens])
            if sequence.encoder_T is not None:
                self._append("encoder", sequence.encoder_T)
                self.num_encoder_tokens += len(sequence.encoder_T)
            self.num_tokens += len(sequence.tokens_T)
            self.num_targets += sequence.num_targets
            self.num_sequences += 1
        self.num_units += 1

    def close(self) -> None:
        """Write the last borders and the sizes."""
        self._append("sequence_start", [self.num_tokens])
        self._append("value_start", [self.num_values])
        self._append("encoder_start", [self.num_encoder_tokens])
        self._append("unit_start", [self.num_sequences])
        for file in self._files.values():
            file.close()
        meta = {
            "units": self.num_units,
            "sequences": self.num_sequences,
            "tokens": self.num_tokens + self.num_encoder_tokens,
            "targets": self.num_targets,
            "files": list(self._names),
            "group_rows": 0,
        }
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")


def write_groups(folder: Path, *, groups: np.ndarray) -> None:
    """Make the rows of each of `groups` [G, M] one unit."""
    (folder / "groups.bin").write_bytes(np.ascontiguousarray(groups, dtype=ARRAYS["groups"]).tobytes())
    meta = json.loads((folder / "meta.json").read_text("utf-8")) | {"group_rows": groups.shape[1]}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")


class TokenStore:
    """Units read back from a folder that a TokenWriter closed."""

    def __init__(self, folder: Path, *, grouped: bool = True):
        self.folder = folder
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        self.num_units: int = meta["units"]
        self.num_tokens: int = meta["tokens"]
        self.num_targets: int = meta["targets"]
        self.files: list[str] = meta["files"]
        self._arrays = {name: self._open(name, dtype) for name, dtype in ARRAYS.items()}
        self._group_rows: int = meta["group_rows"] if grouped else 0

    def _open(self, name: str, dtype: type) -> np.ndarray:
        path = self.folder / f"{name}.bin"
        if not path.stat().st_size:
            return np.zeros(0, dtype)
        return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)  # plain, whose slices cost a tenth

    def __len__(self) -> int:
        return len(self._arrays["groups"]) // self._group_rows if self._group_rows else self.num_units

    def rows(self) -> "TokenStore":
        """The same rows, each a unit of its own."""
        return TokenStore(self.folder, grouped=False)

    def _members(self, index: int) -> list[int]:
        first = index * self._group_rows
        return self._arrays["groups"][first : first + self._group_rows].tolist() if self._group_rows else [index]

    def unit(self, index: int) -> list[Sequence]:
        """The sequences of one unit, numbered by it."""
        return [sequence for row in self._members(index) for sequence in self._row(row, unit=index)]

    def _row(self, index: int, *, unit: int) -> list[Sequence]:
        a, b = self._arrays["unit_start"][index : index + 2]
        return [self._sequence(number, unit=unit) for number in range(int(a), int(b))]

    def _sequence(self, number: int, *, unit: int) -> Sequence:
        first, last = self._arrays["sequence_start"][number : number + 2]
        tokens_T, weight_T = (np.array(self._arrays[name][first:last]) for name in ("tokens", "weights"))
        values, encoder_T = self._some("values", "value_start", number), self._some("encoder", "encoder_start", number)
        choice = int(self._arrays["choice"][number])
        return Sequence(
            tokens_T, weight_T, unit, values, encoder_T=encoder_T, choice=None if choice == NO_CHOICE else choice
        )

    def _some(self, name: str, starts: str, number: int) -> np.ndarray | None:
        first, last = self._arrays[starts][number : number + 2]
        return np.array(self._arrays[name][first:last]) if last > first else None

    def origin(self, index: int) -> Origin:
        """Where the unit's first row stands."""
        index = self._members(index)[0]
        return Origin(self.files[self._arrays["unit_file"][index]], int(self._arrays["unit_line"][index]))

    def lengths(self) -> np.ndarray:
        """Tokens of each row on disk, those that an encoder reads among them: int64 [units]."""
        starts = self._arrays["unit_start"]
        lengths: np.ndarray = np.diff(self._arrays["sequence_start"][starts] + self._arrays["encoder_start"][starts])
        return lengths

    def longest(self) -> int:
        """Tokens of the longest sequence."""
        starts = self._arrays["sequence_start"]
        return int(np.diff(starts).max()) if len(starts) > 1 else 0
