"""Train, validation and test by content, so that a row lands on the same side for ever.

The side is a function of the row's prompt alone: appending rows, sorting or shuffling the file moves nothing, and rows
that ask the same question (exact duplicates among them) never stand on both sides of a split.
"""

import hashlib
from collections.abc import Mapping

HASH_BITS = 48  # fewer than a float's 53, so that the place is exact and below 1


def side(key: str, *, shares: Mapping[str, float]) -> str:
    """The side of a row: `train`, `validation` or `test`.

    `key` is `Example.prompt_key`; `shares` holds the held-out shares by side, each in (0, 1), with a sum below 1.
    Validation takes the lowest part of the hash range and test the highest, so that changing one share moves no row
    of the other.
    """
    place = _place(b"tunesmith split\0", key)
    if place < shares.get("validation", 0.0):
        return "validation"
    if place >= 1.0 - shares.get("test", 0.0):
        return "test"
    return "train"


def is_in(key: str, *, share: float) -> bool:
    """Whether a training row belongs to a share of them; every larger share holds it too."""
    return _place(b"tunesmith share\0", key) < share


def is_helped(key: str, *, share: float) -> bool:
    """Whether a training row is shown what was found for it (`data.look_up`), and not other passages alone."""
    return _place(b"tunesmith look up\0", key) < share


def _place(what: bytes, key: str) -> float:
    """A number in [0, 1) that the key alone decides."""
    digest = hashlib.sha256(what + key.encode()).digest()
    return int.from_bytes(digest[: HASH_BITS // 8], "big") / 2**HASH_BITS
