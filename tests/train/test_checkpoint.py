"""Two checkpoints that verify are always there, and what is damaged is passed over with a word."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.errors import StorageError
from tunesmith.storage import PARTIAL
from tunesmith.train import checkpoint

TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "half": torch.ones(3, dtype=torch.bfloat16)}


def saved(folder: Path, *numbers: int) -> list[Path]:
    made = []
    for number in numbers:
        state = {"step": number}
        made.append(checkpoint.save(folder, name=f"step-{number:08d}", tensors=TENSORS, state=state))
        checkpoint.remove_old(folder)
    return made


def cut(path: Path) -> None:
    tensors = path / checkpoint.TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-1])


def there(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in checkpoint.steps(folder)]


def test_an_older_one_stays_while_one_before_the_newest_is_damaged(tmp_path: Path) -> None:
    _, second = saved(tmp_path, 1, 2)
    cut(second)
    saved(tmp_path, 3)
    assert there(tmp_path) == [3, 2, 1]
    saved(tmp_path, 4)
    assert there(tmp_path) == [4, 3]


def test_a_damaged_one_is_told_and_the_one_before_it_used(tmp_path: Path) -> None:
    first, second = saved(tmp_path, 1, 2)
    cut(second)
    said: list[str] = []
    assert checkpoint.latest(tmp_path, warn=said.append) == first
    assert said == [f"{second}: the checkpoint's bytes are not those written; {first.name}, the one before it, is used"]
    assert there(tmp_path) == [1]


def test_without_a_good_one_the_damaged_make_room_for_new_ones(tmp_path: Path) -> None:
    for path in saved(tmp_path, 5, 6):
        cut(path)
    said: list[str] = []
    assert checkpoint.latest(tmp_path, warn=said.append) is None
    assert [sentence.rpartition("; ")[2] for sentence in said] == ["the run begins again"] * 2
    saved(tmp_path, 1, 2)
    assert there(tmp_path) == [2, 1]
    assert checkpoint.latest(tmp_path, warn=said.append) == tmp_path / "step-00000002"


def test_what_a_kill_left_is_removed_when_a_run_is_resumed(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / f".step-00000003.abcdefgh{PARTIAL}").mkdir()
    half_removed = tmp_path / "step-00000000"
    half_removed.mkdir()
    assert checkpoint.latest(tmp_path, warn=pytest.fail) == tmp_path / "step-00000002"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("harm", [lambda data: data[:-4], lambda data: data[:-4] + b"\0\0\0\1"])
def test_a_disk_that_writes_something_else_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[bytes], bytes]
) -> None:
    write: Callable[..., None] = checkpoint.save_tensors

    def lie(tensors: dict[str, Tensor], *, path: Path) -> None:
        write(tensors, path=path)
        path.write_bytes(harm(path.read_bytes()))

    before = saved(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "save_tensors", lie)
    with pytest.raises(StorageError, match="reads back otherwise"):
        saved(tmp_path, 2)
    assert list(tmp_path.iterdir()) == before


def test_numbers_that_are_none_are_kept_as_they_are(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {"odd": torch.tensor([float("nan"), float("inf"), -0.0]), "one": torch.tensor(3)}
    path = checkpoint.save(tmp_path, name="best", tensors=tensors, state={})
    found, _ = checkpoint.load(path)
    assert {name: t.tolist() for name, t in found.items() if name == "one"} == {"one": 3}
    assert found["odd"].view(torch.int32).tolist() == tensors["odd"].view(torch.int32).tolist()
