"""A checksum sees a changed word, and words that have changed places."""

import pytest
import torch

from weft.actors.checksum import checksum
from weft.kernels.pack.reference import CHUNK


@pytest.mark.parametrize("numel", [1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 13])
def test_a_changed_word_and_two_that_changed_places_are_seen(numel: int) -> None:
    words = torch.randint(-(2**15), 2**15, (numel,), generator=torch.Generator().manual_seed(numel), dtype=torch.int16)
    whole = int(checksum(words))
    assert int(checksum(words.clone().view(torch.uint8))) == whole
    spots = sorted({0, 1, numel // 2, CHUNK - 2, CHUNK + 1, numel - 1} & set(range(numel)))
    for index, one in enumerate(spots):
        changed = words.clone()
        changed[one] ^= 1
        assert int(checksum(changed)) != whole
        for other in spots[index + 1 :]:
            swapped = words.clone()
            swapped[one], swapped[other] = words[other], words[one]
            assert words[one] == words[other] or int(checksum(swapped)) != whole
