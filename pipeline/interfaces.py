"""The three pools as the pipeline sees them. `actors/sampler_pool.py`, `trainer_pool.py` and `sync_pool.py` implement them over
processes; the tests in virtual time.

A pool restarts its own processes. What a caller must know of a death comes as an exception:
samplers.rollout and every trainers call raise PeerDiedError when the process that served them died;
`wait_ready` returns once the pool is whole again (samplers: any of them can be given what it is to serve; trainers: empty, so
load).
A trainers call that names an adapter whose process has died since its `add` raises PeerDiedError too, however late it comes,
and `wait_lost` tells whoever makes no call. One death is told in the same words by all of them, another in others.
An adapter lives on some of the samplers, and a rollout waits for any of these; what lived on one that died moves to the others.
Samplers' `add` and `drop`, and `publish`, ride over the death of a sampler themselves.
AdapterFault is one adapter's own fault and ends that adapter alone.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from weft.configs.schema import AdapterConfig
from weft.transport.messages import AdapterRef, Distributed, Group, Saved, StepResults, TrainBatch

Seat = Any  # room for one group on one sampler, which is the pool's to know


class Seats(Protocol):
    """How much room there is on the samplers, and for whom."""

    @property
    def capacity(self) -> int:
        """Rollouts (sequences) that all samplers together run at once."""

    def welcome(self, name: str) -> int:
        """How a group of this adapter is received now: 2, the samplers that serve the adapter have room; 1, another one has,
        and would have to be given the adapter; 0, it must wait for a group that ends."""

    def seat(self, name: str, rollouts: int) -> Seat:
        """Room for a group, for `rollout` to use. Exactly one `leave` gives it back."""

    def leave(self, seat: Seat) -> None: ...


class Samplers(Seats, Protocol):
    """Rollouts of any installed version."""

    async def wait_ready(self) -> None: ...

    async def add(self, config: AdapterConfig, lineage: int) -> int | None:
        """Build the adapter's environment on every sampler; returns its number of training prompts, None if endless."""

    async def drop(self, name: str) -> None: ...

    async def rollout(
        self,
        ref: AdapterRef,
        prompt_index: int,
        group_size: int,
        held_out: bool = False,
        seat: Seat = None,
        epoch: int = 0,
        texts: bool = False,
    ) -> Group:
        """seat: taken by the caller, who gives it back; None: one is taken meanwhile, whether there is room or not. texts: with
        those of the best rewarded sample and of the worst."""


class Trainers(Protocol):
    """Weights, gradients and moments of every adapter; each lives in one trainer, or in several where trainers are more."""

    @property
    def capacity(self) -> int:
        """Launches that run at once: one on each trainer."""

    def home(self, name: str) -> tuple[Hashable, ...]:
        """The processes that hold this adapter, dead or alive: one, where it is not shared. Adapters of one home may share a
        launch."""

    def expect(self, adapters: int) -> None:
        """So many are there or are to come: where they are fewer than the trainers, these are shared out among them."""

    async def wait_ready(self) -> None: ...

    async def add(self, config: AdapterConfig, lineage: int) -> None:
        """Make version 0 (random A, zero B, or the warm start)."""

    async def drop(self, name: str) -> None: ...

    async def move(self, ref: AdapterRef, busy: Collection[tuple[Hashable, ...]]) -> bool:
        """To a trainer that is none of `busy`, with all its state, to the bit; meanwhile it may be published, not trained.
        False: there is none, or it could not be; then it is where it was."""

    async def wait_lost(self, name: str) -> str:
        """Returns why the process died that holds this adapter, or held it last: at once, if it is dead."""

    async def step(self, batches: Sequence[TrainBatch]) -> StepResults:
        """One fused forward and backward over all batches, whose adapters have one home; then one optimizer step each."""

    async def save(self, ref: AdapterRef, folder: str) -> Saved: ...

    async def load(self, ref: AdapterRef, folder: str) -> None: ...

    async def export(self, ref: AdapterRef, folder: str) -> None: ...


class ParamSync(Protocol):
    """New versions to the samplers."""

    async def publish(self, ref: AdapterRef, supersedes: AdapterRef | None) -> Distributed:
        """Returns when every sampler that serves this adapter has installed `ref`. Survives the death of a relay or sampler;
        raises PeerDiedError only for the trainer's."""


@dataclass(frozen=True)
class Pools:
    """All three."""

    samplers: Samplers
    trainers: Trainers
    sync: ParamSync
