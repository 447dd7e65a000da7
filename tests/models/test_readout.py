"""Log-probabilities at the targets against log_softmax over everything."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.models import readout
from tunesmith.models.readout import head_logits, target_logprobs

CAPS = [None, 2.0]
CHUNK_ROWS = 16


def make_head(
    *, num_vocabulary: int, num_hidden: int, bias: bool, dtype: torch.dtype = torch.float64, seed: int = 0
) -> torch.nn.Linear:
    head = torch.nn.Linear(num_hidden, num_vocabulary, bias=bias, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return head


def naive(
    hidden_TD: Tensor, head: torch.nn.Linear, source_N: Tensor, target_N: Tensor, softcap: float | None
) -> Tensor:
    logits_TV = head(hidden_TD)
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    return logits_TV.log_softmax(-1)[source_N, target_N]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of the least size, so that a few dozen targets make several."""
    monkeypatch.setattr(readout, "CHUNK_BYTES", 1)
    monkeypatch.setattr(readout, "MIN_CHUNK", CHUNK_ROWS)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 3 * CHUNK_ROWS + 1), st.integers(1, 9), st.booleans(), st.sampled_from(CAPS), st.integers(0, 2**31)
)
def test_values_and_gradients_equal_log_softmax(
    num_targets: int, num_tokens: int, bias: bool, softcap: float | None, seed: int
) -> None:
    head = make_head(num_vocabulary=11, num_hidden=5, bias=bias, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(num_tokens, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    source_N = torch.randint(num_tokens, (num_targets,), generator=generator)
    target_N = torch.randint(11, (num_targets,), generator=generator)
    ours_N = target_logprobs(hidden_TD, head=head, source_N=source_N, target_N=target_N, softcap=softcap)
    theirs_N = naive(hidden_TD, head, source_N, target_N, softcap)
    assert ours_N.dtype == torch.float64
    torch.testing.assert_close(ours_N, theirs_N, rtol=1e-12, atol=1e-12)
    weight_N = torch.randn(num_targets, dtype=torch.float64, generator=generator)
    inputs = [hidden_TD, *head.parameters()]
    ours = torch.autograd.grad((ours_N * weight_N).sum(), inputs)
    theirs = torch.autograd.grad((theirs_N * weight_N).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    "num_targets", [1, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 2 * CHUNK_ROWS, 2 * CHUNK_ROWS + 3]
)
@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.usefixtures("small_chunks")
def test_borders_of_chunks_lose_and_repeat_nothing(num_targets: int, softcap: float | None) -> None:
    head = make_head(num_vocabulary=7, num_hidden=4, bias=True)
    hidden_TD = torch.randn(num_targets, 4, dtype=torch.float64, requires_grad=True)
    source_N, target_N = torch.arange(num_targets), torch.arange(num_targets) % 7
    ours_N = target_logprobs(hidden_TD, head=head, source_N=source_N, target_N=target_N, softcap=softcap)
    theirs_N = naive(hidden_TD, head, source_N, target_N, softcap)
    torch.testing.assert_close(ours_N, theirs_N, rtol=1e-12, atol=1e-12)
    inputs = [hidden_TD, *head.parameters()]
    for a, b in zip(
        torch.autograd.grad(ours_N.sum(), inputs), torch.autograd.grad(theirs_N.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("small_chunks")
def test_gradcheck(bias: bool, softcap: float | None) -> None:
    num_targets = CHUNK_ROWS + 2
    hidden_TD = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    parameters = [torch.randn(5, 3, dtype=torch.float64, requires_grad=True)]
    parameters += [torch.randn(5, dtype=torch.float64, requires_grad=True)] if bias else []
    source_N, target_N = torch.arange(num_targets) % 3, torch.arange(num_targets) % 5

    def function(hidden_TD: Tensor, *parameters: Tensor) -> Tensor:
        head = torch.nn.Linear(3, 5, bias=bias, dtype=torch.float64)
        del head.weight, head.bias
        head.weight, head.bias = parameters[0], parameters[1] if bias else None  # type: ignore[assignment]
        return target_logprobs(hidden_TD, head=head, source_N=source_N, target_N=target_N, softcap=softcap)

    assert torch.autograd.gradcheck(function, (hidden_TD, *parameters))


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "nothing"])
def test_each_gradient_is_right_when_it_alone_is_asked_for(trained: str) -> None:
    head = make_head(num_vocabulary=9, num_hidden=4, bias=True)
    hidden_TD = torch.randn(6, 4, dtype=torch.float64, requires_grad=trained == "hidden")
    head.weight.requires_grad_(trained == "weight")
    head.bias.requires_grad_(trained == "bias")
    source_N, target_N = torch.arange(6), torch.arange(6)
    ours_N = target_logprobs(hidden_TD, head=head, source_N=source_N, target_N=target_N)
    if trained == "nothing":
        assert not ours_N.requires_grad
        return
    wanted = {"hidden": hidden_TD, "weight": head.weight, "bias": head.bias}[trained]
    (ours,) = torch.autograd.grad(ours_N.sum(), wanted)
    (theirs,) = torch.autograd.grad(naive(hidden_TD, head, source_N, target_N, None).sum(), wanted)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_a_hand_worked_number() -> None:
    """Logits (ln 3, 0) and (0, ln 7): the first token has p = 3/4 and p = 1/8."""
    head = torch.nn.Linear(2, 2, bias=False, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.eye(2))
    hidden_TD = torch.tensor([[math.log(3), 0.0], [0.0, math.log(7)]], dtype=torch.float64)
    logprob_N = target_logprobs(hidden_TD, head=head, source_N=torch.tensor([0, 1]), target_N=torch.tensor([0, 0]))
    assert logprob_N.exp().tolist() == pytest.approx([3 / 4, 1 / 8])


class Largest(TorchDispatchMode):
    """The most elements that any tensor made in the block has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("train_head", [False, True])
def test_no_tensor_of_all_targets_by_the_vocabulary_is_ever_made(
    monkeypatch: pytest.MonkeyPatch, train_head: bool
) -> None:
    num_targets, num_vocabulary, num_hidden, chunk_rows = 400, 300, 8, 20
    monkeypatch.setattr(readout, "CHUNK_BYTES", 4 * num_vocabulary * chunk_rows)
    monkeypatch.setattr(readout, "MIN_CHUNK", 1)
    head = make_head(num_vocabulary=num_vocabulary, num_hidden=num_hidden, bias=True, dtype=torch.float32)
    head.requires_grad_(train_head)
    hidden_TD = torch.randn(num_targets, num_hidden, requires_grad=True)
    source_N, target_N = torch.arange(num_targets), torch.arange(num_targets) % num_vocabulary
    with Largest() as largest:
        target_logprobs(hidden_TD, head=head, source_N=source_N, target_N=target_N, softcap=3.0).sum().backward()
    assert largest.elements == num_vocabulary * chunk_rows


def test_extreme_logits_stay_finite() -> None:
    head = make_head(num_vocabulary=4, num_hidden=2, bias=False, dtype=torch.float32)
    hidden_TD = torch.tensor([[1e4, -1e4], [0.0, 0.0]], requires_grad=True)
    logprob_N = target_logprobs(
        hidden_TD, head=head, source_N=torch.tensor([0, 0, 1]), target_N=torch.tensor([0, 1, 2])
    )
    logprob_N.sum().backward()
    assert torch.isfinite(logprob_N).all()
    assert torch.isfinite(hidden_TD.grad).all()  # type: ignore[arg-type]
    assert float(logprob_N[2]) == pytest.approx(-math.log(4))


@pytest.mark.parametrize("softcap", CAPS)
def test_bfloat16_under_autocast_is_close_and_returns_float32(softcap: float | None) -> None:
    head = make_head(num_vocabulary=50, num_hidden=16, bias=True, dtype=torch.float32)
    hidden_TD = torch.randn(30, 16, requires_grad=True)
    source_N, target_N = torch.arange(30), torch.arange(30)
    with torch.autocast("cpu", torch.bfloat16):
        ours_N = target_logprobs(hidden_TD, head=head, source_N=source_N, target_N=target_N, softcap=softcap)
    assert ours_N.dtype == torch.float32
    theirs_N = naive(hidden_TD, head, source_N, target_N, softcap)
    torch.testing.assert_close(ours_N, theirs_N, rtol=0.02, atol=0.1)
    inputs = [hidden_TD, *head.parameters()]
    for a, b in zip(
        torch.autograd.grad(ours_N.sum(), inputs), torch.autograd.grad(theirs_N.sum(), inputs), strict=True
    ):
        assert a.dtype == torch.float32
        assert float((a - b).norm()) < 0.03 * float(b.norm())


def test_logits_for_generation_are_those_of_the_head() -> None:
    head = make_head(num_vocabulary=6, num_hidden=3, bias=True)
    hidden_ND = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(head_logits(hidden_ND, head=head), head(hidden_ND))
    torch.testing.assert_close(head_logits(hidden_ND, head=head, softcap=2.0), 2 * torch.tanh(head(hidden_ND) / 2))
    low = make_head(num_vocabulary=6, num_hidden=3, bias=True, dtype=torch.bfloat16)
    assert head_logits(hidden_ND.bfloat16(), head=low).dtype == torch.float32
