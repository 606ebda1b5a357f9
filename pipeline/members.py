"""What the processes of the pools count of themselves, asked for now and then and told to the observers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Protocol

from weft.pipeline.events import MemberCounted, Observer

PERIOD_S = 10.0


class Counting(Protocol):
    """A pool, as far as it can be asked."""

    async def numbers(self) -> Mapping[str, Mapping[str, float]]:
        """By each process's name."""


class Members:
    """The processes of some pools. now: seconds since the pipeline began."""

    def __init__(self, pools: Mapping[str, Counting], now: Callable[[], float], observer: Observer) -> None:
        self._pools = pools
        self._now = now
        self._observer = observer

    async def run(self) -> None:
        """Ask until cancelled."""
        while True:
            await asyncio.sleep(PERIOD_S)
            await self.ask()

    async def ask(self) -> None:
        """Ask all of them once. One that does not answer is told of with its deaths alone."""
        async with asyncio.TaskGroup() as tasks:
            asked = {name: tasks.create_task(self._numbers(pool)) for name, pool in self._pools.items()}
        for name, task in asked.items():
            for member, numbers in task.result().items():
                self._observer(MemberCounted(self._now(), name, member, numbers))

    @staticmethod
    async def _numbers(pool: Counting) -> Mapping[str, Mapping[str, float]]:
        return await pool.numbers()
