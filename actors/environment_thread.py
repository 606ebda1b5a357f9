"""A user's task on a thread of its own, with an event loop of its own: one for each adapter of a sampler.

`respond` is async, but what it calls may sleep or compute without giving way. On the sampler's own loop that would hold up
the rollouts of every adapter, and the very deadline that is to end it. Here it holds up its own adapter alone, and so does what
is made of its texts: tokenising megabytes takes seconds. What never lets go of Python's interpreter lock (a C extension that
computes for minutes) would need a process of its own: the task's to start.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from weft.actors.blame import blamed_on
from weft.actors.environment import Environment

CALL_S = 600.0  # for one prompt, as for one reply
ENDING_S = 1.0  # for what a cancelled task still does
T = TypeVar("T")


class EnvironmentThread:
    """An environment as the sampler calls it. Everything of it runs on one loop, so what it keeps may belong to that loop."""

    def __init__(self, name: str, environment: Environment) -> None:
        """name: the adapter's."""
        self._name = name
        self._environment = environment
        self._closed = False
        self._awaited: set[Future[Any]] = set()  # what `run` waits for
        self._loop = asyncio.new_event_loop()
        # A daemon: a task that never comes back does not keep the process.
        threading.Thread(target=self._run, name=f"environment of {name}", daemon=True).start()

    async def run(self, what: str, call: Callable[[Environment], Awaitable[T]], deadline_s: float = CALL_S) -> T:
        """What `call` makes of the environment, on its thread. Giving it up returns at once, heeded or not.

        Raises AdapterFault, saying `what`, and nothing else: for whatever is raised there, if nothing came in time, and if it
        has been closed, or is meanwhile.
        """

        async def outcome() -> T:
            with blamed_on(self._name, what):  # there: no exception of the user's own reaches the caller's loop
                return await call(self._environment)

        with blamed_on(self._name, what):
            if self._closed:
                raise RuntimeError("its environment has been closed")
            answer = asyncio.run_coroutine_threadsafe(outcome(), self._loop)
            self._awaited.add(answer)
            try:
                async with asyncio.timeout(deadline_s):
                    return await asyncio.wrap_future(answer)
            except TimeoutError as error:
                raise TimeoutError(f"no answer within {deadline_s:g} s") from error
            finally:
                self._awaited.discard(answer)

    def close(self) -> None:
        """Give up what is under way. Whoever waits for it learns at once; its tasks are cancelled, and have ENDING_S to end in
        order. Then, or as soon as they let it, the thread ends. For the thread that `run` is awaited on."""
        self._closed = True
        for answer in self._awaited:
            answer.cancel()
        with suppress(RuntimeError):  # closed before
            self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self) -> None:
        while True:
            with suppress(BaseException):  # sys.exit, say, in a task that the environment started: the loop goes on
                self._loop.run_forever()
            if self._closed or self._loop.is_closed():
                break
        self._end()
        self._loop.close()

    def _end(self) -> None:
        tasks, until = asyncio.all_tasks(self._loop), time.monotonic() + ENDING_S
        for task in tasks:
            if not task.cancelling():  # told once is enough: told again, it would be torn from what it does to end
                task.cancel()
        while (left := [task for task in tasks if not task.done()]) and (seconds := until - time.monotonic()) > 0:
            with suppress(BaseException):  # as above
                self._loop.run_until_complete(asyncio.wait(left, timeout=seconds))
        for task in tasks:
            with suppress(BaseException):  # here, and not in whichever thread would come to free its memory
                if not task.done():
                    task.get_coro().close()  # type: ignore[union-attr]
                elif not task.cancelled() and (error := task.exception()) is not None:
                    said = f"{self._name}: its environment was closed, and raised"
                    self._loop.call_exception_handler({"message": said, "exception": error})
