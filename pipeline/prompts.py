"""Which prompt comes next: a pure function of (seed, position), so that a resumed run goes on where it was.

Training is first in, first out, so the prompts an adapter has used up are version * groups_per_step: that is the position to
resume from, and the prompts that were in flight are issued again.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from weft.transport.errors import AdapterFault


class PromptSource:
    """Indices of training prompts. Endless (num_prompts None): index = position. Finite: each epoch has its own shuffle.

    Raises AdapterFault when there are none: the environment is the adapter's own.
    """

    def __init__(self, num_prompts: int | None, seed: int, position: int = 0) -> None:
        if num_prompts is not None and num_prompts < 1:
            raise AdapterFault(f"num_prompts={num_prompts}: an environment must have at least 1")
        self.position = position  # prompts issued since version 0
        self._num_prompts = num_prompts
        self._seed = seed
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def next(self) -> tuple[int, int]:
        """The next index, and how often it came before: its epoch."""
        position, self.position = self.position, self.position + 1
        if self._num_prompts is None:
            return position, 0
        epoch, place = divmod(position, self._num_prompts)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed % 2**32, epoch]).permutation(self._num_prompts)
        return int(self._order[place]), epoch
