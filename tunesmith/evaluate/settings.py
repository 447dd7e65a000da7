"""The `evaluate` section of a recipe."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from tunesmith.evaluate.adherence import compiled
from tunesmith.evaluate.code import CODE_METRICS
from tunesmith.evaluate.metrics import METRICS
from tunesmith.evaluate.own import is_own

RESOLVED = {"resolved": True}  # the validation context of recipes in which every default is spelled out


SystemName = Literal["base", "few_shot", "retrieval", "tuned_retrieval", "majority", "mean", "median"]
LOOKING_UP = ("retrieval", "tuned_retrieval")
READ_BY = {
    "json_schema": "json_schema",
    "pattern": "pattern_match",
    "samples": "pass_at_k",
}  # settings, and the metric that each is for


class JudgeSettings(BaseModel):
    """A model behind an OpenAI-compatible address that says which of two answers is better."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    url: str = Field(description="the address up to what stands before `/chat/completions`, as https://HOST/v1")
    model: str = Field(min_length=1, description="its name there")
    key_environment: str | None = Field(
        default=None, description="the environment variable with the key, which is never written anywhere"
    )
    instructions: str | None = Field(
        default=None, description="what makes an answer better; by default helpful, correct, relevant and clear"
    )
    rows: int = Field(default=100, ge=2, description="rows that are judged at most; each is asked about twice a system")
    labels: str | None = Field(
        default=None, description="a file of rows that people judged: `prompt`, `a`, `b` and `preferred` (a, b or tie)"
    )
    timeout_seconds: float = Field(default=60.0, gt=0, description="how long an answer may take, each of five times")

    @field_validator("url")
    @classmethod
    def _is_address(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"'{url}' is no address of the form https://HOST/v1")
        if parts.username is not None or parts.password is not None:
            raise ValueError("the address holds a name or password; name a variable in key_environment")
        return url


class GroupSettings(BaseModel):
    """Groups of held-out rows that are scored one by one, and compared with each other."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    column: str | None = Field(
        default=None, min_length=1, description="the column that names a row's group, or a list of its groups"
    )
    words: str | None = Field(
        default=None,
        description="a YAML or JSON file that gives each group a list of words: a row is in the groups of the words in"
        " its prompt",
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> "GroupSettings":
        if (self.column is None) == (self.words is None):
            raise ValueError("give either column or words")
        return self


def _column(value: object) -> object:
    """A name is short for `{column: name}`."""
    return {"column": value} if isinstance(value, str) else value


class EvaluateSettings(BaseModel):
    """How base and tuned are compared. The first metric decides the verdict."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    metrics: tuple[str, ...] | None = Field(
        default=None,
        description="which metrics, or functions of your own as `package.module:function`; by default what fits the answers "
        "(see docs/evaluation.md)",
    )
    against: tuple[SystemName, ...] | None = Field(
        default=None,
        description="the systems that the tuned model is compared with; by default base and few_shot, for a classification"
        " also the most frequent class (majority), for a regression the median and the mean of the training rows; retrieval "
        "and tuned_retrieval are base and tuned with what was looked up for each row",
    )
    few_shot: int | Literal["best"] = Field(
        default=4,
        description="training examples in the prompt of `few_shot`, 1 to 64, drawn at random; `best` chooses how many and"
        " which on rows that are not evaluated",
    )
    look_up: int = Field(default=4, ge=1, le=64, description="rows or passages looked up for each row")
    documents: str | None = Field(
        default=None,
        description="folder of texts in which passages are looked up; by default that of data.look_up, else the training"
        " rows",
    )
    look_up_by: Literal["bm25", "embeddings"] = Field(
        default="bm25",
        description="what is looked up shares words with the question (bm25), or is near to it in meaning (embeddings)",
    )
    embedder: str | None = Field(
        default=None, description="an encoder that gives the embeddings: a local folder or a hub name"
    )
    general: str | None = Field(
        default=None, description="a file of texts, or of questions and answers, that tuning should not make worse"
    )
    general_rows: int = Field(default=200, ge=2, description="passages or questions of it that are evaluated at most")
    general_margin: float = Field(
        default=0.02, gt=0, description="how much worse is still small: bits a byte of texts, a share of right answers"
    )
    every: int | None = Field(
        default=None, ge=1, description="read general every so many optimiser steps while training"
    )
    json_schema: str | None = Field(
        default=None,
        description="a file with a JSON schema for the answers; adds the metric `json_schema` to the default ones",
    )
    pattern: str | None = Field(
        default=None,
        description="a regular expression for the whole answer; adds the metric `pattern_match` to the default ones",
    )
    samples: int | None = Field(
        default=None, ge=1, description="answers drawn for each row; adds the metric `pass_at_k` to the default ones"
    )
    temperature: float = Field(default=0.8, ge=0.001, description="with which `samples` are drawn")
    pass_at: int = Field(default=1, ge=1, description="the k of `pass_at_k`, at most `samples`")
    code_seconds: int = Field(
        default=5, ge=1, description="processor time that an answer's code may take with its tests"
    )
    judge: JudgeSettings | None = Field(
        default=None, description="a model that judges the answers pairwise; the section below"
    )
    memorised: int | None = Field(
        default=None,
        ge=10,
        description="ask this many training rows too, and as many held-out ones: do training answers come back verbatim,"
        " and how much better are rows scored that were trained on",
    )
    groups: Annotated[GroupSettings | None, BeforeValidator(_column)] = Field(
        default=None, description="score groups of rows: a column's name, or the section below"
    )
    swaps: str | None = Field(
        default=None,
        description="a YAML or JSON file of pairs of words such as [he, she]: does a class change when they are swapped",
    )
    gate: dict[str, str] | None = Field(
        default=None, description="rules that must hold, or `evaluate` ends with status 3 (see docs/evaluation.md)"
    )
    rows: int | None = Field(default=None, ge=1, description="evaluate this many held-out rows at most; all by default")
    max_tokens: int = Field(default=256, ge=1, description="longest generated answer in tokens")
    batch_rows: int = Field(default=64, ge=1, description="answers generated at a time; bounds memory, not the result")
    seed: int = Field(default=0, ge=0, description="of the choice of rows and few-shot examples, and of the bootstrap")

    @property
    def added(self) -> tuple[str, ...]:
        """The metrics that are measured beside the default ones, since there is a setting for each."""
        return tuple(metric for name, metric in READ_BY.items() if getattr(self, name) is not None)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the rows that the evaluation reads."""
        return () if self.groups is None or self.groups.column is None else (self.groups.column,)

    @field_validator("metrics")
    @classmethod
    def _known(cls, metrics: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in metrics or ():
            if name not in METRICS and not is_own(name):
                import difflib

                near = difflib.get_close_matches(name, METRICS, n=1)
                raise ValueError(
                    f"there is no metric '{name}'"
                    + (f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(METRICS)}")
                )
        return metrics

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            compiled(pattern)
        return pattern

    @field_validator("few_shot", mode="before")
    @classmethod
    def _count_or_best(cls, value: object) -> object:
        if value == "best" or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 64):
            return value
        raise ValueError(f"a number of examples from 1 to 64 is expected, or best (found {value!r})")

    @field_validator("gate")
    @classmethod
    def _rules(cls, gate: dict[str, str] | None) -> dict[str, str] | None:
        from tunesmith.evaluate.gate import check_rule

        for metric, rule in (gate or {}).items():
            check_rule(metric, rule)
        return gate

    @model_validator(mode="after")
    def _no_idle_setting(self, info: ValidationInfo) -> "EvaluateSettings":
        if info.context == RESOLVED:
            return self
        if "few_shot" in self.model_fields_set and self.against is not None and "few_shot" not in self.against:
            raise ValueError("few_shot has no effect because `against` does not name few_shot")
        for name in ("general_rows", "general_margin", "every"):
            if name in self.model_fields_set and self.general is None:
                raise ValueError(f"{name} has no effect without general")
        if self.gate is not None and "general" in self.gate and self.general is None:
            raise ValueError("gate asks about general, and general names no file")
        if self.judge is not None and self.against == ():
            raise ValueError("judge has no effect because `against` names no system")
        for name, metric in READ_BY.items():
            given = getattr(self, name) is not None
            if given and self.metrics is not None and metric not in self.metrics:
                raise ValueError(f"{name} has no effect because `metrics` does not name {metric}")
            if not given and metric in (self.metrics or ()):
                raise ValueError(f"metric '{metric}' needs {name}")
        for name in ("temperature", "pass_at"):
            if name in self.model_fields_set and self.samples is None:
                raise ValueError(f"{name} has no effect without samples")
        if self.samples is not None and self.pass_at > self.samples:
            raise ValueError(f"pass_at is {self.pass_at} and samples are {self.samples}; draw as many or more")
        if "code_seconds" in self.model_fields_set and self.metrics and not set(self.metrics) & set(CODE_METRICS):
            raise ValueError(f"code_seconds has no effect because `metrics` names none of {', '.join(CODE_METRICS)}")
        if (self.look_up_by == "embeddings") != (self.embedder is not None):
            raise ValueError("look_up_by: embeddings and embedder, which gives them, go together")
        for name in ("look_up", "documents", "look_up_by", "embedder"):
            if name in self.model_fields_set and not set(self.against or ()) & set(LOOKING_UP):
                raise ValueError(f"{name} has no effect because `against` names none of {', '.join(LOOKING_UP)}")
        return self
