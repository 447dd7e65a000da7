"""The tuning methods, each one file; a name here makes it known to recipes."""

from typing import Annotated, get_args

from pydantic import Field

from tunesmith.methods.adapters import Adapters
from tunesmith.methods.base import Method
from tunesmith.methods.bitfit import Bitfit
from tunesmith.methods.full import Full
from tunesmith.methods.ia3 import Ia3
from tunesmith.methods.layers import Layers
from tunesmith.methods.lora import Lora, Qlora
from tunesmith.methods.p_tuning import PTuning
from tunesmith.methods.prefix import Prefix
from tunesmith.methods.prompt import Prompt
from tunesmith.methods.vera import Vera

AnyMethod = Annotated[
    Lora | Qlora | Full | Layers | Prefix | Prompt | PTuning | Adapters | Ia3 | Bitfit | Vera,
    Field(discriminator="kind"),
]

METHODS: dict[str, type[Method]] = {m.model_fields["kind"].default: m for m in get_args(get_args(AnyMethod)[0])}

__all__ = ["METHODS", "AnyMethod", "Method"]
