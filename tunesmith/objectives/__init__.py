"""The objectives, each one file; a row here makes it known to recipes."""

from typing import Annotated, get_args

from pydantic import Field

from tunesmith.objectives.base import Objective
from tunesmith.objectives.causal import Causal
from tunesmith.objectives.classification import Classification
from tunesmith.objectives.contrastive import Contrastive
from tunesmith.objectives.distillation import Distillation
from tunesmith.objectives.instruction import Instruction
from tunesmith.objectives.label_words import LabelWords
from tunesmith.objectives.regression import Regression
from tunesmith.objectives.seq2seq import Seq2seq
from tunesmith.objectives.token_classification import TokenClassification

AnyObjective = Annotated[
    Instruction
    | Causal
    | Seq2seq
    | Distillation
    | Classification
    | LabelWords
    | Contrastive
    | TokenClassification
    | Regression,
    Field(discriminator="kind"),
]

OBJECTIVES: dict[str, type[Objective]] = {
    kind.model_fields["kind"].default: kind for kind in get_args(get_args(AnyObjective)[0])
}

__all__ = ["OBJECTIVES", "AnyObjective", "Objective"]
