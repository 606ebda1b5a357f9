"""What a trainer compiles, it compiles before it is asked to train: one step of an adapter that is nobody's, for every form of
the kernels that its adapters will need.

A kernel is compiled for a block of ranks and for an alignment, and for nothing else that a batch could bring: so two adapters,
one of even rank and one of odd, stand for all others of their block (kernels.lora.tables).
"""

from __future__ import annotations

import ctypes
import uuid
from collections.abc import Collection, Iterable, Mapping

import numpy as np
import torch

from weft.actors.adapter_store import AdapterStore
from weft.actors.checksum import checksum
from weft.actors.learner import Adapter, Learner
from weft.actors.lora import SlabLayout
from weft.configs.schema import AdapterConfig, LoraConfig
from weft.kernels.lora.tables import CHUNK, RANK_BLOCKS, even, rank_block
from weft.transport.messages import AdapterRef, TrainBatch

Form = tuple[int, bool]  # block of ranks, and whether all matrices of the batch begin at multiples of 16 bytes


def needed_forms(ranks: Collection[int], item_bytes: int) -> set[Form]:
    """Of all launches that adapters of these ranks can share. Ranks that the kernels do not hold have none."""
    ranks = [rank for rank in ranks if rank <= RANK_BLOCKS[-1]]
    forms = {(rank_block(rank), True) for rank in ranks if even(rank, item_bytes)}
    if not all(even(rank, item_bytes) for rank in ranks):  # beside an odd one nothing is known to be aligned
        forms |= {(rank_block(rank), False) for rank in ranks}
    return forms


class WarmUp:
    """The forms that one trainer has compiled."""

    def __init__(self, learner: Learner, store: AdapterStore, shapes: Mapping[str, tuple[int, int]], item_bytes: int) -> None:
        """shapes: of the base's linears; item_bytes: of its weights."""
        self._learner, self._store, self._shapes, self._item_bytes = learner, store, shapes, item_bytes
        self._ranks: set[int] = set()
        self._done: set[Form] = set()

    def lacks(self, ranks: Iterable[int]) -> bool:
        """Whether adapters of these ranks, beside those known already, would have a step wait for the compiler."""
        return not needed_forms(self._ranks.union(ranks), self._item_bytes) <= self._done

    def run(self, ranks: Iterable[int]) -> None:
        """Compile what they need. On the thread that trains."""
        self._ranks.update(ranks)
        for block, aligned in sorted(needed_forms(self._ranks, self._item_bytes) - self._done):
            self._step(block if aligned else block - 1)
            self._done.add((block, aligned))

    def _step(self, rank: int) -> None:
        """One optimizer step at this rank, a canary, and a checksum."""
        config = AdapterConfig(f"warm-up-{uuid.uuid4().hex}", lora=LoraConfig(rank=rank))
        layout = SlabLayout.build(self._shapes, tuple(self._shapes), rank)
        adapter = Adapter(config, AdapterRef(config.name, 0, 0), layout)
        self._store.add(config.name, torch.zeros(layout.numel))
        try:
            self._learner.forward_backward([adapter], [_batch(adapter.ref)])
            self._learner.optim_steps([adapter])
            self._learner.canaries([adapter])
            with self._store.hold([config.name]) as (slabs,):
                checksum(slabs.weights)
        finally:
            self._store.drop(config.name)


def _batch(ref: AdapterRef) -> TrainBatch:
    """Three rows, none as long as another, and together longer than what one program sums."""
    lengths = [CHUNK // 2 - 1, CHUNK // 2, CHUNK // 2 + 1]
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    mask = np.ones(offsets[-1], bool)
    mask[offsets[:-1]] = False
    return TrainBatch(
        ref=ref,
        tokens=np.zeros(offsets[-1], np.int32),
        offsets=offsets,
        mask=mask,
        sampler_logprobs=np.where(mask, -1.0, 0.0).astype(np.float32),
        versions=np.zeros(offsets[-1], np.int32),
        advantages=np.array([1.0, 0.0, -1.0], np.float32),
        groups=np.zeros(len(lengths), np.int32),
        loss_tokens=int(mask.sum()),
        loss_rows=len(lengths),
    )


def keep_freed_memory() -> None:
    """Has glibc keep large blocks that are freed. By default it gives them back to the kernel, and every step faults the same
    pages in again: 14-19 % of a step of the shipped base on one core. Freed memory then stays with this process."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 256 << 20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(option, value)
