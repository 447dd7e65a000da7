"""Checkpoints: safetensors and JSON, verified by hash, replaced only by what was read back.

    checkpoints/step-000120/{state.safetensors, state.json}     state.json holds its own SHA-256 and the tensors'
    checkpoints/best/                                           the same, of the best validation loss

A folder is filled beside its final name, synced and renamed; signals wait meanwhile. Two that verify are kept: an older one
is removed only after the new one and the one before it were read back. `latest` falls back where the newest is damaged.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from tunesmith.errors import StorageError
from tunesmith.methods.base import save_tensors
from tunesmith.storage import new_folder, sha256_file, signals_held, storage_errors, sweep

TENSORS, STATE = "state.safetensors", "state.json"
KEEP = 2


def save(folder: Path, *, name: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write one checkpoint and read it back; raises StorageError and leaves the ones before as they are."""
    target = folder / name
    with signals_held():
        with new_folder(target) as new:
            save_tensors(tensors, path=new / TENSORS)
            _check_written(tensors, path=new / TENSORS)
            body = {"state": state, "tensors_sha256": sha256_file(new / TENSORS)}
            sealed = body | {"sha256": _digest(body)}
            (new / STATE).write_text(json.dumps(sealed, indent=1), "utf-8")
        verify(target)
    return target


def _check_written(tensors: dict[str, Tensor], *, path: Path) -> None:
    """StorageError where the file holds other bits than memory: from here on only its hash is known."""
    try:
        with safe_open(path, framework="pt") as file:
            same = all(_same_bits(file.get_tensor(name), tensor) for name, tensor in tensors.items())
    except SafetensorError:
        same = False
    if not same:
        raise StorageError("what was written reads back otherwise", file=path, hint="check the disk")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = (t.detach().cpu().contiguous().flatten().view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def verify(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint whose tensors hash as recorded; StorageError if it is damaged."""
    try:
        body = json.loads((folder / STATE).read_text("utf-8"))
        seal = body.pop("sha256")
        intact = seal == _digest(body) and body["tensors_sha256"] == sha256_file(folder / TENSORS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            f"the checkpoint cannot be read: {error}",
            file=folder,
            hint="bring it back from a copy, or train a new run without --resume",
        ) from error
    if not intact:
        raise StorageError(
            "the checkpoint's bytes are not those written",
            file=folder,
            hint="bring it back from a copy, or train a new run without --resume",
        )
    return body["state"]


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a verified checkpoint."""
    state = verify(folder)
    return load_file(str(folder / TENSORS)), state


def steps(folder: Path) -> list[Path]:
    """Step checkpoints, newest first."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True)


def latest(folder: Path, *, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies.

    Each damaged one is told to `warn` as a sentence, and removed once that is known: its step will be saved again.
    """
    with storage_errors(folder):
        sweep(folder)
        damaged: dict[Path, str] = {}
        found = None
        for path in steps(folder):
            try:
                verify(path)
            except StorageError as error:
                damaged[path] = error.message
            else:
                found = path
                break
        instead = "the run begins again" if found is None else f"{found.name}, the one before it, is used"
        for path, what in damaged.items():
            warn(f"{path}: {what}; {instead}")
            shutil.rmtree(path)
    remove_old(folder)
    return found


def remove_old(folder: Path) -> None:
    """Keep the newest, which was just read back, and those below it until KEEP verify."""
    verified = 1
    with storage_errors(folder):
        for path in steps(folder)[1:]:
            if verified == KEEP:
                shutil.rmtree(path)
            else:
                with contextlib.suppress(StorageError):
                    verify(path)
                    verified += 1
