"""A user's task on a thread of its own, with an event loop of its own: one for each adapter of a sampler.

`respond` is async, but what it calls may sleep or compute without giving way. On the sampler's own loop that would hold up
the rollouts of every adapter, and the very deadline that is to end it. Here it holds up its own adapter alone. What never lets
go of Python's interpreter lock (a C extension that computes for minutes) would need a process of its own: the task's to start.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from weft.actors.environment import ChatMessage, Environment, Prompt, Reply

PROMPT_S = 600.0  # for one prompt, as for one reply
T = TypeVar("T")


class EnvironmentThread:
    """An environment as the sampler calls it. Everything of it runs on one loop, so what it keeps may belong to that loop."""

    def __init__(self, name: str, environment: Environment) -> None:
        """name: the adapter's."""
        self._environment = environment
        self._closed = False
        self._loop = asyncio.new_event_loop()
        # A daemon: a task that never comes back does not keep the process.
        threading.Thread(target=self._run, name=f"environment of {name}", daemon=True).start()

    @property
    def num_prompts(self) -> int | None:
        """The environment's."""
        return self._environment.num_prompts

    async def prompt(self, index: int, held_out: bool) -> Prompt:
        """The environment's; TimeoutError after PROMPT_S."""

        async def ask() -> Prompt:
            return self._environment.prompt(index, held_out)

        try:
            async with asyncio.timeout(PROMPT_S):
                return await self._call(ask)
        except TimeoutError as error:
            raise TimeoutError(str(error) or f"no prompt within {PROMPT_S:g} s") from error

    async def respond(self, prompt: Prompt, turns: Sequence[ChatMessage]) -> Reply:
        """The environment's. Giving it up returns at once, whether or not the task heeds that."""
        return await self._call(lambda: self._environment.respond(prompt, turns))

    def close(self) -> None:
        """End the thread as soon as the task lets it; what is under way is given up."""
        self._closed = True
        with suppress(RuntimeError):  # closed before
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.stop()

    def _run(self) -> None:
        while not self._closed:
            with suppress(SystemExit):  # of a task that the environment has started: the loop goes on
                self._loop.run_forever()
        self._loop.close()

    async def _call(self, call: Callable[[], Awaitable[T]]) -> T:
        async def outcome() -> tuple[T | None, SystemExit | None]:
            try:
                return await call(), None
            except SystemExit as error:  # asyncio would end the loop with it
                return None, error

        value, left = await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(outcome(), self._loop))
        if left is not None:
            raise left
        return value  # type: ignore[return-value]
