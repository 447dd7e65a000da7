"""`tunesmith init`: a commented recipe that fits the data and the base."""

import itertools
import re
from pathlib import Path
from typing import Any

import yaml

from tunesmith.data.formats import detect_form, examine, label_mapping
from tunesmith.data.ledger import Problem
from tunesmith.data.settings import DataSettings
from tunesmith.data.sources import read_rows
from tunesmith.data.split import side
from tunesmith.data.types import Example, Label
from tunesmith.errors import DataError, StorageError
from tunesmith.models.base import ENCODER_DECODERS, ENCODERS, known_model_type
from tunesmith.registry.workspace import LATEST
from tunesmith.storage import write_text

SAMPLE_ROWS = 2_000
LABEL_CHARACTERS = 40
MOST_CLASSES = 20  # that are written as whole numbers
INTERVAL_ROWS = 9  # held-out rows that an interval for 0.9 of the numbers needs
ROWS_A_CLASS = 4  # on average, where answers are taken for classes
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)  # the smallest that holds rows back is taken
YAML_WORDS = {"yes", "no", "on", "off", "y", "n", "true", "false", "null"}

RECIPE = """\
# A recipe: everything that decides a run. Every setting has a vetted default; docs/recipe.md lists them all.
# Check the rows first:   tunesmith data check {shown}
# Train:                  tunesmith train {out}
# Compare with the base:  tunesmith evaluate {name}

name: {name}
base: {base}              # 'starter' is built in (small, English); or a local folder, or a hub name owner/model

data:
  train: {train}
{validation}  # test: FILE               # rows that only the evaluation sees; without it the validation rows are used
{mapping}{limits}
objective: {objective}
method:
  kind: lora                 # or full: every parameter moves
  rank: 16

train:
  epochs: {epochs}
  learning_rate: {learning_rate}
  batch_rows: {batch_rows}              # rows an optimiser step; memory is bounded by micro_batch_tokens instead
{patience}
evaluate:
{evaluate}"""


def write_recipe(source: Path | None, *, out: Path, base: str = "starter") -> dict[str, Any]:
    """Look at the first rows of `source` and write a recipe for them; an existing file is never replaced.

    Returns {"recipe", "form", "rows", "why"}. Raises DataError where no row can be used, or not with such a base,
    StorageError where `out` exists, ModelError or NotFoundError where `base` is no usable model.
    """
    if out.exists():
        raise StorageError("the file exists already", file=out, hint="choose another name with --out")
    model_type = known_model_type(base)
    found = _look(source, model_type=model_type) if source is not None else _Found("chat", model_type=model_type)
    train = _relative(source, out=out) if source else "FILE.jsonl"
    epochs = 3 if found.rows >= 1_500 else 6 if found.rows >= 300 else 10
    text = RECIPE.format(
        shown=_quoted(str(source or train)),
        out=_quoted(str(out)),
        name=_quoted(_name(source or out)),
        base=_quoted(base),
        train=_quoted(train),
        validation=found.validation_lines,
        patience=found.patience_lines,
        mapping=found.mapping_lines,
        limits=found.bad_lines,
        objective=found.objective,
        epochs=1 if found.form == "text" else epochs,
        learning_rate=found.learning_rate(base),
        batch_rows=16,
        evaluate=found.evaluate_lines,
    )
    write_text(out, text=text)
    return {"recipe": str(out), "form": found.form, "rows": found.rows, "why": found.why}


class _Found:
    """What the first rows of a file look like, and what they can be for the base; a decoder unless it is known."""

    def __init__(self, form: str, *, model_type: str | None, rows: int = 0):
        self.form, self.rows, self.num_bad = form, rows, 0
        self.model_type = model_type
        self.mapping: dict[str, str] = {}
        self.answers: list[str] = []
        self.labels: list[Label] = []
        self.share: float | None = SHARES[0]
        self.num_held = 0

    @property
    def validation_lines(self) -> str:
        if self.share is None:
            return "  validation: null           # too few rows to hold some back\n"
        return f"  validation: {self.share}            # this share chooses the best step and is never trained on\n"

    @property
    def patience_lines(self) -> str:
        stop = "  patience: 3                # stop after this many validations without a new best\n"
        return "" if self.share is None else stop

    @property
    def mapping_lines(self) -> str:
        if not self.mapping:
            return ""
        lines = [f"    {key}: {_quoted(column)}" for key, column in self.mapping.items()]
        return "\n".join(["  mapping:                   # which column is what", *lines, ""])

    @property
    def bad_lines(self) -> str:
        if not self.num_bad:
            return "  # too_long: refuse         # or truncate, drop: what to do with rows over the context length\n"
        return (
            f"  bad_rows: drop             # {self.num_bad} of the first rows cannot be used; data check names them\n"
        )

    @property
    def objective(self) -> str:
        """What fits the rows."""
        of_kind = {
            "text": "causal",
            "classes": "classification   # a head; or label_words, where the name of the class is the answer",
            "numbers": "regression",
            "tags": "token_classification",
        }
        return of_kind.get(self.kind, "seq2seq" if self.model_type in ENCODER_DECODERS else "instruction")

    def learning_rate(self, base: str) -> str:
        """For LoRA; a head takes smaller steps beside it."""
        if self.kind in ("classes", "numbers", "tags"):
            return "1e-3" if base == "starter" else "2e-4"
        return "2e-3" if base == "starter" else "2e-4"

    @property
    def kind(self) -> str:
        """`text`, `json`, `label`, `prose`, or what a head learns: `classes`, `numbers`, `tags`."""
        if self.form == "text":
            return "text"
        if self.form == "tagged":
            return "tags"
        if (self.form == "labelled" and not self.mapping) or self.model_type in ENCODERS:
            return "numbers" if _are_numbers(self.labels) else "classes"
        if self.answers and all(a.lstrip().startswith(("{", "[")) for a in self.answers):
            return "json"
        short = sum(map(len, self.answers)) / max(1, len(self.answers)) <= LABEL_CHARACTERS
        return "label" if short else "prose"

    @property
    def evaluate_lines(self) -> str:
        names = {
            "text": "[bits_per_byte, perplexity]",
            "json": "[exact_match, json_fields, json_valid, perplexity]",
            "label": "[exact_match, token_f1, perplexity]",
            "prose": "[chrf, bleu, rouge_l, token_f1, perplexity]",
            "classes": "[accuracy, macro_f1, log_loss, calibration_error]",
            "numbers": "[mae, rmse, coverage, interval_width]" if self.num_held >= INTERVAL_ROWS else "[mae, rmse]",
            "tags": "[entity_f1, tag_accuracy]",
        }[self.kind]
        lines = [f"  metrics: {names}   # the first decides the verdict"]
        if self.kind in ("json", "label", "prose"):
            longest = max((len(a) for a in self.answers), default=200)
            lines.append(f"  max_tokens: {max(32, min(512, longest))}            # longest answer when evaluating")
        return "\n".join(lines) + "\n"

    @property
    def why(self) -> str:
        if not self.rows:
            return "name your file under data.train"
        answers = {
            "text": "plain text",
            "json": "answers in JSON",
            "label": "short answers",
            "prose": "answers in prose",
            "classes": "a class for each text",
            "numbers": "a number for each text",
            "tags": "a tag for each word",
        }
        bad = f", {self.num_bad} of them unusable" if self.num_bad else ""
        more = "the first " if self.rows >= SAMPLE_ROWS else ""
        base = "" if self.model_type is not None else "; the base is not here yet and taken for a decoder"
        return f"{more}{self.rows:,} rows of the form {self.form} ({answers[self.kind]}){bad}{base}"

    def check_base(self, source: Path) -> None:
        """DataError where no objective learns such rows on such a base."""
        if self.model_type in ENCODER_DECODERS and self.form in ("text", "tagged"):
            raise DataError(
                f"an encoder-decoder answers prompts, and these rows are of the form '{self.form}'",
                file=source,
                hint="choose a decoder, or give rows with a prompt and a completion",
            )
        few = 2 <= len(set(self.labels)) <= len(self.labels) / ROWS_A_CLASS
        read = self.form in ("labelled", "tagged") or (self.labels and (few or _are_numbers(self.labels)))
        if self.model_type in ENCODERS and not read:
            found = f"{len(set(self.labels)):,} different answers" if self.labels else "plain text"
            raise DataError(
                f"an encoder writes no text, and these {self.rows:,} rows have {found}",
                file=source,
                hint=f"choose a decoder, or give rows with a label; {ROWS_A_CLASS} a class at least make classes of answers",
            )


def _look(source: Path, *, model_type: str | None) -> _Found:
    problems: list[Problem] = []
    rows = list(itertools.islice(read_rows(source, on_bad=problems.append), SAMPLE_ROWS))
    if not rows:
        message = problems[0].message if problems else "there are no rows in it"
        raise DataError(message, file=source, hint="tunesmith data check FILE says what is wrong")
    forms = [detect_form(row.value) for row in rows]
    form = max(set(forms), key=forms.count)
    found = _Found(form, model_type=model_type, rows=len(rows))
    if form == "labelled" and model_type in ENCODER_DECODERS:
        found.mapping = label_mapping(next(row.value for row, f in zip(rows, forms, strict=True) if f == form))
    settings = DataSettings(train=str(source), mapping=found.mapping)
    read = [examine(row, settings=settings) for row in rows]
    examples = [r for r in read if isinstance(r, Example)]
    if not examples:
        first = next(r for r in read if isinstance(r, Problem))
        raise first.as_error()
    found.num_bad = len(read) - len(examples) + sum(p.severity == "error" for p in problems)
    found.answers = [e.messages[-1].content for e in examples if e.messages]
    found.labels = [e.label for e in examples if e.label is not None]
    if model_type in ENCODERS:
        found.labels = found.labels or [answer.strip() for answer in found.answers]
    found.check_base(source)
    held = {share: _num_held(examples, share) for share in SHARES}
    found.share = next((share for share, count in held.items() if 2 <= count < len(examples)), None)
    found.num_held = 0 if found.share is None else held[found.share]
    return found


def _are_numbers(labels: list[Label]) -> bool:
    """Whether labels are amounts rather than names: numbers, with a fraction or more of them than a taxonomy has."""
    try:
        values = {float(label) for label in labels if isinstance(label, str)}
    except ValueError:
        return False
    few = len(values) <= MOST_CLASSES and all(value.is_integer() for value in values)
    return all(isinstance(label, str) for label in labels) and not few


def _num_held(examples: list[Example], share: float) -> int:
    """How many rows the split holds back; two are the fewest that can be evaluated."""
    return sum(side(e.prompt_key, shares={"validation": share}) == "validation" for e in examples)


def _name(path: Path) -> str:
    """The run's name after a file: `support-tickets` after `Support tickets.jsonl`."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.name.split(".")[0]).strip("-._")[:64]
    return name if name not in ("", LATEST) else "run"


def _quoted(text: str) -> str:
    """The text as it stands in YAML: in quotes where it would mean something else, a number for instance."""
    if re.fullmatch(r"[A-Za-z/][\w./-]*", text, re.ASCII) and text.lower() not in YAML_WORDS:
        return text
    return yaml.safe_dump(text, default_style='"', width=float("inf")).rstrip("\n")


def _relative(source: Path, *, out: Path) -> str:
    """The file as the recipe, which lies at `out`, has to name it."""
    try:
        name = str(source.absolute().relative_to(out.absolute().parent))
    except ValueError:
        return str(source.absolute())
    return f"./{name}" if name.startswith("~") or not name.strip() else name
