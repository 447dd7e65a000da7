"""Talking with a tuned model in a terminal."""

import contextlib
import sys
from typing import Any

from pydantic import ValidationError

from tunesmith.api import Tuned, load
from tunesmith.data.types import Message
from tunesmith.errors import RecipeError, TunesmithError
from tunesmith.generate.sampling import Sampling
from tunesmith.registry.workspace import Workspace


def _sampling(values: dict[str, Any]) -> Sampling:
    try:
        return Sampling(**values)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise RecipeError(message, hint="see tunesmith generate --help") from None


def _start(tuned: Tuned, system: str | None) -> list[Message]:
    text = system if system is not None else tuned.run.recipe.data.system
    return [Message("system", text)] if text else []


def answer(
    run: str, *, prompt: str, system: str | None, sampling: dict[str, Any], base: bool, workspace: Workspace
) -> str:
    """One answer to one prompt, by the tuned model or by its base."""
    drawn = _sampling(sampling)
    if not prompt.strip():
        raise RecipeError("the prompt is empty", hint="tunesmith generate RUN 'your prompt'")
    tuned = load(run, workspace=workspace)
    with tuned.method.disabled(tuned.model) if base else contextlib.nullcontext():
        return tuned.generate([*_start(tuned, system), Message("user", prompt)], sampling=drawn)


def converse(run: str, *, system: str | None, sampling: dict[str, Any], workspace: Workspace) -> None:
    """Read turns from standard input and stream the answers to standard output, until /quit or the end of input."""
    drawn = _sampling(sampling)
    tuned = load(run, workspace=workspace)
    messages = _start(tuned, system)
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() history and editing
        print(f"{tuned.run.name}: /reset forgets the conversation, /quit or Ctrl-D ends it", file=sys.stderr)
    while True:
        try:
            text = input("you> " if interactive else "")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if text.strip() == "/quit":
            return
        if text.strip() == "/reset":
            messages = _start(tuned, system)
        elif text.strip():
            messages = _turn(tuned, [*messages, Message("user", text)], sampling=drawn)


def _turn(tuned: Tuned, messages: list[Message], *, sampling: Sampling) -> list[Message]:
    """Stream one answer; returns the conversation with it, or without the question where none could be given."""
    pieces: list[str] = []
    try:
        for piece in tuned.stream(messages, sampling=sampling):
            pieces.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    except TunesmithError as error:
        print(f"error: {error}\nhint: {error.hint or '/reset forgets the conversation'}", file=sys.stderr)
        return messages[:-1]
    print()
    return [*messages, Message("assistant", "".join(pieces))]
