"""The `data` section of a recipe: which files, what their columns mean, how they are split and what may be left out."""

import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Form = Literal["auto", "chat", "prompt_completion", "alpaca", "sharegpt", "text", "labelled", "tagged"]
Findings = Literal[
    "near_duplicate", "contradiction", "contamination", "protected_text", "quality", "language", "label_error"
]
MAPPING_KEYS = ("prompt", "completion", "system", "text", "label", "words", "tags", "messages", "tests", "before")
PLACEHOLDER = re.compile(r"\{([^{}]+)\}")
DESCRIBING = frozenset({"origin", "licence", "notes"})  # fields that change nothing of what is prepared


class SelectSettings(BaseModel):
    """Fewer rows that stand for all (`data.select`): the others are left out and counted."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    keep: float = Field(
        description="How many training rows are kept: a whole number from 2, or a share between 0 and 1."
    )
    by: Literal["random", "diversity", "quality", "quality+diversity", "difficulty"] = Field(
        default="quality+diversity",
        description="Which rows: `diversity`, those that all rows are near to by their words; `quality`, those whose"
        " answer is no refusal, not cut off, without repetition, in the usual script and of a usual length; both;"
        " `difficulty`, those that the base finds hard though their question helps it; or `random` ones. Each class keeps"
        " its share of the rows, and one at least.",
    )

    @field_validator("keep", mode="before")
    @classmethod
    def _no_truth_value(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("true and false are no numbers of rows; give one such as 500, or a share such as 0.1")
        return value

    @field_validator("keep")
    @classmethod
    def _check_number(cls, value: float) -> float:
        if not 0 < value < 1 and not (value >= 2 and value == int(value)):
            raise ValueError(f"{value:g} rows; give a whole number from 2, or a share between 0 and 1")
        return value

    def num_kept(self, num_rows: int) -> int:
        """How many of so many rows are kept; as many as there are where `keep` is not below their number."""
        return max(int(self.keep * num_rows), 1) if self.keep < 1 else min(int(self.keep), num_rows)


class LookUpSettings(BaseModel):
    """Train with passages or other rows before the questions, as `tuned_retrieval` is asked (`data.look_up`; RAFT, Zhang
    et al. 2024)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    documents: str | None = Field(
        default=None,
        description="Folder of texts in which passages are looked up for each question; by default other training rows are"
        " looked up, and shown with their answers.",
    )
    passages: int = Field(
        default=4, ge=1, le=64, description="How many passages, or rows, stand before a question at most."
    )
    share: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="The share of the training rows with what is most like the question; the rest have others alone, so"
        " that the model learns to ignore what does not help.",
    )


class DataSettings(BaseModel):
    """What to read and how to treat it. Every default refuses rather than loses a row."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    train: str | list[str] = Field(
        description="The training rows: a file, a folder, a hub data set `owner/name:split`, or a list of these."
    )
    validation: float | str | None = Field(
        default=0.1,
        description="Rows that choose the best step: a share of `train` between 0 and 1, or a file; null for none.",
    )
    test: float | str | None = Field(
        default=None, description="Rows that only the evaluation sees: a share of `train` between 0 and 1, or a file."
    )
    train_share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Which share of the training rows is trained on; a larger one holds them all.",
    )
    replay: str | None = Field(
        default=None,
        description="A file of general texts, or of questions and answers, trained on among the rows so that less is"
        " forgotten.",
    )
    replay_share: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="Which share of what is trained on comes from `replay`, in rows and in the weight they have.",
    )
    select: SelectSettings | None = Field(
        default=None, description="Train on fewer rows, chosen to stand for all: the section below."
    )
    look_up: LookUpSettings | None = Field(
        default=None, description="Train with passages or other rows before the questions: the section below."
    )
    form: Form = Field(default="auto", description="The form of the rows; `auto` tells it from each row's columns.")
    mapping: dict[str, str] = Field(
        default_factory=dict,
        description="Which column is what, in files with columns of their own: `prompt` and `completion` (and"
        " `system`), or `text` (and `label`: a class, a list of classes or a number), or `words` and `tags`, or `messages`;"
        " beside an answer that is code `tests` that it is run with, and `before` for code in front of it."
        " A value with a `{column}` in it is a pattern filled from the row.",
    )
    system: str | None = Field(default=None, description="A system prompt for the conversations that have none.")
    template: str | None = Field(
        default=None, description="A file with a jinja chat template, used instead of the base model's own."
    )
    max_tokens: int | None = Field(
        default=None, ge=2, description="The longest row in tokens; null: the context length of the base model."
    )
    too_long: Literal["refuse", "truncate", "drop"] = Field(
        default="refuse",
        description="What to do with a row over `max_tokens`: stop the run, cut its end, or leave it out.",
    )
    duplicates: Literal["keep", "drop"] = Field(
        default="keep", description="What to do with a row that repeats an earlier one exactly."
    )
    personal: Literal["keep", "mask", "drop"] = Field(
        default="keep",
        description="What to do with personal data and secrets: keep them, put a placeholder such as [EMAIL_1] in the place"
        " of each, or leave the row out.",
    )
    names: str | None = Field(
        default=None,
        description="A model that tags names of persons (PER or PERSON), a folder or a hub name: `personal` then concerns"
        " names too, as [NAME_1].",
    )
    benchmarks: list[str] = Field(
        default_factory=list,
        description="Evaluation files whose texts should not be trained on: looked for in every row (`contamination`).",
    )
    protected: str | None = Field(
        default=None,
        description="A folder of texts whose passages should not be trained on word for word (`protected_text`).",
    )
    leave_out: tuple[Findings, ...] = Field(
        default=(), description="Leave out the training rows of which `data check` says this; see docs/data.md."
    )
    bad_rows: Literal["refuse", "drop"] = Field(
        default="refuse", description="What to do with a row that cannot be used: stop the run, or leave it out."
    )
    origin: str | None = Field(
        default=None, description="Where the rows come from, in your words: for the data card. Changes nothing else."
    )
    licence: str | None = Field(
        default=None, description="Under which licence or terms the rows may be used; likewise."
    )
    notes: str | None = Field(default=None, description="What else a reader of the data card should know; likewise.")
    keep_columns: list[str] = Field(
        default=[],
        description="Columns that stay with the rows and are shown beside their answers in examples.jsonl; what"
        " `evaluate.groups` names is kept without being named here.",
    )

    def keeping(self, columns: Iterable[str]) -> "DataSettings":
        """With more columns that stay with the rows."""
        return self.model_copy(update={"keep_columns": list(dict.fromkeys((*self.keep_columns, *columns)))})

    def kept(self, columns: dict[str, Any]) -> dict[str, Any]:
        """Those of a row's columns that stay with it."""
        return {name: columns[name] for name in self.keep_columns if name in columns}

    @property
    def train_paths(self) -> list[str]:
        """`train` as a list."""
        return [self.train] if isinstance(self.train, str) else list(self.train)

    @property
    def shares(self) -> dict[str, float]:
        """The shares of `train` that are held out, by side: `validation`, `test`; a side that is a file is absent."""
        sides = {"validation": self.validation, "test": self.test}
        return {name: value for name, value in sides.items() if isinstance(value, float)}

    @field_validator("system", *DESCRIBING)
    @classmethod
    def _whole_characters(cls, value: str | None) -> str | None:
        if value is not None and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("the text holds half of a surrogate pair, which is no character")
        return value

    @field_validator("validation", "test", mode="before")
    @classmethod
    def _no_truth_value(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("true and false are no shares; give a share such as 0.1, a file, or null for none")
        return value

    @field_validator("validation", "test", mode="after")
    @classmethod
    def _check_share(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError(f"the share is {value:g}; a share lies between 0 and 1 (or give a file, or null for none)")
        return value

    @model_validator(mode="after")
    def _check_combinations(self) -> "DataSettings":
        for complaint in (*self._path_complaints(), *self._mapping_complaints(), *self._text_complaints()):
            raise ValueError(complaint)
        return self

    def _path_complaints(self) -> Iterator[str]:
        paths = self.train_paths
        if not paths or not all(path.strip() for path in paths):
            yield "`train` names no file; give a file, a folder, a hub name or a list of these"
        if len(set(paths)) != len(paths):
            repeated = next(path for path in paths if paths.count(path) > 1)
            yield f"`train` names {repeated!r} twice; name each file once"
        for name, value in (("validation", self.validation), ("test", self.test)):
            if isinstance(value, str) and value in paths:
                yield f"`{name}` is {value!r}, which is also trained on; give another file, or a share such as 0.1"
        if self.replay is not None and self.replay in {*paths, self.validation, self.test}:
            yield f"`replay` is {self.replay!r}, which holds rows of the task; give general rows"
        if self.replay is None and "replay_share" in self.model_fields_set and self.replay_share != 0.1:
            yield "`replay_share` has no effect without `replay`"
        if self.names is not None and self.personal == "keep":
            yield "`names` has no effect where `personal` is keep; set `personal` to mask or drop"
        if "contamination" in self.leave_out and not self.benchmarks:
            yield "`leave_out: contamination` has no effect without `benchmarks`"
        if isinstance(self.test, str) and self.test == self.validation:
            yield f"`test` and `validation` are both {self.test!r}; a test must not also choose the best step"
        if sum(self.shares.values()) >= 1:
            yield f"`validation` {self.validation:g} and `test` {self.test:g} leave nothing to train on"

    def _mapping_complaints(self) -> Iterator[str]:
        keys = set(self.mapping)
        if unknown := sorted(keys - set(MAPPING_KEYS)):
            yield f"`mapping` has the key {unknown[0]!r}; allowed are {', '.join(MAPPING_KEYS)}"
        if empty := sorted(key for key in keys if not self.mapping[key].strip()):
            yield f"`mapping.{empty[0]}` is empty; give a column name or a pattern such as '{{question}}'"
        if keys and len(keys & {"prompt", "text", "words", "messages"}) != 1:
            yield f"`mapping` has {', '.join(sorted(keys))}; give exactly one of prompt, text, words, messages"
        for one, other in (("prompt", "completion"), ("words", "tags")):
            if (one in keys) != (other in keys):
                yield f"`mapping` needs `{one}` and `{other}` together"
        if "label" in keys and "text" not in keys:
            yield "`mapping.label` goes with `text` only"
        if "system" in keys and "prompt" not in keys:
            yield "`mapping.system` goes with `prompt` and `completion` only"
        if "tests" in keys and not keys & {"prompt", "messages"}:
            yield "`mapping.tests` goes with `prompt` and `completion`, or with `messages`"
        if "before" in keys and "tests" not in keys:
            yield "`mapping.before` goes with `tests` only"
        for key in ("messages", "words", "tags"):
            if key in keys and PLACEHOLDER.search(self.mapping[key]):
                yield f"`mapping.{key}` is a column name, not a pattern"
        if keys and self.form not in ("auto", self.mapped_form):
            yield f"`form` is {self.form} but `mapping` makes {self.mapped_form} rows; leave `form` out"

    def _text_complaints(self) -> Iterator[str]:
        if {"text", "labelled", "tagged"} & {self.form, self.mapped_form}:
            for name in ("system", "template"):
                if getattr(self, name) is not None:
                    yield f"`{name}` has no effect on plain text; leave it out, or map prompt and completion"

    @property
    def mapped_form(self) -> str | None:
        """The form that `mapping` makes; None without a mapping."""
        forms = {
            "prompt": "prompt_completion",
            "label": "labelled",
            "text": "text",
            "words": "tagged",
            "messages": "chat",
        }
        return next((form for key, form in forms.items() if key in self.mapping), None)
