"""The objectives, each one file; a row here makes it known to recipes."""

from typing import Annotated

from pydantic import Field

from tunesmith.objectives.base import Objective
from tunesmith.objectives.causal import Causal
from tunesmith.objectives.instruction import Instruction

OBJECTIVES: dict[str, type[Instruction] | type[Causal]] = {"instruction": Instruction, "causal": Causal}

AnyObjective = Annotated[Instruction | Causal, Field(discriminator="kind")]

__all__ = ["OBJECTIVES", "AnyObjective", "Objective"]
