"""What frozen blocks compute is computed once: their output is kept on disk, for later epochs and for other runs.

A token's hidden state depends on the tokens before it alone, so there is one place for each distinct beginning of a row, and
rows under one prompt share its places. They are computed before the first step, always in the same packs; so what is kept
depends on the base, the rows and the code alone, which name it, and a run that is resumed or repeated reads the same bits.

Shapes: T packed tokens, P places, D hidden.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.pack import Forest, Pack, build_packs
from tunesmith.data.tokens import TokenStore
from tunesmith.data.types import Sequence
from tunesmith.models.blocks import block_output, hidden_below, hidden_from
from tunesmith.models.load import Model
from tunesmith.storage import code_digest, make_room, read_json, sha256_file, storage_errors, versions, write_json
from tunesmith.train.settings import TrainSettings

MAX_BYTES = 16 << 30  # of all that is kept in a workspace
MAX_SHARE_OF_FREE = 0.5
MAX_TOKENS = 50_000_000  # of a store: laying out more of them would take gigabytes of memory
ROWS = ("tokens", "sequence_start", "unit_start", "groups")  # what decides the places of a store
UNITS_AT_A_TIME = 256
SECONDS_A_FLUSH = 10


class FrozenFeatures:
    """The rows of a store, and what the lowest blocks of a model give for each of their tokens.

    `num_tokens` go through the model at a time. `kept_in` is the cache's folder.
    """

    def __init__(
        self, store: TokenStore, *, model: Model, num_blocks: int, num_tokens: int, kept_in: Path, about: str = ""
    ):
        self.store, self.num_blocks, self.num_tokens = store, num_blocks, num_tokens
        self.output = block_output(model)
        sequences = [store.unit(unit) for unit in range(len(store))]
        self._first = np.cumsum([0, *(len(unit) for unit in sequences)])
        self._forest = Forest([sequence for unit in sequences for sequence in unit])
        self._shape = (self._forest.num_tokens, model.hidden_size)
        self._bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[self.output.dtype.itemsize]
        what = [
            [sha256_file(store.folder / f"{name}.bin") for name in ROWS],
            [model.digest, num_blocks, num_tokens, str(self.output), model.device.type, about],
            [code_digest("data", "models"), versions()],
        ]
        self.folder = kept_in / hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]

    @property
    def num_bytes(self) -> int:
        """Of the file."""
        return self._shape[0] * self._shape[1] * self.output.dtype.itemsize

    def open(self) -> bool:
        """Take up the files, or make room for them and make them; False where there is none."""
        path, done = self.folder / "hidden.bin", self.folder / "done.json"
        with storage_errors(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file() and not make_room(
                self.folder.parent,
                num_bytes=self.num_bytes,
                max_bytes=MAX_BYTES,
                max_share_of_free=MAX_SHARE_OF_FREE,
            ):
                return False
            self.folder.mkdir(exist_ok=True)
        try:
            with path.open("ab") as file:
                if file.tell() != self.num_bytes:
                    done.unlink(missing_ok=True)
                    os.posix_fallocate(file.fileno(), 0, self.num_bytes)  # a full disk is found out here
        except OSError:
            self.remove()
            return False
        os.utime(self.folder)
        dtype = np.dtype(f"int{8 * self.output.dtype.itemsize}")
        self._hidden_PD = np.memmap(path, dtype=dtype, mode="r+", shape=self._shape)
        self._units_done = read_json(done)["units"] if done.is_file() else 0
        return True

    def compute(self, model: Model, *, say: Callable[[str], None], interrupted: Callable[[], bool]) -> bool:
        """Compute what is not there yet; False when interrupted, and what was done is kept.

        Two processes may do so at once: they write the same bits to the same places.
        """
        if self._units_done < len(self):
            say(f"computing what the {self.num_blocks} frozen blocks give for {self._shape[0]:,} tokens, once")
        flushed = time.monotonic()
        while self._units_done < len(self):
            units = range(self._units_done, min(self._units_done + UNITS_AT_A_TIME, len(self)))
            sequences = [sequence for unit in units for sequence in self.unit(unit)]
            for pack in build_packs(sequences, max_tokens=self.num_tokens, min_shared=model.min_shared_tokens):
                if interrupted():
                    self._flush()
                    return False
                hidden_TD = hidden_below(model, model.attention(pack.padded()), num_blocks=self.num_blocks)
                hidden_TD = hidden_TD[: len(pack.tokens_T)].cpu().contiguous()
                self._hidden_PD[pack.places_T] = hidden_TD.view(self._bits).numpy()
            self._units_done = units.stop
            if self._units_done == len(self) or time.monotonic() - flushed > SECONDS_A_FLUSH:
                self._flush()
                flushed = time.monotonic()
        return True

    def _flush(self) -> None:
        with storage_errors(self.folder):
            self._hidden_PD.flush()
        write_json(self.folder / "done.json", value={"units": self._units_done})

    def __len__(self) -> int:
        return len(self.store)

    def unit(self, index: int) -> list[Sequence]:
        """The store's unit, its tokens with their places."""
        first = int(self._first[index])
        return [replace(s, places_T=self._forest.places(first + n)) for n, s in enumerate(self.store.unit(index))]

    def hidden(self, model: Model, pack: Pack) -> Tensor:
        """Hidden states [T, D] at the end, the frozen blocks' share of them read back."""
        assert pack.places_T is not None
        given_TD = torch.from_numpy(self._hidden_PD[pack.places_T]).view(self.output.dtype).to(model.device)
        return hidden_from(
            model, model.attention(pack), num_blocks=self.num_blocks, given_TD=given_TD, output=self.output
        )

    def remove(self) -> None:
        """Delete the files."""
        shutil.rmtree(self.folder, ignore_errors=True)


def open_features(
    store: TokenStore | None,
    *,
    model: Model,
    num_blocks: int,
    kept_in: Path,
    stored_in: str | None,
    settings: TrainSettings,
    say: Callable[[str], None],
) -> FrozenFeatures | None:
    """The features of a store, None where there is nothing to keep or no room for it.

    `stored_in` are the bits in which the method stores the base, None as it came.
    """
    if store is None or not len(store) or not num_blocks:
        return None
    if store.num_tokens > MAX_TOKENS:
        say(f"what the {num_blocks} frozen blocks compute is not kept: there are more than {MAX_TOKENS:,} tokens")
        return None
    device = model.device.type
    features = FrozenFeatures(
        store,
        model=model,
        num_blocks=num_blocks,
        num_tokens=min(settings.tokens_at_a_time(device), TrainSettings().tokens_at_a_time(device)),
        kept_in=kept_in,
        about=f"{stored_in} {settings.precision}",
    )
    if not features.open():
        say(
            f"what the {num_blocks} frozen blocks compute is not kept: it would take {features.num_bytes / 2**30:.1f} GiB "
            f"of disk in {kept_in}"
        )
        return None
    return features
