"""Checkpoints: safetensors and JSON, verified by hash, replaced only by what was read back.

    checkpoints/step-000120/{state.safetensors, state.json}     state.json holds its own SHA-256 and the tensors'
    checkpoints/best/                                           the same, of the best validation loss

A folder is filled beside its final name, synced and renamed. The two newest verified ones are kept; an older one is
removed only after the new one was read back. `latest` falls back to the one before when the newest is damaged.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tunesmith.errors import StorageError
from tunesmith.methods.base import save_tensors
from tunesmith.storage import new_folder, sha256_file, storage_errors

TENSORS, STATE = "state.safetensors", "state.json"
KEEP = 2


def save(folder: Path, *, name: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write one checkpoint and read it back; raises StorageError and leaves the ones before as they are."""
    target = folder / name
    with storage_errors(target), new_folder(target) as new:
        try:
            save_tensors(tensors, path=new / TENSORS)
        except SafetensorError as error:  # safetensors wraps the operating system's error in its own
            raise StorageError(
                f"cannot write: {error}", file=target, hint="free some space, then run the same command with --resume"
            ) from error
        body = {"state": state, "tensors_sha256": sha256_file(new / TENSORS)}
        sealed = body | {"sha256": _digest(body)}
        (new / STATE).write_text(json.dumps(sealed, indent=1), "utf-8")
    verify(target)
    return target


def verify(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint whose tensors hash as recorded; StorageError if it is damaged."""
    try:
        body = json.loads((folder / STATE).read_text("utf-8"))
        seal = body.pop("sha256")
        intact = seal == _digest(body) and body["tensors_sha256"] == sha256_file(folder / TENSORS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            f"the checkpoint cannot be read: {error}", file=folder, hint="an older one is used"
        ) from error
    if not intact:
        raise StorageError("the checkpoint's bytes are not those written", file=folder, hint="an older one is used")
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


def latest(folder: Path, *, warn: Any) -> Path | None:
    """The newest checkpoint that verifies.

    Each damaged one is told to `warn` as a sentence, and removed once a good one was found: its step will be saved again.
    """
    damaged = []
    for path in steps(folder):
        try:
            verify(path)
        except StorageError as error:
            warn(f"{error.file}: {error.message}; the one before it is used")
            damaged.append(path)
        else:
            for old in damaged:
                shutil.rmtree(old)
            return path
    return None


def remove_old(folder: Path) -> None:
    """Keep the newest KEEP step checkpoints."""
    for path in steps(folder)[KEEP:]:
        shutil.rmtree(path)
