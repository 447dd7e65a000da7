"""tunesmith: from a pre-trained model and a team's own examples to a tuned, proven, usable model.

The verbs are in `tunesmith.api`; they are imported on first use, because they need torch.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Run", "Tuned", "evaluate", "export", "find_run", "load", "tune"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from tunesmith import api

        return getattr(api, name)
    raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")
