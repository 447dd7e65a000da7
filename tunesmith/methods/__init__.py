"""The tuning methods, each one file; a row here makes it known to recipes."""

from typing import Annotated

from pydantic import Field

from tunesmith.methods.base import Method
from tunesmith.methods.full import Full
from tunesmith.methods.lora import Lora

METHODS: dict[str, type[Lora] | type[Full]] = {"lora": Lora, "full": Full}

AnyMethod = Annotated[Lora | Full, Field(discriminator="kind")]

__all__ = ["METHODS", "AnyMethod", "Method"]
