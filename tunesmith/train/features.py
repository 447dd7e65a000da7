"""What frozen blocks compute is computed once: their output is kept on disk and read back in later epochs.

A token's hidden state depends on the tokens before it alone, so there is one place for each distinct beginning of a row, and
rows under one prompt share its places. A place is written once, by the first step that computes it, and remembers which
step that was: a resumed run forgets what came after its checkpoint, and so goes on to the same bits.

Shapes: T packed tokens, P places, D hidden.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.pack import Forest, Pack
from tunesmith.data.tokens import TokenStore
from tunesmith.data.types import Sequence
from tunesmith.models.blocks import block_output, hidden_and_boundary, hidden_from
from tunesmith.models.load import Model
from tunesmith.storage import storage_errors

MAX_BYTES = 16 << 30
MAX_SHARE_OF_FREE = 0.5
MAX_TOKENS = 50_000_000  # of a store: laying out more of them would take gigabytes of memory


class FrozenFeatures:
    """The rows of a store, and what the lowest blocks of a model gave for each of their tokens."""

    def __init__(self, store: TokenStore, *, model: Model, num_blocks: int, folder: Path):
        self.store, self.num_blocks, self.folder = store, num_blocks, folder
        self.output = block_output(model)
        sequences = [store.unit(unit) for unit in range(len(store))]
        self._first = np.cumsum([0, *(len(unit) for unit in sequences)])
        self._forest = Forest([sequence for unit in sequences for sequence in unit])
        self._shape = (self._forest.num_tokens, model.hidden_size)
        self._numpy = np.dtype(np.uint16 if self.output.dtype.itemsize == 2 else np.float32)
        self.step = 0

    @property
    def num_bytes(self) -> int:
        """Of the file."""
        return self._shape[0] * self._shape[1] * self._numpy.itemsize

    def open(self) -> bool:
        """Make or take up the files; False where the disk has no room."""
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if (
            self.num_bytes > min(MAX_BYTES, MAX_SHARE_OF_FREE * shutil.disk_usage(self.folder).free)
            and not self._there()
        ):
            return False
        try:
            self._hidden_PD = self._map("hidden.bin", self._numpy, self._shape)
            self._stamp_P = self._map("step.bin", np.dtype(np.int64), self._shape[:1])
        except OSError:
            self.remove()
            return False
        return True

    def _there(self) -> bool:
        path = self.folder / "hidden.bin"
        return path.is_file() and path.stat().st_size == self.num_bytes

    def _map(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
        size = int(np.prod(shape)) * dtype.itemsize
        with (self.folder / name).open("ab") as file:
            if file.tell() != size:
                file.truncate(0)
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is found out here and not in the middle
        return np.memmap(self.folder / name, dtype=dtype, mode="r+", shape=shape)

    def __len__(self) -> int:
        return len(self.store)

    def unit(self, index: int) -> list[Sequence]:
        """The store's unit, its tokens with their places."""
        first = int(self._first[index])
        return [replace(s, places_T=self._forest.places(first + n)) for n, s in enumerate(self.store.unit(index))]

    def hidden(self, model: Model, pack: Pack) -> Tensor:
        """Hidden states [T, D] at the end, from what is kept where all of it is there."""
        assert pack.places_T is not None
        attention = model.attention(pack)
        stamp_T = self._stamp_P[pack.places_T]
        if (stamp_T > 0).all():
            given_TD = torch.from_numpy(self._hidden_PD[pack.places_T]).view(self.output.dtype).to(model.device)
            return hidden_from(model, attention, num_blocks=self.num_blocks, given_TD=given_TD, output=self.output)
        hidden_TD, boundary_TD = hidden_and_boundary(model, attention, num_blocks=self.num_blocks)
        new_T = stamp_T == 0
        kept = boundary_TD.cpu().contiguous()
        kept_TD = (kept.view(torch.uint16) if self.output.dtype.itemsize == 2 else kept).numpy()
        self._hidden_PD[pack.places_T[new_T]] = kept_TD[new_T]
        self._stamp_P[pack.places_T[new_T]] = self.step + 1
        return hidden_TD

    def flush(self) -> None:
        """Everything written is on the disk."""
        with storage_errors(self.folder):
            self._hidden_PD.flush()
            self._stamp_P.flush()

    def forget_after(self, step: int) -> None:
        """Forget what steps after the first `step` wrote."""
        self._stamp_P[self._stamp_P > step] = 0

    def remove(self) -> None:
        """Delete the files."""
        shutil.rmtree(self.folder, ignore_errors=True)


def open_features(
    store: TokenStore | None, *, model: Model, num_blocks: int, folder: Path, say: Callable[[str], None]
) -> FrozenFeatures | None:
    """The features of a store, None where there is nothing to keep or no room for it."""
    if store is None or not len(store) or not num_blocks:
        return None
    if store.num_tokens > MAX_TOKENS:
        say(f"what the {num_blocks} frozen blocks compute is not kept: there are more than {MAX_TOKENS:,} tokens")
        return None
    features = FrozenFeatures(store, model=model, num_blocks=num_blocks, folder=folder)
    if not features.open():
        say(
            f"what the {num_blocks} frozen blocks compute is not kept: it would take {features.num_bytes / 2**30:.1f} GiB "
            f"of disk in {folder}"
        )
        return None
    return features
