"""Keys that stay what they are, and sequences that are cut and kept on disk."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.pack import build_pack
from tunesmith.data.tokens import TokenStore, TokenWriter
from tunesmith.data.types import Example, Message, Origin, Sequence

HERE = Origin("a", 1)
CALL = {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("example", "key", "prompt_key"),
    [
        (
            Example(HERE, "chat", (Message("user", "hi"), Message("assistant", "hello"))),
            "29c8d3fbc690c4172b9dfa824f9c511c",
            "357f232837e92f3b1cec5fafe4b22dc6",
        ),
        (Example(HERE, "text", text="Once"), "eb4ea1b81d06c55faf3bbb6a47ad3245", "eb4ea1b81d06c55faf3bbb6a47ad3245"),
        (
            Example(HERE, "chat", (Message("user", "hi"), Message("assistant", "", 1.0, CALL)), tools=(TOOL,)),
            "a8f79179a942bb2592a533cfe273fd5f",
            "7da31a4e03e1bb014410098c6a3bd9cf",
        ),
        (
            Example(HERE, "labelled", text="Once", label="b"),
            "b99e426d5d707b48efc0a7086e1332a9",
            "e2e57a19e493899b25c01bee6119ef76",
        ),
        (
            Example(HERE, "tagged", words=("Once", "more"), label=("x", "y")),
            "dbd5469435a4f53c92e4a32aa7f2d1d4",
            "a1f38fa7d6385aa2d06763986961ec78",
        ),
    ],
)
def test_keys_are_recorded(example: Example, key: str, prompt_key: str) -> None:
    """The side of a row and what two evaluations share hang on them, so they stay for ever."""
    assert (example.key, example.prompt_key) == (key, prompt_key)


tokens = st.lists(st.integers(0, 300), min_size=1, max_size=12)


@given(tokens, st.integers(1, 14), st.booleans(), st.booleans())
def test_what_is_read_at_the_last_token_keeps_that_token(ids: list[int], kept: int, last: bool, read: bool) -> None:
    weight_T = np.zeros(len(ids), np.float32)
    weight_T[-1] = float(last)
    values = np.array([2.5], np.float32) if read else None
    found = Sequence(np.array(ids, np.int32), weight_T, 3, values).cut(kept)
    assert len(found.tokens_T) == len(found.weight_T) == min(kept, len(ids))
    expected = ids[:kept]
    if read and last:
        expected[-1] = ids[-1]
    assert found.tokens_T.tolist() == expected
    assert found.num_targets == int(last and (read or kept >= len(ids)))
    assert (found.row, found.values is values) == (3, True)


def test_cutting_leaves_the_sequence_itself_alone() -> None:
    whole = Sequence(np.arange(5, dtype=np.int32), np.ones(5, np.float32), values=np.zeros(1, np.float32))
    assert whole.cut(2).tokens_T.tolist() == [0, 4]
    assert whole.tokens_T.tolist() == [0, 1, 2, 3, 4]


def test_values_stay_with_their_sequence_on_disk_and_in_a_pack(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    units = []
    for unit in range(9):
        values = [None, np.array([0.5], np.float32), random.normal(size=unit).astype(np.float32)][unit % 3]
        weight_T = np.array([0, 1, 1], np.float32)
        units.append([Sequence(np.array([unit, 7, 8], np.int32), weight_T, unit, values) for _ in range(1 + unit % 2)])
    writer = TokenWriter(tmp_path)
    for unit in units:
        writer.add(unit, origin=HERE)
    writer.close()
    store = TokenStore(tmp_path)
    for number, unit in enumerate(units):
        for found, given_sequence in zip(store.unit(number), unit, strict=True):
            assert found.row == number
            if given_sequence.values is None:
                assert found.values is None
            else:
                assert found.values is not None
                assert np.array_equal(found.values, given_sequence.values)
    pack = build_pack([sequence for number in range(9) for sequence in store.unit(number)][::-1])
    for row, values in zip(pack.rows_S, pack.values_S, strict=True):
        expected = units[int(row)][0].values
        assert (values is None and expected is None) or np.array_equal(values, expected)


def test_a_token_that_is_read_is_its_own_source() -> None:
    """What is predicted is predicted from the token before it; what is read is read where it stands."""
    tokens_T, weight_T = np.array([5, 6, 7], np.int32), np.array([1, 0, 1], np.float32)
    read = build_pack([Sequence(tokens_T, weight_T, values=np.zeros(1, np.float32))])
    assert (read.source_N.tolist(), read.target_N.tolist()) == ([0, 2], [5, 7])
    predicted = build_pack([Sequence(tokens_T, np.array([0, 1, 1], np.float32))])
    assert (predicted.source_N.tolist(), predicted.target_N.tolist()) == ([0, 1], [6, 7])
    with pytest.raises(AssertionError, match="nothing stands before"):
        build_pack([Sequence(tokens_T, weight_T)])
