"""Text that looks like a special token or template code: it is read as plain text, which may not be what was meant."""

import re
from collections.abc import Iterator

from tunesmith.data.ledger import Problem
from tunesmith.data.types import Example

SPECIAL_TEXT = re.compile(
    r"<\|\w{1,40}\|>|<｜[^｜\s]{1,40}｜>"  # ChatML, GPT-2, Llama 3, DeepSeek
    r"|\[/?INST\]|<</?SYS>>|</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>"  # Llama 2, Gemma
    r"|\[/?(?:SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS)\]|\[gMASK\]|<[se]op>"  # Mistral, GLM
    r"|<extra_id_\d{1,2}>|<end_of_utterance>|<fim_(?:prefix|middle|suffix)>|\[(?:CLS|SEP|MASK)\]"  # T5, StarCoder, BERT
    r"|\{%-?\s*(?:if|for|set|macro|end\w{2,8})\b|\{\{-?\s*(?:bos_token|eos_token|messages?\b)"  # jinja
)
SPECIAL_SIGNS = ("<", "[", "{")  # one of them begins every special text


class SpecialTokens:
    """Looks for the first such text of a row."""

    name = "special_tokens"

    def look(self, example: Example) -> Iterator[Problem]:
        """What the row alone says."""
        text = example.all_text
        if any(sign in text for sign in SPECIAL_SIGNS) and (special := SPECIAL_TEXT.search(text)):
            message = f"the text {special[0]!r} looks like a special token or template code; it is read as plain text"
            yield Problem("special_token", "warning", *example.origin, message=message)

    def finish(self) -> Iterator[Problem]:
        """Nothing more."""
        yield from ()
