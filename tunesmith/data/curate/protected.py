"""Rows whose text belongs to somebody: by the licence they carry, or because a text the user names stands in them.

A licence is told from the wording of its own header, of its SPDX tag, or from a copyright line, never from its mere name.
A protected passage is `MIN_PASSAGE_WORDS` words in a row, word for word, that stand in one of the files. All 13-grams of
the files are indexed and nothing is sampled, so such a passage is always found, wherever it stands (winnowing, Schleimer
et al. 2003, promises the same of a part of the grams, but not where a passage begins and ends).

Shapes: H hits, R runs of hits (ngrams.py), L lines.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tunesmith.data.curate.base import quoted
from tunesmith.data.curate.ngrams import Batch, Batches, Index, hashed, passage, runs_of, texts_in, words_of
from tunesmith.data.ledger import Problem
from tunesmith.data.sources import JSON_SUFFIXES, PARQUET_SUFFIXES, TABLE_SUFFIXES, read_rows
from tunesmith.data.types import Example, Origin
from tunesmith.errors import NotFoundError

GRAM_WORDS = 13
MIN_PASSAGE_WORDS = 25
ROW_SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES, *PARQUET_SUFFIXES)
HEAD_BYTES = 8192
SIGNS = ("licen", "copyright", "(c)", "©", "rights reserved", "permission is hereby", "redistribution")
MARKS = re.compile(r"[\s/*#;%|<>!\"'-]+")  # what a comment puts between the words of a header
HEADERS = {
    "the GNU Affero GPL": r"(?:terms|under) (?:of )?the GNU Affero General Public License as published",
    "the GNU LGPL": r"(?:terms|under) (?:of )?the GNU (?:Lesser|Library) General Public License as published",
    "the GNU GPL": r"(?:terms|under) (?:of )?the GNU General Public License (?:version \d )?as published",
    "the Apache License": r"licen[sc]e(?:d|s this file to you) under (?:the terms of )?the Apache License,? Version \d",
    "the Mozilla Public License": r"subject to the terms of the Mozilla Public License",
    "the MIT License": r"Permission is hereby granted, free of charge, to any person obtaining a copy",
    "the BSD License": r"Redistribution and use in source and binary forms, with or without modification",
    "another licence": r"This (?:source code|file|program|software|package) is (?:dual )?licen[sc]ed under",
    "a Creative Commons licence": r"(?:is|are) licen[sc]ed under (?:a |the )?(?:Creative Commons|CC.BY)",
}
HEADER_PATTERNS = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in HEADERS.items()}
SPDX = re.compile(r"SPDX.License.Identifier: ?\(?([A-Za-z][\w.+-]*)")
OPENING = r"(?m:^)(?i:[\s/*#;%|<!\"'-]|:copyright:)*"
YEARS = r"(?:19|20)\d\d(?: ?[-–,] ?(?:(?:19|20)?\d\d|present))*"
COPYRIGHT = re.compile(
    rf"{OPENING}(?:(?i:copyright)(?: ?\((?i:c)\)| ?©)?|\((?i:c)\)|©):? {YEARS},? (?i:by )?(?i:the )?[A-Z\"<][\w. ]"
    rf"|{OPENING}(?i:copyright) ?(?:\((?i:c)\)|©) [A-Z]\w"
)
RESERVED = re.compile(rf"(?:{OPENING}|{YEARS}[^\n?]{{1,80}}[.,;] )(?i:all rights reserved)\.?\s*(?m:$)")


def licences_in(text: str) -> list[str]:
    """What of licences a text carries: `the header of the MIT License`, `a copyright line`, ..."""
    lower = text.lower()
    if not any(sign in lower for sign in SIGNS):
        return []
    running = MARKS.sub(" ", text)
    found = [f"the header of {name}" for name, pattern in HEADER_PATTERNS.items() if pattern.search(running)]
    if tag := SPDX.search(text):
        found.append(f"the SPDX tag {tag[1]}")
    if COPYRIGHT.search(text):
        found.append("a copyright line")
    if RESERVED.search(text):
        found.append("'all rights reserved'")
    return found


class _File(NamedTuple):
    """Where an indexed text stands: its first line, and how many words stand before each of its lines (or nothing)."""

    origin: Origin
    words_before_L: np.ndarray

    def at(self, word: int) -> Origin:
        """The line of a word."""
        line = int(np.searchsorted(self.words_before_L, word, "right")) - 1 if len(self.words_before_L) else 0
        return Origin(self.origin.file, self.origin.line + line)


class Protected:
    """Looks for licences in rows, and for passages of the texts in a folder.

    folder: a folder or a file, None for the licences alone; rows of .jsonl, .csv and the like are texts of their own, any
    other file in UTF-8 is one text. min_passage_words: GRAM_WORDS at least. Raises NotFoundError where there is none.
    Memory is at most 64 bytes a word of them.
    """

    name = "protected"

    def __init__(self, folder: str | None, *, min_passage_words: int = MIN_PASSAGE_WORDS):
        self.min_passage_words = min_passage_words
        self._batches = Batches()
        self._index = Index(size=GRAM_WORDS, every_place=False)
        self._files: list[_File] = []
        self._unread: list[Problem] = []
        for path in [] if folder is None else files_below(folder):
            if path.name.lower().removesuffix(".gz").removesuffix(".xz").endswith(ROW_SUFFIXES):
                self._add_rows(path)
            else:
                self._add_text(path)
        self._index.close()

    def look(self, example: Example) -> Iterator[Problem]:
        """Take a row; its licences, and the passages in it and in rows before it, once there are enough."""
        batch = self._batches.add(example)
        if batch is not None:
            yield from self._findings(batch)

    def finish(self) -> Iterator[Problem]:
        """What is in the last rows, and which files could not be compared."""
        yield from self._findings(self._batches.take())
        yield from self._unread

    def _add_rows(self, path: Path) -> None:
        for row in read_rows(path, on_bad=self._skip):
            for text in dict.fromkeys(texts_in(row.value)):
                self._index.add(hashed(words_of(text)))
                self._files.append(_File(row.origin, np.zeros(0, np.int64)))

    def _add_text(self, path: Path) -> None:
        with path.open("rb") as file:
            if b"\0" in file.read(HEAD_BYTES):
                message = "the file holds no text in UTF-8 and was not compared with"
                self._skip(Problem("quality", "warning", str(path), 1, message))
                return
        with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
            hashes = [hashed(words_of(line)) for line in lines]
        if hashes:
            lengths_L = np.array([len(line) for line in hashes], np.int64)
            self._index.add(np.concatenate(hashes))
            self._files.append(_File(Origin(str(path), 1), np.cumsum(lengths_L) - lengths_L))

    def _skip(self, problem: Problem) -> None:
        hint = "save it as plain text in UTF-8, or take it out of the folder"
        self._unread.append(Problem("quality", "warning", *problem.origin, message=problem.message, hint=hint))

    def _findings(self, batch: Batch) -> Iterator[Problem]:
        passages = list(self._passages(batch))
        place = 0
        for part, (origin, (name, text)) in enumerate(zip(batch.origins, batch.parts, strict=True)):
            if licences := licences_in(text):
                message = f"{name} carries {' and '.join(licences)}"
                hint = "check that the licence allows what the model is for, or leave the row out"
                yield Problem("protected_text", "warning", *origin, message=message, hint=hint)
            while place < len(passages) and passages[place][0] == part:
                yield passages[place][1]
                place += 1

    def _passages(self, batch: Batch) -> Iterator[tuple[int, Problem]]:
        """The long runs of grams that stand in the folder, with the numbers of their parts, in order."""
        grams_Q, part_Q, word_Q = batch.grams(size=GRAM_WORDS)
        query_H, entry_H = self._index.find(grams_Q)
        part_H, word_H = part_Q[query_H], word_Q[query_H]
        for start, end in zip(*(bounds.tolist() for bounds in runs_of(part_H, word_H)), strict=True):
            part, first, last = int(part_H[start]), int(word_H[start]), int(word_H[end]) + GRAM_WORDS - 1
            if last - first + 1 < self.min_passage_words:
                continue
            # A gram is known by the first text that has it, so one passage may have grams of several.
            text = Counter(self._index.text_G[entry_H[start : end + 1]].tolist()).most_common(1)[0][0]
            own = entry_H[start : end + 1][self._index.text_G[entry_H[start : end + 1]] == text]
            other = self._files[text].at(int(self._index.place_G[own[0]]))
            name, content = batch.parts[part]
            message = (
                f"{last - first + 1} words in a row stand in {other}: words {first + 1} to {last + 1} of {name},"
                f" {quoted(passage(content, first=first, last=last))}"
            )
            hint = "leave the row out, or have the right to train on that text"
            origin = batch.origins[part]
            yield part, Problem("protected_text", "warning", *origin, message=message, other=other, hint=hint)


def files_below(folder: str) -> list[Path]:
    """The files below a folder, sorted by name, hidden ones left out; a file is itself."""
    path = Path(folder)
    if path.is_file():
        return [path]
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        raise NotFoundError(f"no texts at {folder}", hint="name a folder with the texts that must not be trained on")
    return files
