"""Chat templates are code from strangers: jinja2's immutable sandbox, with bounds on time, work and size.

Every block entered, every item of a range and every operator, call and filter is counted or measured, so neither an
endless loop nor a value that doubles itself gets far.
"""

import datetime
import functools
import json
import time
from typing import Any, NoReturn

import jinja2
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tunesmith.errors import TemplateError

MAX_SECONDS = 2.0
MAX_STEPS = 1_000_000  # blocks entered and items counted while rendering one conversation
MAX_SIZE = 4_000_000  # characters and items of any one value, inner ones included
MAX_DEPTH = 100
MAX_BITS = 4_096  # of a whole number
SOURCE_CHARACTERS = 500_000
UNSAFE_METHODS = {"format", "format_map", "ljust", "rjust", "center", "zfill", "expandtabs", "translate"}
UNSAFE_FILTERS = (
    "center",
    "indent",
    "wordwrap",
    "format",
    "pprint",
    "urlize",
    "batch",
    "slice",
    "random",
    "filesizeformat",
)
UNSAFE_GLOBALS = ("lipsum", "cycler", "joiner")


def _refuse(what: str) -> NoReturn:
    raise TemplateError(f"the chat template {what}", hint="mend the template")


class _BoundedCode(CodeGenerator):
    """Compiled templates count every block they enter and measure what they join."""

    def blockvisit(self, nodes: Any, frame: Any) -> None:
        self.writeline("environment.tick()")
        super().blockvisit(nodes, frame)

    def visit_List(self, node: Any, frame: Any) -> None:
        self._wrapped("measured", super().visit_List, node, frame)

    def visit_Tuple(self, node: Any, frame: Any) -> None:
        if node.ctx == "load":
            self._wrapped("measured", super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Dict(self, node: Any, frame: Any) -> None:
        self._wrapped("measured", super().visit_Dict, node, frame)

    def visit_Getitem(self, node: Any, frame: Any) -> None:
        self._wrapped("measured", super().visit_Getitem, node, frame)

    def _wrapped(self, name: str, visit: Any, node: Any, frame: Any) -> None:
        self.write(f"environment.{name}(")
        visit(node, frame)
        self.write(")")

    def visit_Concat(self, node: Any, frame: Any) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Generation(Extension):
    """`{% generation %}` marks assistant turns in some templates; its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2 as chat templates use it, with bounds."""

    code_generator_class = _BoundedCode
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *, today: datetime.date) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        self.steps, self.deadline = 0, float("inf")
        self.sizes: dict[int, tuple[Any, int, int]] = {}
        for name in UNSAFE_FILTERS:
            self.filters.pop(name, None)
        for name in UNSAFE_GLOBALS:
            self.globals.pop(name, None)
        self.filters["tojson"] = _tojson
        self.filters = {name: self._measured(function) for name, function in self.filters.items()}
        self.globals["raise_exception"] = _raise
        midnight = datetime.datetime.combine(today, datetime.time())
        self.globals["strftime_now"] = midnight.strftime  # a template that writes the date writes the same one for ever
        self.globals["range"] = self._range
        self.concat = self.joined  # type: ignore[method-assign]

    def start(self) -> None:
        """A new rendering begins: fresh budgets."""
        self.steps, self.deadline = 0, time.monotonic() + MAX_SECONDS
        self.sizes.clear()

    def tick(self, steps: int = 1) -> None:
        """Count work."""
        self.steps += steps
        if self.steps > MAX_STEPS or time.monotonic() > self.deadline:
            _refuse(f"does not end within {MAX_STEPS:,} steps and {MAX_SECONDS:g} seconds")

    def joined(self, parts: Any) -> str:
        """Texts joined, if the result is not too large."""
        texts = [part if isinstance(part, str) else str(part) for part in parts]
        if sum(map(len, texts)) > MAX_SIZE:
            _refuse("writes without end")
        return "".join(texts)

    def measured(self, value: Any) -> Any:
        """`value`, unless it is too large."""
        if isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                _refuse("computes with numbers that are too large")
        elif isinstance(value, str | bytes | list | tuple | dict | set):
            size = self._size(value)
            if size > MAX_SIZE:
                _refuse("makes values that are too large")
            self.tick(1 + size // 1024)
        return value

    def _size(self, value: Any, depth: int = 0) -> int:
        """Characters and items of a value, inner ones included and counted as often as they stand there."""
        if isinstance(value, str | bytes):
            return len(value)
        if not isinstance(value, list | tuple | dict | set):
            return 1
        if id(value) in self.sizes and self.sizes[id(value)][1] == len(value):
            return self.sizes[id(value)][2]
        if depth > MAX_DEPTH:
            _refuse("nests values too deeply")
        inner = value.values() if isinstance(value, dict) else value
        size = len(value) + sum(self._size(item, depth + 1) for item in inner)
        self.sizes[id(value)] = (value, len(value), size)  # keeps the value alive, so that its id stays its own
        return size

    def _measured(self, function: Any) -> Any:
        """A filter whose result is measured; what jinja2 noted on the function is kept."""

        @functools.wraps(function)
        def filtered(*arguments: Any, **keywords: Any) -> Any:
            self.tick()
            return self.measured(function(*arguments, **keywords))

        return filtered

    def _range(self, *arguments: int) -> range:
        found = range(*arguments)
        self.tick(len(found))
        return found

    def call(self, context: Any, function: Any, /, *arguments: Any, **keywords: Any) -> Any:
        """A call whose result is measured."""
        self.tick()
        return self.measured(super().call(context, function, *arguments, **keywords))

    def wrap_str_format(self, value: Any) -> None:
        """No formatting: a width in it is a size of the template's choosing."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """No methods that pad, besides what the sandbox forbids."""
        return not (isinstance(obj, str) and attr in UNSAFE_METHODS) and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Operators whose results could be large, measured before they are computed."""
        numbers = (int, float)
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            _refuse(f"uses '{operator}', which is not allowed")
        if operator == "*" and not (isinstance(left, numbers) and isinstance(right, numbers)):
            _refuse("multiplies text, which is not allowed")
        if operator == "+" and self._size(left) + self._size(right) > MAX_SIZE:
            _refuse("makes values that are too large")
        return self.measured(super().call_binop(context, operator, left, right))


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **keywords: Any) -> str:
    separators, sort_keys = keywords.get("separators"), bool(keywords.get("sort_keys", False))
    indent = min(indent, 8) if isinstance(indent, int) else None
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(f"the chat template refuses this conversation: {message}", hint="change the row's roles")


def compile_template(sandbox: Sandbox, source: str) -> jinja2.Template:
    """The template, compiled; raises TemplateError where it cannot be."""
    if len(source) > SOURCE_CHARACTERS:
        _refuse(f"has more than {SOURCE_CHARACTERS:,} characters")
    try:
        return sandbox.from_string(source)
    except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
        raise TemplateError(f"the chat template does not compile: {error}", hint="mend the template") from error


def render_bounded(sandbox: Sandbox, template: jinja2.Template, names: dict[str, Any]) -> str:
    """The template's text; raises TemplateError where it fails or breaks a bound."""
    sandbox.start()
    parts, length = [], 0
    try:
        for part in template.generate(names):
            sandbox.tick()
            length += len(part)
            if length > MAX_SIZE:
                _refuse("writes without end")
            parts.append(part)
    except TemplateError:
        raise
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        LookupError,
        ArithmeticError,
        AttributeError,
        RecursionError,
        MemoryError,
    ) as error:
        what = str(error) or type(error).__name__
        raise TemplateError(
            f"the chat template fails on this conversation: {what}", hint="check the row's roles and fields"
        ) from error
    return "".join(parts)
