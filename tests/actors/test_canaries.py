"""A trainer's canaries come after its slabs, together, and each for itself."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence

import pytest

from weft.actors.canaries import Canaries, Found
from weft.transport.errors import VersionError
from weft.transport.messages import AdapterRef, AskCanary, Canary

LONG_S = 120.0  # a deadline that nothing here may reach
ASKED = [AskCanary(AdapterRef(name, 0, 1)) for name in "abc"]


class Compute:
    """Waits for `go`; `gone` are not there any more, and with one of `impossible` it raises."""

    def __init__(self) -> None:
        self.calls: list[list[AskCanary]] = []
        self.go, self.began = threading.Event(), threading.Event()
        self.go.set()
        self.gone: set[AskCanary] = set()
        self.impossible: set[AskCanary] = set()

    def __call__(self, asked: Sequence[AskCanary]) -> dict[AskCanary, Found]:
        self.calls.append(list(asked))
        self.began.set()
        assert self.go.wait(LONG_S)
        if self.impossible & set(asked):
            raise ArithmeticError("not with this one among them")
        return {one: VersionError("it is gone") if one in self.gone else answer(one) for one in asked}


def answer(asked: AskCanary) -> Canary:
    return Canary(asked.ref, -float(ASKED.index(asked)))


def run(test: Callable[[Compute, Canaries], Awaitable[None]]) -> None:
    async def within() -> None:
        compute = Compute()
        canaries = Canaries(compute, lambda: None)
        try:
            async with asyncio.timeout(2 * LONG_S):
                await test(compute, canaries)
        finally:
            compute.go.set()
            canaries.thread.shutdown()

    asyncio.run(within())


def test_slabs_go_first_and_then_one_forward_is_for_all_that_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.actors.canaries.QUIET_S", LONG_S)

    async def test(compute: Compute, canaries: Canaries) -> None:
        async with asyncio.TaskGroup() as tasks:
            with canaries.handing_over():
                with canaries.handing_over():
                    asking = [tasks.create_task(canaries.ask(one)) for one in ASKED]
                    for _ in range(20):
                        await asyncio.sleep(0)
                assert not compute.calls, "one is still handed over"
        assert [task.result() for task in asking] == list(map(answer, ASKED))
        assert compute.calls == [ASKED]

    run(test)


def test_slabs_without_end_hold_up_no_canary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.actors.canaries.QUIET_S", 0.01)

    async def test(compute: Compute, canaries: Canaries) -> None:
        with canaries.handing_over():
            assert await canaries.ask(ASKED[1]) == answer(ASKED[1])

    run(test)


def test_a_version_that_is_gone_fails_alone() -> None:
    async def test(compute: Compute, canaries: Canaries) -> None:
        compute.gone = {ASKED[0]}
        found = await asyncio.gather(*map(canaries.ask, ASKED), return_exceptions=True)
        assert isinstance(found[0], VersionError)
        assert found[1:] == list(map(answer, ASKED[1:]))

    run(test)


@pytest.mark.parametrize("bad", ASKED, ids=lambda one: one.ref.name)
def test_one_that_cannot_be_computed_fails_alone(bad: AskCanary) -> None:
    """Whichever it is: some are computed together with it."""

    async def test(compute: Compute, canaries: Canaries) -> None:
        compute.impossible = {bad}
        found = dict(zip(ASKED, await asyncio.gather(*map(canaries.ask, ASKED), return_exceptions=True), strict=True))
        assert isinstance(found.pop(bad), ArithmeticError)
        assert found == {one: answer(one) for one in ASKED if one != bad}

    run(test)


def test_whoever_asks_no_more_takes_nobodys_canary_along() -> None:
    """The first to ask has all computed; it may go away in the middle of that."""

    async def test(compute: Compute, canaries: Canaries) -> None:
        compute.go.clear()
        async with asyncio.TaskGroup() as tasks:
            first, *others = [tasks.create_task(canaries.ask(one)) for one in (ASKED[0], *ASKED)]
            await asyncio.to_thread(compute.began.wait, LONG_S)
            first.cancel()
            compute.go.set()
        assert [task.result() for task in others] == list(map(answer, ASKED))

    run(test)
