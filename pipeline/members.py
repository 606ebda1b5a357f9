"""What the processes of the pools count of themselves, asked for now and then and told to the observers; and who is silent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Protocol

from weft.pipeline.events import MemberCounted, Observer

PERIOD_S = 10.0
SILENT_S = 30.0  # on a busy machine a process may miss one asking or two
WHY = {"samplers": ": code of a task that holds Python's lock stops every adapter there"}


class Counting(Protocol):
    """A pool, as far as it can be asked."""

    async def numbers(self) -> Mapping[str, Mapping[str, float]]:
        """By each process's name."""


class Members:
    """The processes of some pools. now: seconds since the pipeline began.

    warn: is told once of each spell in which a process that takes requests does not answer. It is not ended for that: what it
    holds is worth more than the time it takes, as long as nobody knows that it will never answer.
    """

    def __init__(
        self, pools: Mapping[str, Counting], now: Callable[[], float], observer: Observer, warn: Callable[[str], None]
    ) -> None:
        self._pools = pools
        self._now = now
        self._observer = observer
        self._warn = warn
        self._heard: dict[str, float] = {}  # when each answered last, or was not there to answer
        self._warned: set[str] = set()  # in this spell

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
                self._listen(member, numbers, WHY.get(name, ""))

    def _listen(self, member: str, numbers: Mapping[str, float], why: str) -> None:
        now = self._now()
        if numbers["answers"] or not numbers["ready"]:
            self._heard[member] = now
            self._warned.discard(member)
        elif (silent := now - self._heard.setdefault(member, now)) > SILENT_S and member not in self._warned:
            self._warned.add(member)
            self._warn(f"{member} has not answered for {silent:.0f} s{why}")

    @staticmethod
    async def _numbers(pool: Counting) -> Mapping[str, Mapping[str, float]]:
        return await pool.numbers()
