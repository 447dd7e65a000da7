"""The token contract: a few conversations with their ids and masks, saved beside the weights.

Whoever serves or exports the model renders the same conversations again and compares. A template, tokenizer or library
that changed in between is found before a user sees gibberish.
"""

import hashlib
from pathlib import Path
from typing import Any

from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example, Message, Origin
from tunesmith.errors import TemplateError
from tunesmith.storage import write_json

FILE = "token_contract.json"
PROBES = (
    (Message("user", "What is 2 + 2?"), Message("assistant", "4")),
    (Message("user", "Grüße  aus\nZürich 👋"), Message("assistant", " Hallo\n")),
    (Message("system", "Be brief."), Message("user", "What is 2 + 2?"), Message("assistant", "4")),
)


def write_contract(folder: Path, *, template: ChatTemplate, examples: list[Example]) -> None:
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
        "sequences": [
            {"ids": s.tokens_T.tolist(), "weights": s.weight_T.tolist()}
            | ({} if s.encoder_T is None else {"encoder_ids": s.encoder_T.tolist()})
            for s in template.sequences([example])[0]
        ],
    }


def check_contract(document: dict[str, Any], *, template: ChatTemplate, file: Path) -> None:
    """Render the probes again; raises TemplateError naming the first that differs."""
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
    if template.stop_ids() != document["stop_ids"]:
        raise TemplateError("token contract broken: other stop tokens than in training", file=file, hint=hint)
