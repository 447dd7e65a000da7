"""The token contract: a few conversations and texts with their ids and masks, saved beside the weights.

Whoever serves or exports the model renders and reads the same ones again and compares. A template, tokenizer or library
that changed in between is found before a user sees gibberish. Texts are there where the objective reads any, as it does.
"""

import hashlib
from pathlib import Path
from typing import Any, Protocol

from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example, Message, Origin, Sequence
from tunesmith.errors import DataError, TemplateError
from tunesmith.storage import write_json

FILE = "token_contract.json"
PROBES = (
    (Message("user", "What is 2 + 2?"), Message("assistant", "4")),
    (Message("user", "Grüße  aus\nZürich 👋"), Message("assistant", " Hallo\n")),
    (Message("system", "Be brief."), Message("user", "What is 2 + 2?"), Message("assistant", "4")),
)
TEXTS = (
    "What is 2 + 2?",
    "  Grüße aus ZÜRICH,\n\ncafe\u0301 \u00bd \ufb01ne 👋 ",  # cases, accents, forms and spaces that normalisers change
    "A  B\tC",
)


class ReadsTexts(Protocol):
    """The part of an objective that the contract needs."""

    def read_texts(self, examples: list[Example], *, template: ChatTemplate) -> list[Sequence]:
        """What is read of plain texts; nothing where the objective reads conversations alone."""


def write_contract(folder: Path, *, template: ChatTemplate, objective: ReadsTexts, examples: list[Example]) -> None:
    """Save the template, the stop tokens, and ids and weights of fixed probes and of a few of the run's own rows."""
    probes = [Example(Origin("probe", i + 1), "chat", m) for i, m in enumerate(PROBES) if _renders(template, m)]
    probes += [e for e in examples if e.messages and _renders(template, e.messages)][
        :4
    ]  # no base of a head need answer
    document = {
        "tokenizer": template.tokenizer.digest,
        "template": template.source,
        "template_sha256": hashlib.sha256(template.source.encode()).hexdigest(),
        "plain": template.plain,
        "today": template.today.isoformat(),
        "stop_ids": template.stop_ids(),
        "probes": [_probe(template, example) for example in probes],
        "texts": [
            {"text": text, "sequences": found}
            for text in TEXTS
            if (found := _read(text, template, objective=objective))
        ],
    }
    write_json(folder / FILE, value=document)


def _renders(template: ChatTemplate, messages: tuple[Message, ...]) -> bool:
    """Whether the template takes such a conversation at all."""
    try:
        template.sequences([Example(Origin("probe", 1), "chat", messages)])
    except TemplateError:
        return False
    return True


def _probe(template: ChatTemplate, example: Example) -> dict[str, Any]:
    return {
        "messages": [m.as_dict() | {"weight": m.weight} for m in example.messages],
        "tools": list(example.tools),
        "sequences": _as_json(template.sequences([example])[0]),
    }


def _as_json(sequences: list[Sequence]) -> list[dict[str, Any]]:
    return [
        {"ids": s.tokens_T.tolist(), "weights": s.weight_T.tolist()}
        | ({} if s.encoder_T is None else {"encoder_ids": s.encoder_T.tolist()})
        for s in sequences
    ]


def _read(text: str, template: ChatTemplate, *, objective: ReadsTexts) -> list[dict[str, Any]]:
    """What is read of a text, or of its words; nothing where a word of it cannot be read."""
    example = Example(Origin("probe", 1), "text", text=text, words=tuple(text.split()))
    try:
        return _as_json(objective.read_texts([example], template=template))
    except DataError:
        return []


def known_sequences(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Ids and weights of all probes; runs of earlier versions have no texts."""
    return [s for probe in (*document["probes"], *document.get("texts", ())) for s in probe["sequences"]]


def check_contract(document: dict[str, Any], *, template: ChatTemplate, objective: ReadsTexts, file: Path) -> None:
    """Render and read the probes again; raises TemplateError naming the first that differs."""
    hint = "use the tokenizer and chat template that were saved with the run"
    for number, probe in enumerate(document["probes"], start=1):
        messages = tuple(
            Message(
                m["role"],
                m["content"],
                m["weight"],
                {k: v for k, v in m.items() if k not in ("role", "content", "weight")},
            )
            for m in probe["messages"]
        )
        example = Example(Origin(str(file), number), "chat", messages, tools=tuple(probe["tools"]))
        if _probe(template, example)["sequences"] != probe["sequences"]:
            raise TemplateError(
                f"token contract broken: probe {number} no longer gives the ids it was trained with",
                file=file,
                hint=hint,
            )
    for number, probe in enumerate(document.get("texts", ()), start=1):
        if _read(probe["text"], template, objective=objective) != probe["sequences"]:
            raise TemplateError(
                f"token contract broken: text {number} no longer gives the ids it was trained with",
                file=file,
                hint=hint,
            )
    if template.stop_ids() != document["stop_ids"]:
        raise TemplateError("token contract broken: other stop tokens than in training", file=file, hint=hint)
