"""The best few-shot prompt is that of a naive computation, and rows that are evaluated take no part in the choice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.data.retrieval import prompt_messages
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.types import Example, Message, Origin
from tunesmith.evaluate.answered import Answered
from tunesmith.evaluate.run import System, only_last
from tunesmith.evaluate.shots import ROWS, Choice, best_shots, parted
from tunesmith.models.load import Model


def row(number: int, *, line: int = 1) -> Example:
    answer = ["red", "green"][number % 2]
    turns = (Message("user", f"Colour of {number}?"), Message("assistant", answer))
    return Example(Origin("rows.jsonl", line), "chat", turns)


TRAIN = [row(number, line=number + 1) for number in range(20)]
HELD = [row(number, line=number + 1) for number in range(100, 106)]
ASKED = [row(number, line=number + 1) for number in range(200, 204)]


@pytest.fixture(scope="session")
def template(toy_tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(toy_tokenizer)


@pytest.fixture(scope="session")
def base(build_model: Callable[..., Model]) -> Model:
    return build_model("llama", dtype=torch.float32, max_position_embeddings=512)


def chosen(system: System, template: ChatTemplate, **given: Any) -> Choice:
    how: dict[str, Any] = {"train": TRAIN, "validation": HELD, "examples": ASKED, "room": 500, "seed": 0} | given
    how |= {"train": iter(how["train"]), "validation": iter(how["validation"])}
    return best_shots(system, template=template, **how)


def cost(shots: tuple[Example, ...], *, rows: list[Example], model: Model, template: ChatTemplate) -> float:
    """Nats a token of the references, row by row and without anything shared."""
    nats = tokens = 0.0
    for example in rows:
        (sequence,) = template.sequences([only_last(example, prompt_messages(example, shots=shots, plain=False))])[0]
        nats -= float(model.row_logprobs([sequence], num_rows=1, max_tokens=1024)[0])
        tokens += sequence.num_targets
    return nats / tokens


def test_the_best_of_all_candidates_is_taken(base, template):
    found = chosen(System("base", base), template)
    document = found.document
    assert (document["rows"], document["from"]) == (len(HELD), "validation")
    shown = [(candidate["examples"], candidate["draw"]) for candidate in document["candidates"]]
    assert shown == [(0, 0)] + [(size, draw) for draw in (1, 2, 3) for size in (1, 2, 4, 8, 16)]
    costs = [candidate["nats_a_token"] for candidate in document["candidates"]]
    assert len(found.shots) == document["examples"] == shown[int(np.argmin(costs))][0]
    assert costs[0] == pytest.approx(cost((), rows=HELD, model=base, template=template), rel=1e-5)
    assert min(costs) == pytest.approx(cost(found.shots, rows=HELD, model=base, template=template), rel=1e-5)
    assert {shot.origin.line for shot in found.shots} <= {example.origin.line for example in TRAIN}
    assert chosen(System("base", base), template) == found
    assert chosen(System("base", base), template, seed=1).document["candidates"] != document["candidates"]
    plural = "" if len(found.shots) == 1 else "s"
    assert f"with {len(found.shots)} example{plural} is the best of 16 on 6 validation rows" in document["sentence"]


@pytest.mark.parametrize("num_train", [1, 5, 20, 400])
def test_rows_that_are_evaluated_or_shown_are_not_chosen_on(num_train):
    train = [row(number // 2, line=number + 1) for number in range(num_train)]  # every prompt stands there twice
    for validation, source in ((HELD + ASKED, "validation"), (ASKED, "train"), ([], "train")):
        random = np.random.default_rng(0)
        pool, rows, side = parted(iter(train), validation=iter(validation), examples=ASKED, random=random)
        assert side == source
        keys = {example.prompt_key for example in rows}
        assert not keys & {example.prompt_key for example in [*pool, *ASKED]}
        assert len(rows) <= ROWS
        assert len(pool) == min(48, num_train if source == "validation" else (num_train + 1) // 2)
        if source == "validation":
            assert keys == {example.prompt_key for example in HELD}
        elif num_train >= 20:
            assert rows


def test_prompts_that_do_not_fit_are_no_candidates(base, template):
    found = chosen(System("base", base), template, room=140)
    sizes = {candidate["examples"] for candidate in found.document["candidates"]}
    assert sizes == {0, 1, 2, 4}
    none = chosen(System("base", base), template, room=5)
    assert [candidate["examples"] for candidate in none.document["candidates"]] == [0]
    assert none.shots == ()
    alone = chosen(System("base", base), template, train=TRAIN[:1], validation=[])
    assert (alone.shots, alone.document["rows"], alone.document["candidates"]) == ((), 0, [])
    assert "no row is left" in alone.document["sentence"]


def test_what_the_candidates_cost_is_kept(base, template, tmp_path: Path):
    system = System("base", base, answered=Answered(tmp_path, base))
    first = chosen(system, template)
    (entry,) = tmp_path.iterdir()
    known = json.loads(entry.read_text())
    cheap = np.array(known["logprobs"]).reshape(len(HELD), 16)
    cheap[:, 4] = 0.0  # as if the references were certain behind eight examples of the first draw
    entry.write_text(json.dumps({"logprobs": cheap.ravel().tolist()}))
    again = chosen(system, template)
    assert len(again.shots) == 8
    assert again.document["candidates"][5:] == first.document["candidates"][5:]
    assert chosen(system, template, seed=1) != again
    assert len(list(tmp_path.iterdir())) == 2
