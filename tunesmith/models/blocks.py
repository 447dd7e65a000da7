"""Beginning a model in the middle: what the lowest blocks gave is kept, and given to the others another time.

Nothing of a model is rewritten: for the length of one call, the blocks below give out what they are told instead of
computing it. Shapes: T packed tokens, D hidden.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.data.pack import build_pack
from tunesmith.data.types import Sequence
from tunesmith.models.load import Model


class BlockOutput(NamedTuple):
    """What a model's blocks give out: the dtype of hidden states, and whether they come in a tuple."""

    dtype: torch.dtype
    in_tuple: bool


def block_output(model: Model) -> BlockOutput:
    """Found by one token through the model."""
    seen: list[Any] = []
    handle = model.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        with torch.no_grad():
            model.hidden(model.attention(build_pack([Sequence(np.zeros(1, np.int32), np.zeros(1, np.float32))])))
    finally:
        handle.remove()
    (output,) = seen
    return BlockOutput((output[0] if isinstance(output, tuple) else output).dtype, isinstance(output, tuple))


def num_frozen_blocks(model: Model, *, moving: set[Tensor]) -> int:
    """How many of the lowest blocks compute the same as long as only `moving` changes."""
    if model.is_encoder or model.is_encoder_decoder or model.num_virtual_tokens or model.input_tables() & moving:
        return 0
    for count, block in enumerate(model.layers):
        if any(parameter in moving for parameter in block.parameters()):
            return count
    return len(model.layers)


class _Reached(Exception):
    """What a block gave, on the way out of the model."""

    def __init__(self, hidden_TD: Tensor):
        self.hidden_TD = hidden_TD


def hidden_below(model: Model, attention: Any, *, num_blocks: int) -> Tensor:
    """Hidden states [T, D] after the lowest `num_blocks` blocks; those above are not computed."""

    def stop(module: nn.Module, inputs: Any, output: Any) -> None:
        raise _Reached((output[0] if isinstance(output, tuple) else output)[0])

    handle = model.layers[num_blocks - 1].register_forward_hook(stop)
    try:
        with torch.no_grad():
            model.hidden(attention)
    except _Reached as reached:
        return reached.hidden_TD
    finally:
        handle.remove()
    raise AssertionError("a model computes its blocks")


def hidden_from(model: Model, attention: Any, *, num_blocks: int, given_TD: Tensor, output: BlockOutput) -> Tensor:
    """Hidden states [T, D] at the end, with what the lowest `num_blocks` blocks gave another time."""
    given = (given_TD[None],) if output.in_tuple else given_TD[None]
    with _giving(model.layers[:num_blocks], given):
        return model.hidden(attention)


@contextlib.contextmanager
def _giving(blocks: list[nn.Module], given: Any) -> Iterator[None]:
    for block in blocks:
        block.forward = lambda *inputs, **keywords: given  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
