"""A checksum sees a changed word, and words that have changed places."""

import pytest
import torch

from weft.actors.checksum import ROW, checksum


@pytest.mark.parametrize("numel", [1, 7, ROW - 1, ROW, ROW + 1, 3 * ROW, 5 * ROW + 13])
def test_a_changed_word_and_two_that_changed_places_are_seen(numel: int) -> None:
    words = torch.randint(-(2**15), 2**15, (numel,), generator=torch.Generator().manual_seed(numel), dtype=torch.int16)
    whole = int(checksum(words))
    assert int(checksum(words.clone().view(torch.uint8))) == whole
    spots = sorted({0, 1, numel // 2, ROW - 2, ROW + 1, 2 * ROW, numel - 1} & set(range(numel)))
    for index, one in enumerate(spots):
        changed = words.clone()
        changed[one] ^= 1
        assert int(checksum(changed)) != whole
        for other in spots[index + 1 :]:
            swapped = words.clone()
            swapped[one], swapped[other] = words[other], words[one]
            assert words[one] == words[other] or int(checksum(swapped)) != whole


def test_rows_and_columns_count_differently() -> None:
    """Places of one diagonal, and a difference of a power of two, which a sum modulo 2^64 could lose."""
    words = torch.zeros(1024 * ROW, dtype=torch.int16)
    words[512] = -(2**15)
    swapped = torch.zeros_like(words)
    swapped[512 * ROW] = -(2**15)
    assert checksum(words) != checksum(swapped)
