"""What the commands share: their common options, and how they speak and show results."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="print one JSON document")]
WorkspaceOption = Annotated[
    Path | None, typer.Option("--workspace", help="the workspace folder; .tunesmith found upward by default")
]
RecipeArgument = Annotated[Path, typer.Argument(help="the recipe, a YAML file")]
RunArgument = Annotated[str, typer.Argument(help="a run: its name, a unique beginning, its recipe's name, or latest")]
Set = Annotated[list[str] | None, typer.Option("--set", help="change a setting: a.b=value (may be repeated)")]


def space_of(path: Path | None) -> Any:
    """The workspace that a command works in."""
    from tunesmith.registry.workspace import find_workspace

    return find_workspace(path)


def say(text: str) -> None:
    """A line for people, on standard error."""
    sys.stderr.write(text + "\n")  # at once, so that several processes do not write into each other's lines
    sys.stderr.flush()


def print_result(result: Any, *, as_json: bool, text: Callable[[], str]) -> None:
    """A result on standard output: one JSON document, or its text."""
    if not as_json:
        print(text())
        return
    document = json.dumps(result, ensure_ascii=False, indent=1)
    try:
        document.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # a terminal without these characters, or a file name that is no UTF-8
        document = json.dumps(result, indent=1)
    print(document)
