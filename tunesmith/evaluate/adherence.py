"""Is an answer of the form that was asked for: JSON, JSON under a schema, a pattern?"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.data.answers import Floats
from tunesmith.errors import NotFoundError, RecipeError

if TYPE_CHECKING:
    from jsonschema.protocols import Validator
    from regex import Pattern

MISSING = object()
PATTERN_SECONDS = 1.0


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse_json(text: str) -> Any:
    """The JSON value, or `MISSING` if `text` is not JSON to the letter (fences, NaN and trailing words are not)."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # a model may well write ten thousand opening brackets
        return MISSING


# ---- a schema --------------------------------------------------------------------------------------------------------


def read_schema(path: str) -> "Validator":
    """The schema in a file, of the draft that its `$schema` names, 2020-12 by default. Nothing is ever fetched.

    Raises NotFoundError, and RecipeError where it is no schema or refers to what is neither in it nor a draft.
    """
    from jsonschema import SchemaError, validators
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import UnknownDialect, specification_with

    try:
        schema = parse_json(Path(path).read_text("utf-8"))
        if not isinstance(schema, dict | bool):
            raise ValueError("the file is not JSON" if schema is MISSING else "a schema is an object")
        if isinstance(schema, dict) and "$schema" in schema:
            specification_with(str(schema["$schema"]))
        draft = validators.validator_for(schema, default=validators.Draft202012Validator)
        draft.check_schema(schema, format_checker=draft.FORMAT_CHECKER)
        _check_references(schema, registry=REGISTRY)
    except FileNotFoundError:
        raise NotFoundError("no such file", file=path, hint="evaluate.json_schema names a JSON schema") from None
    except SchemaError as error:
        what = f"{error.json_path}: {error.message}"
    except Unresolvable as error:
        what = f"'$ref' to {error.ref!r}, which is not in the file; nothing is fetched"
    except UnknownDialect as error:
        what = f"'$schema' is {error.uri!r}, which is no draft that is known"
    except (OSError, ValueError, RecursionError) as error:
        what = str(error)
    else:
        return draft(schema, registry=REGISTRY, format_checker=draft.FORMAT_CHECKER)
    raise RecipeError(f"no JSON schema: {what}", file=path, hint="mend it: evaluate.json_schema reads this file")


def _check_references(schema: Any, *, registry: Any) -> None:
    """Unresolvable for a `$ref` that leads nowhere: a validator would notice only when an answer takes it there."""
    from referencing import Resource
    from referencing.jsonschema import DRAFT202012

    root = Resource.from_contents(schema, default_specification=DRAFT202012)
    waiting = [(root, registry.resolver_with_root(root))]
    while waiting:
        part, resolver = waiting.pop()
        for keyword in ("$ref", "$dynamicRef"):
            if isinstance(part.contents, dict) and isinstance(part.contents.get(keyword), str):
                resolver.lookup(part.contents[keyword])
        waiting += [(below, resolver.in_subresource(below)) for below in part.subresources()]


def schema_rows(predictions: list[str], references: list[list[str]], *, json_schema: "Validator") -> Floats:
    """1 for each prediction that is JSON and valid under the schema; references are not read. [B]."""
    return np.array([float(_is_valid(text, schema=json_schema)) for text in predictions])


def _is_valid(text: str, *, schema: "Validator") -> bool:
    value = parse_json(text)
    try:
        return value is not MISSING and schema.is_valid(value)
    except RecursionError:  # the nesting is the model's choice, and no answer that was asked for has so much
        return False


# ---- a pattern -------------------------------------------------------------------------------------------------------


def compiled(pattern: str) -> "Pattern[str]":
    """The pattern, in the syntax of the library `regex`, which extends Python's; ValueError where it is none."""
    import regex

    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None


def pattern_rows(predictions: list[str], references: list[list[str]], *, pattern: "Pattern[str]") -> Floats:
    """1 for each prediction that the pattern matches as a whole, but for whitespace around it; references are not read.

    [B]. Raises RecipeError for a pattern that takes more than a second on one answer, as (a+)+b does on a row of a's.
    """
    rows = np.zeros(len(predictions))
    for row, text in enumerate(predictions):
        try:
            rows[row] = pattern.fullmatch(text.strip(), timeout=PATTERN_SECONDS) is not None
        except TimeoutError:
            raise RecipeError(
                f"evaluate.pattern takes more than {PATTERN_SECONDS:g} s on an answer of {len(text):,} characters",
                hint="repeat nothing that is itself repeated: write a+b and not (a+)+b",
            ) from None
    return rows
