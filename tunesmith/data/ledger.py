"""The ledger: what became of every input row.

Each row ends in exactly one state. Counts are exact whatever the size of the data; one byte a line remembers the
states, and the details of the first 1,000 rows that were not simply trained are kept for reading.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from tunesmith.data.types import Origin
from tunesmith.errors import DataError

STATES = ("trained", "truncated", "dropped", "duplicate", "held_out_validation", "held_out_test", "bad")
QUIET_STATES = frozenset({"trained", "held_out_validation", "held_out_test"})
MAX_DETAILS = 1_000

PROBLEM_KINDS = (
    "bad_row", "empty_target", "too_long", "template", "special_token", "exact_duplicate", "near_duplicate", "leak",
    "contamination", "personal_data", "secret", "contradiction", "label_error", "imbalance", "language", "quality",
    "protected_text", "difficulty",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding at one place. `other` is the second place where there is one; `hint` says what to do.

    severity: `error` (the row cannot be used) or `warning` (it can, but look at it).
    """

    kind: str
    severity: str
    file: str
    line: int
    message: str
    other: Origin | None = None
    hint: str = ""

    def __post_init__(self) -> None:
        assert self.kind in PROBLEM_KINDS, self.kind
        assert self.severity in ("error", "warning"), self.severity

    @property
    def origin(self) -> Origin:
        """Where it is."""
        return Origin(self.file, self.line)

    def as_dict(self) -> dict[str, Any]:
        """As `data check --json` prints it; `other` and `hint` are left out where there is none."""
        document: dict[str, Any] = {"kind": self.kind, "severity": self.severity, "file": self.file, "line": self.line}
        document["message"] = self.message
        if self.other is not None:
            document["other"] = {"file": self.other.file, "line": self.other.line}
        if self.hint:
            document["hint"] = self.hint
        return document

    def as_error(self) -> DataError:
        """The same as an exception."""
        return DataError(self.message, hint=self.hint, file=self.file, line=self.line)


class Ledger:
    """Records the state of every row; memory is one byte a line of input and at most 1,000 details."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.reasons: dict[str, Counter[str]] = {}
        self.tokens_cut = 0
        self.findings: Counter[str] = Counter()  # what the checks that a recipe asks for found, whatever became of it
        self.masked = 0  # rows in which personal data or secrets were replaced, whatever their state
        self.details: list[dict[str, Any]] = []
        self._codes: dict[str, bytearray] = {}  # by file, indexed by line: 0 or 1 + the state's index

    def record(
        self, origin: Origin, *, state: str, reason: str = "", tokens_cut: int = 0, other: Origin | None = None
    ) -> None:
        """Enter a row once.

        `reason` groups the rows of a state (`too_long`, `empty_target`, ...); `tokens_cut` goes with `truncated`;
        `other` is the earlier row of a `duplicate`.
        """
        assert state in STATES, state
        assert (tokens_cut > 0) == (state == "truncated"), (state, tokens_cut)
        self._enter(origin, state=state)
        self.counts[state] += 1
        self.tokens_cut += tokens_cut
        if reason:
            self.reasons.setdefault(state, Counter())[reason] += 1
        if state not in QUIET_STATES and len(self.details) < MAX_DETAILS:
            detail: dict[str, Any] = {"state": state, "file": origin.file, "line": origin.line}
            if reason:
                detail["reason"] = reason
            if tokens_cut:
                detail["tokens_cut"] = tokens_cut
            if other is not None:
                detail["other"] = {"file": other.file, "line": other.line}
            self.details.append(detail)

    def record_problem(self, problem: Problem) -> None:
        """Enter the row of an error as `bad`, with the problem's kind as the reason; a warning enters nothing."""
        if problem.severity == "error":
            self.record(problem.origin, state="bad", reason=problem.kind)

    def state_of(self, origin: Origin) -> str | None:
        """The state of the row at `origin`, or None if it was not recorded."""
        codes = self._codes.get(origin.file, b"")
        code = codes[origin.line] if origin.line < len(codes) else 0
        return STATES[code - 1] if code else None

    @property
    def rows(self) -> int:
        """The number of rows recorded."""
        return self.counts.total()

    def assert_complete(self, num_rows: int) -> None:
        """Check that as many rows were recorded as were read."""
        assert self.rows == num_rows, f"{num_rows} rows were read and {self.rows} are in the ledger"

    def as_dict(self) -> dict[str, Any]:
        """The document of `ledger.json`: counts by state and reason, tokens cut, the first rows not simply trained."""
        noted = sum(count for state, count in self.counts.items() if state not in QUIET_STATES)
        return {
            "rows": self.rows,
            "states": {state: self.counts[state] for state in STATES},
            "reasons": {state: dict(reasons.most_common()) for state, reasons in self.reasons.items()},
            "tokens_cut": self.tokens_cut,
            "masked": self.masked,
            "findings": dict(self.findings.most_common()),
            "details": list(self.details),
            "details_left_out": noted - len(self.details),
        }

    def summary(self) -> str:
        """One line: `412 rows: 368 trained, 41 held out for validation, 3 bad (bad_row 2, empty_target 1)`."""
        parts = []
        for state in STATES:
            if count := self.counts[state]:
                words = state.replace("held_out_", "held out for ")
                reasons = ", ".join(f"{name} {n}" for name, n in self.reasons.get(state, Counter()).most_common())
                cut = f"{self.tokens_cut:,} tokens cut" if state == "truncated" else ""
                inside = ", ".join(filter(None, (reasons, cut)))
                parts.append(f"{count:,} {words}" + (f" ({inside})" if inside else ""))
        parts += [f"{self.masked:,} with placeholders"] if self.masked else []
        return f"{self.rows:,} row{'' if self.rows == 1 else 's'}" + (": " + ", ".join(parts) if parts else "")

    def _enter(self, origin: Origin, *, state: str) -> None:
        codes = self._codes.setdefault(origin.file, bytearray())
        if origin.line >= len(codes):
            codes.extend(bytes(origin.line + 1 - len(codes) + len(codes) // 4))
        assert codes[origin.line] == 0, f"{origin} is already {STATES[codes[origin.line] - 1]}, not {state}"
        codes[origin.line] = 1 + STATES.index(state)
