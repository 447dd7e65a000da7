"""Writing to disk so that a crash leaves the old file or the new one, never half of one.

Write beside, flush, fsync, rename, fsync the folder. A folder is filled under a temporary name and renamed whole.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.errors import NotFoundError, StorageError

CHUNK_BYTES = 1 << 20


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing `path` into a StorageError that says what to do."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        hint = {
            errno.ENOSPC: "free some space on that disk, then run the same command again",
            errno.EDQUOT: "the disk quota is used up: free some space, then run the same command again",
            errno.EACCES: "check the permissions of that folder, or choose another with --workspace",
            errno.EROFS: "that file system is read-only: choose another folder with --workspace",
        }.get(error.errno or 0, "check the disk; what was written before is untouched")
        raise StorageError(f"cannot write: {error.strerror or error}", file=path, hint=hint) from error


def fsync_folder(folder: Path) -> None:
    """Make the renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, *, data: bytes) -> None:
    """Replace the file `path` by `data` atomically and durably; creates its folder."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
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
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
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
                old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
                os.replace(path, old / "content")
                os.replace(temporary, path)
                shutil.rmtree(old)
            else:
                os.replace(temporary, path)
            fsync_folder(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


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
