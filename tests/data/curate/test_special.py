"""Text that looks like a special token or template code, and text that only begins like one."""

import pytest

from tunesmith.data.curate.special import SpecialTokens
from tunesmith.data.types import Example, Message, Origin


def told(text: str) -> list[str]:
    row = Example(Origin("a.jsonl", 1), "chat", (Message("user", "Say it."), Message("assistant", text)))
    return [problem.message for problem in SpecialTokens().look(row)]


@pytest.mark.parametrize(
    "text",
    [
        "<|im_end|>", "<｜end▁of▁sentence｜>", "[/INST]", "<<SYS>>", "</s>", "<end_of_turn>", "[TOOL_CALLS]",
        "[/SYSTEM_PROMPT]", "[gMASK]", "<sop>", "<extra_id_12>", "<end_of_utterance>", "<fim_middle>", "[SEP]",
        "{% for m in messages %}",
        "{{- bos_token }}",
    ],
)  # fmt: skip
def test_special_text_is_told_of_with_its_words(text):
    (message,) = told(f"Before {text} after, and {text} again.")
    found = message.removeprefix("the text '").partition("' looks like a special token or template code")[0]
    assert text.startswith(found)
    assert len(found) >= 3


@pytest.mark.parametrize(
    "text",
    ["<b>", "[INSTALL]", "{{ name }}", "a <| b |> c", "[1]", "[SEPTEMBER]", "<sops>", "<extra_id>", "</div>", "{%d}"],
)
def test_other_text_is_not(text):
    assert told(f"Before {text} after.") == []
