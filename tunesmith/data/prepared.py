"""A prepared data set on disk (prepare.py makes it): tokens to train on, the rows of each side, what became of every row."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.data.tokens import TokenStore
from tunesmith.data.types import CodeTests, Example, Message, Origin


@dataclass(frozen=True)
class Prepared:
    """A prepared data set: token stores for training and validation, held-out examples, and the ledger."""

    folder: Path
    digest: str

    @property
    def train(self) -> TokenStore:
        """Units to train on."""
        return TokenStore(self.folder / "train")

    @property
    def validation(self) -> TokenStore | None:
        """Units that choose the best step, or None."""
        store = TokenStore(self.folder / "validation")
        return store if len(store) else None

    @property
    def validation_rows(self) -> TokenStore | None:
        """The rows behind `validation`, each alone."""
        store = TokenStore(self.folder / "validation", grouped=False)
        return store if len(store) else None

    @property
    def ledger(self) -> dict[str, Any]:
        """What became of every row."""
        return json.loads((self.folder / "ledger.json").read_text("utf-8"))

    @property
    def objective(self) -> dict[str, Any]:
        """The objective's settings, with what it took from the rows."""
        return json.loads((self.folder / "objective.json").read_text("utf-8"))

    @property
    def files(self) -> dict[str, list[str]]:
        """SHA-256 of every file read, by the name the user gave."""
        return json.loads((self.folder / "files.json").read_text("utf-8"))

    def examples(self, name: str) -> Iterator[Example]:
        """The examples of `train`, `validation` or `test`, in order."""
        with (self.folder / f"{name}.jsonl").open("rb") as file:
            for line in file:
                yield from_json(json.loads(line))

    def held_out(self) -> tuple[str, list[Example]]:
        """The rows to prove a model on: `test` where there is one, else `validation`."""
        for name in ("test", "validation"):
            examples = list(self.examples(name))
            if examples:
                return name, examples
        return "none", []


def to_json(example: Example, *, columns: dict[str, Any]) -> str:
    """A row on one line, with those of its columns that stay."""
    messages = [[m.role, m.content, m.weight, m.extra] for m in example.messages]
    said = [example.origin, example.form, messages, example.text, example.tools]
    value = [*said, example.words, example.label, columns, example.tests]
    return json.dumps(value, ensure_ascii=True, default=str)


def from_json(value: list[Any]) -> Example:
    """The row of a line, parsed."""
    origin, form, messages, text, tools, words, label, columns, tests = value
    return Example(
        Origin(*origin),
        form,
        tuple(Message(*m) for m in messages),
        text,
        tuple(tools),
        tuple(words),
        tuple(label) if isinstance(label, list) else label,
        columns,
        tests=None if tests is None else CodeTests(*tests),
    )
