"""Reading rows: every kind of file gives the same rows, and a bad record costs only itself."""

import contextlib
import csv
import gzip
import json
import lzma
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.data import sources
from tunesmith.data.sources import parse_json, read_rows, split_elements, split_lines
from tunesmith.errors import DataError, NotFoundError

ROWS = [
    {"prompt": "How many legs?", "completion": "Eight."},
    {"prompt": 'Say "hé", twice', "completion": "hé,\nhé"},
    {"prompt": "Two\u2028lines\x85here", "completion": "ok 🙂"},
]
KINDS = ("a.jsonl", "a.ndjson", "crlf.jsonl", "bom.jsonl", "blank.jsonl", "no_suffix", "a.json", "array.jsonl")
KINDS += ("comma.json", "a.csv", "semicolon.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "A.JSON.XZ")
KINDS += ("gzip_by_content.jsonl",)
ROOT = Path(__file__).resolve().parents[2]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def read(path):
    """(rows, problems) of a path."""
    problems = []
    rows = list(read_rows(path, on_bad=problems.append))
    return rows, problems


def values(path):
    rows, problems = read(path)
    assert problems == []
    return [row.value for row in rows]


def places(problems):
    return [(problem.line, problem.severity) for problem in problems]


def chunked(data, sizes):
    """`data` in pieces of the given sizes, in a circle."""
    start = number = 0
    while start < len(data):
        size = sizes[number % len(sizes)]
        yield data[start : start + size]
        start, number = start + size, number + 1


# ---------------------------------------------------------------------------------------------------- kinds


def write_table(path, *, delimiter):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_kind(path):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    array = json.dumps(ROWS)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2)
    elif path.name in ("a.csv", "semicolon.csv", "a.tsv"):
        write_table(path, delimiter={"a.csv": ",", "semicolon.csv": ";", "a.tsv": "\t"}[path.name])
    else:
        content = {
            "a.jsonl": lines.encode(),
            "a.ndjson": lines.encode().removesuffix(b"\n"),
            "crlf.jsonl": lines.replace("\n", "\r\n").encode(),
            "bom.jsonl": b"\xef\xbb\xbf" + lines.encode(),
            "blank.jsonl": ("\n" + lines.replace("\n", "\n \t\n\n")).encode(),
            "no_suffix": lines.encode(),
            "a.json": array.encode(),
            "array.jsonl": b" \n" + json.dumps(ROWS, indent=2).encode() + b"\n\n",
            "comma.json": array.replace("]", ",\n]").encode(),
            "a.jsonl.gz": gzip.compress(lines.encode(), mtime=0),
            "A.JSON.XZ": lzma.compress(array.encode()),
            "gzip_by_content.jsonl": gzip.compress(lines.encode(), mtime=0),
        }[path.name]
        path.write_bytes(content)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_same_rows(tmp_path, name):
    write_kind(tmp_path / name)
    assert values(tmp_path / name) == ROWS


def test_line_numbers_count_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"a": 1}\n   \n\n{"a": 2}\n')
    rows, _ = read(path)
    assert [str(row.origin) for row in rows] == [f"{path}:2", f"{path}:5"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_is_read_and_reported(tmp_path, encoding):
    path = tmp_path / "a.jsonl"
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}[encoding]
    path.write_bytes(mark + "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS).encode(encoding))
    rows, problems = read(path)
    assert [row.value for row in rows] == ROWS
    assert [(problem.kind, problem.severity) for problem in problems] == [("quality", "warning")]


def test_utf16_with_half_a_surrogate_loses_one_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xff\xfe" + '{"a": 1}\n{"a": "\ud83d"}\n{"a": 3}\n'.encode("utf-16-le", "surrogatepass"))
    rows, problems = read(path)
    assert [row.value["a"] for row in rows] == [1, 3]
    assert (2, "error") in places(problems)


def test_text_files_hold_documents(tmp_path):
    whole, parts = tmp_path / "a.md", tmp_path / "b.txt"
    whole.write_text("# Title\n\nBody <|doc|> inside.\n")
    parts.write_text("<|doc|>\n\nFirst\nmore\n<|doc|>\n\n<|doc|>\r\nSecond\n<|doc|> \nstill second\n")
    assert values(whole) == [{"text": "# Title\n\nBody <|doc|> inside."}]
    rows, problems = read(parts)
    assert problems == []
    assert [(row.origin.line, row.value["text"]) for row in rows] == [
        (3, "First\nmore"),
        (8, "Second\n<|doc|> \nstill second"),
    ]


def test_text_that_is_not_utf8_costs_its_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n<|doc|>\n\nb\xe9d\n<|doc|>\nalso good\n")
    rows, problems = read(path)
    assert [row.value["text"] for row in rows] == ["good", "also good"]
    assert places(problems) == [(4, "error")]


# ------------------------------------------------------------------------------------------------- bad records


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"a": "cut', "unterminated string"),
        (b'{"a": 1,}', "broken JSON"),
        (b'{"a": 1} {"a": 2}', "extra data"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' stands twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "1e999"),
        (b'{"a": "\\ud83d"}', "half of a surrogate pair"),
        (b'{"\\udc00": 1}', "half of a surrogate pair"),
        (b'{"a": "\xe9"}', "byte 0xE9 at position 8"),
        (b'{"a": "\xed\xa0\xbd"}', "not valid UTF-8"),
        (b'["user", "hi"]', "a list"),
        (b'"text"', "a text"),
        (b"12", "a number"),
        (b"null", "null"),
        (b'{"a": "\x00"}', "control character"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "broken JSON|digits"),
    ],
)
def test_a_bad_line_is_told_and_skipped(tmp_path, line, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    rows, problems = read(path)
    assert [(row.origin.line, row.value["a"]) for row in rows] == [(1, 1), (3, 3)]
    assert places(problems) == [(2, "error")]
    assert problems[0].kind == "bad_row"
    assert any(word in problems[0].message for word in words.split("|"))


def test_surrogate_pairs_are_characters():
    assert parse_json(b'"\\ud83d\\ude42"') == "🙂"
    assert parse_json(rb'"\\ud83d"') == "\\ud83d"


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ('[{"a": 1}, {"a": 2,}, {"a": 3}]', [1, 3], [2]),
        ('[{"a": 1}, {"a": "]},["}, 7, {"a": 3}]', [1, "]},[", 3], [3]),
        ('[{"a": 1},\n {"a": 2},\n {"a": ', [1, 2], [3, 4]),
        ('[{"a": 1},\n {"a": 2}', [1, 2], [3]),
        ('[{"a": 1},, {"a": 3}]', [1, 3], [2]),
        ('[{"a": 1}] {"a": 2}', [1], [2]),
        ("[]", [], []),
        ("[", [], [1]),
        ('[\n  1,\n  {"a": 2}\n]', [2], [1]),
    ],
)
def test_arrays_with_damage(tmp_path, text, good, bad):
    path = tmp_path / "a.json"
    path.write_text(text)
    rows, problems = read(path)
    assert [row.value["a"] for row in rows] == good
    assert places(problems) == [(line, "error") for line in bad]


def test_lines_that_are_lists_do_not_make_an_array(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('["user", "hi"]\n{"a": 2}\n')
    rows, problems = read(path)
    assert [row.origin.line for row in rows] == [2]
    assert places(problems) == [(1, "error")]


def test_tables_tell_ragged_rows_and_open_quotes(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'a,b\n1,2\n\n1,2,3\n1\n"x"y,2\n"caf\xe9",2\n5,6\n"never closed,7\n8,9\n')
    rows, problems = read(path)
    assert [(row.origin.line, row.value) for row in rows] == [(1, {"a": "1", "b": "2"}), (6, {"a": "5", "b": "6"})]
    assert places(problems) == [(2, "error"), (3, "error"), (4, "error"), (5, "error"), (7, "error")]
    assert "3 field(s) where the header has 2" in problems[0].message
    assert "2 line(s)" in problems[-1].message


@pytest.mark.parametrize("header", [b"a,a\n1,2\n", b"a,\n1,2\n", b"", b"\xff,b\n1,2\n", b'"a\n'])
def test_a_table_needs_a_header(tmp_path, header):
    path = tmp_path / "a.csv"
    path.write_bytes(header)
    if not header:
        assert values(path) == []
        return
    with pytest.raises(DataError, match="header"):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "string.json", "a.csv", "a.txt"])
def test_records_that_are_too_long_cost_only_themselves(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sources, "MAX_RECORD_BYTES", 5_000)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 512)
    long = '\\\\ \\" ]},' * 3_000
    content = {
        "a.jsonl": f'{{"a": 1}}\n{{"a": "{long}"}}\n{{"a": 3}}\n',
        "a.json": f'[{{"a": 1}}, {{"a": [{"7, " * 5_000} 7]}}, {{"a": 3}}]',
        "string.json": f'[{{"a": 1}}, {{"a": "{long}"}}, {{"a": 3}}]',
        "a.csv": f"a\n1\n{'x' * 20_000}\n3\n",
        "a.txt": f"1\n<|doc|>\n{'x ' * 20_000}\n<|doc|>\n3\n",
    }[name]
    path = tmp_path / name
    path.write_text(content)
    rows, problems = read(path)
    assert [str(row.value.get("a", row.value.get("text"))) for row in rows] == ["1", "3"]
    assert [problem.severity for problem in problems] == ["error"]


def test_parquet_texts_that_are_not_utf8_cost_their_row(tmp_path):
    path = tmp_path / "a.parquet"
    column = pyarrow.Array.from_buffers(
        pyarrow.string(),
        3,
        [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pyarrow.py_buffer(b"a\xffc")],
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    rows, problems = read(path)
    assert [row.value["text"] for row in rows] == ["a", "c"]
    assert places(problems) == [(2, "error")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-20]),
        ("a.jsonl.xz", lzma.compress(b'{"a": 1}\n' * 1000)[:-20]),
        ("a.parquet", b"PAR1 no table PAR1"),
        ("a.xlsx", b"PK\x03\x04"),
    ],
)
def test_files_that_cannot_be_read_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(tmp_path / name)
    assert caught.value.file == str(tmp_path / name)
    assert caught.value.hint


# ------------------------------------------------------------------------------------------ folders and names


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, number in (("b.jsonl", 2), ("a.csv", 1), ("sub/c.jsonl", 3)):
        text = f"n\n{number}\n" if name.endswith("csv") else json.dumps({"n": str(number)})
        (tmp_path / name).write_text(text)
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".hidden.jsonl").write_text("{}")
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    rows, problems = read(tmp_path)
    assert problems == []
    assert [row.value["n"] for row in rows] == ["1", "2", "3"]
    assert rows[0].origin.file == f"{tmp_path}/a.csv"


def test_a_folder_with_a_test_split_must_be_named_by_split(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}-00000.jsonl").write_text(json.dumps({"split": split}))
    with pytest.raises(DataError, match="train on the rows of a test") as caught:
        read(tmp_path)
    assert caught.value.hint.endswith(f"{tmp_path}:train")
    assert values(f"{tmp_path}:train") == [{"split": "train"}]
    assert values(f"{tmp_path}:test") == [{"split": "test"}]
    with pytest.raises(NotFoundError, match="no split"):
        read(f"{tmp_path}:validation")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(NotFoundError, match="no file that can be read"):
        read(tmp_path)


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "tickets.jsonl").write_text("{}")
    with pytest.raises(NotFoundError) as caught:
        read(tmp_path / "ticket.jsonl")
    assert str(tmp_path / "tickets.jsonl") in caught.value.hint


@pytest.mark.parametrize("path", ["missing/rows.jsonl", "nothing", "\0", "x" * 5000, "", "a/b/c"])
def test_missing_names_are_not_taken_for_hub_names(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError, match="no such file"):
        read(path)


READ_HUB = """
import json, sys
from tunesmith.data.sources import read_rows
from tunesmith.errors import NotFoundError
try:
    print(json.dumps([[str(row.origin), row.value] for row in read_rows(sys.argv[1], on_bad=print)]))
except NotFoundError as error:
    print(json.dumps([error.message, error.hint]))
"""


def read_hub(name, cache):
    """Read a hub name in a process that has only this cache and no network."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", READ_HUB, name]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, cwd=cache).stdout)


def test_a_hub_name_is_read_from_the_hub_cache(tmp_path):
    repository = tmp_path / "datasets--team--tickets"
    snapshot = repository / "snapshots" / ("0" * 40)
    (snapshot / "data").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for split in ("train", "test"):
        (snapshot / "data" / f"{split}-00000-of-00001.jsonl").write_text(json.dumps({"split": split}) + "\n")
    origin = "team/tickets/data/train-00000-of-00001.jsonl:1"
    assert read_hub("team/tickets:train", tmp_path) == [[origin, {"split": "train"}]]


def test_a_hub_that_cannot_be_reached_says_what_to_do(tmp_path):
    message, hint = read_hub("team/unknown", tmp_path)
    assert "team/unknown" in message
    assert "give its folder" in hint


# -------------------------------------------------------------------------------------------------- properties


@given(st.lists(st.binary(max_size=12)), st.lists(st.integers(1, 7), min_size=1, max_size=4))
def test_lines_do_not_depend_on_the_chunks(lines, sizes):
    data = b"\n".join(lines)
    whole = [(number, line.removesuffix(b"\r")) for number, line in enumerate(data.split(b"\n"), start=1)]
    if not data.split(b"\n")[-1]:
        whole = whole[:-1]
    assert list(split_lines(chunked(data, sizes))) == whole


@given(
    st.lists(json_values, max_size=5), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.sampled_from([None, 1])
)
def test_elements_do_not_depend_on_the_chunks(elements, sizes, indent):
    data = json.dumps(elements, indent=indent, ensure_ascii=False).encode()[1:]
    found = list(split_elements(chunked(data, sizes)))
    assert [number for number, _ in found] == list(range(1, len(elements) + 1))
    assert [json.loads(element) for _, element in found] == elements


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(
    st.binary(max_size=200)
    | st.sampled_from([b"\xff\xfe", b"\x1f\x8b", b"\xfd7zXZ\0", b"[{", b"PAR1"]).flatmap(
        lambda head: st.binary(max_size=60).map(lambda tail: head + tail)
    ),
    st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.parquet", "a.jsonl.gz"]),
)
def test_random_bytes_raise_nothing_but_data_errors(tmp_path, data, name):
    path = tmp_path / name
    path.write_bytes(data)
    with contextlib.suppress(DataError):
        rows, problems = read(path)
        assert all(isinstance(row.value, dict) for row in rows)
        places_found = [row.origin for row in rows]
        places_found += [problem.origin for problem in problems if problem.severity == "error"]
        assert len(set(places_found)) == len(places_found)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1 << 16)
    row, num_rows = {"text": "x" * 2_000}, 2_500
    path = tmp_path / name
    if name == "a.json":
        path.write_text(json.dumps([row] * num_rows))
    elif name == "a.jsonl":
        path.write_text((json.dumps(row) + "\n") * num_rows)
    else:
        path.write_text("text\n" + (row["text"] + "\n") * num_rows)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(path, on_bad=pytest.fail)) == num_rows
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1_500_000 < path.stat().st_size / 3
