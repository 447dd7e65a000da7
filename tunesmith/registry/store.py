"""Content-addressed files: a file is kept under the SHA-256 of its bytes, so the same bytes are kept once for ever.

    objects/ab/cdef...    one file's bytes          digest = SHA-256(bytes)
    folders/ab/cdef...    a folder's manifest       digest = SHA-256(manifest), {"files": {relative name: digest}}

A digest thus names exact bytes: what is read back is checked against its own name. Files are read-only once stored.
Of a folder the names and the bytes of its files count; times, permissions, empty folders and names that begin with a
dot (`.git`, `.cache`, unfinished writes) do not.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tunesmith.errors import NotFoundError, StorageError
from tunesmith.storage import (
    CHUNK_BYTES,
    fsync_folder,
    new_folder,
    partial,
    sha256_file,
    storage_errors,
    sweep,
    write_bytes,
)

DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Store:
    """The content-addressed files under the folder `path`; made on the first write. Safe for several processes."""

    path: Path

    def put_file(self, path: Path, *, link: bool = False) -> str:
        """Keep a file's bytes; returns its digest. Bytes that are there already are checked, and mended if damaged.

        `link`: share the disk space with `path` where the file system can, which makes `path` read-only as well; right
        for files that are never written in place, as all that `tunesmith.storage` writes. Raises NotFoundError,
        StorageError (also if the file changes while it is read).
        """
        digest = _sha256(_file(path))
        target = self._object(digest)
        sweep(target.parent)
        if not _holds(target, digest=digest):
            changed = StorageError("changed while it was read", file=path, hint="try again when nothing writes to it")
            _bring(path, to=target, digest=digest, otherwise=changed, link=link, mode=0o444)
        return digest

    def put_folder(self, path: Path, *, link: bool = False) -> str:
        """Keep all files of a folder and a manifest of them; returns the manifest's digest. As `put_file` otherwise."""
        manifest = _manifest({name: self.put_file(file, link=link) for name, file in _files(path)})
        digest = hashlib.sha256(manifest).hexdigest()
        target = self._folder(digest)
        if not _holds(target, digest=digest):
            write_bytes(target, data=manifest)
            target.chmod(0o444)
        return digest

    def verify(self, digest: str) -> None:
        """Read everything under `digest` and compare. Raises NotFoundError, or StorageError naming what is damaged."""
        for file_digest in self._files_of(digest).values():
            path = self._object(file_digest)
            if not path.is_file():
                raise NotFoundError(f"the store {self.path} does not hold {file_digest}", hint="store it again")
            if not _holds(path, digest=file_digest):
                raise _damaged(path)

    def materialise(self, digest: str, to: Path) -> None:
        """Copy the file or folder `digest` to `to`, which must not exist; the bytes are checked on the way.

        Raises NotFoundError, StorageError; then nothing is left at `to`.
        """
        if os.path.lexists(to):
            raise StorageError("exists already", file=to, hint="give a path that does not exist, or remove that one")
        if self._folder(digest).is_file():
            with new_folder(to) as folder:
                for name, file_digest in self._files_of(digest).items():
                    self._copy_out(file_digest, to=folder / name)
        else:
            self._copy_out(digest, to=to)

    def _copy_out(self, digest: str, *, to: Path) -> None:
        path = self._object(digest)
        if not path.is_file():
            raise NotFoundError(f"the store {self.path} does not hold {digest}", hint="store it again")
        _bring(path, to=to, digest=digest, otherwise=_damaged(path), link=False, mode=0o644)

    def _files_of(self, digest: str) -> dict[str, str]:
        """Name -> digest of what a folder's manifest lists; a file has the one name "".

        Raises StorageError if the manifest is damaged or a name leads out of the folder.
        """
        path = self._folder(digest)
        if not path.is_file():
            return {"": digest}
        if not _holds(path, digest=digest):
            raise _damaged(path)
        names = json.loads(path.read_bytes())["files"]
        for name in names:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise StorageError(f"the manifest names {name!r}, outside its folder", file=path, hint="do not use it")
        return names

    def _object(self, digest: str) -> Path:
        return self.path / "objects" / _checked(digest)[:2] / digest[2:]

    def _folder(self, digest: str) -> Path:
        return self.path / "folders" / _checked(digest)[:2] / digest[2:]


def digest_of(path: Path, *, known: Mapping[str, str] | None = None) -> str:
    """The digest a file or folder has in any store, without storing it. Raises NotFoundError, StorageError.

    `known` are digests of files in the folder, by name, that were read a moment ago.
    """
    if path.is_dir():
        given = known or {}
        return hashlib.sha256(_manifest({n: given.get(n) or _sha256(file) for n, file in _files(path)})).hexdigest()
    return _sha256(_file(path))


def _manifest(digests: dict[str, str]) -> bytes:
    return json.dumps({"files": digests}, sort_keys=True, separators=(",", ":")).encode()


def _checked(digest: str) -> str:
    if not DIGEST.fullmatch(digest):
        raise NotFoundError(f"{digest!r} is no digest", hint="a digest is 64 hexadecimal digits, in lower case")
    return digest


def _damaged(path: Path) -> StorageError:
    hint = "store the same file or folder again to mend it, or bring it back from a copy"
    return StorageError("damaged: its bytes do not match its name", file=path, hint=hint)


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    if os.path.lexists(path):
        raise StorageError("neither a file nor a folder", file=path, hint="give a plain file")
    raise NotFoundError("no such file", file=path, hint="check the path")


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(relative name, file) of every file below `folder`; links to files count as files."""
    if not folder.is_dir():
        raise NotFoundError("no such folder", file=folder, hint="check the path")
    with _reading(folder):
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in paths:
        if path.is_dir() and path.is_symlink():
            raise StorageError("a link to a folder", file=path, hint="put the folder itself in its place")
        if path.is_dir():
            yield from ((f"{path.name}/{name}", file) for name, file in _files(path))
        else:
            yield path.name, _file(path)


def _sha256(path: Path) -> str:
    with _reading(path):
        return sha256_file(path)


def _holds(path: Path, *, digest: str) -> bool:
    return path.is_file() and _sha256(path) == digest


def _bring(source: Path, *, to: Path, digest: str, otherwise: StorageError, link: bool, mode: int) -> None:
    """Bring the bytes of `source` to `to` whole or not at all; raise `otherwise` if they are not those of `digest`."""
    with storage_errors(to), partial(to, folder=True) as folder:
        beside = folder / "file"
        if not (link and _linked(source, to=beside)) and _copied(source, to=beside) != digest:
            raise otherwise
        beside.chmod(mode)
        os.replace(beside, to)
        fsync_folder(to.parent)


def _linked(source: Path, *, to: Path) -> bool:
    with contextlib.suppress(OSError):  # another disk, or a file system without hard links: copied instead
        os.link(source.resolve(), to)
        return True
    return False


def _copied(source: Path, *, to: Path) -> str:
    """Copy, make durable, and return the digest of the bytes that were read."""
    digest = hashlib.sha256()
    with source.open("rb") as reader, to.open("wb") as writer:
        while chunk := reader.read(CHUNK_BYTES):
            digest.update(chunk)
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return digest.hexdigest()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn an OSError while reading `path` into a StorageError."""
    try:
        yield
    except OSError as error:
        hint = "check the disk, and that the file may be read"
        raise StorageError(f"cannot be read: {error.strerror or error}", file=path, hint=hint) from error
