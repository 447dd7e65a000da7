"""Talking with a tuned model in a terminal."""

import contextlib
import sys
from typing import Any

from pydantic import ValidationError

from tunesmith.api import Tuned, load
from tunesmith.data.types import Message
from tunesmith.errors import RecipeError, TunesmithError
from tunesmith.generate.sampling import Sampling
from tunesmith.objectives.headed import Headed
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
) -> dict[str, Any]:
    """One answer to one prompt, by the tuned model or by its base; of a run for classes, numbers or tags, those."""
    drawn = _sampling(sampling)
    if not prompt.strip():
        raise RecipeError("the prompt is empty", hint="tunesmith generate RUN 'your prompt'")
    tuned = load(run, workspace=workspace)
    if base and tuned.run.recipe.objective.num_new_tokens:
        raise RecipeError(
            "the run has tokens that its base does not know, so the base cannot answer in its place",
            hint="leave --base out; tunesmith evaluate compares them",
        )
    if isinstance(tuned.run.recipe.objective, Headed):
        return _read(tuned, prompt, idle={"--system": system is not None, "--base": base})
    with tuned.method.disabled(tuned.model) if base else contextlib.nullcontext():
        text = tuned.generate([*_start(tuned, system), Message("user", prompt)], sampling=drawn)
    return {"prompt": prompt, "answer": text}


def _read(tuned: Tuned, text: str, *, idle: dict[str, bool]) -> dict[str, Any]:
    """What a run for classes, numbers or tags says of a text."""
    for option, given in idle.items():
        if given:
            raise RecipeError(
                f"{option} has no effect on a run for {tuned.run.recipe.objective.kind_name}", hint="leave it out"
            )
    said = tuned.predict([text])
    return {"prompt": text, "answer": said.texts()[0], "prediction": said.documents()[0]}


def converse(run: str, *, system: str | None, sampling: dict[str, Any], workspace: Workspace) -> None:
    """Read turns from standard input and stream the answers to standard output, until /quit or the end of input."""
    drawn = _sampling(sampling)
    tuned = load(run, workspace=workspace)
    if tuned.run.recipe.objective.num_outputs:
        raise RecipeError(
            f"{tuned.run.name} was tuned for {tuned.run.recipe.objective.kind_name} and writes no text",
            hint="tunesmith generate RUN TEXT shows what it says of a text",
        )
    if tuned.model.is_encoder_decoder:
        raise RecipeError(
            f"{tuned.run.name} answers one prompt at a time and holds no conversation: its base is an encoder-decoder",
            hint="tunesmith generate RUN TEXT",
        )
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
