"""Choosing a token: the distribution drawn from is the one that was asked for, and the one that is reported."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import chisquare

from tunesmith.errors import NumericalError
from tunesmith.generate.sampling import Sampling, choose, random_stream

SHARES = [0.5, 0.25, 0.15, 0.1]


def naive_distribution(logits: list[float], *, temperature: float, top_k: int | None, top_p: float) -> list[float]:
    """Token by token, in float64."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or len(logits)]
    total = sum(weights[i] for i in ranked)
    kept, mass = [], 0.0
    for i in ranked:
        if mass >= top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@given(
    st.lists(st.integers(-40, 40), min_size=2, max_size=8, unique=True),
    st.floats(0.3, 3.0),
    st.one_of(st.none(), st.integers(1, 9)),
    st.one_of(st.just(1.0), st.floats(0.05, 0.99)),
    st.floats(0.0, 1.0, exclude_max=True),
)
@settings(max_examples=200, deadline=None)
def test_token_and_logprob_are_of_the_named_distribution(
    tenths: list[int], temperature: float, top_k: int | None, top_p: float, uniform: float
) -> None:
    logits = [x / 10 for x in tenths]
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    tokens_B, logprobs_B = choose(
        torch.tensor([logits], dtype=torch.float64),
        sampling=sampling,
        uniform_B=torch.tensor([uniform], dtype=torch.float64),
    )
    expected = naive_distribution(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    assert expected[int(tokens_B)] > 0
    assert float(logprobs_B) == pytest.approx(math.log(expected[int(tokens_B)]), abs=1e-9)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"temperature": 1.0}, SHARES),
        ({"temperature": 0.5}, [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
        ({"temperature": 1.0, "top_k": 3}, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]),
        ({"temperature": 1.0, "top_p": 0.7}, [2 / 3, 1 / 3, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.76}, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]),
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),  # two thirds of the two likeliest
    ],
)
def test_what_is_drawn_follows_the_distribution(sampling: dict[str, float], expected: list[float]) -> None:
    """Chi-square of 20,000 draws against shares worked by hand; the tokens stand in no particular order."""
    order = [2, 0, 3, 1]
    logits_V = torch.tensor(SHARES, dtype=torch.float64).log()[order]
    uniform_B = torch.from_numpy(np.random.default_rng(1).random(20_000))
    tokens_B, logprobs_B = choose(
        logits_V.expand(20_000, -1), sampling=Sampling.model_validate(sampling), uniform_B=uniform_B
    )
    counts = np.bincount(tokens_B.numpy(), minlength=4)
    shares = np.array(expected)[order]
    assert (counts[shares == 0] == 0).all()
    assert (counts > 0).sum() == 1 or chisquare(counts[shares > 0], shares[shares > 0] * 20_000).pvalue > 0.01
    np.testing.assert_allclose(logprobs_B.exp().numpy(), shares[tokens_B.numpy()], rtol=1e-9)


def test_greedy_reports_the_models_own_log_probability() -> None:
    logits_BV = torch.tensor([SHARES, SHARES[::-1]]).log()
    tokens_B, logprobs_B = choose(logits_BV, sampling=Sampling())
    assert tokens_B.tolist() == [0, 3]
    torch.testing.assert_close(logprobs_B, torch.full((2,), math.log(0.5)))


def test_half_precision_is_summed_in_float32() -> None:
    logits_BV = torch.zeros(1, 4096, dtype=torch.bfloat16)
    _, logprobs_B = choose(logits_BV, sampling=Sampling())
    assert logprobs_B.dtype == torch.float32
    assert float(logprobs_B) == pytest.approx(-math.log(4096), abs=1e-5)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_a_token_without_probability_is_never_drawn(uniform: float) -> None:
    logits_BV = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    tokens_B, _ = choose(
        logits_BV, sampling=Sampling(temperature=1), uniform_B=torch.tensor([uniform], dtype=torch.float64)
    )
    assert int(tokens_B) in (1, 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1), Sampling(temperature=1, top_k=2)])
def test_logits_that_are_no_numbers_are_refused(bad: float, sampling: Sampling) -> None:
    with pytest.raises(NumericalError, match="not finite"):
        choose(
            torch.tensor([[0.0, 1.0], [bad, 0.0]]),
            sampling=sampling,
            uniform_B=torch.tensor([0.5, 0.5], dtype=torch.float64),
        )


def test_streams_differ_by_prompt_seed_and_occurrence_and_repeat() -> None:
    names = [([1, 2], 0, 0), ([1, 2], 0, 1), ([1, 2], 1, 0), ([1, 3], 0, 0), ([1], 0, 2)]
    draws = [random_stream(p, seed=s, occurrence=o).random(4).tolist() for p, s, o in names]
    assert len({tuple(x) for x in draws}) == len(names)
    assert draws[0] == random_stream((1, 2), seed=0, occurrence=0).random(4).tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "greater than or equal to 0"),
        ({"temperature": math.nan}, "finite"),
        ({"temperature": 1e-9}, "at least 0.001"),
        ({"top_p": 0.9}, "top_p has no effect at temperature 0"),
        ({"top_k": 5}, "top_k has no effect at temperature 0"),
        ({"temperature": 1, "top_p": 0}, "greater than 0"),
        ({"max_tokens": 0}, "greater than or equal to 1"),
        ({"stop": ["x", ""]}, "empty stop text"),
        ({"top_n": 3}, "Extra inputs"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Sampling.model_validate(settings)
