"""What form a row has, and what it means: Row -> Example.

Forms: `chat` (the hosted format: `messages`, with tools and weights), `prompt_completion` (also prompt/response,
input/output, question/answer), `alpaca` (instruction, input, output), `sharegpt` (`conversations`), `text`, `labelled`
(a text and its class, classes or number) and `tagged` (words and a tag for each).
Nothing is guessed: a row whose meaning is not certain is refused, with the mapping that would make it certain.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.data.ledger import Problem
from tunesmith.data.settings import PLACEHOLDER, DataSettings
from tunesmith.data.sources import json_type, read_rows
from tunesmith.data.types import CodeTests, Example, Label, Message, Row

PAIRS = (("prompt", "completion"), ("prompt", "response"), ("input", "output"), ("question", "answer"))
WORD_COLUMNS = ("words", "tokens")
TAG_COLUMNS = ("tags", "ner_tags", "pos_tags", "labels")
ALPACA_ANSWERS = ("output", "response")
LABEL_COLUMNS = ("label", "labels", "class", "category", "intent", "target", "topic", "sentiment")
# Columns beside `text` that say where a text is from, and not what is to be learned from it.
TEXT_NOTES = {"id", "document_id", "__index_level_0__", "url", "title", "author", "source", "license", "split", "dump"}
TEXT_NOTES |= {"meta", "metadata", "date", "timestamp", "created", "added", "name", "path", "file", "file_path"}
TEXT_NOTES |= {"language", "lang", "language_score", "score", "length", "num_tokens", "token_count"}
PREFERENCE_SIDES = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"))

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
ROLES |= {"tool": "tool", "function": "tool"}
SHAREGPT_ROLES = ROLES | {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
SHAREGPT_ROLES |= {"observation": "tool", "function_call": "assistant"}
MEND = "mend the row, or set data.bad_rows: drop to leave such rows out"
EXTRA_KEYS = ("name", "tool_call_id", "reasoning_content")


class _RowError(ValueError):
    """Why a row cannot be used. Only `examine` sees it."""

    def __init__(self, message: str, *, kind: str = "bad_row", hint: str = ""):
        super().__init__(message)
        self.kind, self.hint = kind, hint


@dataclass
class _Reading:
    """A row as understood so far; `used` are its columns that went into it."""

    form: str
    used: set[str]
    messages: list[Message] = field(default_factory=list)
    text: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    words: tuple[str, ...] = ()
    label: Label | None = None
    tests: CodeTests | None = None


def detect_form(value: Any) -> str:
    """The form of a row's value, from its columns.

    One of `chat`, `prompt_completion`, `alpaca`, `sharegpt`, `text`, `labelled`, `tagged`; or a form that needs something
    first: `preference` (needs a preference objective), `unknown` (needs a mapping, or `form: text` where there is a text
    among columns of unknown use).
    """
    if not isinstance(value, dict):
        return "unknown"
    filled = {column for column, content in value.items() if content is not None}
    if "text" in filled and any(column in value for column in LABEL_COLUMNS):
        return "labelled"
    if any(isinstance(value.get(column), list) for column in WORD_COLUMNS) and filled.intersection(TAG_COLUMNS):
        return "tagged"
    return _form_of(filled) or _form_of(set(value)) or "unknown"


def _form_of(columns: set[str]) -> str | None:
    if any(side in columns for sides in PREFERENCE_SIDES for side in sides):
        return "preference"
    if "messages" in columns:
        return "chat"
    if "conversations" in columns:
        return "sharegpt"
    if "instruction" in columns and columns.intersection(ALPACA_ANSWERS):
        return "alpaca"
    if any(columns.issuperset(pair) for pair in PAIRS):
        return "prompt_completion"
    return "text" if "text" in columns and columns <= {"text"} | TEXT_NOTES else None


def label_mapping(value: dict[str, Any]) -> dict[str, str]:
    """The mapping that makes prompt and completion of a `labelled` row, for an answer in words."""
    column = next(column for column in LABEL_COLUMNS if column in value)
    return {"prompt": "text", "completion": column if isinstance(value[column], str) else f"{{{column}}}"}


def to_example(row: Row, *, settings: DataSettings) -> Example:
    """What the row means. Raises DataError, with file and line, when it cannot be trained on as it is."""
    result = examine(row, settings=settings)
    if isinstance(result, Problem):
        raise result.as_error()
    return result


def read_examples(path: str, *, settings: DataSettings) -> list[Example]:
    """All rows of a file, as the settings read them. DataError, with file and line, for the first that cannot be used."""
    problems: list[Problem] = []
    examples = [to_example(row, settings=settings) for row in read_rows(path, on_bad=problems.append)]
    if errors := [problem for problem in problems if problem.severity == "error"]:
        raise errors[0].as_error()
    return examples


def examine(row: Row, *, settings: DataSettings) -> Example | Problem:
    """As `to_example`, but the defect of a row is a value: a Problem of kind `bad_row` or `empty_target`."""
    try:
        reading = _read(row.value, settings=settings)
        if reading.words:
            _check_tags(reading)
        elif reading.text is None:
            _check_conversation(reading.messages)
            if settings.system is not None and reading.messages[0].role != "system":
                reading.messages.insert(0, Message("system", settings.system))
        elif settings.system is not None:
            raise _RowError("plain text has no place for `data.system`", hint="leave data.system out")
        elif not reading.text.strip():
            raise _RowError("the text is empty", kind="empty_target")
    except _RowError as defect:
        return Problem(defect.kind, "error", row.origin.file, row.origin.line, str(defect), hint=defect.hint or MEND)
    return Example(
        origin=row.origin,
        form=reading.form,
        messages=tuple(reading.messages),
        text=reading.text,
        tools=reading.tools,
        words=reading.words,
        label=reading.label,
        tests=reading.tests,
        columns={
            column: content
            for column, content in row.value.items()
            if column not in reading.used or column in settings.keep_columns
        },
    )


def _read(value: Any, *, settings: DataSettings) -> _Reading:
    if not isinstance(value, dict):
        raise _RowError(f"the row is {json_type(value)}; it must be an object with named columns")
    if settings.mapping:
        return _read_mapped(value, mapping=settings.mapping)
    form = detect_form(value) if settings.form == "auto" else settings.form
    if form in READERS:
        return READERS[form](value)
    columns = ", ".join(map(repr, value)) or "none"
    if form == "preference":
        imitate = "to imitate the chosen answers, write data.mapping: {prompt: prompt, completion: chosen}"
        raise _RowError(
            "a preference row (a better and a worse answer); the preference objectives it is for are not available",
            hint=imitate
            if isinstance(value.get("chosen"), str)
            else "to imitate the chosen answers, write them as conversations (messages)",
        )
    names = [column for column, content in value.items() if isinstance(content, str)]
    others = [name for name in names if name not in TEXT_NOTES and name != "text"]
    prompt, completion = [*(["text"] if "text" in names else []), *others, "COLUMN", "COLUMN"][:2]
    raise _RowError(
        f"the columns {columns} are no form that is known"
        " (messages; conversations; prompt and completion; instruction and output; text)",
        hint=f"write data.mapping: {{prompt: {prompt}, completion: {completion}}}, with the columns that are meant,"
        f" or {{text: {prompt}, label: {completion}}} for a class or a number"
        + (" (or data.form: text)" if "text" in names else ""),
    )


# ------------------------------------------------------------------------------------------------------ forms


def _read_chat(value: dict[str, Any]) -> _Reading:
    return _conversation(value, form="chat", column="messages")


def _read_sharegpt(value: dict[str, Any]) -> _Reading:
    return _conversation(value, form="sharegpt", column="conversations")


def _conversation(value: dict[str, Any], *, form: str, column: str) -> _Reading:
    turns = value.get(column)
    if not isinstance(turns, list):
        raise _RowError(f"{column!r} is {json_type(turns)}; it must be a list of messages")
    if not turns:
        raise _RowError(f"{column!r} is empty; a conversation needs a user turn and an assistant turn")
    messages = [_message(turn, number=number) for number, turn in enumerate(turns, start=1)]
    tools = _tools(value)
    return _Reading(form, {column, "tools", "functions", "system"}, _system(value, messages=messages), tools=tools)


def _read_prompt_completion(value: dict[str, Any]) -> _Reading:
    prompt, completion = next((pair for pair in PAIRS if pair[0] in value and pair[1] in value), PAIRS[0])
    if isinstance(value.get(prompt), list):  # a conversation and its continuation, both as messages
        answer = value.get(completion)
        turns = [*value[prompt], *(answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}])]
        reading = _conversation({**value, "messages": turns}, form="chat", column="messages")
        reading.used |= {prompt, completion}
        return reading
    texts = [_text(value, column=prompt), _answer(value, column=completion)]
    messages = [Message("user", texts[0]), Message("assistant", texts[1])]
    return _Reading("prompt_completion", {prompt, completion, "system"}, _system(value, messages=messages))


def _read_alpaca(value: dict[str, Any]) -> _Reading:
    answer = next((column for column in ALPACA_ANSWERS if column in value), ALPACA_ANSWERS[0])
    messages = []
    for turn in value.get("history") or []:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise _RowError("'history' must be a list of [question, answer] pairs")
        messages += [Message("user", turn[0]), Message("assistant", turn[1])]
    parts = [_text(value, column="instruction")]
    if value.get("input") is not None and (extra := _text(value, column="input")).strip():
        parts.append(extra)
    messages += [Message("user", "\n\n".join(parts)), Message("assistant", _answer(value, column=answer))]
    used = {"instruction", "input", answer, "history", "system"}
    return _Reading("alpaca", used, _system(value, messages=messages))


def _read_text(value: dict[str, Any]) -> _Reading:
    return _Reading("text", {"text"}, text=_text(value, column="text"))


def _read_labelled(value: dict[str, Any]) -> _Reading:
    column = next((column for column in LABEL_COLUMNS if column in value), LABEL_COLUMNS[0])
    return _Reading("labelled", {"text", column}, text=_text(value, column="text"), label=_label(value, column=column))


def _read_tagged(value: dict[str, Any]) -> _Reading:
    words, tags = (next((c for c in names if c in value), names[0]) for names in (WORD_COLUMNS, TAG_COLUMNS))
    return _tagged(value, words=words, tags=tags)


def _tagged(value: dict[str, Any], *, words: str, tags: str) -> _Reading:
    found = [_column(value, column=column) for column in (words, tags)]
    for column, content in zip((words, tags), found, strict=True):
        if not isinstance(content, list) or not all(isinstance(item, str | int) for item in content):
            raise _RowError(f"the column {column!r} is {json_type(content)}; it must be a list of texts")
    if not found[0]:
        raise _RowError(f"the column {words!r} is empty", kind="empty_target")
    return _Reading("tagged", {words, tags}, words=tuple(map(str, found[0])), label=tuple(map(str, found[1])))


def _check_tags(reading: _Reading) -> None:
    assert isinstance(reading.label, tuple)
    if len(reading.words) != len(reading.label):
        raise _RowError(f"{len(reading.words)} words and {len(reading.label)} tags; there must be a tag for each word")


READERS: dict[str, Callable[[dict[str, Any]], _Reading]] = {
    "chat": _read_chat,
    "sharegpt": _read_sharegpt,
    "prompt_completion": _read_prompt_completion,
    "alpaca": _read_alpaca,
    "text": _read_text,
    "labelled": _read_labelled,
    "tagged": _read_tagged,
}


def _read_mapped(value: dict[str, Any], *, mapping: dict[str, str]) -> _Reading:
    used = {name for text in mapping.values() for name in PLACEHOLDER.findall(text) or [text]}
    if "messages" in mapping:
        _column(value, column=mapping["messages"])
        reading = _conversation(value, form="chat", column=mapping["messages"])
        reading.used |= used
        reading.tests = _tests(value, mapping=mapping)
        return reading
    if "words" in mapping:
        return _tagged(value, words=mapping["words"], tags=mapping["tags"])
    filled = {key: _fill(text, value=value) for key, text in mapping.items() if key in ("prompt", "completion", "text")}
    if "label" in mapping:
        return _Reading("labelled", used, text=filled["text"], label=_label(value, column=mapping["label"]))
    if "text" in filled:
        return _Reading("text", used, text=filled["text"])
    messages = [Message("user", filled["prompt"]), Message("assistant", filled["completion"])]
    if "system" in mapping and (system := _fill(mapping["system"], value=value)).strip():
        messages.insert(0, Message("system", system))
    return _Reading("prompt_completion", used, messages, tests=_tests(value, mapping=mapping))


def _tests(value: dict[str, Any], *, mapping: dict[str, str]) -> CodeTests | None:
    """What is run with the answer; a column with a list of texts is one text with a line for each."""
    if "tests" not in mapping:
        return None
    lines = {
        column: "\n".join(content)
        if isinstance(content, list) and all(isinstance(t, str) for t in content)
        else content
        for column, content in value.items()
    }
    return CodeTests(*(_fill(mapping[key], value=lines) if key in mapping else "" for key in ("before", "tests")))


def _fill(text: str, *, value: dict[str, Any]) -> str:
    """The column `text`, which must hold text; or the pattern `text` with numbers and texts filled in."""
    if not PLACEHOLDER.search(text):
        return _text(value, column=text)

    def content_of(column: str) -> str:
        content = _column(value, column=column)
        if content is None or isinstance(content, (dict, list)):
            raise _RowError(f"the column {column!r} is {json_type(content)}; a pattern takes texts and numbers")
        return content if isinstance(content, str) else json.dumps(content)

    return PLACEHOLDER.sub(lambda match: content_of(match[1]), text)


# ---------------------------------------------------------------------------------------------------- columns


def _column(value: dict[str, Any], *, column: str) -> Any:
    if column not in value:
        raise _RowError(f"there is no column {column!r}; the row has {', '.join(map(repr, value)) or 'none'}")
    return value[column]


def _text(value: dict[str, Any], *, column: str) -> str:
    content = _column(value, column=column)
    if isinstance(content, str):
        return content
    hint = f"to write it as text, map it with a pattern: '{{{column}}}'" if isinstance(content, (int, float)) else ""
    raise _RowError(f"the column {column!r} is {json_type(content)}; it must be a text", hint=hint)


def _label(value: dict[str, Any], *, column: str) -> Label:
    """A class, several, or a number: a column, or a pattern that makes a class."""
    if PLACEHOLDER.search(column):
        return _fill(column, value=value)
    content = _column(value, column=column)
    if content is None or (isinstance(content, str) and not content.strip()):
        raise _RowError(f"the column {column!r} is empty: nothing to learn", kind="empty_target")
    if isinstance(content, list) and all(isinstance(item, str | int) for item in content):
        return tuple(str(item) for item in content)
    if isinstance(content, (list, dict)):
        raise _RowError(
            f"the column {column!r} is {json_type(content)}; a label is a text, a number or a list of texts"
        )
    return content if isinstance(content, str) else json.dumps(content)


def _answer(value: dict[str, Any], *, column: str) -> str:
    if _column(value, column=column) is None:
        raise _RowError(f"the column {column!r} is null: nothing to train on", kind="empty_target")
    return _text(value, column=column)


def _system(value: dict[str, Any], *, messages: list[Message]) -> list[Message]:
    """The messages with the row's own `system` column before them, where it has one."""
    if value.get("system") is None or not (system := _text(value, column="system")).strip():
        return messages
    if messages[0].role == "system":
        raise _RowError("there are two system prompts: the column 'system' and the first message")
    return [Message("system", system), *messages]


# --------------------------------------------------------------------------------------------------- messages


def _message(turn: Any, *, number: int) -> Message:
    """One turn in either spelling: role and content, or from and value."""
    if not isinstance(turn, dict):
        raise _RowError(f"message {number} is {json_type(turn)}; it must be an object with a role and a content")
    names, roles = (("from", "value"), SHAREGPT_ROLES) if "from" in turn else (("role", "content"), ROLES)
    said = turn.get(names[0])
    role = roles.get(said) if isinstance(said, str) else None
    if role is None:
        found = repr(said) if isinstance(said, str) else json_type(said)
        raise _RowError(f"message {number} has the {names[0]} {found}; allowed are {', '.join(roles)}")
    calls = _tool_calls(turn, number=number)
    content = _content(turn.get(names[1]), number=number)
    weight = _weight(turn, number=number, role=role)
    if calls and role != "assistant":
        raise _RowError(f"message {number} ({role}) has tool calls; only the assistant calls tools")
    if content is None and not calls:
        kind = "empty_target" if role == "assistant" and weight else "bad_row"
        raise _RowError(f"message {number} ({role}) has no {names[1]}, or null", kind=kind)
    extra = {key: turn[key] for key in EXTRA_KEYS if turn.get(key) is not None}
    return Message(role, content or "", weight, extra | ({"tool_calls": calls} if calls else {}))


def _content(content: Any, *, number: int) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _RowError(f"the content of message {number} is {json_type(content)}; it must be a text")
    texts = []
    for part in content:
        if not isinstance(part, dict):
            raise _RowError(f"the content of message {number} has {json_type(part)} among its parts, not a text part")
        if part.get("type") != "text":
            raise _RowError(
                f"the content of message {number} has a part of type {part.get('type')!r}; only text is read"
            )
        texts.append(_text(part, column="text"))
    return "".join(texts)


def _weight(turn: dict[str, Any], *, number: int, role: str) -> float:
    weight = turn.get("weight")
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or weight not in (0, 1):
        raise _RowError(f"message {number} has the weight {weight!r}; allowed are 0 (read only) and 1 (trained)")
    if role != "assistant" and weight:
        raise _RowError(f"message {number} ({role}) has the weight 1; only assistant turns are trained")
    return float(weight) if role == "assistant" else 1.0


def _tool_calls(turn: dict[str, Any], *, number: int) -> list[dict[str, Any]]:
    """The turn's tool calls with their arguments as objects, which is what chat templates print."""
    calls = turn.get("tool_calls") or []
    if turn.get("function_call") is not None:
        calls = [{"function": turn["function_call"]}]
    if not isinstance(calls, list):
        raise _RowError(f"the tool calls of message {number} are {json_type(calls)}; they must be a list")
    result = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _RowError(f"a tool call of message {number} has no function with a name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise _RowError(f"the arguments of {function['name']} in message {number} are not JSON") from None
        if not isinstance(arguments, dict):
            raise _RowError(f"the arguments of {function['name']} in message {number} are {json_type(arguments)}")
        identity = {"id": call["id"]} if call.get("id") is not None else {}
        result.append({**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


def _tools(value: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The tools that the conversation may call; `functions` is their older spelling, and a JSON text is read."""
    found = []
    for column in ("tools", "functions"):
        tools = value.get(column)
        if isinstance(tools, str):
            try:
                tools = json.loads(tools or "[]")
            except (ValueError, RecursionError):
                raise _RowError(f"{column!r} is a text that is not JSON") from None
        if not isinstance(tools or [], list) or not all(isinstance(tool, dict) for tool in tools or []):
            raise _RowError(f"{column!r} must be a list of objects")
        found += [{"type": "function", "function": tool} if column == "functions" else tool for tool in tools or []]
    return tuple(found)


def _check_conversation(messages: Sequence[Message]) -> None:
    """The order of the turns, and that something in them is trained."""
    previous = None
    for number, message in enumerate(messages, start=1):
        role = message.role
        if role == "system" and number > 1:
            raise _RowError(f"message {number} is a system message; only the first may be one")
        if role in ("assistant", "tool") and previous in (None, "system"):
            raise _RowError(f"message {number} ({role}) opens the conversation; a user turn comes first")
        if role == "tool" and previous == "user":
            raise _RowError(f"message {number} (tool) follows the user; a tool answers the assistant")
        if role == previous and role in ("user", "assistant"):
            raise _RowError(f"messages {number - 1} and {number} are both {role} turns", hint="join them into one")
        previous = role
    if previous != "assistant":
        raise _RowError(f"the conversation ends with a {previous} message; it must end with an assistant turn")
    if not any(message.role == "assistant" and message.weight for message in messages):
        raise _RowError("all assistant turns have the weight 0: nothing to train on", kind="empty_target")
    for number, message in enumerate(messages, start=1):
        if message.content.strip() or "tool_calls" in message.extra:
            continue
        if message.role == "user":
            raise _RowError(f"the user turn (message {number}) is empty")
        if message.role == "assistant" and message.weight:
            raise _RowError(f"the answer (message {number}) is empty: nothing to train on", kind="empty_target")


# ------------------------------------------------------------------------------------------------- preferences


def preference_defect(row: Row) -> Problem | None:
    """What is wrong with a `preference` row in itself: an answer missing, empty, or the same as the other."""
    sides = next(pair for pair in PREFERENCE_SIDES if any(side in row.value for side in pair))
    answers = {}
    for side in sides:
        content = row.value.get(side)
        if content is None:
            return Problem("bad_row", "error", *row.origin, message=f"there is no {side!r} answer")
        answers[side] = _said(content).strip()
        if not answers[side]:
            return Problem("empty_target", "error", *row.origin, message=f"the {side!r} answer is empty")
    if len(set(answers.values())) == 1:
        return Problem("bad_row", "error", *row.origin, message=f"{sides[0]!r} and {sides[1]!r} are the same answer")
    return None


def _said(content: Any) -> str:
    """The text of an answer given as a text, a message or a list of messages."""
    if isinstance(content, dict):
        content = content.get("content", content.get("value"))
    if isinstance(content, list):
        return "\n".join(_said(part) for part in content)
    return content if isinstance(content, str) else json.dumps(content, default=str)
