"""kernels.lora_decode: the table of work, the reference against one product a token, and what the kernels refuse."""

# T tokens, S slots, P parts, R widest rank, I in, O out

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.kernels.lora_decode import HEIGHTS, WIDEST, Work, add_lora, misfit
from weft.kernels.lora_decode.work import most_tiles, read_tiles, tiles_at

torch.set_num_threads(1)
SLOTS = 5
MIXES = st.lists(st.integers(-1, SLOTS - 1), min_size=0, max_size=150)


@settings(deadline=None)
@given(MIXES, st.integers(0, 50))
def test_every_token_with_an_adapter_is_in_one_tile_of_its_slot_at_every_height(mix: list[int], spare: int) -> None:
    work = Work(len(mix) + spare, SLOTS, "cpu")
    work.table.fill_(-7)  # nothing is assumed of what was there
    active = work.update(np.array(mix, np.int64), ranks := [8, 16, 3, 24, 1])
    assert active == len(set(mix) - {-1})
    for index, height in enumerate(HEIGHTS):
        tiles = read_tiles(work.table, index, work.max_tokens, SLOTS)
        assert len(tiles) <= most_tiles(height, len(mix), SLOTS)
        found = {}
        for slot, tokens, rank in tiles:
            assert 0 < len(tokens) <= height
            assert ranks[slot] <= rank < ranks[slot] + 8 and rank % 8 == 0
            for token in tokens:
                assert token not in found
                found[token] = slot
        assert found == {token: slot for token, slot in enumerate(mix) if slot >= 0}


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(1, 300))
def test_the_places_of_a_table_do_not_overlap(tokens: int, slots: int) -> None:
    ends = [tiles_at(index, tokens, slots) for index in range(len(HEIGHTS) + 1)]
    assert ends[0] >= len(HEIGHTS)
    for index, height in enumerate(HEIGHTS):
        assert ends[index + 1] - ends[index] >= 4 * most_tiles(height, tokens, slots)
    assert Work(tokens, slots, "cpu").table.numel() == ends[-1] + tokens


def test_the_most_tiles_are_reached_and_never_passed() -> None:
    worst = np.array([0] * (2 * 16 + 1) + [1, 2, 3, 4])
    work = Work(len(worst), SLOTS, "cpu")
    work.update(worst, [8] * SLOTS)
    assert int(work.table[0]) == most_tiles(16, len(worst), SLOTS) == 7


def test_a_later_mix_replaces_the_one_before() -> None:
    work = Work(40, SLOTS, "cpu")
    work.update(np.arange(40) % SLOTS, [8] * SLOTS)
    work.update(np.array([-1, 3]), [8] * SLOTS)
    assert read_tiles(work.table, 0, 40, SLOTS) == [(3, [1], 8)]
    work.update(np.array([-1, -1]), [8] * SLOTS)
    assert read_tiles(work.table, 0, 40, SLOTS) == []


def stacks(
    draw: torch.Generator, widths: tuple[int, ...], inputs: int, ranks: list[int], widest: int
) -> tuple[list[Tensor], ...]:
    a = [torch.zeros(SLOTS, 1, widest, inputs) for _ in widths]
    b = [torch.zeros(SLOTS, 1, width, widest) for width in widths]
    for part_a, part_b in zip(a, b, strict=True):
        for slot, rank in enumerate(ranks):
            part_a[slot, 0, :rank] = torch.randn(rank, inputs, generator=draw)
            part_b[slot, 0, :, :rank] = torch.randn(part_b.shape[2], rank, generator=draw)
    return a, b


@pytest.mark.parametrize("add", [True, False])
@settings(deadline=None)
@given(mix=MIXES, ranks=st.lists(st.integers(1, 24), min_size=SLOTS, max_size=SLOTS))
def test_each_token_gets_its_own_adapter_and_the_others_nothing(add: bool, mix: list[int], ranks: list[int]) -> None:
    draw, widths, inputs = torch.Generator().manual_seed(len(mix)), (16, 8, 24), 12
    a, b = stacks(draw, widths, inputs, ranks, 24)
    x, y = torch.randn(len(mix), inputs, generator=draw), torch.randn(len(mix), sum(widths), generator=draw)
    wanted = y.clone()
    for t, slot in enumerate(mix):
        if slot >= 0:
            delta = torch.cat([part_b[slot, 0] @ (part_a[slot, 0] @ x[t]) for part_a, part_b in zip(a, b, strict=True)])
            wanted[t] = 0.5 * delta + (y[t] if add else 0)
    work = Work(len(mix) + 3, SLOTS, "cpu")
    work.update(np.array(mix, np.int64), ranks)
    add_lora(y, x, a, b, work.table, work.max_tokens, 0.5, add)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)


def test_what_the_kernels_do_not_take_has_its_reason() -> None:
    def pair(rank: int, inputs: int = 64, width: int = 48, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
        return torch.zeros(2, 1, rank, inputs, dtype=dtype), torch.zeros(2, 1, width, rank, dtype=dtype)

    a, b = pair(16)
    assert misfit([a], [b]) == misfit([a, a, a], [b, b, pair(16, width=7)[1]]) == ""
    assert "4 parts" in misfit([a] * 4, [b] * 4)
    for bad, why in (
        (pair(16, dtype=torch.float32), "float32"),
        (pair(2 * WIDEST), "rank 256"),
        (pair(4), "rank 4"),
        (pair(16, inputs=60), "60 inputs"),
    ):
        assert why in misfit([bad[0]], [bad[1]])
    assert "buffers" in misfit([a[:, :, :, :32]], [b])
    assert "several ranks" in misfit([a, pair(32)[0]], [b, pair(32)[1]])
    assert "several ranks" in misfit([a], [pair(32)[1]])  # as where the rank is spread over several GPUs
