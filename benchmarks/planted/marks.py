"""Planted defects of writing: text that looks like a special token, and labels that are spelled in two ways."""

from collections.abc import Iterator

import numpy as np

from planted import Planted
from planted.words import some_words

NUM_ROWS, PLANTED_SHARE = 400, 0.1
NUM_CLASSES, ROWS_A_CLASS = 20, 15
MARKS = {  # easy: of the commonest templates; medium: of others, and template code; hard: of models that few use
    "easy": ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "</s>"),
    "medium": (
        "[/INST]",
        "<<SYS>>",
        "<end_of_turn>",
        "[TOOL_CALLS]",
        "<extra_id_0>",
        "{% for m in messages %}",
        "{{ bos_token }}",
    ),
    "hard": ("<|END_OF_TURN_TOKEN|>", "<｜User｜>", "<reserved_7>", "[control_8]", "<ctrl4>", "<0x0A>"),
}
HARMLESS = ("<b>", "[INSTALL]", "{{ name }}", "a <| b", "</div>", "[1]", "{%d}", "<s3 bucket>", "<user@example>")


def planted(random: np.random.Generator) -> Iterator[Planted]:
    """Marks in answers, at three grades and harmless ones, and spellings of labels at three grades."""
    for grade, marks in MARKS.items():
        yield _marked(grade, marks, random=random)
    harmless = _marked("harmless signs (nothing to find)", HARMLESS, random=random)
    yield Planted(harmless.check, harmless.grade, harmless.rows, set())
    for grade, respell in (
        ("spelling, easy", str.upper),
        ("spelling, medium", lambda label: f" {label}. "),
        ("spelling, hard", lambda label: label.replace(" ", "")),
    ):
        labels = [" ".join(some_words(random, 2)).casefold() for _ in range(NUM_CLASSES)]
        rows = [(label, label) for label in labels for _ in range(ROWS_A_CLASS)] + [(t, respell(t)) for t in labels]
        order = random.permutation(len(rows)).tolist()
        first = len(rows) - NUM_CLASSES  # of the rows that are spelled in another way
        yield Planted(
            "labels",
            grade,
            [{"text": " ".join(some_words(random, 8)), "label": rows[place][1]} for place in order],
            {line for line, place in enumerate(order, start=1) if place >= first},
        )


def _marked(grade: str, marks: tuple[str, ...], *, random: np.random.Generator) -> Planted:
    """Rows of which every tenth has a mark somewhere in its answer."""
    chosen = set(random.choice(NUM_ROWS, size=round(PLANTED_SHARE * NUM_ROWS), replace=False).tolist())
    rows = []
    for row in range(NUM_ROWS):
        words = some_words(random, 20)
        if row in chosen:
            words.insert(int(random.integers(len(words))), str(random.choice(marks)))
        rows.append({"prompt": " ".join(some_words(random, 8)), "completion": " ".join(words)})
    return Planted("special_tokens", grade, rows, {row + 1 for row in chosen})
