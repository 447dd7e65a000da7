"""The `train` and `plan` sections of a recipe."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class TrainSettings(BaseModel):
    """How a run trains. The defaults are the vetted setting."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epochs: float = Field(default=3.0, gt=0, description="passes over the training rows")
    max_steps: int | None = Field(default=None, ge=1, description="stop after this many optimiser steps at the latest")
    learning_rate: float | None = Field(default=None, gt=0, description="peak learning rate; the method's own default")
    optimiser: Literal["adamw", "muon"] = Field(
        default="adamw", description="muon: matrices by orthogonalised momentum (Jordan 2024), the rest by AdamW"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="after the warm-up")
    final_share: float = Field(default=0.0, ge=0, lt=1, description="share of the peak that the schedule ends at")
    warmup: float = Field(default=0.05, ge=0, description="steps of linear warm-up; below 1 a share of all steps")
    weight_decay: float = Field(default=0.01, ge=0, description="decoupled decay of matrices; vectors never decay")
    clip: float | None = Field(default=1.0, gt=0, description="largest norm of the gradient; null: no clipping")
    batch_rows: int = Field(default=16, ge=1, description="rows an optimiser step, whatever the micro-batches")
    micro_batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens computed at a time, not counting a beginning that all of them share; bounds memory, not the "
        "result; 1,536 on a CPU and 8,192 on a GPU by default",
    )
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="of the forward and backward pass")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of order, initial adapter weights and dropout")
    checkpoint_every: int | None = Field(
        default=None, ge=1, description="optimiser steps; a tenth of the run by default"
    )
    validate_every: int | None = Field(default=None, ge=1, description="optimiser steps; a tenth of the run by default")
    patience: int | None = Field(default=None, ge=1, description="stop after this many validations without a new best")
    general_limit: float | None = Field(
        default=None,
        gt=0,
        description="stop when the rows of evaluate.general cost this many bits a byte more than at the start; the best step"
        " is then chosen among those before",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass: less memory, slower"
    )
    reuse_frozen: Literal["auto", "off"] = Field(
        default="auto", description="auto: what frozen blocks give is kept on disk and read back in later epochs"
    )
    compile: bool = Field(default=False, description="compile the blocks with torch.compile")
    parallel: Literal["data", "fsdp"] = Field(
        default="data",
        description="of several processes, each holds the whole model (data), or the blocks are divided among them (fsdp)",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: a GPU where there is one")
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        default=(), description="send metrics there too"
    )

    def tokens_at_a_time(self, device: str) -> int:
        """`micro_batch_tokens`, or what suits the type of device: more gain nothing on a CPU (docs/log.md)."""
        return self.micro_batch_tokens or (8192 if device == "cuda" else 1536)

    @field_validator("reuse_frozen", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads a bare off as false

    @model_validator(mode="after")
    def _warmup_is_share_or_count(self) -> "TrainSettings":
        if self.warmup > 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup: {self.warmup} is neither a share below 1 nor a whole number of steps")
        if self.final_share and self.schedule == "constant":
            raise ValueError("final_share has no effect on a constant schedule")
        return self


class PlanSettings(BaseModel):
    """What a machine costs, for `tunesmith plan`; it decides nothing of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    price_per_hour: float | None = Field(default=None, ge=0, description="of the machine")
    currency: str = Field(default="EUR", min_length=1, max_length=8, description="of the price")

    @model_validator(mode="after")
    def _currency_of_something(self) -> "PlanSettings":
        if self.price_per_hour is None and "currency" in self.model_fields_set and self.currency != "EUR":
            raise ValueError("currency has no effect without price_per_hour")
        return self
