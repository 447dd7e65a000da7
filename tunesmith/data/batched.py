"""Values a list at a time."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

Value = TypeVar("Value")


def batched(values: Iterable[Value], size: int) -> Iterator[list[Value]]:
    """Lists of `size` values in order; the last may be shorter. As itertools has it from Python 3.12 on."""
    iterator = iter(values)
    while batch := list(islice(iterator, size)):
        yield batch
