"""Distillation: the model learns a larger one's whole distribution at each trained token, and not only the token.

    loss = sum_n w_n (a T^2 D_n + (1 - a) (-log p(y_n))) / sum_n w_n

    forward:  D_n = sum_v t_v log(t_v / p_v)                               (Hinton et al. 2015, section 2)
    reverse:  D_n = sum_v p_v log(p_v / t_v)                               (Gu et al. 2024, MiniLLM, eq. 1, on given answers)

t and p are the teacher's and the model's distributions, both at temperature T. Forward covers all that the teacher holds
possible, reverse keeps to what it holds likely. The teacher reads the same packs, so what rows share is computed once.
"""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tunesmith.data.pack import Pack
from tunesmith.objectives.base import Loss, Readout, Reads
from tunesmith.objectives.instruction import Instruction


class Distillation(Instruction):
    """Answer as a larger model would."""

    kind: Literal["distillation"] = "distillation"  # type: ignore[assignment]
    summary: ClassVar[str] = "answer as a larger model would, from its probabilities"

    teacher: str = Field(
        description="the larger model: a local folder or a hub name, with the same tokenizer; `base`: the recipe's own base,"
        " which then keeps the model from moving far from it"
    )
    divergence: Literal["forward", "reverse"] = Field(
        default="forward", description="forward covers all that the teacher holds possible, reverse what is likely"
    )
    temperature: float = Field(default=1.0, gt=0, description="flattens both distributions where it is above 1")
    share: float = Field(
        default=1.0, gt=0, le=1, description="of the teacher in the loss; the rest is the rows' tokens"
    )

    @model_validator(mode="after")
    def _has_teacher(self) -> Self:
        if not self.teacher.strip():
            raise ValueError("teacher is empty; name a folder or a hub name")
        return self

    @property
    def reads(self) -> Reads:
        """How far each target's distribution is from the teacher's, and its log-probability."""
        return "divergences"

    @property
    def teacher_base(self) -> str | None:
        """What the recipe names."""
        return self.teacher

    @property
    def divergence_options(self) -> dict[str, Any]:
        """Temperature and direction."""
        return {"temperature": self.temperature, "reverse": self.divergence == "reverse"}

    def loss(self, readout: Readout, pack: Pack) -> Loss:
        """Both parts; the divergence alone, in nats, as a metric."""
        assert readout.divergence_N is not None
        taught_N = self.share * self.temperature**2 * readout.divergence_N
        each_N = taught_N - (1 - self.share) * readout.value
        count = self.count(pack)
        divergence = float((readout.divergence_N.detach() * readout.weight_N).sum())
        return Loss((each_N * readout.weight_N).sum(), count, {"divergence": (divergence, count)})
