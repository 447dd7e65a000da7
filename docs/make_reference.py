"""Writes docs/recipe.md, the reference of the recipe, from the models that read it.

    python docs/make_reference.py            write the file
    python docs/make_reference.py --check    write nothing; exit status 1 when the file is not what would be written

Names, types, defaults, limits and descriptions come from the pydantic fields, so the page cannot say anything else than
what the code does.
"""

import argparse
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import annotated_types
import numpy as np
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tunesmith.data.settings import DataSettings, LookUpSettings, SelectSettings
from tunesmith.evaluate.metrics import METRICS
from tunesmith.evaluate.settings import EvaluateSettings, GroupSettings, JudgeSettings
from tunesmith.methods import METHODS
from tunesmith.models.base import NewBase
from tunesmith.objectives import OBJECTIVES, Objective
from tunesmith.recipe import Recipe
from tunesmith.train.settings import PlanSettings, TrainSettings

PAGE = Path(__file__).resolve().parent / "recipe.md"

WORDS = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`", type(None): "`null`"}
LIMITS: dict[type, tuple[str, str]] = {
    annotated_types.Ge: ("ge", "at least"),
    annotated_types.Gt: ("gt", "above"),
    annotated_types.Le: ("le", "at most"),
    annotated_types.Lt: ("lt", "below"),
}

HEAD = """\
# The recipe

<!-- Written by docs/make_reference.py from the code. Change the descriptions there, then run `make reference`. -->

A recipe is one YAML file that says everything that decides a run. `tunesmith init --from FILE` writes one that fits a
file of rows; only `data.train` has no default.

- Relative paths are relative to the recipe's folder.
- A setting that has no effect is an error: an unknown name, a setting of another method, a `patience` without
  validation. The message names the line and the nearest valid name.
- Numbers may be written as `2e-4`. A key that stands twice is refused.
- `method: lora` is short for `method: {kind: lora}`; the same goes for `objective`.
- On the command line, `--set section.name=value` changes a setting; the value is read as YAML.
- The resolved recipe, with every default and the hashes of data, base, tokenizer and code, is saved with the run in
  `resolved.json`.
"""


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or compare it. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page (default: docs/recipe.md)")
    options = parser.parse_args(arguments)
    page = render()
    if not options.check:
        options.out.write_text(page, "utf-8")
        return 0
    fresh = options.out.is_file() and options.out.read_text("utf-8") == page
    if not fresh:
        print(f"error: {options.out} is not what the code says\nhint: make reference", file=sys.stderr)
    return 0 if fresh else 1


def render() -> str:
    """The whole page."""
    parts = [
        HEAD,
        _section("The recipe itself", Recipe),
        _section("`base`, as a section", NewBase, about="A model made from a configuration, for `method: full`."),
        _section("`data`", DataSettings),
        _section("`data.select`", SelectSettings, level=3),
        _section("`data.look_up`", LookUpSettings, level=3),
        *_kinds("objective", OBJECTIVES, about=lambda kind: kind.summary),
        *_kinds("method", METHODS, about=lambda kind: f"{kind.summary}; learning rate {_rate(kind)} by default"),
        _section("`train`", TrainSettings),
        _section("`evaluate`", EvaluateSettings),
        _section("`evaluate.judge`", JudgeSettings, level=3),
        _section("`evaluate.groups`", GroupSettings, level=3),
        _section("`plan`", PlanSettings),
        _metrics(),
    ]
    return "\n".join(parts)


def _section(title: str, model: type[BaseModel], *, about: str = "", level: int = 2) -> str:
    about = about or inspect.cleandoc(model.__doc__ or "")
    idle = model.idle if issubclass(model, Objective) else ()
    rows = [_row(name, field) for name, field in model.model_fields.items() if name not in ("kind", *idle)]
    body = _table(("name", "type", "default", "what it does"), rows) if rows else "It has no settings.\n"
    return f"{'#' * level} {title}\n\n{about}\n\n{body}"


def _kinds(section: str, kinds: dict[str, Any], *, about: Callable[[Any], str]) -> Iterable[str]:
    names, first = ", ".join(f"`{name}`" for name in kinds), next(iter(kinds))
    yield f"## `{section}`\n\nOne of {names}: `{section}: {first}`, or a section with `kind` and its settings.\n"
    for name, kind in kinds.items():
        text = about(kind)
        yield _section(f"`{section}: {name}`", kind, about=f"{text[0].upper()}{text[1:]}.", level=3)


def _rate(method: Any) -> str:
    return np.format_float_scientific(method.learning_rate, trim="-", exp_digits=1)


READS = {"text": "the answer", "samples": "drawn answers"}


def _metrics() -> str:
    rows = [
        (
            f"`{name}`",
            "higher" if metric.higher_is_better else "lower",
            READS.get(metric.reads, "the likelihood"),
            "McNemar" if metric.right_or_wrong else "permutation",
            metric.description,
        )
        for name, metric in METRICS.items()
    ]
    table = _table(("metric", "better", "reads", "paired test", "what it is"), rows)
    return f"## Metrics\n\nThe names that `evaluate.metrics` takes.\n\n{table}"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _row(name: str, field: FieldInfo) -> tuple[str, str, str, str]:
    description = field.description or ("The section below." if _is_section(field.annotation) else "")
    assert description, f"{name} has no description"
    return f"`{name}`", ", ".join([type_text(field.annotation), *_limits(field)]), _default(field), description


def _is_section(annotation: Any) -> bool:
    members = typing.get_args(annotation) or (annotation,)
    return any(inspect.isclass(member) and issubclass(member, BaseModel) for member in members)


def type_text(annotation: Any) -> str:
    """A type as words: `whole number or null`, `adamw or muon`, `list of text`."""
    if annotation in WORDS:
        return WORDS[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_text(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_text(argument) for argument in arguments))
    if origin in (list, tuple):
        return f"list of {type_text(arguments[0])}"
    if origin is dict:
        return f"section of {type_text(arguments[0])}: {type_text(arguments[1])}"
    assert _is_section(annotation), annotation
    return "section"


def _limits(field: FieldInfo) -> list[str]:
    texts = []
    for limit in field.metadata:
        if type(limit) in LIMITS:
            attribute, words = LIMITS[type(limit)]
            texts.append(f"{words} {getattr(limit, attribute):,}")
    return texts


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        made = field.get_default(call_default_factory=True)
        kind = made.__class__.model_fields.get("kind") if isinstance(made, BaseModel) else None
        return f"`{kind.default}`" if kind else "none" if made == {} else "all its defaults"
    return "required" if field.default is PydanticUndefined else f"`{_value(field.default)}`"


def _value(value: Any) -> str:
    """A default as YAML has it."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_value, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
