"""What a crash leaves beside a file or folder goes with the next write, what a living process writes stays, signals wait."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tunesmith import storage
from tunesmith.errors import StorageError
from tunesmith.storage import OLD, PARTIAL, new_folder, partial, signals_held, storage_errors, sweep, write_text

KILLED = """
import os, pathlib, signal, sys
from tunesmith.storage import partial

with partial(pathlib.Path(sys.argv[1]), folder=sys.argv[2] == "folder") as temporary:
    (temporary / "file" if temporary.is_dir() else temporary).write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path: Path, kind: str) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "name"), kind]
    root = Path(storage.__file__).parents[1]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(root)}, check=False)
    assert ended.returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert left.startswith(".name.")
    assert left.endswith(PARTIAL)
    write_text(tmp_path / "other", text="whole")
    assert names(tmp_path) == ["other"]


@pytest.mark.parametrize("folder", [False, True])
def test_what_is_being_written_is_left_alone(tmp_path: Path, folder: bool) -> None:
    with partial(tmp_path / "slow", folder=folder) as temporary:
        write_text(tmp_path / "other", text="whole")
        sweep(tmp_path)
        assert temporary.exists()
    assert names(tmp_path) == ["other"]


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    for name in (".gitignore", ".name.12345678.partial", "name.tunesmith-partial"):
        (tmp_path / name).write_text("mine")
    before = names(tmp_path)
    sweep(tmp_path)
    assert names(tmp_path) == before


def moved_aside(tmp_path: Path) -> Path:
    aside = tmp_path / f".best.0a1b2c3d{OLD}"
    aside.mkdir()
    (aside / "file").write_text("old")
    return aside


def test_what_was_moved_aside_and_not_replaced_is_put_back(tmp_path: Path) -> None:
    moved_aside(tmp_path)
    sweep(tmp_path)
    assert names(tmp_path) == ["best"]
    assert (tmp_path / "best" / "file").read_text() == "old"


def test_what_was_moved_aside_and_replaced_goes(tmp_path: Path) -> None:
    moved_aside(tmp_path)
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "file").write_text("new")
    sweep(tmp_path)
    assert names(tmp_path) == ["best"]
    assert (tmp_path / "best" / "file").read_text() == "new"


def test_a_folder_that_cannot_be_replaced_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "file").write_text("old")
    replace: Callable[..., None] = os.replace

    def failing(source: Path, target: Path) -> None:
        if target == tmp_path / "best" and not Path(source).name.endswith(OLD):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(StorageError, match="Input/output error"), new_folder(tmp_path / "best") as new:
        (new / "file").write_text("new")
    assert names(tmp_path) == ["best"]
    assert (tmp_path / "best" / "file").read_text() == "old"


def test_a_file_system_without_locks_is_written_to_and_not_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    aside = moved_aside(tmp_path)
    write_text(tmp_path / "file", text="whole")
    assert names(tmp_path) == [aside.name, "file"]


def test_the_error_inside_that_of_safetensors_is_found(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file") as caught, storage_errors(tmp_path):
        save_file({"a": torch.zeros(3)}, tmp_path / "no folder" / "file")
    assert caught.value.hint
    with pytest.raises(SafetensorError, match="header"), storage_errors(tmp_path):
        raise SafetensorError("header too small")  # which is not the disk's fault


def test_signals_wait_for_the_end_of_a_write() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        with signals_held():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert came == []
        assert came == [signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)
        assert len(came) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
