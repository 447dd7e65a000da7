"""Rows -> packs-to-be: read, split, rendered, counted, and kept on disk by content.

The folder's name is a hash of all that decides its content: the bytes of the files, the data settings, the objective, the
template, the tokenizer and this code. So a cache can be used without asking, and is never stale. Memory does not grow
with the data.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from tunesmith.data.batched import batched
from tunesmith.data.curate.checks import NO_MODELS, Models
from tunesmith.data.curate.leaving import look
from tunesmith.data.curate.masking import masked
from tunesmith.data.curate.names import Names, with_names
from tunesmith.data.curate.protected import files_below
from tunesmith.data.curate.select import select
from tunesmith.data.formats import examine
from tunesmith.data.general import draw_key, drawn_keys, parts
from tunesmith.data.ledger import Ledger, Problem
from tunesmith.data.look_up import LookedUp
from tunesmith.data.prepared import Prepared, to_json
from tunesmith.data.retrieval import documents_in
from tunesmith.data.settings import DESCRIBING, DataSettings
from tunesmith.data.sources import read_rows, resolve
from tunesmith.data.split import is_in, side
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokens import TokenStore, TokenWriter, write_groups
from tunesmith.data.types import Example, Origin, Sequence
from tunesmith.errors import DataError, TemplateError
from tunesmith.storage import code_digest, new_folder, sha256_file

BATCH_ROWS = 512
MAX_ERRORS = 100  # kept for the message; the ledger counts them all


class Trains(Protocol):
    """The part of an objective that preparation needs."""

    def sequences(self, examples: list[Example], *, template: ChatTemplate, max_tokens: int) -> list[list[Sequence]]:
        """For each example, what is read and trained."""

    def groups(self, values: Iterable[np.ndarray]) -> np.ndarray | None:
        """Rows that are learned from together."""

    def general_sequences(
        self, examples: list[Example], *, template: ChatTemplate, max_tokens: int
    ) -> list[list[Sequence]]:
        """The same of general rows, which have nothing to do with the task."""

    def cut(self, sequences: list[Sequence], *, num_tokens: int) -> list[Sequence]:
        """The beginnings of a row's sequences."""

    def units(self, sequences: list[Sequence]) -> list[list[Sequence]]:
        """What is shuffled as one row."""

    def model_dump(self, *, mode: str = "python") -> dict[str, Any]:
        """The objective's settings."""

    def fitted(self, examples: Iterable[tuple[Example, bool]]) -> Self:
        """With what it takes from the rows; each comes with whether it is trained on."""


def prepare(
    settings: DataSettings,
    *,
    objective: Trains,
    template: ChatTemplate,
    max_tokens: int,
    cache: Path,
    models: Models = NO_MODELS,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Prepared:
    """Read, split, render and count. Raises DataError or TemplateError with file and line where rows are at fault.

    `max_tokens` is the longest sequence allowed, `models` has those that the settings ask for. `on_rows` is told how many
    rows were read so far.
    """
    sources = _sources(settings) | ({} if settings.replay is None else {"replay": [settings.replay]})
    read = {name: [file for source in found for file in resolve(source)] for name, found in sources.items()}
    _refuse_repeated(read)
    read |= {"benchmarks": [file for source in settings.benchmarks for file in resolve(source)]}
    texts = [] if settings.protected is None else files_below(settings.protected)
    read |= {"protected": [(str(path), path) for path in texts]}
    files = {name: [f"{shown} {sha256_file(path)}" for shown, path in found] for name, found in read.items() if found}
    if settings.look_up is not None and settings.look_up.documents is not None:
        documents = documents_in(Path(settings.look_up.documents))
        files["look_up"] = [f"{path} {sha256_file(path)}" for path in documents]
    names, scorer = models.names, models.scorer
    files |= {} if names is None else {"names": names.files}
    files |= {} if scorer is None else {"scorer": list(scorer.files)}
    # Fitted first, so that the fitted one, as a run has it, finds the same rows.
    objective = objective.fitted(usable(settings, names=names))
    what = {
        "files": files,
        "settings": settings.model_dump(mode="json", exclude=set(DESCRIBING)),
        "objective": objective.model_dump(mode="json"),
        "template": template.identity,
        "tokenizer": template.tokenizer.digest,
        "max_tokens": max_tokens,
        "code": code_digest("data", "data/curate", "objectives", *_code_of(models)),
    }
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    folder = cache / "prepared" / digest[:32]
    if not (folder / "ledger.json").is_file():
        with new_folder(folder, replace=False) as new:
            _Preparation(settings, objective, template, max_tokens, new, models, on_rows).run()
            (new / "files.json").write_text(json.dumps(files, indent=1), "utf-8")
    return Prepared(folder, digest)


def _code_of(models: Models) -> list[str]:
    """The folders whose code decides what models say of rows."""
    return ["models"] * (models != NO_MODELS) + ["evaluate"] * (models.scorer is not None)


def _refuse_repeated(read: dict[str, list[tuple[str, Path]]]) -> None:
    """Each file may be read once: a row has one place and one state."""
    seen: dict[Path, str] = {}
    for name, found in read.items():
        for shown, path in found:
            before = seen.setdefault(path.resolve(), f"data.{name}")
            if before != f"data.{name}" or sum(p.resolve() == path.resolve() for _, p in found) > 1:
                raise DataError(
                    f"the file is named twice (in {before} and data.{name})", file=shown, hint="name each file once"
                )


def _sources(settings: DataSettings) -> dict[str, list[str]]:
    held = {n: [v] for n, v in (("validation", settings.validation), ("test", settings.test)) if isinstance(v, str)}
    return held | {"train": settings.train_paths}


def usable(settings: DataSettings, *, names: Names | None) -> Iterator[tuple[Example, bool]]:
    """All rows that can be read, and whether each is on the side of training; `names` as `prepare`."""
    for name, sources in _sources(settings).items():
        shares = settings.shares if name == "train" else {}
        rows = (row for source in sources for row in read_rows(source, on_bad=lambda problem: None))
        examples = (e for row in rows if isinstance(e := examine(row, settings=settings), Example))
        for example, num_found in _private(examples, settings=settings, names=names):
            if not (num_found and settings.personal == "drop"):
                yield example, name == "train" and side(example.prompt_key, shares=shares) == "train"


def _private(
    examples: Iterable[Example], *, settings: DataSettings, names: Names | None
) -> Iterator[tuple[Example, int]]:
    """Rows as `data.personal` wants them, and how many pieces of personal data each had; none where they are kept."""
    assert (settings.names is None) == (names is None), "load_names finds them"
    for example, found in with_names(examples, names=names):
        yield (example, 0) if settings.personal == "keep" else masked(example, names=found)


@dataclass
class _Preparation:
    settings: DataSettings
    objective: Trains
    template: ChatTemplate
    max_tokens: int
    folder: Path
    models: Models
    on_rows: Callable[[int], None]
    ledger: Ledger = field(default_factory=Ledger)
    errors: list[Problem] = field(default_factory=list)
    num_errors: int = 0
    num_rows: int = 0
    seen: dict[str, set[int]] = field(default_factory=dict)  # by side: 64 bits of each row's key
    longest: tuple[int, Origin] | None = None
    trained_weight: float = 0.0
    selected: set[Origin] | None = None  # the training rows that `data.select` keeps
    left_out: dict[Origin, Problem] = field(default_factory=dict)  # those that `data.leave_out` does not
    looked_up: LookedUp | None = None  # what `data.look_up` puts before the questions
    missing: set[str] = field(default_factory=set)  # columns to keep that no row had so far

    def run(self) -> None:
        found = look(lambda: usable(self.settings, names=self.models.names), settings=self.settings)
        self.ledger.findings, self.left_out = found.counts, found.left_out
        self.missing.update(self.settings.keep_columns)
        if self.settings.select is not None:
            self.selected = select(self._candidates(), settings=self.settings.select, scorer=self.models.scorer)
        if (asked := self.settings.look_up) is not None:
            rows = self._candidates() if asked.documents is None else iter(())
            self.looked_up = LookedUp(asked, rows=rows, plain=self.template.plain, fits=self._fits)
        (self.folder / "objective.json").write_text(json.dumps(self.objective.model_dump(mode="json")), "utf-8")
        sides = ("train", "validation", "test")
        writers = {name: TokenWriter(self.folder / name) for name in sides if name != "test"}
        texts = {name: (self.folder / f"{name}.jsonl").open("w", encoding="utf-8") for name in sides}
        try:
            for example, where, sequences in self._rows():
                columns = self.settings.kept(example.columns)
                self.missing -= columns.keys()
                texts[where].write(to_json(example, columns=columns) + "\n")
                if where in writers:
                    for unit in self.objective.units(sequences):
                        writers[where].add(unit, origin=example.origin)
                if where == "train":
                    self.trained_weight += sum(float(s.weight_T.sum()) for s in sequences)
            if self.settings.replay is not None:
                self._replay(writers["train"], path=self.settings.replay)
        finally:
            for file in texts.values():
                file.close()
            for writer in writers.values():
                writer.close()
        self._settle(writers)
        for name in writers:
            self._group(TokenStore(self.folder / name), needed=name == "train")
        self.ledger.assert_complete(self.num_rows)
        (self.folder / "ledger.json").write_text(json.dumps(self.ledger.as_dict(), indent=1), "utf-8")

    def _candidates(self) -> Iterator[Example]:
        """The rows that will be trained on, of those that `data.select` keeps; errors of the others come first."""
        what = (self.settings, self.objective, self.template, self.max_tokens, self.folder, self.models)
        first = _Preparation(*what, on_rows=lambda rows: None)
        first.left_out, first.selected = self.left_out, self.selected
        for example, where, _ in first._rows():
            if where == "train":
                yield example
        first._refuse_losses()

    def _rows(self) -> Iterator[tuple[Example, str, list[Sequence]]]:
        """The rows of all files that stay, with their side and sequences."""
        for name, sources in _sources(self.settings).items():
            shares = self.settings.shares if name == "train" else {}
            for batch in batched(self._examples(sources, settings=self.settings), BATCH_ROWS):
                yield from self._rendered(batch, name=name, shares=shares)
                self.on_rows(self.num_rows)

    def _replay(self, writer: TokenWriter, *, path: str) -> None:
        """General rows among the trained ones: `replay_share` of the units, each with the weight of a unit of the task."""
        share, num_units = self.settings.replay_share, writer.num_units
        settings = DataSettings(train=path, personal=self.settings.personal, names=self.settings.names)
        rows = (row for row, _ in usable(settings, names=self.models.names))
        wanted = drawn_keys(rows, count=round(share / (1 - share) * num_units)) if num_units else set()
        for row in self._examples([path], settings=settings):
            chosen = [part for part in parts(row) if draw_key(part) in wanted]
            if not chosen:
                self.ledger.record(row.origin, state="dropped", reason="not drawn for replay")
                continue
            wanted.difference_update(map(draw_key, chosen))  # of parts that are the same, only the first is taken
            try:
                found = self.objective.general_sequences(chosen, template=self.template, max_tokens=self.max_tokens)
            except TemplateError as error:
                self._refuse(Problem("template", "error", *row.origin, error.message, hint=error.hint))
                continue
            sequences = self._settled(row, [s for unit in found for s in unit], where="train", reason="replayed")
            if sequences is not None:
                for unit in found if row.text is not None else [sequences]:
                    writer.add(_weighing(unit, weight=self.trained_weight / num_units), origin=row.origin)

    def _group(self, store: TokenStore, *, needed: bool) -> None:
        """Rows that are learned from together become the store's units, where the objective wants it."""
        values = (s.values for unit in range(len(store)) for s in store.unit(unit) if s.values is not None)
        groups = self.objective.groups(values)
        if groups is None:
            return
        if needed and not len(groups):
            raise DataError(
                "there are no rows to learn from together: two classes are needed, and one with two rows",
                file=self.settings.train_paths[0],
                hint="give more rows, or hold out fewer",
            )
        write_groups(store.folder, groups=groups)

    def _examples(self, sources: list[str], *, settings: DataSettings) -> Iterator[Example]:
        readable = self._readable(sources, settings=settings)
        for example, num_found in _private(readable, settings=self.settings, names=self.models.names):
            if num_found and self.settings.personal == "drop":
                self.ledger.record(example.origin, state="dropped", reason="personal_data")
                continue
            self.ledger.masked += bool(num_found)
            yield example

    def _readable(self, sources: list[str], *, settings: DataSettings) -> Iterator[Example]:
        for source in sources:
            for row in read_rows(source, on_bad=self._unreadable):
                self.num_rows += 1
                example = examine(row, settings=settings)
                if isinstance(example, Problem):
                    self._refuse(example)
                else:
                    yield example

    def _unreadable(self, problem: Problem) -> None:
        if problem.severity == "error":
            self.num_rows += 1
            self._refuse(problem)

    def _refuse(self, problem: Problem) -> None:
        self.num_errors += 1
        self.ledger.record_problem(problem)
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(problem)

    def _rendered(
        self, batch: list[Example], *, name: str, shares: dict[str, float]
    ) -> Iterator[tuple[Example, str, list[Sequence]]]:
        """The examples that stay, with their side and sequences; the others are entered in the ledger."""
        sides = [name if name != "train" else side(example.prompt_key, shares=shares) for example in batch]
        for example, where, sequences, reason in self._sequences(batch, sides=sides):
            if sequences is None or self._duplicate(example, where=where):
                continue
            if where == "train" and (problem := self.left_out.get(example.origin)) is not None:
                near = problem.kind == "near_duplicate"
                other = problem.origin if problem.other == example.origin else problem.other
                state, why = ("duplicate", "near") if near else ("dropped", problem.kind)
                self.ledger.record(example.origin, state=state, reason=why, other=other)
                continue
            if where == "train" and not is_in(example.prompt_key, share=self.settings.train_share):
                self.ledger.record(example.origin, state="dropped", reason="train_share")
                continue
            among = self.selected if where == "train" else None
            settled = self._settled(example, sequences, where=where, among=among, reason=reason)
            if settled is not None:
                yield example, where, settled

    def _settled(
        self,
        example: Example,
        sequences: list[Sequence],
        *,
        where: str,
        among: set[Origin] | None = None,
        reason: str = "",
    ) -> list[Sequence] | None:
        """What is left of a row's sequences where it stays; either way it is entered in the ledger."""
        fitted = self._fit(example, sequences)
        if fitted is None:
            return None
        cut, sequences = fitted
        if not any(s.num_targets for s in sequences):
            message = "no token of this row would be trained"
            self._refuse(Problem("empty_target", "error", *example.origin, message, hint="mend or drop the row"))
            return None
        if among is not None and example.origin not in among:
            self.ledger.record(example.origin, state="dropped", reason="not selected")
            return None
        if where != "train":
            self.ledger.record(example.origin, state=f"held_out_{where}")
        elif cut:
            self.ledger.record(example.origin, state="truncated", reason="too_long", tokens_cut=cut)
        else:
            self.ledger.record(example.origin, state="trained", reason=reason)
        return sequences

    def _sequences(
        self, batch: list[Example], *, sides: list[str]
    ) -> Iterator[tuple[Example, str, list[Sequence] | None, str]]:
        """Render a batch at once, row by row only where one of them is refused; with what was put before each question."""
        try:
            yield from zip(batch, sides, *self._render(batch, sides=sides), strict=True)
        except (TemplateError, DataError):
            for example, where in zip(batch, sides, strict=True):
                try:
                    (sequences,), (reason,) = self._render([example], sides=[where])
                    yield example, where, sequences, reason
                except (TemplateError, DataError) as error:
                    kind = "template" if isinstance(error, TemplateError) else "bad_row"
                    self._refuse(Problem(kind, "error", *example.origin, error.message, hint=error.hint))
                    yield example, where, None, ""

    def _render(self, batch: list[Example], *, sides: list[str]) -> tuple[list[list[Sequence]], list[str]]:
        shown = [(example, "") for example in batch]
        if self.looked_up is not None:
            helped = zip(batch, sides, strict=True)
            shown = [self.looked_up.before(example, is_trained=where == "train") for example, where in helped]
        examples = [example for example, _ in shown]
        sequences = self.objective.sequences(examples, template=self.template, max_tokens=self.max_tokens)
        return sequences, [reason for _, reason in shown]

    def _fits(self, example: Example) -> bool:
        found = self.objective.sequences([example], template=self.template, max_tokens=self.max_tokens)[0]
        return max(s.num_context_tokens for s in found) <= self.max_tokens

    def _duplicate(self, example: Example, *, where: str) -> bool:
        """Whether the row is left out because it stands elsewhere: in a held-out file, or (if asked) before."""
        key = int(example.key[:16], 16)
        for held in ("validation", "test"):
            if where != held and key in self.seen.get(held, ()):
                self.ledger.record(example.origin, state="duplicate", reason=f"also in {held}")
                return True
        seen = self.seen.setdefault(where, set())
        if key in seen and where == "train" and self.settings.duplicates == "drop":
            self.ledger.record(example.origin, state="duplicate", reason="repeated")
            return True
        if where != "train" or self.settings.duplicates == "drop":
            seen.add(key)
        return False

    def _fit(self, example: Example, sequences: list[Sequence]) -> tuple[int, list[Sequence]] | None:
        """Apply `too_long`; None when the row was dropped."""
        over = max(s.num_context_tokens for s in sequences) - self.max_tokens
        if over <= 0:
            return 0, sequences
        if self.settings.too_long == "drop":
            self.ledger.record(example.origin, state="dropped", reason="too_long")
            return None
        if self.settings.too_long == "refuse":
            message = f"the row has {over + self.max_tokens:,} tokens and {self.max_tokens:,} are allowed"
            hint = "set data.too_long: truncate or drop, raise data.max_tokens, or shorten the row"
            self._refuse(Problem("too_long", "error", *example.origin, message, hint=hint))
            if self.longest is None or over + self.max_tokens > self.longest[0]:
                self.longest = (over + self.max_tokens, example.origin)
            return None
        short = self.objective.cut(sequences, num_tokens=self.max_tokens)
        kept = [s for s in short if s.num_targets]
        if not kept:
            self.ledger.record(example.origin, state="dropped", reason="nothing left to train after truncation")
            return None
        return sum(s.num_tokens for s in sequences) - sum(s.num_tokens for s in kept), kept

    def _refuse_losses(self) -> None:
        """Raise for the first row that may not be lost in silence."""
        too_long = self.ledger.reasons["bad"]["too_long"] if "bad" in self.ledger.reasons else 0
        if self.errors and (self.settings.bad_rows == "refuse" or too_long):
            first = next((p for p in self.errors if p.kind == "too_long"), self.errors[0])
            first = self.errors[0] if self.settings.bad_rows == "refuse" else first
            more = f" ({self.num_errors} rows are at fault)" if self.num_errors > 1 else ""
            if first.kind == "too_long" and self.longest is not None:
                more = f" ({too_long} rows are too long, the longest has {self.longest[0]:,})" if too_long > 1 else ""
            hint = first.hint if first.kind == "too_long" else f"{first.hint}; or set data.bad_rows: drop"
            error = TemplateError if first.kind == "template" else DataError
            raise error(first.message + more, file=first.file, line=first.line, hint=hint)

    def _settle(self, writers: dict[str, TokenWriter]) -> None:
        """Refuse what may not be lost in silence, and sides that are empty."""
        self._refuse_losses()
        if writers["train"].num_units == 0:
            source = self.settings.train_paths[0]
            raise DataError(
                f"no row is left to train on: {self.ledger.summary()}",
                file=source,
                hint="give more rows, or hold out fewer",
            )
        if self.missing:
            raise DataError(
                f"no row has the column {min(self.missing)!r}",
                file=self.settings.train_paths[0],
                hint="mend data.keep_columns, or evaluate.groups",
            )
        given = self.settings.validation
        asked = given is not None and given != DataSettings.model_fields["validation"].default
        if asked and writers["validation"].num_units == 0:
            raise DataError(
                "data.validation holds no row",
                file=given if isinstance(given, str) else self.settings.train_paths[0],
                hint="give more rows, a larger share, a file, or data.validation: null",
            )


def _weighing(sequences: list[Sequence], *, weight: float) -> list[Sequence]:
    """The same with weights that add up to `weight`."""
    factor = weight / sum(float(s.weight_T.sum()) for s in sequences)
    return [replace(s, weight_T=(s.weight_T * factor).astype(np.float32)) for s in sequences]
