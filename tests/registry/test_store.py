"""What is put into the store comes back to the bit, once for the same bytes, or an error names what is damaged."""

import hashlib
import json
import os
import stat
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.errors import NotFoundError, StorageError
from tunesmith.registry.store import Store, digest_of


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A small model folder with two equal files."""
    (tmp_path / "model" / "tokenizer").mkdir(parents=True)
    (tmp_path / "model" / "weights.bin").write_bytes(b"\0\1\2" * 1000)
    (tmp_path / "model" / "copy.bin").write_bytes(b"\0\1\2" * 1000)
    (tmp_path / "model" / "tokenizer" / "vocabulary.txt").write_text("a\nb\n")
    return tmp_path / "model"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def objects(store: Store) -> list[Path]:
    return [p for p in (store.path / "objects").rglob("*") if p.is_file()]


def damage(path: Path, data: bytes = b"other") -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def test_a_file_is_named_by_its_bytes_and_read_only(store, tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    digest = store.put_file(tmp_path / "file")
    assert digest == hashlib.sha256(b"abc").hexdigest() == digest_of(tmp_path / "file")
    stored = store.path / "objects" / digest[:2] / digest[2:]
    assert stored.read_bytes() == b"abc"
    assert stat.S_IMODE(stored.stat().st_mode) == 0o444
    store.verify(digest)
    store.materialise(digest, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"abc"
    assert os.access(tmp_path / "back", os.W_OK)


def test_the_source_may_change_after_it_was_stored(store, tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    digest = store.put_file(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"changed")
    store.verify(digest)


def test_a_folder_comes_back_and_equal_files_are_kept_once(store, folder, tmp_path):
    digest = store.put_folder(folder)
    assert digest == digest_of(folder)
    assert len(objects(store)) == 2
    assert store.put_folder(folder) == digest
    assert len(objects(store)) == 2
    store.verify(digest)
    store.materialise(digest, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)


names = st.lists(
    st.text("abcé .", min_size=1, max_size=4).filter(lambda n: not n.startswith(".")), min_size=1, max_size=3
)


@settings(max_examples=25, deadline=None)
@given(files=st.dictionaries(names.map("/".join), st.binary(max_size=40), max_size=6))
def test_any_folder_comes_back(files):
    # a name cannot be both a file and a folder
    files = {n: data for n, data in files.items() if not any(o.startswith(n + "/") for o in files)}
    with tempfile.TemporaryDirectory() as temporary:
        source, back, store = Path(temporary) / "in", Path(temporary) / "out", Store(Path(temporary) / "store")
        source.mkdir()
        for name, data in files.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(data)
        digest = store.put_folder(source)
        store.materialise(digest, back)
        assert contents(back) == files
        assert digest_of(back) == digest


def test_a_folder_is_named_by_names_and_bytes_only(folder, tmp_path):
    before = digest_of(folder)
    os.utime(folder / "weights.bin", (1, 1))
    (folder / "empty").mkdir()
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("x")
    assert digest_of(folder) == before
    (folder / "weights.bin").rename(folder / "renamed.bin")
    renamed = digest_of(folder)
    (folder / "renamed.bin").write_bytes(b"x")
    assert len({before, renamed, digest_of(folder)}) == 3


def test_links_to_files_are_followed_and_links_to_folders_refused(store, folder, tmp_path):
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "weights.bin").symlink_to(folder / "weights.bin")
    digest = store.put_folder(tmp_path / "snapshot", link=True)
    store.materialise(digest, tmp_path / "back")
    assert not (tmp_path / "back" / "weights.bin").is_symlink()
    assert contents(tmp_path / "back") == {"weights.bin": (folder / "weights.bin").read_bytes()}
    (tmp_path / "snapshot" / "more").symlink_to(folder)
    with pytest.raises(StorageError, match="more: a link to a folder"):
        store.put_folder(tmp_path / "snapshot")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_what_is_no_file_is_refused(store, folder):
    os.mkfifo(folder / "pipe")
    with pytest.raises(StorageError, match="pipe: neither a file nor a folder"):
        store.put_folder(folder)


def test_a_linked_file_shares_its_bytes(store, folder):
    digest = store.put_file(folder / "weights.bin", link=True)
    stored = store.path / "objects" / digest[:2] / digest[2:]
    assert stored.samefile(folder / "weights.bin")
    assert not stat.S_IMODE((folder / "weights.bin").stat().st_mode) & 0o222


def test_a_damaged_object_is_named_never_returned_and_mended_by_storing_again(store, folder, tmp_path):
    digest = store.put_folder(folder)
    bad = max(objects(store), key=lambda path: path.stat().st_size)
    damage(bad)
    with pytest.raises(StorageError, match=f"{bad.name}: damaged"):
        store.verify(digest)
    with pytest.raises(StorageError, match=f"{bad.name}: damaged"):
        store.materialise(digest, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert store.put_folder(folder) == digest
    store.verify(digest)


def test_a_damaged_manifest_is_named_and_mended(store, folder, tmp_path):
    digest = store.put_folder(folder)
    manifest = store.path / "folders" / digest[:2] / digest[2:]
    damage(manifest, b'{"files":{}}')
    with pytest.raises(StorageError, match=f"{manifest.name}: damaged"):
        store.verify(digest)
    with pytest.raises(StorageError, match=f"{manifest.name}: damaged"):
        store.materialise(digest, tmp_path / "back")
    assert store.put_folder(folder) == digest
    store.verify(digest)


def test_a_missing_object_is_told_from_a_damaged_one(store, folder, tmp_path):
    digest = store.put_folder(folder)
    objects(store)[0].unlink()
    with pytest.raises(NotFoundError, match="does not hold"):
        store.verify(digest)
    with pytest.raises(NotFoundError, match="does not hold"):
        store.materialise(digest, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/outside"])
def test_a_manifest_cannot_write_outside_its_folder(store, tmp_path, name):
    (tmp_path / "file").write_bytes(b"x")
    digest = store.put_file(tmp_path / "file")
    manifest = json.dumps({"files": {name: digest}}).encode()
    forged = hashlib.sha256(manifest).hexdigest()
    (store.path / "folders" / forged[:2]).mkdir(parents=True)
    (store.path / "folders" / forged[:2] / forged[2:]).write_bytes(manifest)
    with pytest.raises(StorageError, match="outside its folder"):
        store.materialise(forged, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("digest", ["", "abc", "../" * 22, "A" * 64, "0" * 63 + "\n"])
def test_a_text_that_is_no_digest_is_refused(store, digest):
    with pytest.raises(NotFoundError, match="is no digest"):
        store.verify(digest)


def test_nothing_is_overwritten(store, tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    digest = store.put_file(tmp_path / "file")
    with pytest.raises(StorageError, match="exists already"):
        store.materialise(digest, tmp_path / "file")
    with pytest.raises(StorageError, match="exists already"):
        store.materialise(digest, tmp_path)


def test_missing_sources(store, tmp_path):
    for call in (store.put_file, digest_of):
        with pytest.raises(NotFoundError, match="no such file"):
            call(tmp_path / "none")
    with pytest.raises(NotFoundError, match="no such folder"):
        store.put_folder(tmp_path / "none")
    with pytest.raises(NotFoundError, match="does not hold"):
        store.verify("0" * 64)
    assert not store.path.exists(), "nothing is made before the first write"


def test_many_writers_of_the_same_bytes(store, folder):
    with ThreadPoolExecutor(4) as pool:
        digests = set(pool.map(lambda _: store.put_folder(folder), range(8)))
    assert digests == {digest_of(folder)}
    assert len(objects(store)) == 2
    store.verify(digests.pop())
