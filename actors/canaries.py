"""A trainer's canaries: computed once a version is on its way, not before.

    AskCanary, when the slab has been sent ──> no Publish is being answered ──> one forward for all that ask

What a sampler checks a version with, it needs when it has installed it. A canary is a forward of its own, tens of milliseconds
on a large base, in which the weights themselves would wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from weft.transport.errors import WeftError
from weft.transport.messages import AskCanary, Canary

QUIET_S = 0.05  # after which a canary no longer lets slabs go first: somebody's version waits for it
Found = Canary | WeftError


class Canaries:
    """Those of one trainer. For its event loop; `compute` runs on a thread of its own."""

    def __init__(
        self, compute: Callable[[Sequence[AskCanary]], Mapping[AskCanary, Found]], initializer: Callable[[], object]
    ) -> None:
        """compute: what is answered to each, or why there is nothing. initializer: of the thread."""
        self._compute = compute
        self.thread = ThreadPoolExecutor(1, "weft-canary", initializer=initializer)
        self._asked: dict[AskCanary, asyncio.Future[Found]] = {}
        self._turn = asyncio.Lock()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._handing = 0

    @contextmanager
    def handing_over(self) -> Iterator[None]:
        """While the block lasts, a slab is being handed over."""
        self._handing += 1
        self._quiet.clear()
        try:
            yield
        finally:
            self._handing -= 1
            if not self._handing:
                self._quiet.set()

    async def ask(self, message: AskCanary) -> Canary:
        """Raises why there is none."""
        loop = asyncio.get_running_loop()
        future = self._asked.setdefault(message, loop.create_future())
        async with self._turn:
            if not future.done():
                await self._wait_quiet()
                asked, self._asked = {**self._asked, message: future}, {}
                try:
                    found = await self._found(asked, message)
                except BaseException:
                    self._wait_on(asked, [message])
                    raise
                self._wait_on(asked, found)
                for one in found:
                    asked[one].set_result(found[one])
        result = await future
        if isinstance(result, WeftError):
            raise result
        return result

    async def _found(self, asked: Collection[AskCanary], message: AskCanary) -> Mapping[AskCanary, Found]:
        """Of all that ask; or of `message` alone, where the fault of one would be that of all."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self.thread, self._compute, list(asked))
        except Exception:  # whatever one of them raises
            if len(asked) == 1:
                raise
            return await loop.run_in_executor(self.thread, self._compute, [message])

    def _wait_on(self, asked: Mapping[AskCanary, asyncio.Future[Found]], done: Collection[AskCanary]) -> None:
        """The next one that asks computes for those that still wait."""
        self._asked = {one: future for one, future in asked.items() if one not in done} | self._asked

    async def _wait_quiet(self) -> None:
        try:
            async with asyncio.timeout(QUIET_S):
                await self._quiet.wait()
        except TimeoutError:
            return
