"""Writing to disk so that a crash leaves the old file or the new one, never half of one.

Write beside, flush, fsync, rename, fsync the folder. A folder is filled under a temporary name and renamed whole.

    .NAME.xxxxxxxx.tunesmith-partial        what will be NAME
    .NAME.xxxxxxxx.old.tunesmith-partial    what was NAME

Whoever writes holds a lock on such a file or folder, which ends with the process. So what a killed process left is known,
and the next write into the same folder removes it, or puts back what had been moved aside and not yet replaced.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import signal
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import SafetensorError

from tunesmith.errors import NotFoundError, StorageError

CHUNK_BYTES = 1 << 20
PACKAGES = ("tunesmith", "torch", "transformers", "tokenizers", "safetensors", "numpy")
PARTIAL, OLD = ".tunesmith-partial", ".old.tunesmith-partial"
SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an error of the system while writing `path` into a StorageError that says what to do."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise _storage_error(path, number=error.errno or 0, what=error.strerror or str(error)) from error
    except SafetensorError as error:  # which holds the system's error as text
        found = SYSTEM_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found[1])
        raise _storage_error(path, number=number, what=os.strerror(number)) from error


def _storage_error(path: Path, *, number: int, what: str) -> StorageError:
    hint = {
        errno.ENOSPC: "free some space on that disk, then run the same command again",
        errno.EDQUOT: "the disk quota is used up: free some space, then run the same command again",
        errno.EFBIG: "files may not be that large there: raise the limit (ulimit -f), or choose another --workspace",
        errno.EACCES: "check the permissions of that folder, or choose another with --workspace",
        errno.EROFS: "that file system is read-only: choose another folder with --workspace",
    }.get(number, "check the disk; what was written before is untouched")
    return StorageError(f"cannot write: {what}", file=path, hint=hint)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """SIGINT and SIGTERM wait until the block is over, so that a write is not cut short by them."""
    came: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if number not in came:
            came.append(number)

    before = {}
    with contextlib.suppress(ValueError):  # only the main thread is sent signals, and may handle them
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, remember)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for held in came:
            signal.raise_signal(held)


def fsync_folder(folder: Path) -> None:
    """Make the renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def partial(path: Path, *, folder: bool) -> Iterator[Path]:
    """A locked temporary file or folder beside `path`; whatever of it was not renamed is gone after the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    temporary, descriptor = _new_partial(path, folder=folder)
    try:
        yield temporary
    finally:
        try:
            if folder:
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
        finally:
            os.close(descriptor)


def _new_partial(path: Path, *, folder: bool) -> tuple[Path, int]:
    """Made, with the descriptor that holds its lock."""
    while True:
        temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}{PARTIAL}"
        if folder:
            os.mkdir(temporary, 0o700)
        else:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with contextlib.suppress(FileNotFoundError):  # another process took it for one that was left
            descriptor = os.open(temporary, os.O_RDONLY)
            _lock(descriptor, wait=True)
            if temporary.exists():
                return temporary, descriptor
            os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Lock an open file or folder until it is closed; False where another has the lock, or the file system knows none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def sweep(folder: Path) -> None:
    """Remove what writes that were cut short left in `folder`, and put back what they had moved aside."""
    for path in folder.glob(f".*{PARTIAL}"):
        with contextlib.suppress(OSError):  # two processes may sweep at once
            descriptor = os.open(path, os.O_RDONLY)
            try:
                if _lock(descriptor, wait=False):
                    _settle(path)
            finally:
                os.close(descriptor)


def _settle(path: Path) -> None:
    """Remove what a killed process left, or put it back."""
    target = path.parent / path.name[1:].rsplit(".", 3)[0]
    if path.name.endswith(OLD) and not target.exists():
        os.replace(path, target)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        os.unlink(path)


def write_bytes(path: Path, *, data: bytes) -> None:
    """Replace the file `path` by `data` atomically and durably; creates its folder."""
    with storage_errors(path), partial(path, folder=False) as temporary:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        fsync_folder(path.parent)


def write_text(path: Path, *, text: str) -> None:
    """As `write_bytes`, UTF-8."""
    write_bytes(path, data=text.encode("utf-8"))


def write_json(path: Path, *, value: Any) -> None:
    """As `write_bytes`, indented JSON; NaN and infinity are refused."""
    write_text(path, text=json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def new_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends without an error.

    Every file in it is fsynced before the rename. An existing folder `path` is replaced; with `replace=False`, for folders
    named by their content, it is kept, and what was written here is dropped.
    """
    with storage_errors(path), partial(path, folder=True) as temporary:
        yield temporary
        for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        for folder in [p for p in temporary.rglob("*") if p.is_dir()]:
            fsync_folder(folder)
        fsync_folder(temporary)
        os.chmod(temporary, 0o755)
        if not replace:
            _rename_unless_there(temporary, path)
        elif path.exists():
            _exchange(temporary, path)
        else:
            os.replace(temporary, path)
        fsync_folder(path.parent)


def _exchange(temporary: Path, path: Path) -> None:
    """Put a folder in the place of another, which is back there if that fails."""
    aside = path.parent / f".{path.name}.{secrets.token_hex(4)}{OLD}"
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _lock(descriptor, wait=False)
        os.replace(path, aside)
        try:
            os.replace(temporary, path)
        except BaseException:
            os.replace(aside, path)
            raise
        shutil.rmtree(aside)
    finally:
        os.close(descriptor)


def _rename_unless_there(temporary: Path, path: Path) -> None:
    """Rename, or drop `temporary` where another process put the same content at `path` meanwhile."""
    try:
        os.rename(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        shutil.rmtree(temporary)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def code_digest(*folders: str) -> str:
    """SHA-256 of the program's own code in these folders of it."""
    package, digest = Path(__file__).resolve().parent, hashlib.sha256()
    for path in sorted(path for folder in folders for path in package.glob(f"{folder}/*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def make_room(folder: Path, *, num_bytes: int, max_bytes: int, max_share_of_free: float = 1.0) -> bool:
    """Remove what stands in a cache's folder, used longest ago first, until `num_bytes` more stay within its bounds.

    They are `max_bytes` in all, and a share of what the disk has free besides. False (and nothing is removed) where so
    many bytes alone are too many. Who uses an entry touches it; one that is mapped into memory lives on until it is let go.
    """
    entries = sorted((path for path in folder.iterdir() if path.name[0] != "."), key=lambda p: p.stat().st_mtime)
    sizes = [sum(f.stat().st_size for f in (p, *p.rglob("*")) if f.is_file()) for p in entries]
    used = sum(sizes)
    bound = min(max_bytes, used + int(max_share_of_free * shutil.disk_usage(folder).free))
    if num_bytes > bound:
        return False
    for path, size in zip(entries, sizes, strict=True):
        if used + num_bytes <= bound:
            break
        used -= size
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return True


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises NotFoundError if there is none, StorageError if it is damaged or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFoundError("no such file", file=path, hint="check that the run's folder is complete") from error
    except json.JSONDecodeError as error:
        hint = "the file is damaged: bring it back from a copy, or do that step again"
        raise StorageError(f"not JSON: {error.msg}", file=path, line=error.lineno, hint=hint) from error
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"cannot be read: {error}", file=path, hint="check the disk and the permissions") from error
    if not isinstance(value, dict):
        raise StorageError("not a JSON object", file=path, hint="the file is damaged: do that step again")
    return value
