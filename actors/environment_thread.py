"""A user's task on a thread of its own, with an event loop of its own: one for each adapter of a sampler.

`respond` is async, but what it calls may sleep or compute without giving way. On the sampler's own loop that would hold up
the rollouts of every adapter, and the very deadline that is to end it. Here it holds up its own adapter alone, and so does what
is made of its texts: tokenising megabytes takes seconds. What never lets go of Python's interpreter lock (a C extension that
computes for minutes) would need a process of its own: the task's to start.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from weft.actors.blame import blamed_on
from weft.actors.environment import Environment

CALL_S = 600.0  # for one prompt, as for one reply
T = TypeVar("T")


class EnvironmentThread:
    """An environment as the sampler calls it. Everything of it runs on one loop, so what it keeps may belong to that loop."""

    def __init__(self, name: str, environment: Environment) -> None:
        """name: the adapter's."""
        self._name = name
        self._environment = environment
        self._closed = False
        self._loop = asyncio.new_event_loop()
        # A daemon: a task that never comes back does not keep the process.
        threading.Thread(target=self._run, name=f"environment of {name}", daemon=True).start()

    async def run(self, what: str, call: Callable[[Environment], Awaitable[T]], deadline_s: float = CALL_S) -> T:
        """What `call` makes of the environment, on its thread. Giving it up returns at once, heeded or not.

        Raises AdapterFault, saying `what`, and nothing else: for whatever is raised there, and if nothing came in time.
        """

        async def outcome() -> T:
            with blamed_on(self._name, what):  # there: no exception of the user's own reaches the caller's loop
                return await call(self._environment)

        with blamed_on(self._name, what):
            try:
                async with asyncio.timeout(deadline_s):
                    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(outcome(), self._loop))
            except TimeoutError as error:
                raise TimeoutError(f"no answer within {deadline_s:g} s") from error

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
        while not self._closed and not self._loop.is_closed():
            with suppress(BaseException):  # sys.exit, say, in a task that the environment started: the loop goes on
                self._loop.run_forever()
        self._loop.close()
