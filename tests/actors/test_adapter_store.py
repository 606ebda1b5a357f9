"""The tiers of the adapter store: whatever moves, no bit changes."""

import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import Tensor

from weft.actors.adapter_store import AdapterStore

torch.set_num_threads(1)
NAMES = [f"adapter-{i}" for i in range(6)]


def _bits(seed: int, size: int) -> Tensor:
    """Random bit patterns, so with NaNs of every payload, infinities and denormals among them."""
    patterns = torch.randint(-(2**31), 2**31, (size,), generator=torch.Generator().manual_seed(seed))
    return patterns.to(torch.int32).view(torch.float32)


def _same(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.view(torch.int32), right.view(torch.int32))


def _store(folder: Path, device: int = 2, host: int = 2, dtype: torch.dtype = torch.float32) -> AdapterStore:
    return AdapterStore(torch.device("cpu"), dtype, device, host, folder)


@settings(max_examples=60, deadline=None)
@given(
    moves=st.lists(
        st.tuples(st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True), st.integers(0, 3)),
        min_size=4,
        max_size=16,
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_no_sequence_of_moves_changes_a_bit(moves: list[tuple[list[str], int]], dtype: torch.dtype) -> None:
    """Against a plain dictionary: each block may write a state, make a gradient or let it go."""
    with tempfile.TemporaryDirectory() as folder:
        store = _store(Path(folder), dtype=dtype)
        states: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        for i, name in enumerate(NAMES):
            master = _bits(i, 5 + i)
            store.add(name, master)
            states[name] = torch.stack([master, torch.zeros(5 + i), torch.zeros(5 + i)])
        for turn, (names, action) in enumerate(moves):
            with store.hold(names) as held:
                for name, slabs in zip(names, held, strict=True):
                    assert _same(slabs.state, states[name])
                    assert torch.equal(slabs.weights.nan_to_num(), slabs.master.to(dtype).nan_to_num())
                    assert (slabs.gradient is None) == (name not in gradients)
                    if slabs.gradient is not None:
                        assert _same(slabs.gradient, gradients[name])
                    if action == 1:
                        states[name] = _bits(100 + turn, states[name].numel()).view_as(states[name])
                        slabs.replace_state(states[name])
                        gradients.pop(name, None)
                    if action == 2:
                        gradients[name] = _bits(200 + turn, states[name].shape[1])
                        slabs.gradient = gradients[name].clone()
                    if action == 3:
                        slabs.gradient = None
                        gradients.pop(name, None)
            statistics = store.statistics()
            assert (statistics.device <= 2, statistics.host <= 2) == (True, True)
            assert statistics.device + statistics.host + statistics.disk == len(NAMES)
            assert len(list(Path(folder).iterdir())) == statistics.disk
        for name in NAMES:
            with store.hold([name]) as (slabs,):
                assert _same(slabs.state, states[name])


def test_the_least_recently_used_makes_way_and_what_is_held_never_does(tmp_path: Path) -> None:
    store = _store(tmp_path, device=2, host=1)
    for name in NAMES[:4]:
        store.add(name, torch.ones(3))
    assert (store.statistics().device, store.statistics().host, store.statistics().disk) == (0, 1, 3)
    with store.hold(NAMES[:1]) as (first,):
        first.state.fill_(7.0)
        for name in NAMES[1:4]:
            with store.hold([name]):
                assert store.statistics().device == 2
        assert NAMES[0] in store
        with store.hold(NAMES[:1]) as (again,):
            assert again is first
    assert [path.stem for path in tmp_path.iterdir()] == [NAMES[1]]


def test_more_than_fits_at_once_is_refused(tmp_path: Path) -> None:
    store = _store(tmp_path)
    for name in NAMES[:3]:
        store.add(name, torch.ones(3))
    with pytest.raises(AssertionError, match="3 adapters at once, room for 2"), store.hold(NAMES[:3]):
        pass
    with store.hold(NAMES[:2]), store.hold(NAMES[2:3]):  # two blocks may together: what is held has to be there
        assert store.statistics().device == 3
    assert store.statistics().device == 2


def test_gradients_exist_only_for_adapters_that_hold_any(tmp_path: Path) -> None:
    store = _store(tmp_path, device=1, host=3)
    for name in NAMES[:4]:
        store.add(name, torch.ones(3))
    with store.hold(NAMES[:1]) as (slabs,):
        slabs.gradient = torch.zeros(3)
    with store.hold(NAMES[1:2]):
        assert store.statistics().gradients == 1
    with store.hold(NAMES[:1]) as (slabs,):
        slabs.gradient = None
    assert store.statistics().gradients == 0


@contextmanager
def _full_disk() -> Iterator[None]:
    """No file takes a byte more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_loses_no_adapter(tmp_path: Path) -> None:
    store = _store(tmp_path, device=1, host=1)
    for i, name in enumerate(NAMES[:3]):
        store.add(name, torch.full((3,), i + 1.0))
    refused = 0
    for i in (2, 0, 1, 0, 2):  # three adapters, places for two: a move down to the disk fails, and all of them are still there
        try:
            with _full_disk(), store.hold([NAMES[i]]) as (slabs,):
                assert slabs.master.tolist() == [i + 1.0] * 3
        except SafetensorError:
            refused += 1
    assert refused
    assert sum(store.statistics().__dict__[tier] for tier in ("device", "host", "disk")) == 3
    for i, name in enumerate(NAMES[:3]):
        with store.hold([name]) as (slabs,):
            assert slabs.master.tolist() == [i + 1.0] * 3


@pytest.mark.parametrize("host", [0, 1])
def test_an_adapter_that_finds_no_room_leaves_nothing_and_may_come_again(tmp_path: Path, host: int) -> None:
    store = _store(tmp_path, device=1, host=host)
    if host:
        store.add(NAMES[0], torch.full((3,), 1.0))
    before = store.statistics()
    for _ in range(2):
        with _full_disk(), pytest.raises(SafetensorError, match="too large"):
            store.add(NAMES[1], torch.full((3,), 2.0))
        assert NAMES[1] not in store
        assert store.statistics() == before
        assert not list(tmp_path.iterdir())
    store.add(NAMES[1], torch.full((3,), 5.0))
    with store.hold(NAMES[1:2]) as (slabs,):
        assert slabs.master.tolist() == [5.0] * 3


def test_a_dropped_adapter_leaves_nothing(tmp_path: Path) -> None:
    store = _store(tmp_path, device=1, host=1)
    for name in NAMES[:3]:
        store.add(name, torch.ones(3))
    for name in NAMES[:3]:
        store.drop(name)
        assert name not in store
    assert not list(tmp_path.iterdir())
    with pytest.raises(AssertionError, match="not in the store"):
        store.drop(NAMES[0])


def test_fp32_weights_are_the_master_itself(tmp_path: Path) -> None:
    store = _store(tmp_path)
    store.add(NAMES[0], torch.arange(3.0))
    with store.hold(NAMES[:1]) as (slabs,):
        slabs.master[0] = 5.0
        assert float(slabs.weights[0]) == 5.0


def test_what_was_never_held_waits_as_its_master_alone_on_the_host_and_on_disk(tmp_path: Path) -> None:
    store = _store(tmp_path, device=1, host=1)
    size = 1 << 16
    for index, name in enumerate(NAMES[:2]):
        store.add(name, torch.full((size,), float(index)))
    (file,) = tmp_path.iterdir()
    assert 4 * size <= file.stat().st_size < 5 * size
    for index, name in enumerate(NAMES[:2]):
        before = store.statistics().bytes_up
        with store.hold([name]) as (slabs,):
            assert slabs.master.eq(index).all() and not slabs.exp_avg.any() and not slabs.exp_avg_sq.any()
        assert store.statistics().bytes_up == before + 4 * size


def test_the_caller_may_go_on_writing_to_the_master_that_it_gave(tmp_path: Path) -> None:
    store, master = _store(tmp_path), torch.ones(3)
    store.add(NAMES[0], master)
    master.zero_()
    with store.hold(NAMES[:1]) as (slabs,):
        assert slabs.master.tolist() == [1.0] * 3
