"""The learning rate by its formula, and one update of each optimiser by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tunesmith.methods.base import trainable
from tunesmith.methods.full import Full
from tunesmith.models.load import Model
from tunesmith.train.optimiser import Optimiser, learning_rate
from tunesmith.train.settings import TrainSettings


def rates(num_steps: int, **settings: object) -> list[float]:
    chosen = TrainSettings.model_validate(settings)
    return [learning_rate(step, peak=1.0, num_steps=num_steps, settings=chosen) for step in range(num_steps)]


def test_the_schedules_by_hand() -> None:
    assert rates(4, schedule="constant", warmup=0) == [1, 1, 1, 1]
    assert rates(4, schedule="linear", warmup=0) == [1, 0.75, 0.5, 0.25]
    assert rates(4, schedule="linear", warmup=0, final_share=0.2) == pytest.approx([1, 0.8, 0.6, 0.4])
    half = math.sqrt(0.5)
    assert rates(4, schedule="cosine", warmup=0) == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2])
    assert rates(6, schedule="constant", warmup=3) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert rates(10, schedule="constant", warmup=0.2) == rates(10, schedule="constant", warmup=2)


@given(
    st.integers(1, 50),
    st.sampled_from(["cosine", "linear", "constant"]),
    st.one_of(st.floats(0, 0.99), st.integers(1, 60)),
    st.floats(0, 0.9),
)
def test_the_rate_rises_to_the_peak_and_falls_to_its_share(
    num_steps: int, schedule: str, warmup: float, final: float
) -> None:
    found = rates(num_steps, schedule=schedule, warmup=warmup, final_share=0 if schedule == "constant" else final)
    assert all(0 < rate <= 1 for rate in found)
    top = found.index(max(found))
    assert found[:top] == sorted(found[:top])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert max(found) == pytest.approx(1)


def tensors() -> dict[str, Tensor]:
    return {"matrix": torch.tensor([[2.0, -4.0]]), "vector": torch.tensor([3.0]), "table": torch.tensor([[1.0], [5.0]])}


def moved(kind: str, *, factors: dict[str, float] | None = None, decay: float = 0.0) -> dict[str, list[float]]:
    """By how much one update with rate 0.1 moves each tensor under gradients of one."""
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in tensors().items()}
    optimiser = Optimiser(
        dict(parameters),
        settings=TrainSettings.model_validate({"optimiser": kind, "weight_decay": decay}),
        not_matrices={parameters["table"]},
        rate_factors=factors,
    )
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step(learning_rate=0.1)
    return {name: (p.detach() - tensors()[name]).flatten().tolist() for name, p in parameters.items()}


def test_the_first_step_of_adamw_is_the_rate_against_the_sign() -> None:
    found = moved("adamw")
    assert found["matrix"] == pytest.approx([-0.1, -0.1])
    assert found["vector"] == pytest.approx([-0.1])


def test_matrices_decay_and_vectors_do_not() -> None:
    found = moved("adamw", decay=0.5)
    assert found["matrix"] == pytest.approx([-0.1 - 0.1 * 0.5 * 2, -0.1 + 0.1 * 0.5 * 4], rel=1e-4)
    assert found["vector"] == pytest.approx([-0.1])


def test_a_factor_moves_a_parameter_faster() -> None:
    found = moved("adamw", factors={"vector": 4.0, "matrix": 0.5})
    assert found["vector"] == pytest.approx([-0.4], rel=1e-4)
    assert found["matrix"] == pytest.approx([-0.05, -0.05], rel=1e-4)
    assert found["table"] == pytest.approx([-0.1, -0.1])
    plain, fast = moved("muon"), moved("muon", factors={"matrix": 3.0})
    assert fast["matrix"] == pytest.approx([3 * x for x in plain["matrix"]], rel=1e-4)


def test_muon_leaves_tables_and_vectors_to_adamw() -> None:
    """Its update of a 1 x 2 matrix is the gradient's direction, 0.2 sqrt(2) times the rate (Liu et al. 2025, eq. 4)."""
    found, plain = moved("muon"), moved("adamw")
    assert (found["table"], found["vector"]) == (plain["table"], plain["vector"])
    expected = 0.1 * 0.2 * math.sqrt(2) / math.sqrt(2)
    assert found["matrix"] == pytest.approx([-expected, -expected], rel=0.35)  # Newton-Schulz is near orthogonal only


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_embeddings_of_tokens_and_places_are_no_matrices(build_model: Callable[..., Model], architecture: str) -> None:
    model = build_model(architecture, dtype=torch.float32)
    Full().apply(model, seed=0)
    parameters = trainable(model)
    optimiser = Optimiser(parameters, settings=TrainSettings(optimiser="muon"), not_matrices=model.vocabulary_weights())
    muon = next(o for o in optimiser.optimisers if isinstance(o, torch.optim.Muon))
    chosen = {id(p) for group in muon.param_groups for p in group["params"]}
    names = {name for name, p in parameters.items() if id(p) in chosen}
    assert names == {n for n, p in parameters.items() if p.ndim == 2 and ("layers." in n or ".h." in n)}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_state_comes_back(kind: str) -> None:
    def built() -> tuple[dict[str, Tensor], Optimiser]:
        torch.manual_seed(0)
        parameters: dict[str, Tensor] = {name: torch.nn.Parameter(torch.randn(4, 4)) for name in ("a", "b")}
        parameters["c"] = torch.nn.Parameter(torch.randn(4))
        settings = TrainSettings.model_validate({"optimiser": kind})
        return parameters, Optimiser(parameters, settings=settings, not_matrices=set(), rate_factors={"a": 2.0})

    def step(parameters: dict[str, Tensor], optimiser: Optimiser) -> None:
        for number, parameter in enumerate(parameters.values()):
            parameter.grad = torch.full_like(parameter, 0.1 * number + 0.3)
        optimiser.step(learning_rate=0.01)

    parameters, optimiser = built()
    step(parameters, optimiser)
    again, other = built()
    with torch.no_grad():
        for name, parameter in again.items():
            parameter.copy_(parameters[name])
    other.load_state({name: value.clone() for name, value in optimiser.state().items()})
    step(parameters, optimiser)
    step(again, other)
    assert all(torch.equal(again[name], parameters[name]) for name in parameters)
