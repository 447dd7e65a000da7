"""How the next token is chosen from its logits.

A token is drawn by inverting the cumulative distribution at one uniform number, which comes from a stream of the
prompt's own: what is drawn for a prompt depends on the seed and on its tokens, not on the prompts beside it.

Shapes: B rows, V vocabulary.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from tunesmith.errors import NumericalError

MIN_TEMPERATURE = 0.001


class Sampling(BaseModel):
    """How completions are drawn. The default is greedy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(
        default=0.0, ge=0.0, allow_inf_nan=False, description="0 takes the likeliest token every time"
    )
    top_p: float = Field(
        default=1.0, gt=0.0, le=1.0, description="draw from the likeliest tokens that together have this share"
    )
    top_k: int | None = Field(default=None, ge=1, description="draw from this many of the likeliest tokens")
    max_tokens: int = Field(default=256, ge=1, description="longest completion, in tokens")
    stop: tuple[str, ...] = Field(default=(), description="texts that end a completion; they are not part of it")
    seed: int = Field(default=0, ge=0, lt=2**63, description="the same seed draws the same completion for a prompt")

    @field_validator("temperature")
    @classmethod
    def _temperature_can_be_divided_by(cls, temperature: float) -> float:
        if 0 < temperature < MIN_TEMPERATURE:
            raise ValueError(f"a temperature is 0 (the likeliest token) or at least {MIN_TEMPERATURE}")
        return temperature

    @field_validator("stop")
    @classmethod
    def _stop_has_text(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("an empty stop text would end every completion at once")
        return stop

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> "Sampling":
        for name, unset in {"top_p": 1.0, "top_k": None}.items():
            if self.temperature == 0 and getattr(self, name) != unset:
                raise ValueError(f"{name} has no effect at temperature 0; set a temperature above 0 or leave it out")
        return self


def random_stream(prompt: Sequence[int], *, seed: int, occurrence: int) -> np.random.Generator:
    """The uniform numbers for one completion of `prompt`; `occurrence` counts completions of the same prompt from 0."""
    content = np.array([seed, occurrence, *prompt], dtype="<i8").tobytes()
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(content).digest(), "little")))


def choose(logits_BV: Tensor, *, sampling: Sampling, uniform_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The next token of every row -> (tokens_B int64, logprobs_B).

    `uniform_B` float64 in [0, 1), on the device of the logits, is needed where the temperature is above 0. The
    log-probabilities are those of the distribution that was drawn from: after temperature, top-k and then top-p. At
    temperature 0 they are the model's own. Raises NumericalError where a row's logits are not numbers.
    """
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    if sampling.temperature == 0:
        logprobs_BV = logits_BV.log_softmax(dim=-1)
        tokens_B1 = logits_BV.argmax(dim=-1, keepdim=True)
        chosen_B1 = logprobs_BV.gather(-1, tokens_B1)
    else:
        assert uniform_B is not None, "drawing needs a uniform number a row"
        logprobs_BV, order_BV = _distribution(logits_BV / sampling.temperature, sampling=sampling)
        cumulative_BV = logprobs_BV.double().exp().cumsum(dim=-1)
        place_B1 = torch.searchsorted(cumulative_BV, uniform_B[:, None] * cumulative_BV[:, -1:], right=True)
        place_B1 = place_B1.clamp(max=logits_BV.shape[-1] - 1)  # beyond the end only where a logit is not a number
        tokens_B1 = place_B1 if order_BV is None else order_BV.gather(-1, place_B1)
        chosen_B1 = logprobs_BV.gather(-1, place_B1)
    if not bool(chosen_B1.isfinite().all()):
        raise NumericalError(
            "the model's logits are not finite, so no token can be chosen",
            hint="the weights hold NaN or infinity: use an earlier checkpoint, and train with a lower learning rate",
        )
    return tokens_B1[:, 0], chosen_B1[:, 0]


def _distribution(logits_BV: Tensor, *, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities to draw from, and the token at each place where they are sorted (None: in token order)."""
    if sampling.top_k is None and sampling.top_p == 1.0:
        return logits_BV.log_softmax(dim=-1), None
    logits_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        logits_BV[:, sampling.top_k :] = -torch.inf
    probabilities_BV = logits_BV.softmax(dim=-1)
    before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
    return logits_BV.masked_fill(before_BV >= sampling.top_p, -torch.inf).log_softmax(dim=-1), order_BV
