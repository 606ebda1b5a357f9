"""What the garbage collector need not look at, while pools are open and afterwards."""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path
from typing import Any

from weft.actors.wiring import RunningPools, open_pools
from weft.configs.expand import expand


class Knot:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.itself = self


class Ready:
    """A pool, as far as it is waited for."""

    async def wait_ready(self) -> None: ...


class Slow:
    """A starter whose processes take for ever."""

    async def start(self, *_: Any, **__: Any) -> Any:
        await asyncio.Event().wait()


def test_pools_that_are_ready_are_not_looked_through_and_what_is_left_of_them_is_collected(tmp_path: Path) -> None:
    async def law() -> None:
        ready: Any = Ready()
        config = expand({"adapters": {"a": {}}, "run": {"dir": str(tmp_path)}})
        async with open_pools(config, Slow(), str(tmp_path)):
            knot: Knot | None = Knot()
            known = weakref.ref(knot)
            await RunningPools(ready, ready, ready).wait_ready()
            assert not any(one is knot for one in gc.get_objects()), "it is frozen"
            knot = None
        gc.collect()
        assert known() is None

    asyncio.run(law())
