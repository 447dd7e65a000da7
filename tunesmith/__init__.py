"""tunesmith: from a pre-trained model and a team's own examples to a tuned, proven, usable model.

The verbs are in `tunesmith.api`; they are imported on first use, because they need torch.
"""

import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"
__all__ = ["Run", "Tuned", "combine", "evaluate", "export", "find_run", "load", "load_several", "plan", "tune"]


class _Package(ModuleType):
    """The room `evaluate/` and the file `export.py` share their names with verbs; as attributes, the verbs win."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):  # how Python binds a submodule that was imported
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in __all__:
        from tunesmith import api

        return getattr(api, name)
    raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")


sys.modules[__name__].__class__ = _Package
