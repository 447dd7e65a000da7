"""Answers of an encoder-decoder: token by token those of transformers, whatever stands beside them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.data.pack import build_pack
from tunesmith.data.types import Sequence
from tunesmith.generate.runner import Generator
from tunesmith.generate.sampling import Sampling
from tunesmith.generate.scheduler import plan_by_length
from tunesmith.models.load import Model
from tunesmith.models.readout import head_logits

BuildModel = Callable[..., Model]
NEW = 24


@pytest.fixture(scope="module")
def sources(pair_rows: list[Sequence]) -> list[list[int]]:
    return [row.encoder_T.tolist() for row in pair_rows if row.encoder_T is not None]


def theirs(twin: Any, source: list[int], *, stop: int) -> list[int]:
    found = twin.generate(
        torch.tensor([source]), max_new_tokens=NEW, do_sample=False, eos_token_id=stop, decoder_start_token_id=0,
        pad_token_id=0, use_cache=False,
    )  # fmt: skip
    return found[0, 1:].tolist()


@pytest.mark.parametrize("kind", ["t5", "t5_gated", "mt5"])
def test_greedy_answers_are_transformers_own(
    build_model: BuildModel, pair_twin: Callable[[Model], Any], sources: list[list[int]], kind: str
) -> None:
    model = build_model(kind, dtype=torch.float32)
    twin = pair_twin(model)
    free = [theirs(twin, source, stop=-1) for source in sources]
    stop = free[1][5]  # a token that some answers come to
    expected = [theirs(twin, source, stop=stop) for source in sources]
    assert len({len(tokens) for tokens in expected}) > 1
    for rows in (1, 3, 128):
        found = Generator(model, stop_ids=[stop], batch_rows=rows).generate(sources, sampling=Sampling(max_tokens=NEW))
        assert [c.tokens for c in found] == expected
        assert [c.finish_reason for c in found] == ["stop" if t[-1] == stop else "length" for t in expected]


def test_logprobs_are_those_of_the_whole_answer(build_model: BuildModel, pair_rows: list[Sequence]) -> None:
    model = build_model("t5_gated")
    sources = [row.encoder_T.tolist() for row in pair_rows if row.encoder_T is not None]
    for row, found in zip(
        pair_rows, Generator(model, stop_ids=[]).generate(sources, sampling=Sampling(max_tokens=NEW)), strict=True
    ):
        tokens_T = np.array([0, *found.tokens], np.int32)
        weight_T = np.array([0.0] + [1.0] * NEW, np.float32)
        pack = build_pack([replace(row, tokens_T=tokens_T, weight_T=weight_T)])
        with torch.no_grad():
            expected = model.target_logprobs(pack)
        torch.testing.assert_close(
            torch.tensor(found.logprobs, dtype=torch.float64), expected.double(), rtol=0, atol=1e-5
        )


def test_what_is_drawn_depends_on_the_prompt_and_the_seed_alone(
    build_model: BuildModel, sources: list[list[int]]
) -> None:
    model = build_model("t5")
    sampling = Sampling(max_tokens=8, temperature=1.0, seed=3)
    together = Generator(model, stop_ids=[]).generate(sources[:4], sampling=sampling)
    alone = [Generator(model, stop_ids=[]).generate([s], sampling=sampling)[0] for s in sources[:4]]
    assert [c.tokens for c in together] == [c.tokens for c in alone]


def test_the_sources_are_read_once(build_model: BuildModel, sources: list[list[int]]) -> None:
    model = build_model("t5", dtype=torch.float32)
    read: list[int] = []
    written: list[int] = []
    model.causal.encoder.block[0].register_forward_hook(lambda m, i, out: read.append(out[0].shape[1]))
    model.causal.decoder.block[0].register_forward_hook(lambda m, i, out: written.append(out[0].shape[1]))
    Generator(model, stop_ids=[]).generate(sources, sampling=Sampling(max_tokens=40))
    assert read == [sum(map(len, sources))]
    assert written == [len(sources)] * 40


def test_the_first_token_is_what_the_logits_say(build_model: BuildModel, pair_rows: list[Sequence]) -> None:
    model = build_model("t5")
    row = pair_rows[1]
    assert row.encoder_T is not None
    with torch.no_grad():
        hidden_TD = model.hidden(model.attention(build_pack([row])))
    (found,) = Generator(model, stop_ids=[]).generate([row.encoder_T.tolist()], sampling=Sampling(max_tokens=1))
    assert found.tokens == [int(head_logits(hidden_TD[:1], head=model.head).argmax())]


def test_sources_of_like_length_meet_in_one_batch() -> None:
    prompts = [[0] * n for n in (3, 50, 4, 48, 5, 2)]
    batches = plan_by_length(prompts, new_tokens=10, batch_tokens=130, batch_rows=3)
    assert [batch.rows for batch in batches] == [(1, 3), (4, 2, 0), (5,)]
    assert plan_by_length([[0] * 900], new_tokens=10, batch_tokens=130, batch_rows=3)[0].rows == (0,)
    rows = [r for b in plan_by_length(prompts, new_tokens=1, batch_tokens=10, batch_rows=9) for r in b.rows]
    assert sorted(rows) == [0, 1, 2, 3, 4, 5]
