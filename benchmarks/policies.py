"""How the same experiments may share one cluster: what each policy of experiments.py changes.

serial          disaggregated: one adapter at a time, with both pools to itself.
time-shared     the same on one card that has two jobs. At staleness 0 an adapter alone takes turns by itself: the places of its
                next step are released when the version before is installed, so nothing is sampled while anything trains or
                syncs, and the other way round. On one sampler and one trainer all that is left to differ is what moves: after
                each install the adapter's masters and moments leave the trainer's card, and come back for its next step.
                What a colocated engine does besides is not in this row: vLLM's sleep and wake (on one H200 a 4B base has room
                for both jobs), and that it could sample on both cards, then train on both.
lock-step       all adapters sample, then all train, in one launch where they fit, then all sync.
one-a-launch    all adapters at once, and a trainer that takes one of them at a time.
swap            the same as SkyRL's trainer does it: masters and moments wait in pinned host memory and come to the card for a
                step. Moved by the trainer's own store. The card holds two states, so that one is synced while the next trains,
                which SkyRL's does not do.
all-ready       all adapters at once, and a launch takes all that are ready, as far as they fit.
staleness-0     as weft does it: a launch takes a third of the on-policy adapters at most, two of eight (pipeline/schedule.py).
few             the same with two adapters a launch at most, however many there are.
staleness-1, -2 as weft does it: nobody is on policy, and a launch takes all that are ready, as far as they fit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from weft.transport.messages import AdapterRef, Load, Saved

NOBODY = AdapterRef("", 0, 0)  # a message that names it is for the benchmark's own actors (measured.py)


@dataclass(frozen=True)
class Rule:
    """What a policy changes. one_by_one: an adapter begins when the one before has ended. lock_step: no adapter begins a step
    before all have been synced. a_launch: adapters that the trainer takes at once, at most. turns: of the on-policy
    ones, instead of the scheduler's own (StepScheduler.turns). swap: its card holds the states
    of two of them. time_shared: of none, but while it trains. max_staleness: of every adapter. first: of the experiments, these
    many are done; one after the other, each is as long as beside all."""

    one_by_one: bool = False
    lock_step: bool = False
    a_launch: int | None = None
    turns: int | None = None
    swap: bool = False
    time_shared: bool = False
    max_staleness: int | None = None
    first: int | None = None


RULES = {
    "serial": Rule(one_by_one=True),  # both pools to itself: the baseline
    "serial-on-policy": Rule(one_by_one=True, max_staleness=0),
    "serial-time-shared": Rule(one_by_one=True, time_shared=True, max_staleness=0, first=2),
    "together": Rule(),  # each with its own bound
    "lock-step": Rule(lock_step=True, turns=1, max_staleness=0),
    "all-ready": Rule(turns=1, max_staleness=0),
    "one-a-launch": Rule(a_launch=1, max_staleness=0),
    "swap": Rule(a_launch=1, swap=True, max_staleness=0),
    "staleness-0": Rule(max_staleness=0),
    "staleness-0-few": Rule(a_launch=2, max_staleness=0),
    "staleness-1": Rule(max_staleness=1),
    "staleness-2": Rule(max_staleness=2),
}


def launch_budget(rule: Rule, step_tokens: int, own: int) -> int:
    """Packed tokens of a launch under this rule. step_tokens: of one adapter's step; own: what the configuration says."""
    if rule.a_launch is None:
        return own
    return 1 if rule.a_launch == 1 else int((rule.a_launch + 0.5) * step_tokens)  # the oldest goes whatever its size


async def hold_on_device(trainers: Any, adapters: int) -> int:
    """From now on the cards of the trainers (measured.MeasuredTrainer) hold the state of so many adapters at most; 0: of none
    at this moment, and of one when it trains. Returns the bytes that have moved to and from the cards since they started."""
    replies = [await member.request(Load(NOBODY, str(adapters))) for member in trainers._members]
    return sum(int(moved) for reply in replies for moved in reply.checksums.values())


def states_on_device(rule: Rule, own: int) -> int:
    """That the trainer's card may hold; own: otherwise."""
    return 2 if rule.swap else 1 if rule.time_shared else own


class Unsaved:
    """Trainers that write no checkpoints and no adapters: 800 MB of r = 32 on a 4B shape, at both ends of an experiment, take
    longer than some of its steps, and how fast a machine's disk is says nothing of a policy."""

    def __init__(self, trainers: Any) -> None:
        self._trainers = trainers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainers, name)

    async def save(self, ref: AdapterRef, folder: str) -> Saved:
        return Saved({})

    async def export(self, ref: AdapterRef, folder: str) -> None:
        return


class AfterPublish:
    """A parameter sync whose `publish` returns only after something else as well."""

    def __init__(self, sync: Any, then: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        self._sync, self._then = sync, then

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sync, name)

    async def publish(self, ref: AdapterRef, supersedes: AdapterRef | None) -> Any:
        done = await self._sync.publish(ref, supersedes)
        await self._then()
        return done


class Turn:
    """Whoever waits goes on when as many wait as there are adapters."""

    def __init__(self, adapters: int) -> None:
        self._adapters, self._waiting = adapters, 0
        self._turn = asyncio.Event()

    async def wait_all(self) -> None:
        self._waiting += 1
        turn = self._turn
        if self._waiting == self._adapters:
            self._waiting, self._turn = 0, asyncio.Event()
            turn.set()
        await turn.wait()
