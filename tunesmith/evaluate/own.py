"""A metric of the user's own: `package.module:function` in the working directory, called for each row.

    function(prediction: str, reference: str) -> float | bool
    function(prediction: str, reference: str, example: Example) -> float | bool

Higher is better. The score of a set is the mean; where every row of every system gives True or False, it is a metric that is
right or wrong.
"""

import hashlib
import importlib
import inspect
import math
import numbers
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from tunesmith.data.answers import Floats
from tunesmith.data.types import Example
from tunesmith.errors import DataError, RecipeError
from tunesmith.evaluate.metric import FRACTION, MEAN, Metric

OWN = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_own(name: str) -> bool:
    """Whether the name of a metric is that of a function, as `package.module:function`."""
    return OWN.fullmatch(name) is not None


def own_file(name: str) -> Path:
    """The file of the function's module in the working directory; RecipeError where there is none.

    Nothing else is imported, so that a recipe cannot call what stands elsewhere on this machine.
    """
    parts = name.partition(":")[0].split(".")
    for path in (Path.cwd().joinpath(*parts).with_suffix(".py"), Path.cwd().joinpath(*parts, "__init__.py")):
        if path.is_file():
            return path
    raise RecipeError(
        f"evaluate.metrics: '{name}' is looked for in {'/'.join(parts)}.py in the working directory, where it is not",
        hint=f"the working directory is {Path.cwd()}; start tunesmith in the one with the module",
    )


def own_digest(name: str) -> str:
    """SHA-256 of the module's source."""
    return hashlib.sha256(own_file(name).read_bytes()).hexdigest()


def own_metric(name: str) -> Metric:
    """The function as a metric whose score takes `examples` too, and gives rows of bool where it gave nothing else.

    RecipeError where it cannot be imported, is no function or takes other arguments.
    """
    function = _imported(name)
    takes_example = _takes_example(name, function)

    def score(predictions: list[str], references: list[list[str]], *, examples: list[Example]) -> Floats:
        found = []
        for prediction, texts, example in zip(predictions, references, examples, strict=True):
            more = (example,) if takes_example else ()
            found.append(max(_value(name, function, prediction, text, *more, example=example) for text in texts))
        return np.array(found, dtype=bool if all(isinstance(value, bool) for value in found) else np.float64)

    return Metric(name, "a metric of your own", score, MEAN, needs=("examples",))


def settled(metric: Metric, rows: dict[str, Floats]) -> Metric:
    """The metric with these rows by system: right or wrong where all systems have rows of bool."""
    if not all(found.dtype == bool for found in rows.values()):
        return metric
    return replace(metric, aggregate=FRACTION, right_or_wrong=True)


def _imported(name: str) -> Callable[..., object]:
    path = own_file(name)
    module_name, _, function_name = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise RecipeError(
            f"it cannot be imported: {type(error).__name__}: {error}", file=path, hint="mend it"
        ) from error
    if module.__file__ is None or not path.samefile(module.__file__):
        raise RecipeError(
            f"evaluate.metrics: there is another module {module_name}, {module.__file__}",
            file=path,
            hint="rename yours",
        )
    function = vars(module).get(function_name)
    if not callable(function):
        what = "there is no" if function is None else "this is no function:"
        raise RecipeError(f"{what} {function_name}", file=path, hint=f"evaluate.metrics names '{name}'")
    return function


def _takes_example(name: str, function: Callable[..., object]) -> bool:
    """Whether there is a place for a third argument. RecipeError where there is none for two, or more are needed."""
    try:
        signature = inspect.signature(function)
        places = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        given = ("prediction", "reference", "example")[: max(2, min(3, len(places)))]
        signature.bind(*given)
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"evaluate.metrics: '{name}' cannot be called with (prediction, reference): {error}",
            file=own_file(name),
            hint="it takes (prediction, reference), or (prediction, reference, example), and gives a number",
        ) from None
    return len(given) == 3


def _value(name: str, function: Callable[..., object], *given: object, example: Example) -> float | bool:
    file, line = example.origin
    try:
        value = function(*given)
    except Exception as error:
        raise DataError(
            f"{name} failed on this row: {type(error).__name__}: {error}",
            file=file,
            line=line,
            hint="mend the function",
        ) from error
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise DataError(
            f"{name} gave {value!r} for this row, which is no finite number",
            file=file,
            line=line,
            hint="give a number, or True or False",
        )
    return float(value)
