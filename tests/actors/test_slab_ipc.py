"""Boxes that a trainer hands slabs over in: here the two sides share a process, and buffers are found by their number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from weft.actors.slab_ipc import Boxes, Taker

SIZE = 96


class Shelf:
    """Buffers by number, as CUDA IPC finds them by handle."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []
        self.opened: list[int] = []
        self.boxes = Boxes(torch.device("cpu"), self.export)
        self.taker = Taker(self.open)

    def export(self, buffer: Tensor) -> list[int]:
        self.buffers.append(buffer)
        return [len(self.buffers) - 1]

    def open(self, address: list[int]) -> Tensor:
        self.opened.append(address[0])
        return self.buffers[address[0]]


def weights(value: float) -> Tensor:
    return torch.full((SIZE // 4,), float(value))


def value_of(slab: Tensor) -> float:
    values = set(slab.view(torch.float32).tolist())
    assert len(values) == 1
    return values.pop()


def test_what_is_taken_is_what_was_put_and_the_file_is_gone(tmp_path: Path) -> None:
    shelf = Shelf()
    for number in range(5):
        file = tmp_path / f"{number}.slab"
        shelf.boxes.put(weights(number), "a", file)
        assert value_of(shelf.taker.take(file, SIZE)) == number
        assert list(tmp_path.iterdir()) == []
    assert shelf.opened == [0]  # one box, opened once


def test_a_box_that_is_still_to_be_taken_is_not_written_over_by_another_adapter(tmp_path: Path) -> None:
    shelf = Shelf()
    for number in range(3):
        shelf.boxes.put(weights(number), f"adapter-{number}", tmp_path / f"{number}.slab")
    assert len(shelf.buffers) == 3
    assert [value_of(shelf.taker.take(tmp_path / f"{number}.slab", SIZE)) for number in (2, 0, 1)] == [2, 0, 1]
    shelf.boxes.put(weights(7), "another", tmp_path / "7.slab")
    assert len(shelf.buffers) == 3


def test_the_next_version_takes_back_a_box_that_nobody_came_for(tmp_path: Path) -> None:
    shelf = Shelf()
    for number in range(10):
        shelf.boxes.put(weights(number), "a", tmp_path / f"{number}.slab")
    assert len(shelf.buffers) == 1
    with pytest.raises(FileNotFoundError):
        shelf.taker.take(tmp_path / "8.slab", SIZE)
    assert value_of(shelf.taker.take(tmp_path / "9.slab", SIZE)) == 9


def test_a_box_that_is_being_copied_is_left_alone(tmp_path: Path) -> None:
    shelf = Shelf()
    shelf.boxes.put(weights(1), "a", tmp_path / "1.slab")
    (tmp_path / "1.slab").rename(tmp_path / "1.taken")
    shelf.boxes.put(weights(2), "a", tmp_path / "2.slab")
    assert len(shelf.buffers) == 2
    assert value_of(shelf.buffers[0]) == 1


def test_a_slab_of_another_size_is_refused_and_its_box_is_free_again(tmp_path: Path) -> None:
    shelf = Shelf()
    shelf.boxes.put(weights(1), "a", tmp_path / "1.slab")
    with pytest.raises(ValueError, match=f"holds {SIZE} bytes, its handle says {SIZE + 1}"):
        shelf.taker.take(tmp_path / "1.slab", SIZE + 1)
    shelf.boxes.put(weights(2), "b", tmp_path / "2.slab")
    assert len(shelf.buffers) == 1


def test_a_box_is_the_memory_of_the_stream_that_writes_it_and_told_of_when_that_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made on another stream, it could be what that one has let go of and still works on."""
    done: list[str] = []

    class Stream:
        def synchronize(self) -> None:
            done.append("waited")

    @contextmanager
    def using(stream: Any) -> Iterator[None]:
        done.append("entered" if stream is boxes._stream else "another")
        yield
        done.append("left")

    def export(buffer: Tensor) -> list[int]:
        assert not list(tmp_path.iterdir())
        return [0]

    empty, boxes = torch.empty, Boxes(torch.device("cpu"), export)
    monkeypatch.setattr(boxes, "_stream", Stream())
    monkeypatch.setattr(torch.cuda, "stream", using)
    monkeypatch.setattr(torch, "empty", lambda *size, **kind: (done.append("made"), empty(*size, **kind))[1])
    boxes.put(weights(1), "a", tmp_path / "1.slab")
    assert done == ["entered", "made", "left", "waited"]
