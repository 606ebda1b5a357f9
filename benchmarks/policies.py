"""How the same experiments may share one cluster: what each policy of experiments.py changes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from weft.transport.messages import AdapterRef


@dataclass(frozen=True)
class Rule:
    """What a policy changes. one_by_one: an adapter begins when the one before has ended. lock_step: no adapter begins a step
    before all have been synced. token_budget: of a launch; 1 trains one adapter at a time. max_staleness: of every adapter."""

    one_by_one: bool = False
    lock_step: bool = False
    token_budget: int | None = None
    max_staleness: int | None = None


RULES = {
    "serial": Rule(one_by_one=True),  # both pools to itself: the baseline
    "serial-on-policy": Rule(one_by_one=True, max_staleness=0),
    "together": Rule(),  # each with its own bound
    "lock-step": Rule(lock_step=True, max_staleness=0),
    "one-a-launch": Rule(token_budget=1, max_staleness=0),  # as SkyRL's trainer, though nothing is swapped in or out
    "staleness-0": Rule(max_staleness=0),
    "staleness-1": Rule(max_staleness=1),
    "staleness-2": Rule(max_staleness=2),
}


class LockStep:
    """The parameter sync of a policy in which all adapters wait for one another after each step."""

    def __init__(self, sync: Any, adapters: int) -> None:
        self._sync = sync
        self._adapters = adapters
        self._waiting = 0
        self._turn = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sync, name)

    async def publish(self, ref: AdapterRef, supersedes: AdapterRef | None) -> Any:
        """Returns when every adapter has been published as often as this one."""
        done = await self._sync.publish(ref, supersedes)
        self._waiting += 1
        turn = self._turn
        if self._waiting == self._adapters:
            self._waiting, self._turn = 0, asyncio.Event()
            turn.set()
        await turn.wait()
        return done
