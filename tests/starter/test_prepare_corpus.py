import json
import lzma
import sys
from pathlib import Path

import prepare_corpus
import pytest


def write_corpus(folder: Path, **files: list[str]) -> None:
    for name, documents in files.items():
        text = "\n" + prepare_corpus.SEPARATOR.join(documents) + "\n"
        (folder / f"{name}.txt.xz").write_bytes(lzma.compress(text.encode("utf-8")))


def read_texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_document_lands_on_one_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = [f"Chapter {number}\n\nIt was a dark night — №{number}." for number in range(300)]
    second = [f"Proposal {number}\n\nWe change one thing." for number in range(300)]
    write_corpus(tmp_path, literature=first, technical=second, heldout=["Kept apart."])
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["prepare_corpus.py", "--prose", str(tmp_path), "--out", str(out)])
    prepare_corpus.main()

    train, validation = read_texts(out / "pretrain.jsonl"), read_texts(out / "validation.jsonl")
    assert read_texts(out / "heldout.jsonl") == ["Kept apart."]
    assert sorted(train + validation) == sorted(first + second)
    assert 1 <= len(validation) <= 20
    assert [text for text in first + second if text in set(train)] == train  # in the order of the files
    assert all(prepare_corpus.is_validation(text) for text in validation)


def test_a_folder_without_a_corpus_is_an_error(tmp_path: Path):
    write_corpus(tmp_path, heldout=["Kept apart."])
    with pytest.raises(FileNotFoundError, match=r"no \*.txt.xz"):
        prepare_corpus.training_files(tmp_path)
