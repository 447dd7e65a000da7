"""The few-shot prompt that does best, of several: chosen on rows that are not evaluated.

Candidates are the question alone, and behind 1, 2, 4, 8 and 16 training rows of each of three random draws. A candidate's
score is what the references cost it on the same rows, in nats a token (lower is better):

    - sum_rows log p(reference | prompt) / sum_rows tokens(reference)

The prompts of a draw begin alike, so that what they share is computed once. Rows that are evaluated take no part: where they
are the validation rows, training rows are taken that no candidate shows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tunesmith.data.retrieval import prompt_messages
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example, Sequence
from tunesmith.errors import ModelError
from tunesmith.evaluate.run import PACK_TOKENS, System, only_last, sampled, shots_fit

SIZES = (1, 2, 4, 8, 16)
DRAWS = 3
ROWS = 100  # on which the candidates are scored at most


@dataclass(frozen=True)
class Choice:
    """The examples of the best prompt, none where they do not help, and how it was chosen: `few_shot_choice`."""

    shots: tuple[Example, ...]
    document: dict[str, Any]


@dataclass(frozen=True)
class _Candidate:
    draw: int
    shots: tuple[Example, ...]


def best_shots(
    system: System,
    *,
    train: Iterator[Example],
    validation: Iterator[Example],
    examples: list[Example],
    template: ChatTemplate,
    seed: int,
    room: int,
) -> Choice:
    """The best prompt for `system` of those with which the rows that are evaluated, `examples`, fit into `room` tokens.

    `template` is that of the system's model.
    """
    random = np.random.default_rng(seed)
    pool, rows, source = parted(train, validation=validation, examples=examples, random=random)
    candidates = [_Candidate(0, ())]
    for draw in range(1, DRAWS + 1):
        drawn = [pool[place] for place in random.permutation(len(pool))[: SIZES[-1]]]
        sizes = [size for size in SIZES if size <= len(drawn)]
        candidates += [_Candidate(draw, tuple(drawn[:size])) for size in sizes]
    fitting = [c for c in candidates if shots_fit(c.shots, template=template, examples=examples, room=room)]
    return _chosen(system, fitting or candidates[:1], rows=rows, template=template, source=source)


def parted(
    train: Iterator[Example], *, validation: Iterator[Example], examples: list[Example], random: np.random.Generator
) -> tuple[list[Example], list[Example], str]:
    """Rows to show, rows to score on, whose prompts are neither shown nor evaluated, and the side these came from."""
    asked = {example.prompt_key for example in examples}
    most = DRAWS * SIZES[-1]
    rows = sampled((row for row in validation if row.prompt_key not in asked), count=ROWS, random=random)
    source, pool = "validation", []
    if rows:
        pool = sampled(train, count=most, random=random)
    else:
        drawn = sampled((row for row in train if row.prompt_key not in asked), count=most + ROWS, random=random)
        order = [drawn[place] for place in random.permutation(len(drawn))]
        num_shown = min(most, (len(order) + 1) // 2)
        source, pool, rows = "train", order[:num_shown], order[num_shown:]
    shown = {example.prompt_key for example in pool}
    return pool, [row for row in rows if row.prompt_key not in shown], source


def _chosen(
    system: System, candidates: list[_Candidate], *, rows: list[Example], template: ChatTemplate, source: str
) -> Choice:
    """The candidate with the lowest cost; among equals that with the fewest examples."""
    units = [[_rendered(row, shots=c.shots, template=template) for c in candidates] for row in rows]
    limit = system.model.room_tokens
    units = [unit for unit in units if max(s.num_context_tokens for found in unit for s in found) <= limit]
    document: dict[str, Any] = {"examples": 0, "rows": len(units), "from": source, "candidates": []}
    if not units:
        return Choice((), document | {"sentence": "no example is shown: no row is left to choose the prompt on"})
    cost_C = _costs(system, units)
    best = min(range(len(candidates)), key=lambda place: (cost_C[place], len(candidates[place].shots)))
    count = len(candidates[best].shots)
    document["examples"] = count
    document["candidates"] = [
        {"examples": len(c.shots), "draw": c.draw, "nats_a_token": float(cost)}
        for c, cost in zip(candidates, cost_C, strict=True)
    ]
    where = "validation rows" if source == "validation" else "training rows that no prompt shows"
    sentence = (
        f"the prompt with {count} example{'' if count == 1 else 's'} is the best of {len(candidates)} on {len(units):,} "
        f"{where}: {cost_C[best]:.3g} nats a token of the references"
    )
    if best:
        sentence += f", {cost_C[0]:.3g} without examples"
    return Choice(candidates[best].shots, document | {"sentence": sentence})


def _rendered(row: Example, *, shots: tuple[Example, ...], template: ChatTemplate) -> list[Sequence]:
    return template.sequences([only_last(row, prompt_messages(row, shots=shots, plain=template.plain))])[0]


def _costs(system: System, units: list[list[list[Sequence]]]) -> np.ndarray:
    """What each candidate's references cost, [C] in nats a token. `units`: by row and candidate."""
    num_candidates = len(units[0])
    numbered = enumerate(found for unit in units for found in unit)
    sequences = [replace(sequence, row=number) for number, found in numbered for sequence in found]
    tokens_B = np.zeros(len(units) * num_candidates)
    np.add.at(tokens_B, [s.row for s in sequences], [s.num_targets for s in sequences])

    def ask() -> dict[str, Any]:
        with system.switched():
            total_B = system.model.row_logprobs(sequences, num_rows=len(tokens_B), max_tokens=PACK_TOKENS)
        return {"logprobs": total_B.tolist()}

    def asked() -> Iterator[bytes]:
        yield b"few-shot prompts"
        for sequence in sequences:
            yield sequence.tokens_T.tobytes()
            yield sequence.weight_T.tobytes()
            yield b"" if sequence.encoder_T is None else sequence.encoder_T.tobytes()

    found = ask() if system.answered is None else system.answered.get(asked(), ask=ask)
    cost_RC = -np.array(found["logprobs"]).reshape(len(units), num_candidates)
    if not np.isfinite(cost_RC).all():
        raise ModelError("the model gives probabilities that are not finite", hint="use another base")
    return cost_RC.sum(0) / tokens_B.reshape(len(units), num_candidates).sum(0)
