"""Files, folders and hub data sets -> rows, one record at a time.

A file is cut into records of bytes (lines, array elements, documents) and each record is parsed on its own, so memory
depends on the longest record and not on the file, and one broken record costs only itself. What a file holds is told
from its first bytes where that is possible, and from its name otherwise.
"""

import csv
import difflib
import gzip
import io
import itertools
import json
import lzma
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from tunesmith.data.ledger import Problem
from tunesmith.data.types import Origin, Row
from tunesmith.errors import DataError, NotFoundError

MAX_RECORD_BYTES = 64 << 20
CHUNK_BYTES = 1 << 20
HEAD_BYTES = 64 << 10
PARQUET_BATCH_ROWS = 256

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (".csv", ".tsv")
TEXT_SUFFIXES = (".txt", ".md")
PARQUET_SUFFIXES = (".parquet",)
NAMED_SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES, *TEXT_SUFFIXES, *PARQUET_SUFFIXES)
SUFFIXES = (*NAMED_SUFFIXES, "")  # a file without a suffix is taken for JSON
COMPRESSED_SUFFIXES = (".gz", ".xz")
ALLOWED = ".jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt, .md, and .gz or .xz of these"

DOCUMENT_SEPARATOR = b"<|doc|>"
HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<split>[\w.-]+))?")
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_WORDS |= dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation")

OnBad = Callable[[Problem], None]
Record = tuple[int, bytes | None]  # its number, and its bytes (None: longer than MAX_RECORD_BYTES)


def read_rows(path: str | Path, *, on_bad: OnBad) -> Iterator[Row]:
    """The rows of a file, of all the files of a folder, or of a hub data set, in order.

    A record that cannot be read is skipped and told to `on_bad` as a Problem of severity `error`; a remark on a whole
    file (UTF-16 for instance) comes as a `warning` and skips nothing.
    Raises NotFoundError (no such file, folder or hub name) and DataError (a file that cannot be read at all).
    """
    for name, file in resolve(str(path)):
        try:
            yield from _read_file(file, name=name, on_bad=on_bad)
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise DataError(
                f"the compressed file is damaged or cut off ({error})", file=name, hint="copy or download it again"
            ) from error
        except OSError as error:
            raise DataError(
                f"cannot be read: {error.strerror or error}", file=name, hint="check the file and its permissions"
            ) from error


def resolve(path: str) -> list[tuple[str, Path]]:
    """The files that `path` stands for: (the name the user would give it, the file), in reading order."""
    if os.path.isdir(path):
        return _folder_files(Path(path), name=path.rstrip("/"), split=None)
    if os.path.exists(path):
        return [(path, Path(path))]
    stem, _, split = path.rpartition(":")
    if stem and os.path.isdir(stem):
        return _folder_files(Path(stem), name=stem.rstrip("/"), split=split)
    match = HUB_NAME.fullmatch(path)
    if match and _suffix(path) not in NAMED_SUFFIXES and not Path(path).parent.exists():
        return _folder_files(_download(match["name"]), name=match["name"], split=match["split"])
    _not_found(path)


def _not_found(path: str) -> NoReturn:
    folder = Path(path).parent
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    nearest = difflib.get_close_matches(Path(path).name, names, n=1, cutoff=0.5)
    if nearest:
        hint = f"did you mean {folder / nearest[0]}?"
    elif folder.is_dir():
        hint = "the folder is there, the file is not: check the name"
    else:
        hint = f"there is no folder {folder} either: check the path"
    raise NotFoundError(f"no such file: {path}", hint=hint)


def _folder_files(folder: Path, *, name: str, split: str | None) -> list[tuple[str, Path]]:
    """The readable files below `folder`, sorted by name; those of one split where the names tell splits apart."""
    by_split: dict[str, list[tuple[str, Path]]] = {}
    for file in sorted(folder.rglob("*")):
        relative = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        note = relative.name.upper().startswith(("README", "LICENSE", "NOTICE"))
        if file.is_file() and not hidden and not note and _suffix(file.name) in NAMED_SUFFIXES:
            word = _split_of(relative.as_posix())
            by_split.setdefault(word, []).append((f"{name}/{relative.as_posix()}", file))
    if not by_split:
        raise NotFoundError(f"the folder {name} holds no file that can be read", hint=f"allowed are {ALLOWED}")
    splits = ", ".join(sorted(filter(None, by_split))) or "none"
    if split is not None:
        chosen = by_split.get(SPLIT_WORDS.get(split, ""), []) if split in SPLIT_WORDS else []
        chosen = chosen or [pair for pairs in by_split.values() for pair in pairs if split in pair[1].name]
        if not chosen:
            raise NotFoundError(f"{name} has no split {split!r}", hint=f"the splits it has: {splits}")
        return chosen
    if len(by_split) > 1 and by_split.keys() - {"", "train"}:
        raise DataError(
            f"{name} holds the splits {splits}; reading all of it would train on the rows of a test",
            hint=f"name one split: {name}:train" if "train" in by_split else "name the files instead of the folder",
        )
    return sorted(pair for pairs in by_split.values() for pair in pairs)


def _split_of(name: str) -> str:
    """`train`, `validation`, `test`, or an empty string where the file's path names no split."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "")


def _download(name: str) -> Path:
    """The hub data set `name` in the hub cache."""
    import huggingface_hub

    patterns = [f"*{suffix}{packed}" for suffix in NAMED_SUFFIXES for packed in ("", *COMPRESSED_SUFFIXES)]
    try:
        return Path(huggingface_hub.snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotFoundError(
            f"there is no file {name}, and the hub data set of that name could not be fetched ({reason})",
            hint="check the name and the network, or download the data set elsewhere and give its folder",
        ) from error


def _suffix(name: str) -> str:
    """The suffix that tells the kind, in lower case: `.csv` for `a.csv`, `A.CSV` and `a.csv.gz`."""
    path = Path(name.lower())
    if path.suffix in COMPRESSED_SUFFIXES:
        path = path.with_suffix("")
    return path.suffix


def _read_file(path: Path, *, name: str, on_bad: OnBad) -> Iterator[Row]:
    suffix = _suffix(path.name)
    if suffix not in SUFFIXES:
        raise DataError(f"{suffix!r} is not a kind of file that can be read", file=name, hint=f"allowed are {ALLOWED}")
    if suffix in PARQUET_SUFFIXES:
        yield from _parquet_rows(path, name=name, on_bad=on_bad)
        return
    with _open(path) as stream:
        head = stream.peek(HEAD_BYTES)[:HEAD_BYTES]
        chunks = _utf8_chunks(stream, head=head, name=name, on_bad=on_bad)
        if suffix in TABLE_SUFFIXES:
            yield from _table_rows(split_lines(chunks), suffix=suffix, name=name, on_bad=on_bad)
        elif suffix in TEXT_SUFFIXES:
            yield from _document_rows(split_lines(chunks), name=name, on_bad=on_bad)
        else:
            yield from _json_rows(chunks, name=name, on_bad=on_bad)


def _open(path: Path) -> io.BufferedReader:
    """The file's bytes, decompressed; what it is compressed with is told from its first bytes."""
    file: io.BufferedReader = io.BufferedReader(io.FileIO(path), CHUNK_BYTES)
    magic = file.peek(6)[:6]
    if magic.startswith(b"\x1f\x8b"):
        return io.BufferedReader(gzip.GzipFile(fileobj=file), HEAD_BYTES)  # type: ignore[arg-type]
    if magic.startswith(b"\xfd7zXZ\0"):
        return io.BufferedReader(lzma.LZMAFile(file), HEAD_BYTES)  # type: ignore[arg-type]
    return file


def _utf8_chunks(stream: io.BufferedReader, *, head: bytes, name: str, on_bad: OnBad) -> Iterator[bytes]:
    """The stream in pieces of UTF-8 without a byte-order mark. UTF-16 is recognised by its mark and re-encoded."""
    if not head.startswith((b"\xff\xfe", b"\xfe\xff")):
        first = stream.read(CHUNK_BYTES).removeprefix(b"\xef\xbb\xbf")
        while first:
            yield first
            first = stream.read(CHUNK_BYTES)
        return
    on_bad(Problem("quality", "warning", name, 1, "the file is UTF-16; it was read as such", hint="save it as UTF-8"))
    # Half surrogates pass through, so that the one record they stand in is refused and not the file.
    text = io.TextIOWrapper(stream, encoding="utf-16", errors="surrogatepass", newline="")
    try:
        while piece := text.read(CHUNK_BYTES):
            yield piece.encode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise DataError(f"the file begins as UTF-16 and breaks off: {error.reason}", file=name) from error


# ---------------------------------------------------------------------------------------------------- records


def split_lines(chunks: Iterable[bytes]) -> Iterator[Record]:
    """Lines without their `\\n` or `\\r\\n`, numbered from 1. Only `\\n` ends a line: U+2028 and U+0085 are text."""
    number, parts, size = 1, [], 0
    for chunk in chunks:
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            size += len(line)
            parts.append(line)
            yield number, b"".join(parts).removesuffix(b"\r") if size <= MAX_RECORD_BYTES else None
            number, parts, size = number + 1, [], 0
        size += len(rest)
        parts = [*parts, rest] if size <= MAX_RECORD_BYTES else []
    if size:
        yield number, b"".join(parts).removesuffix(b"\r") if size <= MAX_RECORD_BYTES else None


# Strings are matched as a whole, so that brackets and commas inside them are not seen.
_JSON_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?P<end>")?|[\[\]{},]', re.DOTALL)


def split_elements(chunks: Iterator[bytes]) -> Iterator[Record]:
    """The elements of a JSON array as they stand in the bytes that follow its opening bracket, numbered from 1.

    Only strings and brackets are looked at, so an element that is broken inside does not hide the next one. An empty
    record stands for damage to the array itself: two commas in a row, no closing bracket, or something after it.
    """
    buffer, start, position, depth, number, skipping = b"", 0, 0, 0, 1, False
    for chunk in chunks:
        buffer, position, start = buffer[start:] + chunk, position - start, 0
        while token := _JSON_TOKEN.search(buffer, position):
            mark = token.group()[:1]
            if mark == b'"' and token["end"] is None:
                position = token.start()  # it goes on in the next chunk: begin again at its quote
                break
            position = token.end()
            if mark in (b"[", b"{"):
                depth += 1
            elif depth and mark in (b"]", b"}"):
                depth -= 1
            elif not depth and mark in (b",", b"]"):
                element = buffer[start : token.start()].strip()
                if mark == b"," or element:
                    yield number, None if skipping else element
                    number += 1
                start, skipping = position, False
                if mark == b"]":
                    if buffer[start:].strip() or any(more.strip() for more in chunks):
                        yield number, b""
                    return
        else:
            position = len(buffer)
        if len(buffer) - start > MAX_RECORD_BYTES:
            skipping, start = True, position
            if len(buffer) - start > MAX_RECORD_BYTES:  # one string alone is too long: keep that it is open
                open_escape = (len(buffer) - len(buffer.rstrip(b"\\"))) % 2
                buffer, start, position = b'"' + b"\\" * open_escape, 0, 0
    if element := buffer[start:].strip():
        yield number, None if skipping else element
        number += 1
    yield number, b""


# ------------------------------------------------------------------------------------------------------ kinds


def parse_json(record: bytes) -> Any:
    """Strict JSON: UTF-8, no key twice, no NaN or infinity, no half surrogates. Raises ValueError with the reason."""
    try:
        text = record.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8: byte 0x{record[error.start]:02X} at position {error.start + 1}") from None
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        reason = error.msg.removesuffix(" starting at").lower()
        raise ValueError(f"broken JSON: {reason} (character {min(error.pos + 1, len(text))} of {len(text)})") from None
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    if "\\u" in text and (half := _half_surrogate(value)):
        raise ValueError(f"half of a surrogate pair (\\u{ord(half):04x}), which is no character")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return value


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"{text} is not allowed in JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if abs(value) != float("inf") else _not_finite(text)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_not_finite, parse_float=_finite)


def _half_surrogate(value: Any) -> str | None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        return str(error.object)[error.start]
    return None


def _json_rows(chunks: Iterator[bytes], *, name: str, on_bad: OnBad) -> Iterator[Row]:
    """One object a line, or one array of objects; which of the two is told from the first line."""
    first = next(chunks, b"")
    is_array = _is_array(first)
    if is_array:
        records = split_elements(itertools.chain([first.lstrip()[1:]], chunks))
        what, damage = "element", "the array is damaged here: an empty element, no closing bracket, or text after it"
    else:
        records = split_lines(itertools.chain([first], chunks))
        what, damage = "line", ""
    for number, record in records:
        if record is not None and not record.strip() and not is_array:
            continue
        try:
            if record is None:
                raise ValueError(f"longer than {MAX_RECORD_BYTES >> 20} MiB")
            if not record:
                raise ValueError(damage)
            value = parse_json(record)
            if not isinstance(value, dict):
                raise ValueError(f"{json_type(value)} where a row, which is an object {{...}}, is expected")
        except ValueError as error:
            hint = f"mend the {what}, or set data.bad_rows: drop to leave such {what}s out"
            on_bad(Problem("bad_row", "error", name, number, str(error), hint=hint))
        else:
            yield Row(Origin(name, number), value)


def _is_array(first: bytes) -> bool:
    """Whether a file that begins with these bytes is one JSON array (and not lines that happen to be lists)."""
    text = first.lstrip()
    if not text.startswith(b"["):
        return False
    line, _, rest = text.partition(b"\n")
    if not rest.strip():
        return True
    try:
        parse_json(line)
    except ValueError:
        return True
    return False


def json_type(value: Any) -> str:
    """What a JSON value is, in words with an article."""
    words = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return words.get(type(value), "a number")


def _table_rows(lines: Iterator[Record], *, suffix: str, name: str, on_bad: OnBad) -> Iterator[Row]:
    """CSV after RFC 4180 with a header; records are numbered from 1 after it."""
    csv.field_size_limit(MAX_RECORD_BYTES)  # the csv module's own limit, of the whole process, is 128 KiB
    texts = (_line_text(line) for _, line in lines)
    first = next((text for text in texts if text.strip()), "")
    delimiter = "\t" if suffix == ".tsv" else max(",;\t", key=first.count)
    reader = csv.reader(itertools.chain([first], texts), delimiter=delimiter, strict=True)
    header = _table_header(reader, name=name)
    number = 0
    while True:
        line_before, message = reader.line_num, ""
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            message = f"broken CSV in the {reader.line_num - line_before} line(s) of this record: {error}"
            fields = []
        if not message and len(fields) <= 1 and not "".join(fields).strip():
            continue
        number += 1
        if not message and len(fields) != len(header):
            message = f"{len(fields)} field(s) where the header has {len(header)} ({', '.join(header)})"
        if not message and any(not field.isascii() and _has_bad_bytes(field) for field in fields):
            message = "not valid UTF-8, or a line is too long"
        if message:
            hint = "a text with a comma, quote or line break stands in double quotes, a quote in it is doubled"
            on_bad(Problem("bad_row", "error", name, number, message, hint=hint))
        else:
            yield Row(Origin(name, number), dict(zip(header, fields, strict=True)))


def _table_header(reader: Iterator[list[str]], *, name: str) -> list[str]:
    try:
        header = [column.strip() for column in next(reader, [])]
    except csv.Error as error:
        raise DataError(f"the header is broken: {error}", file=name, line=1) from error
    if len(set(header)) != len(header) or not all(header) or _has_bad_bytes("".join(header)):
        raise DataError(
            f"the header is {', '.join(map(ascii, header))}; it must name each column once",
            file=name,
            line=1,
            hint="the first line of a table holds the names of its columns",
        )
    return header


def _line_text(line: bytes | None) -> str:
    """A line with its line break. What is not UTF-8, or too long, becomes half surrogates."""
    return (b"\xff" if line is None else line).decode("utf-8", "surrogateescape") + "\n"


def _has_bad_bytes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _document_rows(lines: Iterator[Record], *, name: str, on_bad: OnBad) -> Iterator[Row]:
    """Plain text: lines that are exactly `<|doc|>` separate documents. A row's line is where its document begins."""
    number, size = 0, 0
    parts: list[str] = []

    def document() -> Iterator[Row]:
        text = "".join(parts).strip("\n")
        if size > MAX_RECORD_BYTES or _has_bad_bytes(text):
            message = "not valid UTF-8" if size <= MAX_RECORD_BYTES else f"longer than {MAX_RECORD_BYTES >> 20} MiB"
            hint = "save the file as UTF-8, and separate documents by lines that are exactly <|doc|>"
            on_bad(Problem("bad_row", "error", name, number, f"the document is {message}", hint=hint))
        elif text.strip():
            yield Row(Origin(name, number), {"text": text})

    for line_number, line in lines:
        if line == DOCUMENT_SEPARATOR:
            yield from document()
            number, parts, size = 0, [], 0
            continue
        size += len(line) + 1 if line is not None else MAX_RECORD_BYTES + 1
        if not number and (line is None or line.strip()):
            number = line_number
        if number and size <= MAX_RECORD_BYTES:
            parts.append(_line_text(line))
    yield from document()


def _parquet_rows(path: Path, *, name: str, on_bad: OnBad) -> Iterator[Row]:
    """Parquet by record batches; records are numbered from 1."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for index in range(batch.num_rows):
                    number += 1
                    try:
                        value = batch.slice(index, 1).to_pylist()[0]
                    except UnicodeDecodeError:
                        on_bad(Problem("bad_row", "error", name, number, "a text in it is not valid UTF-8"))
                    else:
                        yield Row(Origin(name, number), value)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"not a readable Parquet file: {reason}", file=name, hint="write it again") from error
