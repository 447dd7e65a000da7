"""`tunesmith data check`: what is in a file, what is wrong with it, and what would be trained.

The rows are read once, and go through all checks (curate/checks.py) together; rows that may nearly repeat are read a second
time. A problem is an `error` where the row cannot or must not be trained on, and a `warning` where it can but
should be looked at. Counts are exact; of each kind the first 1,000 problems are kept in full.
"""

import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data.curate.checks import NO_MODELS, Models, choose
from tunesmith.data.curate.difficulty import Difficulty
from tunesmith.data.curate.labels import Labels
from tunesmith.data.curate.masking import Masker
from tunesmith.data.curate.repeated import Repeated
from tunesmith.data.formats import detect_form, examine, label_mapping, preference_defect
from tunesmith.data.ledger import STATES, Problem
from tunesmith.data.settings import DataSettings
from tunesmith.data.sources import read_rows
from tunesmith.data.split import side
from tunesmith.data.types import Example, Row
from tunesmith.errors import DataError, RecipeError, TemplateError

CountTokens = Callable[[list[Example]], list[tuple[int, int]]]

MAX_PROBLEMS_A_KIND = 1_000
SHOWN_A_KIND = 3
MIN_ROWS = 10
BATCH_ROWS = 64
LONG_ROW_CHARACTERS = 100_000
SIDE_STATES = {"train": "trained", "validation": "held_out_validation", "test": "held_out_test"}


@dataclass(frozen=True)
class CheckReport:
    """The result of a check.

    `problems` holds the first 1,000 of a kind and `problem_counts` all of them, by (kind, severity); `ledger` is what
    would become of the rows under these settings; `unused_columns` are read by nothing; `mapping` is the one that was
    taken for granted because the file has a text and a label column; `checks` ran, and those of `not_run` need something;
    `scored` has the scores of the rows, where the check `difficulty` ran.
    """

    file: str
    form: str
    rows: int
    problems: list[Problem]
    problem_counts: dict[tuple[str, str], int]
    tokens: dict[str, Any]
    ledger: dict[str, int]
    unused_columns: list[str] = field(default_factory=list)
    mapping: dict[str, str] = field(default_factory=dict)
    checks: list[str] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    scored: Difficulty | None = None

    @property
    def num_errors(self) -> int:
        """How many problems are errors."""
        return sum(count for (_, severity), count in self.problem_counts.items() if severity == "error")

    def as_dict(self) -> dict[str, Any]:
        """The document of `data check --json`."""
        counts: dict[str, int] = {}
        for (kind, _), count in self.problem_counts.items():
            counts[kind] = counts.get(kind, 0) + count
        return {
            "file": self.file,
            "form": self.form,
            "rows": self.rows,
            "problems": [problem.as_dict() for problem in self.problems],
            "problem_counts": counts,
            "tokens": self.tokens,
            "ledger": self.ledger,
            "unused_columns": self.unused_columns,
            "mapping": self.mapping,
            "checks": self.checks,
            "not_run": self.not_run,
            "scores": None if self.scored is None else self.scored.summary(),
        }

    def as_text(self) -> str:
        """For people: the form, the problems by kind with their first places, what would be trained, what to do."""
        lines = [f"{self.file}: {_plural(self.rows, 'row')}, {self.form.replace('_', '/')}"]
        if self.unused_columns:
            lines.append(f"columns not used: {', '.join(self.unused_columns)}")
        lines += ["", *self._problem_lines(), ""]
        states = [
            f"{count:,} {state.replace('held_out_', 'held out for ')}" for state, count in self.ledger.items() if count
        ]
        lines.append(f"would be: {', '.join(states) or 'nothing'}")
        if "total" in self.tokens:
            lines.append(
                "tokens:   {total:,} in all, {targets:,} trained; a row has {median:,} (median), {p95:,} (95 %),"
                " {longest:,} (longest)".format(**self.tokens)
            )
        lines += self._score_lines()
        lines += [f"not run:  {name} ({why})" for name, why in self.not_run.items()]
        if to_do := self._to_do():
            lines += ["", "to do:", *(f"  - {item}" for item in to_do)]
        return "\n".join(lines)

    def _score_lines(self) -> list[str]:
        """Quantiles of the scores, where there are some."""
        found = {} if self.scored is None else self.scored.summary()
        return [
            "{:12}{p5:.3g} (5 %), {median:.3g} (median), {p95:.3g} (95 %)".format(f"{name}:", **found[name])
            for name in ("perplexity", "difficulty")
            if name in found
        ]

    def _problem_lines(self) -> list[str]:
        if not self.problems:
            return ["no problems found"]
        lines = []
        order = sorted(self.problem_counts.items(), key=lambda item: (item[0][1], -item[1]))  # errors come first
        width = max(len(kind) for kind, _ in self.problem_counts)
        digits = max(len(f"{count:,}") for count in self.problem_counts.values())
        for (kind, severity), count in order:
            shown = [problem for problem in self.problems if (problem.kind, problem.severity) == (kind, severity)]
            shown = shown[:SHOWN_A_KIND]
            head = f"{severity:7}  {kind:{width}}  {count:>{digits},}  "
            for problem in shown:
                lines.append(f"{head}{problem.origin}: {problem.message}")
                head = " " * len(head)
            if count > len(shown):
                lines.append(f"{head}... and {count - len(shown):,} more")
        return lines

    def _to_do(self) -> list[str]:
        items = []
        if self.mapping:
            pairs = ", ".join(f"{key}: {column}" for key, column in self.mapping.items())
            items.append(
                "to train on it, use objective: classification (or regression, for numbers), which reads it as it is;"
                f" to have the label written as an answer, data.mapping: {{{pairs}}}"
            )
        for (kind, severity), count in self.problem_counts.items():
            hints = Counter(problem.hint for problem in self.problems if problem.kind == kind and problem.hint)
            if hints and (severity == "error" or kind == "quality"):
                items.append(f"{kind} ({count:,}): {hints.most_common(1)[0][0]}")
        return items


def check_file(
    path: str | Path,
    *,
    against: str | Path | None = None,
    settings: DataSettings | None = None,
    count_tokens: CountTokens | None = None,
    max_tokens: int | None = None,
    only: tuple[str, ...] | None = None,
    models: Models = NO_MODELS,
) -> CheckReport:
    """Check a file, a folder or a hub data set.

    against: a second file whose rows must not occur in the first (its test set, or the other way round).
    settings: the data section of a recipe; by default everything is detected.
    count_tokens: (tokens, trained tokens) of each of a list of examples; may raise TemplateError.
    max_tokens: the longest row allowed; by default that of the settings.
    only: the checks to run (curate/checks.py); by default all that can. models: what some of them need; no message
    quotes a name that `models.names` finds there.
    Raises NotFoundError, and DataError for a file that cannot be read at all; what is wrong with a row is a problem.
    """
    if against is not None and _is_same_file(str(path), str(against)):
        raise DataError("a file cannot be checked against itself", file=path, hint="give the other file")
    settings = settings or DataSettings(train=str(path))
    if against is not None and only is not None and "duplicates" not in only:
        raise RecipeError("--against has no effect without the check 'duplicates'", hint="--only duplicates")
    limit = max_tokens or settings.max_tokens
    check = _Check(str(path), settings=settings, max_tokens=limit, only=only, models=models)
    if against is not None:
        check.read_other(str(against))
    check.read(count_tokens)
    return check.finish()


class _Reader:
    """Reads a path into examples, and tells what cannot be one."""

    def __init__(self, path: str, *, settings: DataSettings, report: Callable[[Problem], None]):
        self.path, self.settings, self.report = path, settings, report
        self.mapping: dict[str, str] = {}
        self.rows = 0
        self.num_bad = 0
        self.forms: Counter[str] = Counter()

    def examples(self) -> Iterator[Example]:
        """The rows that can be trained on."""
        detecting = self.settings.form == "auto" and not self.settings.mapping
        for row in read_rows(self.path, on_bad=self._bad):
            self.rows += 1
            form = detect_form(row.value) if detecting and not self.mapping else ""
            if form == "labelled" and not self.forms:
                self.mapping = label_mapping(row.value)
                self.settings = self.settings.model_copy(update={"mapping": self.mapping})
            if form == "preference":
                self._preference(row)
                continue
            result = examine(row, settings=self.settings)
            if isinstance(result, Problem):
                self.num_bad += 1
                self.report(result)
            else:
                self.forms["labelled" if self.mapping else result.form] += 1
                yield result

    def _bad(self, problem: Problem) -> None:
        if problem.severity == "error":
            self.rows += 1
            self.num_bad += 1
        self.report(problem)

    def _preference(self, row: Row) -> None:
        self.num_bad += 1
        if not self.forms["preference"]:
            refusal = examine(row, settings=self.settings)
            assert isinstance(refusal, Problem)
            self.report(Problem("quality", "warning", *row.origin, message=refusal.message, hint=refusal.hint))
        self.forms["preference"] += 1
        if defect := preference_defect(row):
            self.report(defect)


class _Check:
    """One run of `check_file`."""

    def __init__(
        self,
        path: str,
        *,
        settings: DataSettings,
        max_tokens: int | None,
        only: tuple[str, ...] | None,
        models: Models,
    ):
        self.path, self.settings, self.max_tokens, self.names = path, settings, max_tokens, models.names
        self.problems: list[Problem] = []
        self.counts: Counter[tuple[str, str]] = Counter()
        self.chosen = choose(settings, again=self._again, only=only, models=models)
        self.columns: Counter[str] = Counter()
        self.states = array("B")
        self.num_tokens, self.num_targets = array("Q"), array("Q")
        self.num_characters = self.longest_characters = 0
        self.reader = _Reader(path, settings=settings, report=self.report)
        self.other: _Reader | None = None

    def report(self, problem: Problem) -> None:
        """Count a problem, and keep the first ones of its kind."""
        key = (problem.kind, problem.severity)
        self.counts[key] += 1
        if self.counts[key] <= MAX_PROBLEMS_A_KIND:
            self.problems.append(problem)

    # ------------------------------------------------------------------------------------------------ reading

    def read_other(self, path: str) -> None:
        """Take the rows of the file to compare with."""
        self.other = _Reader(path, settings=self.settings, report=lambda problem: None)
        repeated = self.chosen.checks["duplicates"]
        assert isinstance(repeated, Repeated)
        repeated.other(self.other.examples())
        if self.other.num_bad:
            message = f"{_plural(self.other.num_bad, 'row')} of {path} cannot be read and could not be compared"
            self.report(Problem("quality", "warning", path, 1, message, hint=f"check {path} by itself"))

    def _again(self) -> Iterator[Example]:
        """The rows of both files once more."""
        for reader in filter(None, (self.other, self.reader)):
            for row in read_rows(reader.path, on_bad=lambda problem: None):
                example = examine(row, settings=reader.settings)
                if isinstance(example, Example):
                    yield example

    def read(self, count_tokens: CountTokens | None) -> None:
        """Take the rows of the file itself."""
        batch: list[Example] = []
        for example in self.reader.examples():
            self._look_at(example)
            self.states.append(STATES.index(SIDE_STATES[side(example.prompt_key, shares=self.settings.shares)]))
            batch.append(example)
            if len(batch) == BATCH_ROWS:
                self._measure(batch, count_tokens)
                batch = []
        self._measure(batch, count_tokens)
        labels = self.chosen.checks.get("labels")
        if isinstance(labels, Labels) and self.reader.mapping:
            labels.certain = True  # a column of the file says so
        for check in self.chosen.checks.values():
            for problem in check.finish():
                self.report(problem)
        repeated = self.chosen.checks.get("duplicates")
        if isinstance(repeated, Repeated) and self.settings.duplicates == "drop":
            for row in repeated.exact_rows:
                self.states[row] = STATES.index("duplicate")

    def _look_at(self, example: Example) -> None:
        """What can be told from the row alone."""
        num_characters = len(example.all_text)
        self.columns.update(example.columns.keys())
        self.num_characters += num_characters
        self.longest_characters = max(self.longest_characters, num_characters)
        for check in self.chosen.checks.values():
            for problem in check.look(example):
                self.report(problem)

    def _measure(self, batch: list[Example], count_tokens: CountTokens | None) -> None:
        """Count the tokens of the rows just read, and mark those that are too long."""
        start = len(self.states) - len(batch)
        for example in batch:
            num_characters = len(example.plain_text or "") + sum(len(message.content) for message in example.messages)
            if count_tokens is None and num_characters > LONG_ROW_CHARACTERS:
                message = f"{num_characters:,} characters are more than most models read (about 4 make a token)"
                hint = "check with the recipe's base to count tokens"
                self.report(Problem("too_long", "warning", *example.origin, message=message, hint=hint))
        if count_tokens is None or not batch:
            return
        for number, (example, count) in enumerate(
            zip(batch, self._counts(batch, count_tokens), strict=True), start=start
        ):
            if count is None:
                self.states[number] = STATES.index("bad")
                continue
            self.num_tokens.append(count[0])
            self.num_targets.append(count[1])
            if self.max_tokens is not None and count[0] > self.max_tokens:
                self._too_long(example, number=number, num_tokens=count[0])

    def _counts(self, batch: list[Example], count_tokens: CountTokens) -> list[tuple[int, int] | None]:
        """The counts of a batch; where one conversation cannot be rendered, row by row to find which."""
        try:
            return list(count_tokens(batch))
        except TemplateError as error:
            if len(batch) == 1:
                problem = Problem("template", "error", *batch[0].origin, message=error.message, hint=error.hint)
                self.report(problem)
                return [None]
        return [self._counts([example], count_tokens)[0] for example in batch]

    def _too_long(self, example: Example, *, number: int, num_tokens: int) -> None:
        message = f"{num_tokens:,} tokens; the limit is {self.max_tokens:,}"
        policy = self.settings.too_long
        if policy == "refuse":
            hint = "shorten it, raise data.max_tokens, or set data.too_long: truncate or drop"
            self.report(Problem("too_long", "error", *example.origin, message=message, hint=hint))
        else:
            self.report(Problem("too_long", "warning", *example.origin, message=f"{message}: {policy}"))
        if policy != "truncate" or self.states[number] == STATES.index("trained"):
            states = {"refuse": "bad", "truncate": "truncated", "drop": "dropped"}
            self.states[number] = STATES.index(states[policy])

    # ---------------------------------------------------------------------------------------------- finishing

    def finish(self) -> CheckReport:
        """The report, with what can only be told of the file as a whole."""
        counts = np.bincount(np.frombuffer(self.states, np.uint8), minlength=len(STATES))
        ledger = dict(zip(STATES, counts.tolist(), strict=True))
        ledger["bad"] += self.reader.num_bad
        num_good = len(self.states)
        if not self.reader.rows:
            message, hint = "there are no rows in it", "check that it was written to the end"
            self.report(Problem("quality", "error", self.path, 1, message, hint=hint))
        elif num_good and num_good < MIN_ROWS:
            message = f"{_plural(num_good, 'usable row')}; hosted services require {MIN_ROWS}, and fewer teach little"
            self.report(Problem("quality", "warning", self.path, 1, message, hint="add rows"))
        for name in self.settings.shares if num_good else ():
            if not ledger[SIDE_STATES[name]]:
                message = f"no row falls into the share held out for {name}"
                hint = f"give a file or a larger share as data.{name}"
                self.report(Problem("quality", "warning", self.path, 1, message, hint=hint))
        forms = list(self.reader.forms)
        scored = self.chosen.checks.get("difficulty")
        if self.names is not None:
            found = zip(self.problems, self.names.in_texts([p.message for p in self.problems]), strict=True)
            self.problems = [replace(p, message=Masker(names).text(p.message)) for p, names in found]
        return CheckReport(
            file=self.path,
            form=forms[0] if len(forms) == 1 else "mixed" if forms else "unknown",
            rows=self.reader.rows,
            problems=sorted(self.problems, key=lambda problem: (problem.file, problem.line, problem.severity)),
            problem_counts=dict(sorted(self.counts.items(), key=lambda item: (item[0][1], -item[1]))),
            tokens=self._tokens(),
            ledger=ledger,
            unused_columns=[column for column, _ in self.columns.most_common(20)],
            mapping=self.reader.mapping,
            checks=list(self.chosen.checks),
            not_run=self.chosen.not_run,
            scored=scored if isinstance(scored, Difficulty) else None,
        )

    def _tokens(self) -> dict[str, Any]:
        document: dict[str, Any] = {"characters": self.num_characters, "longest_characters": self.longest_characters}
        if self.num_tokens:
            tokens = np.frombuffer(self.num_tokens, np.uint64)
            median, p95 = np.percentile(tokens, [50, 95], method="higher").tolist()
            document |= {"total": int(tokens.sum()), "targets": sum(self.num_targets), "median": int(median)}
            document |= {"p95": int(p95), "longest": int(tokens.max()), "limit": self.max_tokens}
        return document


def _is_same_file(a: str, b: str) -> bool:
    return a == b or (os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b))


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
