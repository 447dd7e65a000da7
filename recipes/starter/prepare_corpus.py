"""The prose corpus as JSON Lines: one row `{"text": document}` a document.

    python recipes/starter/prepare_corpus.py --prose DIR --out DIR

Reads the `*.txt.xz` files of `--prose`, in which a line holding only `<|doc|>` stands between documents, and writes

    pretrain.jsonl     what the starter model is trained on, in the order of the files
    validation.jsonl   about 1 % of those documents, chosen by the hash of their text, never trained on
    heldout.jsonl      the documents of `heldout.txt.xz`, for the last measurement only
"""

import argparse
import hashlib
import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path

SEPARATOR = "\n\n<|doc|>\n\n"
HELDOUT = "heldout.txt.xz"
VALIDATION_SHARE = 0.01


def read_documents(path: Path) -> list[str]:
    """The documents of one `.txt.xz` file, without the blank lines around them."""
    text = lzma.decompress(path.read_bytes()).decode("utf-8")
    return [document.strip("\n") for document in text.split(SEPARATOR) if document.strip()]


def training_files(prose: Path) -> list[Path]:
    """The corpus files by name, all but the held-out one; FileNotFoundError if there are none."""
    files = sorted(path for path in prose.glob("*.txt.xz") if path.name != HELDOUT)
    if not files:
        raise FileNotFoundError(f"no *.txt.xz files in {prose}")
    return files


def is_validation(document: str) -> bool:
    """Whether a document is kept for validation: decided by its text alone, so it never changes sides."""
    digest = hashlib.sha256(document.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < VALIDATION_SHARE * 2**64


def write_rows(documents: Iterable[str], *, path: Path) -> None:
    """Write one JSON row a document."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for document in documents:
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")


def all_documents(prose: Path) -> Iterator[str]:
    """Every training and validation document, in the order of the files."""
    for path in training_files(prose):
        yield from read_documents(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prose", type=Path, required=True, help="folder with the *.txt.xz files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the three files into")
    arguments = parser.parse_args()

    arguments.out.mkdir(parents=True, exist_ok=True)
    documents = list(all_documents(arguments.prose))
    splits = {
        "pretrain": [document for document in documents if not is_validation(document)],
        "validation": [document for document in documents if is_validation(document)],
        "heldout": read_documents(arguments.prose / HELDOUT),
    }
    for name, rows in splits.items():
        write_rows(rows, path=arguments.out / f"{name}.jsonl")
        print(f"{name}: {len(rows):,} documents, {sum(len(row.encode()) for row in rows):,} bytes")


if __name__ == "__main__":
    main()
