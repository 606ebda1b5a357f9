"""The pools over stand-in actors that keep the real protocol's state, served by the in-process transport, killed at will.

In virtual time: deadlines, pauses and loads are the same however busy the machine is, and so is who comes first.
"""

from __future__ import annotations

import asyncio
import itertools
import selectors
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from weft.actors.affinity import Affinity
from weft.actors.member import Member
from weft.actors.sampler_pool import SamplerPool
from weft.actors.sync_pool import ATTEMPTS, AUDIT_EVERY, ParamSyncPool
from weft.actors.trainer_pool import TrainerPool
from weft.configs.schema import AdapterConfig
from weft.transport import messages
from weft.transport.errors import (
    AdapterFault,
    EngineLostError,
    InstallError,
    PeerDiedError,
    RemoteError,
    StartError,
    VersionError,
    WeftError,
)
from weft.transport.memory import Client, Server
from weft.transport.messages import AdapterRef

T = TypeVar("T")
PIDS = itertools.count(1000)
DEADLINE_S = 0.2  # where a law waits for it to pass
PLACES = 12  # for versions in each engine: four adapters of max_staleness 1
SEATS = 16  # for rollouts on each sampler
TURN_S = 1e-4  # of virtual time, that each turn of the event loop takes


class _Clock(selectors.SelectSelector):
    """Waits by moving the time, and moves it a little each turn: whoever looks again and again sees deadlines pass."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "nobody can go on"
        self.now += max(timeout, TURN_S)
        return []


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = _Clock()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def run(law: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run, in virtual time."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(law)


class StandIn:
    """A process: its actor answers over the transport until it is killed."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.pid = next(PIDS)
        self.endpoint = ""
        self.server = Server(actor.handle)
        self.dead = asyncio.Event()

    async def wait_death(self) -> str:
        await self.dead.wait()
        return f"pid {self.pid} was killed"

    async def stop(self) -> None:
        await self.server.aclose()
        self.dead.set()

    async def kill(self) -> None:
        """The connection breaks at once; that the process is dead is known a little later."""
        await self.server.aclose()
        await asyncio.sleep(0.01)
        self.dead.set()


class Sampler:
    def __init__(self, world: World) -> None:
        self.world = world
        self.told: list[str] = []
        self.installed: dict[str, AdapterRef] = {}  # the newest of each adapter
        self.live: set[AdapterRef] = set()  # not retired
        self.hold = asyncio.Event()
        self.hold.set()
        self.rollouts = 0
        self.engine_lost = False

    async def handle(self, message: Any) -> Any:
        if self.engine_lost:
            raise EngineLostError
        await self.world.answers("sampler", message)
        match message:
            case messages.AddAdapter():
                if message.config["name"] in self.world.slow:
                    await asyncio.Event().wait()
                if message.config["name"] in self.world.broken:
                    raise AdapterFault("its environment raised", kind="ValueError", traceback="here")
                self.told.append(message.config["name"])
                return messages.AdapterAdded(num_prompts=7)
            case messages.Install():
                if message.ref.name in self.world.uninstallable:
                    raise InstallError("canary")
                self.installed[message.ref.name] = message.ref
                self.live.add(message.ref)
                return messages.Done()
            case messages.Retire():
                self.live.discard(message.ref)
                if self.installed.get(message.ref.name) == message.ref:
                    del self.installed[message.ref.name]
                return messages.Done()
            case messages.Rollout():
                self.rollouts += 1
                await self.hold.wait()
                if message.ref.name not in self.installed or message.ref.name not in self.told:
                    raise InstallError(f"no {message.ref.name}")
                return messages.Group(self.installed[message.ref.name], message.prompt_index, ())
            case messages.GetStatistics():
                return messages.SamplerStatistics(1, 2, ("a/0/1",), 3, 0, 0, 0.0, 8, 5)
            case messages.DropAdapter():
                self.told = [name for name in self.told if name != message.name]
                self.installed.pop(message.name, None)
                return messages.Done()


class Trainer:
    def __init__(self, world: World) -> None:
        self.world = world
        self.versions: dict[str, AdapterRef] = {}

    async def handle(self, message: Any) -> Any:
        await self.world.answers("trainer", message)
        match message:
            case messages.AddAdapter():
                self.world.adds += 1
                await self.world.may_add.wait()
                if message.config["name"] in self.world.broken:
                    raise AdapterFault("its weights cannot be made", kind="ValueError", traceback="here")
                self.versions[message.config["name"]] = AdapterRef(message.config["name"], message.lineage, 0)
                return messages.AdapterAdded()
            case messages.GetStatistics():
                return messages.TrainerStatistics(1, {"device": 1, "host": 2}, 0, 0, 0.0)
            case messages.TrainStep():
                refs = [batch.ref for batch in message.batches]
                assert all(self.versions[ref.name] == ref for ref in refs)
                self.versions.update({ref.name: AdapterRef(ref.name, ref.lineage, ref.version + 1) for ref in refs})
                slabs = {ref.name: self._slab(self.versions[ref.name]) if self.world.slabs_with_steps else None for ref in refs}
                results = [messages.StepResult(self.versions[ref.name], 0, {}, slab=slabs[ref.name]) for ref in refs]
                return messages.StepResults(tuple(results), 1.0)
            case messages.Publish():
                if self.versions[message.ref.name] != message.ref:
                    raise VersionError(f"{self.versions[message.ref.name]} is here")
                self.world.publishes += 1
                if self.world.full:
                    raise OSError("No space left on device")
                self.world.publishing.set()
                await self.world.may_publish.wait()
                return self._slab(message.ref)
            case messages.AskCanary():
                self.world.asked.append(message)
                if self.world.no_canary:
                    raise RuntimeError(self.world.no_canary)
                return messages.Canary(message.ref, -1.0)
            case messages.Load():
                self.versions[message.ref.name] = message.ref
                return messages.Done()
            case messages.DropAdapter():
                self.versions.pop(message.name, None)
                return messages.Done()

    def _slab(self, ref: AdapterRef) -> messages.SlabHandle:
        return messages.SlabHandle(ref, 0, "float32", 1, 1.0, (), None, 0.0, path=self.world.slab(ref))


class Relay:
    def __init__(self, world: World) -> None:
        self.world = world
        self.endpoints: dict[int, str] = {}
        self.newest: dict[str, messages.SlabHandle] = {}
        self.canaries: dict[AdapterRef, asyncio.Event] = {}
        self.hold = asyncio.Event()
        self.hold.set()

    async def _ask(self, sampler: int, message: Any) -> None:
        client = Client(self.endpoints[sampler])
        try:
            await client.request(message, None)
        finally:
            await client.aclose()

    async def handle(self, message: Any) -> Any:
        await self.world.answers("relay", message)
        match message:
            case messages.Distribute():
                assert message.handle.canary_logprob is None
                canary = self.canaries[message.handle.ref] = asyncio.Event()
                self.world.distributing.set()
                await self.hold.wait()
                self.world.take(message.handle.path)
                if message.handle.audited:
                    await canary.wait()
                for sampler in set(message.samplers) & set(self.endpoints):
                    await self._ask(sampler, messages.Install(message.handle.ref))
                    if message.supersedes is not None:
                        await self._ask(sampler, messages.Retire(message.supersedes))
                self.newest[message.handle.ref.name] = message.handle
                return messages.Distributed(0.0, 0.0, 0.0)
            case messages.AwaitSent():
                return messages.Done()
            case messages.Canary():
                self.canaries[message.ref].set()
                return messages.Done()
            case messages.JoinSampler():
                await self.world.may_join.wait()
                if message.endpoint in self.world.unjoinable:
                    raise InstallError("it does not answer")
                self.endpoints[message.sampler] = message.endpoint
                return messages.Done()
            case messages.Serve():
                if message.name not in self.newest or message.sampler not in self.endpoints:
                    raise InstallError(f"no {message.name}, or no sampler {message.sampler}")
                await self._ask(message.sampler, messages.Install(self.newest[message.name].ref))
                return messages.Done()
            case messages.Withdraw():
                await self._ask(message.sampler, messages.Retire(message.ref))
                return messages.Done()
            case messages.GetStatistics():
                return messages.SyncStatistics(1, (), 0, 0, 7)
            case messages.LeaveSampler():
                self.endpoints.pop(message.sampler, None)
                return messages.Done()
            case messages.DropAdapter():
                self.newest.pop(message.name, None)
                return messages.Done()


class World:
    """Two samplers, a trainer and a relay; `processes[name]` lists each member's lives, the newest last."""

    def __init__(self) -> None:
        self.processes: dict[str, list[StandIn]] = {}
        self.broken: set[str] = set()
        self.slow: set[str] = set()  # whose environments are never made
        self.uninstallable: set[str] = set()
        self.distributing = asyncio.Event()
        self.starts_fail = False
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.held_back: set[str] = set()  # that do not start
        self.unjoinable: set[str] = set()  # endpoints
        self.publishing = asyncio.Event()
        self.may_publish, self.may_join, self.may_add = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.may_publish.set()
        self.may_join.set()
        self.may_add.set()  # to a trainer
        self.adds = 0  # that trainers were asked for
        self.asked: list[messages.AskCanary] = []
        self.slabs_with_steps, self.publishes = False, 0
        self.no_canary = ""
        self.slabs: Path | None = None
        self.full = False  # the place for them
        self.unanswered: set[tuple[str, type]] = set()  # messages that a kind of process takes and never answers
        self.tasks: asyncio.TaskGroup

    def slab(self, ref: AdapterRef) -> str:
        """A file of its own for each publish, if there is a place for them."""
        if self.slabs is None:
            return ""
        path = self.slabs / f"{ref.name}-{next(PIDS)}.slab"
        path.touch()
        return str(path)

    def take(self, path: str) -> None:
        if path:
            Path(path).unlink()

    def slabs_left(self) -> int:
        assert self.slabs is not None
        return len(list(self.slabs.iterdir()))

    async def answers(self, kind: str, message: Any) -> None:
        if (kind, type(message)) in self.unanswered:
            await asyncio.Event().wait()

    def member(self, name: str, kind: Callable[[World], Any], clock: Callable[[], float] | None = None) -> Member:
        async def spawn() -> StandIn:
            if self.starts_fail:
                raise StartError(f"{name} did not start")
            await self.may_start.wait()
            await self.until(lambda: name not in self.held_back)
            process = StandIn(kind(self))
            process.endpoint = await process.server.start("memory://")
            self.tasks.create_task(process.server.serve())
            self.processes.setdefault(name, []).append(process)
            return process

        return Member(name, spawn, Client, clock=clock)

    def now(self, name: str) -> StandIn:
        return self.processes[name][-1]

    async def kill(self, name: str) -> None:
        await self.now(name).kill()

    async def replace(self, *names: str) -> None:
        """Kill these; returns when each has a successor."""
        lives = {name: len(self.processes[name]) for name in names}
        for name in names:
            await self.kill(name)
        await self.until(lambda: all(len(self.processes[name]) > before for name, before in lives.items()))

    async def until(self, rule: Callable[[], bool]) -> None:
        while not rule():  # noqa: ASYNC110  the pools tell nobody of a restart but those who wait for one
            await asyncio.sleep(0)


class Pools:
    def __init__(self, world: World, deadline_s: float = 5) -> None:
        self.world = world
        self.sampler_members = [world.member(f"sampler-{index}", Sampler) for index in range(2)]
        self.trainer_member = world.member("trainer-0", Trainer)
        self.relay_member = world.member("relay", Relay)
        self.trainers = TrainerPool([self.trainer_member], deadline_s)
        self.affinity = Affinity(2, SEATS, PLACES, PLACES, asyncio.get_running_loop().time)
        self.sync = ParamSyncPool(self.relay_member, self.trainers, self.affinity, deadline_s)
        self.samplers = SamplerPool(self.sampler_members, self.sync, self.affinity, deadline_s)

    def keep(self, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        pools: list[tuple[Any, Member]] = [(self.samplers, member) for member in self.sampler_members]
        pools += [(self.trainers, self.trainer_member), (self.sync, self.relay_member)]

        def bound(pool: Any, member: Member) -> tuple[Callable[[], Awaitable[None]], Callable[[], Awaitable[None]]]:
            return lambda: pool.prepare(member), lambda: pool.lost(member)

        return [tasks.create_task(member.keep(*bound(pool, member))) for pool, member in pools]

    async def add(self, name: str) -> AdapterRef:
        config, ref = AdapterConfig(name), AdapterRef(name, 0, 0)
        await self.trainers.add(config, 0)
        assert await self.samplers.add(config, 0) == 7
        await self.sync.publish(ref, None)
        return ref

    async def ahead(self) -> tuple[AdapterRef, AdapterRef]:
        """A new adapter whose trainer is a version ahead: what is published, and what is not yet."""
        ref = await self.add("a")
        return ref, await self.step(ref)

    def having(self, ref: AdapterRef) -> set[int]:
        """Samplers that have this version."""
        alive = {index: process for index in range(2) if not (process := self.world.now(f"sampler-{index}")).dead.is_set()}
        return {index for index, process in alive.items() if process.actor.installed.get(ref.name) == ref}

    async def step(self, ref: AdapterRef) -> AdapterRef:
        done = await self.trainers.step([batch(ref)])
        return done.results[0].ref


def batch(ref: AdapterRef) -> messages.TrainBatch:
    none = np.zeros(0, np.int32)
    return messages.TrainBatch(ref, none, none, none.astype(bool), none.astype(np.float32), none, none, none, 0, 0)


async def raised(work: Awaitable[Any]) -> BaseException | None:
    """What it raised, if anything of ours."""
    try:
        await work
    except WeftError as error:
        return error
    return None


@asynccontextmanager
async def running(deadline_s: float = 5) -> AsyncIterator[tuple[Pools, World]]:
    world = World()
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        world.tasks = tasks
        pools = Pools(world, deadline_s)
        kept = pools.keep(tasks)
        await pools.samplers.wait_ready()
        await pools.trainers.wait_ready()
        try:
            yield pools, world
        finally:
            for task in kept:
                task.cancel()


def test_a_rollout_goes_to_the_sampler_with_the_fewest_sequences_in_flight() -> None:
    async def law() -> None:
        async with running() as (pools, world), asyncio.TaskGroup() as tasks:
            ref = await pools.add("a")
            samplers = [world.now(f"sampler-{index}").actor for index in range(2)]
            for sampler in samplers:
                sampler.hold.clear()
            for size in (4, 1, 1, 1, 1):  # 4 | 1 1 1 1
                tasks.create_task(pools.samplers.rollout(ref, 0, size))
                await world.until(lambda: sum(sampler.rollouts for sampler in samplers) > 0)
                await asyncio.sleep(0)
            await world.until(lambda: sum(sampler.rollouts for sampler in samplers) == 5)
            assert sorted(sampler.rollouts for sampler in samplers) == [1, 4]
            for sampler in samplers:
                sampler.hold.set()

    run(law())


def test_two_adapters_live_on_a_sampler_each_and_a_sync_goes_nowhere_else() -> None:
    async def law() -> None:
        async with running() as (pools, world):
            ref = await pools.add("a")
            assert pools.having(ref) == {0, 1}, "alone, it has both"
            other = await pools.add("b")
            newer = await pools.step(ref)
            await pools.sync.publish(newer, ref)
            assert len(pools.having(newer)) == 1
            assert pools.having(other) == {0, 1} - pools.having(newer)
            assert not pools.having(ref), "it is retired where it is served no more"
            for refs, wanted in ((newer, pools.having(newer)), (other, pools.having(other))):
                for index in range(4):
                    before = [world.now(f"sampler-{number}").actor.rollouts for number in range(2)]
                    assert (await pools.samplers.rollout(refs, index, 1)).ref == refs
                    after = [world.now(f"sampler-{number}").actor.rollouts for number in range(2)]
                    assert {number for number in range(2) if after[number] > before[number]} == wanted

    run(law())


@pytest.mark.parametrize("by", ["rollout", "publish"])
def test_a_sampler_that_serves_an_adapter_again_keeps_nothing_of_the_time_before(by: str) -> None:
    async def law() -> None:
        async with running() as (pools, world):
            old = await pools.add("a")
            assert pools.having(old) == {0, 1}
            await pools.add("b")
            still = [pools.samplers.seat("a", 1) for _ in range(2)]  # its rollouts run on both when it leaves one of them
            new = await pools.step(old)
            await pools.sync.publish(new, old)
            (home,) = pools.having(new)
            left = world.now(f"sampler-{1 - home}").actor
            assert old in left.live
            for seat in still:
                pools.samplers.leave(seat)
            full = pools.samplers.seat("a", SEATS)
            assert full.sampler == home
            if by == "rollout":
                await pools.samplers.rollout(new, 0, 1)
            else:
                guest = pools.samplers.seat("a", 1)
                assert guest.sampler == 1 - home
                before, new = new, await pools.step(new)
                await pools.sync.publish(new, before)
            assert {ref for ref in left.live if ref.name == "a"} == {new}

    run(law())


def test_a_samplers_death_ends_its_rollouts_and_its_adapters_live_on_the_other_at_once_until_it_is_back() -> None:
    async def law() -> None:
        async with running() as (pools, world):
            refs = [await pools.add(name) for name in ("a", "b")]
            newer = await pools.step(refs[0])
            await pools.sync.publish(newer, refs[0])
            (home,) = pools.having(newer)
            for index in range(2):
                world.now(f"sampler-{index}").actor.hold.clear()
            rollouts = [asyncio.ensure_future(pools.samplers.rollout(ref, 0, 1)) for ref in (newer, refs[1])]  # noqa: TID251
            await world.until(lambda: all(world.now(f"sampler-{index}").actor.rollouts == 1 for index in range(2)))
            world.held_back.add(f"sampler-{home}")
            await world.kill(f"sampler-{home}")
            with pytest.raises(PeerDiedError):
                await rollouts[0]
            await world.until(lambda: not pools.sampler_members[home].ready)
            world.now(f"sampler-{1 - home}").actor.hold.set()
            assert (await rollouts[1]).ref == refs[1]  # the other sampler's rollout never noticed
            assert (await pools.samplers.rollout(newer, 0, 1)).ref == newer
            assert pools.having(newer) == pools.having(refs[1]) == {1 - home}
            world.held_back.clear()
            await pools.samplers.wait_ready()
            assert sorted(world.now(f"sampler-{home}").actor.told) == ["a", "b"]
            assert not world.now(f"sampler-{home}").actor.installed, "nothing moves while nothing is published"
            newest = [await pools.step(newer), await pools.step(refs[1])]
            for ref, before in zip(newest, (newer, refs[1]), strict=True):
                await pools.sync.publish(ref, before)
            assert sorted(len(pools.having(ref)) for ref in newest) == [1, 1]
            assert pools.having(newest[0]) != pools.having(newest[1])
            assert not pools.having(newer) and not pools.having(refs[1])

    run(law())


def test_what_processes_count_is_told_under_their_names_with_the_deaths_of_their_places() -> None:
    async def law() -> None:
        async with running() as (pools, world):
            counted = await pools.samplers.numbers()
            assert counted["sampler-0"] == counted["sampler-1"]
            assert counted["sampler-0"] == {
                "deaths": 0, "ready": 1, "answers": 1, "live_versions": 1, "rollouts_in_flight": 3, "tokens_sampled": 0,
                "installs": 0, "busy_seconds": 0, "prompt_tokens": 8, "cached_tokens": 5,
            }  # fmt: skip
            assert (await pools.trainers.numbers())["trainer-0"]["adapters/host"] == 2
            assert (await pools.sync.numbers())["relay"]["bytes_sent"] == 7
            world.held_back.add("sampler-0")
            await world.kill("sampler-0")
            await world.until(lambda: pools.sampler_members[0].deaths == 1)
            dead = (await pools.samplers.numbers())["sampler-0"]
            assert dead == {"deaths": 1, "ready": 0, "answers": 0}, "it has nothing to ask"
            world.held_back.clear()
            await pools.samplers.wait_ready()
            assert (await pools.samplers.numbers())["sampler-0"] == {**counted["sampler-1"], "deaths": 1}

    run(law())


def test_a_trainers_death_is_told_to_every_adapter_it_held_until_each_is_made_again() -> None:
    async def law() -> None:
        async with running() as (pools, world):
            refs = [await pools.add(name) for name in ("a", "b")]
            await world.replace("trainer-0")
            await pools.trainers.wait_ready()
            for call in (
                lambda: pools.trainers.step([batch(refs[0])]),
                lambda: pools.trainers.save(refs[1], "x"),
                lambda: pools.sync.publish(refs[1], None),
            ):
                with pytest.raises(PeerDiedError):
                    await call()
            await pools.trainers.add(AdapterConfig("a"), 1)
            restored = AdapterRef("a", 1, 5)
            await pools.trainers.load(restored, "folder")
            await pools.sync.publish(restored, refs[0])
            assert (await pools.samplers.rollout(restored, 0, 1)).ref == restored
            with pytest.raises(PeerDiedError):  # b has not been made again
                await pools.trainers.step([batch(refs[1])])

    run(law())


def test_a_publish_in_flight_survives_the_relays_death_and_every_version_is_given_to_the_next_relay() -> None:
    async def law() -> None:
        async with running() as (pools, world):
            refs = [await pools.add(name) for name in ("a", "b")]
            newer = await pools.step(refs[0])
            world.now("relay").actor.hold.clear()
            world.distributing.clear()
            async with asyncio.TaskGroup() as tasks:
                publishing = tasks.create_task(pools.sync.publish(newer, refs[0]))
                await world.distributing.wait()
                await world.kill("relay")
                await publishing
            relay = world.now("relay").actor
            assert sorted(relay.endpoints) == [0, 1]
            assert {name: handle.ref for name, handle in relay.newest.items()} == {"a": newer, "b": refs[1]}
            homes = [pools.having(newer), pools.having(refs[1])]
            assert sorted(map(len, homes)) == [1, 1]
            await world.kill(f"sampler-{max(homes[0])}")  # and what the new relay holds is enough for those that go on
            await world.until(lambda: not pools.sampler_members[max(homes[0])].ready)
            assert (await pools.samplers.rollout(newer, 0, 1)).ref == newer

    run(law())


def test_a_slab_that_came_with_its_step_is_asked_for_no_more_but_once_it_has_been_lost() -> None:
    async def law() -> None:
        async with running() as (pools, world):
            ref = await pools.add("a")
            world.slabs_with_steps, world.publishes = True, 0
            for _ in range(2):
                newer = await pools.step(ref)
                await pools.sync.publish(newer, ref)
                assert pools.having(newer) and world.publishes == 0
                ref = newer
            unused = await pools.step(ref)
            newer = await pools.step(unused)
            world.now("relay").actor.hold.clear()
            world.distributing.clear()
            async with asyncio.TaskGroup() as tasks:
                publishing = tasks.create_task(pools.sync.publish(newer, ref))
                await world.distributing.wait()
                await world.kill("relay")
                await publishing
            assert pools.having(newer) and world.publishes == 1, "the relay that had it is dead"
            newest = await pools.step(newer)
            with pytest.raises(VersionError):
                await pools.trainers.publish(newer)  # as for a new relay, while the newest is on its way
            await pools.sync.publish(newest, newer)
            assert pools.having(newest) and world.publishes == 1

    run(law())


def test_a_publish_survives_the_death_of_a_sampler_that_it_waits_for() -> None:
    async def law() -> None:
        async with running() as (pools, world):
            ref, newer = await pools.ahead()
            world.now("relay").actor.hold.clear()
            world.distributing.clear()
            async with asyncio.TaskGroup() as tasks:
                publishing = tasks.create_task(pools.sync.publish(newer, ref))
                await world.distributing.wait()
                await world.kill("sampler-0")
                world.now("relay").actor.hold.set()
                await publishing
            await world.until(lambda: len(world.processes["sampler-0"]) == 2)
            await pools.samplers.wait_ready()
            assert all(world.now(f"sampler-{index}").actor.installed["a"] == newer for index in range(2))

    run(law())


def test_an_adapter_is_audited_first_on_each_samplers_process_and_in_each_lineage_and_then_every_eighth_version() -> None:
    async def law() -> None:
        async with running() as (pools, world):
            before = ref = await pools.add("a")
            for _ in range(2 * AUDIT_EVERY):
                newer = await pools.step(ref)
                await pools.sync.publish(newer, ref)
                assert pools.having(newer) and not pools.having(ref)
                ref = newer
            assert [asked.ref.version for asked in world.asked] == [0, AUDIT_EVERY, 2 * AUDIT_EVERY]
            for fresh in (True, False):
                if fresh:
                    await world.replace("sampler-1")
                    await pools.samplers.wait_ready()
                newer = await pools.step(ref)
                await pools.sync.publish(newer, ref)
                assert (world.asked[-1].ref == newer) == fresh
                ref = newer
            other = AdapterRef("a", before.lineage + 1, ref.version)
            await pools.trainers.load(other, "")
            await pools.sync.publish(other, ref)
            assert world.asked[-1].ref == other

    run(law())


def test_a_new_relay_is_given_every_version_without_another_audit() -> None:
    async def law() -> None:
        async with running() as (pools, world):
            refs = [await pools.add(name) for name in ("a", "b")]
            asked = list(world.asked)
            await world.replace("relay")
            await pools.sync.wait_ready()
            assert {handle.ref for handle in world.now("relay").actor.newest.values()} == set(refs)
            assert world.asked == asked

    run(law())


def test_a_process_that_listens_where_the_one_before_it_did_is_audited_anew() -> None:
    """A port that was given back may be given again."""

    async def law() -> None:
        async with running() as (pools, world):
            ref, newer = await pools.ahead()
            sampler = max(pools.having(ref))
            await pools.sync.leave(sampler)
            await pools.sync.join(sampler, pools.sampler_members[sampler])
            await pools.sync.publish(newer, ref)
            assert world.asked[-1].ref == newer

    run(law())


def test_a_version_that_is_published_once_more_since_it_failed_is_audited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.actors.sync_pool.PAUSE_S", 0.01)

    async def law() -> None:
        async with running() as (pools, world):
            ref, newer = await pools.ahead()
            asked = len(world.asked)
            world.uninstallable.add("a")
            async with asyncio.TaskGroup() as tasks:
                publishing = tasks.create_task(pools.sync.publish(newer, ref))
                await world.until(lambda: len(world.asked) > asked)
                world.uninstallable.clear()
                await publishing
            assert {one.ref for one in world.asked[asked:]} == {newer} and pools.having(newer)

    run(law())


def test_a_canary_that_the_trainer_cannot_give_is_a_fault_of_the_install() -> None:
    async def law() -> None:
        async with running() as (pools, world):
            ref, newer = await pools.ahead()
            pools.sync.audit_every, world.no_canary = 1, "no memory for a forward"
            with pytest.raises(InstallError, match="a/0/1: its trainer gives no canary: .*no memory for a forward"):
                await pools.sync.publish(newer, ref)
            assert pools.having(ref) and not pools.having(newer)

    run(law())


def test_a_trainer_that_dies_between_weights_and_canary_ends_the_publish_and_nobody_has_that_version() -> None:
    async def law() -> None:
        async with running() as (pools, world):
            ref, newer = await pools.ahead()
            pools.sync.audit_every = 1
            world.unanswered.add(("trainer", messages.AskCanary))
            world.distributing.clear()
            async with asyncio.TaskGroup() as tasks:
                publishing = tasks.create_task(raised(pools.sync.publish(newer, ref)))
                await world.distributing.wait()
                await world.kill("trainer-0")
            assert isinstance(publishing.result(), PeerDiedError)
            assert pools.having(ref) and not pools.having(newer)

    run(law())


def test_relay_and_sampler_dead_while_the_trainer_is_a_version_ahead_rollouts_wait_for_the_next_publish() -> None:
    async def law() -> None:
        async with running() as (pools, world):
            ref, newer = await pools.ahead()  # not published yet
            await world.replace("relay", "sampler-0", "sampler-1")
            await pools.samplers.wait_ready()
            async with asyncio.TaskGroup() as tasks:
                rollout = tasks.create_task(pools.samplers.rollout(ref, 0, 1))
                await asyncio.sleep(0.05)
                assert not rollout.done()
                await pools.sync.publish(newer, ref)
            assert rollout.result().ref == newer

    run(law())


def test_a_version_that_a_new_relay_cannot_distribute_is_tried_again_and_no_rollout_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def law() -> None:
        async with running() as (pools, world):
            refs = [await pools.add(name) for name in ("a", "b")]
            world.uninstallable.add("a")
            await world.replace("relay")
            await pools.sync.wait_ready()
            assert list(world.now("relay").actor.newest) == ["b"]
            assert (await pools.samplers.rollout(refs[0], 0, 1)).ref == refs[0]  # the samplers that live have it
            world.distributing.clear()
            await world.kill("relay")
            await world.distributing.wait()
            await asyncio.sleep(0)
            world.uninstallable.clear()
            await pools.sync.wait_ready()
            assert sorted(world.now("relay").actor.newest) == ["a", "b"]

    monkeypatch.setattr("weft.actors.sync_pool.PAUSE_S", 0.01)
    run(law())


def test_a_slab_that_a_trainer_cannot_write_for_a_new_relay_holds_up_no_rollout_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its adapter may be sampling, with no publish on its way that would end a wait."""

    async def law() -> None:
        async with running() as (pools, world):
            ref = await pools.add("a")
            world.full = True
            await world.replace("relay")
            await pools.sync.wait_ready()
            assert (await pools.samplers.rollout(ref, 0, 1)).ref == ref  # every sampler has it
            await world.replace("relay")
            world.full = False
            await pools.sync.wait_ready()
            assert list(world.now("relay").actor.newest) == ["a"]

    monkeypatch.setattr("weft.actors.sync_pool.PAUSE_S", 0.01)
    run(law())


def test_a_slab_that_cannot_be_written_is_tried_again_and_then_is_its_adapters_own_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def law() -> None:
        async with running() as (pools, world):
            refs = [await pools.add(name) for name in ("a", "b")]
            newer = [await pools.step(ref) for ref in refs]
            world.full = True
            with pytest.raises(InstallError, match="No space left"):
                await pools.sync.publish(newer[0], refs[0])
            async with asyncio.TaskGroup() as tasks:
                publishing = tasks.create_task(pools.sync.publish(newer[1], refs[1]))
                await asyncio.sleep(0.005)
                world.full = False
                await publishing
            assert (await pools.samplers.rollout(newer[1], 0, 1)).ref == newer[1]
            assert (await pools.samplers.rollout(refs[0], 0, 1)).ref == refs[0]

    monkeypatch.setattr("weft.actors.sync_pool.PAUSE_S", 0.01)
    run(law())


def test_no_slab_outlives_its_publish_though_relays_die_that_were_to_take_it(tmp_path: Path) -> None:
    async def law() -> None:
        async with running() as (pools, world):
            world.slabs = tmp_path
            ref, newer = await pools.ahead()
            world.now("relay").actor.hold.clear()
            world.distributing.clear()
            async with asyncio.TaskGroup() as tasks:
                publishing = tasks.create_task(pools.sync.publish(newer, ref))
                await world.distributing.wait()
                assert world.slabs_left() == 1
                await world.kill("relay")
                await publishing
            assert world.slabs_left() == 0
            world.may_publish.clear()  # and one that nobody asks for any more
            world.publishing.clear()
            await world.kill("relay")
            await world.publishing.wait()
            await pools.samplers.drop("a")
            world.may_publish.set()
            await pools.sync.wait_ready()
            assert world.slabs_left() == 0

    run(law())


def test_a_sampler_that_does_not_join_a_new_relay_is_restarted_and_then_served_again() -> None:
    async def law() -> None:
        async with running() as (pools, world):
            ref = await pools.add("a")
            world.unjoinable.add(world.now("sampler-0").endpoint)
            await world.kill("relay")
            await world.until(lambda: len(world.processes["sampler-0"]) == 2)
            await pools.samplers.wait_ready()
            newer = await pools.step(ref)
            await pools.sync.publish(newer, ref)
            assert sorted(world.now("relay").actor.endpoints) == [0, 1]
            assert pools.having(newer) == {0, 1}

    run(law())


def test_an_adapter_dropped_while_a_new_relay_is_prepared_is_not_given_to_it() -> None:
    async def law() -> None:
        async with running() as (pools, world):
            await pools.add("a")
            world.may_publish.clear()
            world.publishing.clear()
            await world.kill("relay")
            await world.publishing.wait()
            await pools.samplers.drop("a")
            world.may_publish.set()
            await pools.sync.wait_ready()
            assert world.now("relay").actor.newest == {}
            assert all(world.now(f"sampler-{index}").actor.installed == {} for index in range(2))

    run(law())


def test_a_publish_overtaken_by_a_new_relay_waits_until_that_knows_the_samplers() -> None:
    async def law() -> None:
        async with running() as (pools, world):
            ref, newer = await pools.ahead()
            world.may_publish.clear()
            world.publishing.clear()
            async with asyncio.TaskGroup() as tasks:
                publishing = tasks.create_task(pools.sync.publish(newer, ref))
                await world.publishing.wait()
                world.may_join.clear()
                await world.replace("relay")
                world.may_publish.set()
                await asyncio.sleep(0.05)
                assert not publishing.done()
                world.may_join.set()
            assert all(world.now(f"sampler-{index}").actor.installed == {"a": newer} for index in range(2))

    run(law())


def test_a_rollout_waits_for_the_first_sampler_that_is_ready() -> None:
    async def law() -> None:
        async with running() as (pools, world):
            ref = await pools.add("a")
            names = ("sampler-0", "sampler-1")
            world.held_back.update(names)
            for name in names:
                await world.kill(name)
            await world.until(lambda: not any(member.ready for member in pools.sampler_members))
            async with asyncio.TaskGroup() as tasks:
                rollout = tasks.create_task(pools.samplers.rollout(ref, 0, 1))
                await asyncio.sleep(0.05)
                assert not rollout.done()
                world.held_back.discard("sampler-1")
                assert (await rollout).ref == ref
            assert not pools.sampler_members[0].ready
            world.held_back.clear()

    run(law())


@asynccontextmanager
async def two_trainers(deadline_s: float = 5) -> AsyncIterator[tuple[TrainerPool, World, asyncio.TaskGroup]]:
    world = World()
    async with asyncio.timeout(20), asyncio.TaskGroup() as world.tasks:
        members = [world.member(f"trainer-{index}", Trainer) for index in range(2)]
        pool = TrainerPool(members, deadline_s)
        kept = [
            world.tasks.create_task(member.keep(partial(pool.prepare, member), partial(pool.lost, member)))
            for member in members
        ]
        await pool.wait_ready()
        try:
            yield pool, world, world.tasks
        finally:
            for task in kept:
                task.cancel()


def test_adapters_that_join_at_once_are_spread_evenly_and_one_that_fails_to_join_counts_no_more() -> None:
    async def law() -> None:
        async with two_trainers() as (pool, world, _):
            world.may_add.clear()
            world.broken |= {"b", "d"}

            async def add(name: str) -> None:
                with suppress(AdapterFault):
                    await pool.add(AdapterConfig(name), 0)

            async with asyncio.TaskGroup() as tasks:
                for name in "abcd":
                    tasks.create_task(add(name))
                await world.until(lambda: world.adds == 4)
                world.may_add.set()
            assert [list(world.now(f"trainer-{index}").actor.versions) for index in range(2)] == [["a", "c"], []]
            async with asyncio.TaskGroup() as tasks:
                for name in "efgh":
                    tasks.create_task(add(name))
            assert [len(world.now(f"trainer-{index}").actor.versions) for index in range(2)] == [3, 3]

    run(law())


def test_one_of_two_trainers_dies_only_its_adapters_are_lost_and_all_calls_say_the_same() -> None:
    async def law() -> None:
        async with two_trainers() as (pool, world, tasks):
            for name in "abc":  # b lives alone on trainer-1
                await pool.add(AdapterConfig(name), 0)
            waiting = {name: tasks.create_task(pool.wait_lost(name)) for name in "abc"}
            await asyncio.sleep(0.01)
            await world.kill("trainer-0")  # nobody calls it
            why = {await waiting["a"], await waiting["c"]}
            for name in "ac":
                with pytest.raises(PeerDiedError) as caught:
                    await pool.save(AdapterRef(name, 0, 0), "x")
                why.add(str(caught.value))
            assert len(why) == 1
            assert not waiting["b"].done()
            await pool.step([batch(AdapterRef("b", 0, 0))])
            await pool.add(AdapterConfig("a"), 1)
            await pool.step([batch(AdapterRef("a", 1, 0))])
            await world.kill("trainer-0")
            assert await pool.wait_lost("a") not in why
            waiting["b"].cancel()

    run(law())


def test_an_adapters_own_fault_passes_through_and_touches_no_other() -> None:
    async def law() -> None:
        async with running() as (pools, world):
            await pools.add("a")
            world.broken.add("b")
            with pytest.raises(AdapterFault):
                await pools.samplers.add(AdapterConfig("b"), 0)
            await pools.add("c")
            world.broken.add("a")  # it raises from now on: a fresh sampler comes up without it, for all the others
            await world.replace("sampler-0")
            await pools.samplers.wait_ready()
            assert world.now("sampler-0").actor.told == ["c"]

    run(law())


@pytest.mark.parametrize("kind", ["sampler", "trainer"])
def test_an_adapter_that_is_not_made_in_time_fails_alone_and_leaves_its_places(kind: str) -> None:
    async def law() -> None:
        async with running(DEADLINE_S) as (pools, world):
            await pools.add("a")
            world.unanswered.add((kind, messages.AddAdapter))
            pool = pools.samplers if kind == "sampler" else pools.trainers
            with pytest.raises(AdapterFault, match=rf"^b: .* within {DEADLINE_S} s"):
                await pool.add(AdapterConfig("b", max_staleness=7), 0)
            world.unanswered.clear()
            await pools.samplers.drop("b")
            await pools.trainers.drop("b")
            ref = await pools.add("c")
            assert (await pools.samplers.rollout(ref, 0, 1)).ref == ref
            assert not any(member.deaths for member in (*pools.sampler_members, pools.trainer_member))

    run(law())


def test_an_adapter_made_too_late_is_dropped_from_the_trainer_that_made_it() -> None:
    async def law() -> None:
        async with running(DEADLINE_S) as (pools, world):
            trainer = world.now("trainer-0").actor
            world.unanswered.add(("trainer", messages.AddAdapter))
            with pytest.raises(AdapterFault):
                await pools.trainers.add(AdapterConfig("a"), 0)
            trainer.versions["a"] = AdapterRef("a", 0, 0)  # its thread went on
            await pools.trainers.drop("a")
            assert trainer.versions == {}

    run(law())


def test_an_adapter_that_a_fresh_sampler_is_not_told_of_in_time_fails_there_and_the_sampler_serves_the_others() -> None:
    async def law() -> None:
        async with running(DEADLINE_S) as (pools, world):
            refs = [await pools.add(name) for name in ("a", "b")]
            world.slow.add("a")
            await world.replace("sampler-0")
            await pools.samplers.wait_ready()
            assert len(world.processes["sampler-0"]) == 2
            assert world.now("sampler-0").actor.told == ["b"]
            world.held_back.add("sampler-1")
            await world.kill("sampler-1")
            await world.until(lambda: not pools.sampler_members[1].ready)
            assert (await pools.samplers.rollout(refs[1], 0, 1)).ref == refs[1]
            with pytest.raises(InstallError):  # which ends its adapter
                await pools.samplers.rollout(refs[0], 0, 1)
            world.held_back.clear()

    run(law())


@pytest.mark.parametrize("kind", ["relay", "sampler", "trainer"])
def test_an_adapter_leaves_though_a_process_does_not_drop_it_and_the_others_go_on(kind: str) -> None:
    async def law() -> None:
        async with running(DEADLINE_S) as (pools, world):
            refs = [await pools.add(name) for name in ("a", "b")]
            world.unanswered.add((kind, messages.DropAdapter))
            await pools.samplers.drop("a")
            await pools.trainers.drop("a")
            world.unanswered.clear()
            await pools.sync.wait_ready()
            await pools.samplers.wait_ready()
            newer = await pools.step(refs[1])
            await pools.sync.publish(newer, refs[1])
            assert list(world.now("relay").actor.newest) == ["b"]
            for index in range(2):
                assert world.now(f"sampler-{index}").actor.told == ["b"]
                assert world.now(f"sampler-{index}").actor.installed == {"b": newer}

    run(law())


def test_a_version_that_no_sampler_takes_is_an_install_error_after_a_bounded_number_of_attempts() -> None:
    async def law() -> None:
        async with running() as (pools, world):
            ref = await pools.add("a")
            world.uninstallable.add("a")
            newer = await pools.step(ref)
            world.asked.clear()
            with pytest.raises((InstallError, RemoteError)):
                await pools.sync.publish(newer, ref)
            wanted = [messages.AskCanary(newer, closely=True)] * (ATTEMPTS - 1)
            assert world.asked == wanted, "what was refused is looked at again"

    run(law())


def test_a_dropped_adapter_is_forgotten_by_all_three_pools() -> None:
    async def law() -> None:
        async with running() as (pools, world):
            await pools.add("a")
            await pools.add("b")
            await pools.samplers.drop("a")
            await pools.trainers.drop("a")
            assert world.now("sampler-0").actor.told == ["b"]
            assert list(world.now("relay").actor.newest) == ["b"]
            assert list(world.now("trainer-0").actor.versions) == ["b"]
            await world.replace("sampler-0")
            await pools.samplers.wait_ready()
            assert world.now("sampler-0").actor.told == ["b"]

    run(law())


def test_a_member_that_dies_again_and_again_ends_the_run_and_one_that_never_starts_ends_it_at_once() -> None:
    async def dies() -> None:
        async with running() as (pools, world):
            for life in range(1, 7):
                await world.until(lambda life=life: len(world.processes["sampler-0"]) == life)
                await world.kill("sampler-0")
            await asyncio.Event().wait()

    async def never_starts() -> None:
        world = World()
        world.starts_fail = True
        async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
            world.tasks = tasks
            Pools(world).keep(tasks)

    for law, kind in ((dies, PeerDiedError), (never_starts, StartError)):
        with pytest.raises(ExceptionGroup) as caught:
            run(law())
        assert caught.group_contains(kind)


def test_deaths_long_ago_are_forgotten_but_not_those_of_a_process_that_is_never_ready() -> None:
    async def lives(prepare: Callable[[], Awaitable[None]], often_from: int) -> int:
        """Of a process that dies once it is ready: every 601 s, and every second from life `often_from` on."""
        now = 0.0
        world = World()

        def seconds() -> float:
            nonlocal now
            now += 1 if member.deaths > often_from else 601
            return now

        async def kill() -> None:
            while True:
                await member.wait_ready()
                world.now("relay").dead.set()
                await asyncio.sleep(0)

        async with asyncio.timeout(10), asyncio.TaskGroup() as world.tasks:
            member = world.member("relay", Relay, clock=seconds)
            killing = world.tasks.create_task(kill())
            with pytest.raises(PeerDiedError, match="6 times"):
                await member.keep(prepare, succeed)
            killing.cancel()
        return member.deaths

    async def succeed() -> None:
        pass

    async def fail() -> None:
        raise RemoteError("it cannot be prepared", "ValueError")

    assert run(lives(succeed, often_from=20)) == 20 + 5
    assert run(lives(fail, often_from=20)) == 6


def test_statistics_are_of_the_processes_that_answer() -> None:
    async def law() -> None:
        async with running() as (pools, world):
            assert len(await pools.samplers.statistics()) == 2

    run(law())


def test_a_sampler_that_has_lost_its_engine_counts_as_dead_at_once() -> None:
    async def law() -> None:
        async with running() as (pools, world):
            ref = await pools.add("a")
            for index in range(2):
                world.now(f"sampler-{index}").actor.engine_lost = True
            for _ in range(2):
                with pytest.raises(PeerDiedError):
                    await pools.samplers.rollout(ref, 0, 1)
            await pools.samplers.wait_ready()
            assert [len(world.processes[f"sampler-{index}"]) for index in range(2)] == [2, 2]
            assert (await pools.samplers.rollout(ref, 0, 1)).ref == ref

    run(law())


def test_a_broken_connection_counts_as_a_death_before_the_death_is_known() -> None:
    async def law() -> None:
        async with running() as (pools, world):
            ref = await pools.add("a")
            for index in range(2):
                await world.now(f"sampler-{index}").server.aclose()
            for _ in range(2):
                with pytest.raises(PeerDiedError):
                    await pools.samplers.rollout(ref, 0, 1)
            await pools.samplers.wait_ready()
            assert (await pools.samplers.rollout(ref, 0, 1)).ref == ref

    run(law())


def test_a_process_that_is_ended_for_a_reason_died_of_it_whatever_its_requests_say_then() -> None:
    async def law() -> None:
        async with running() as (pools, world):
            ref, member = await pools.add("a"), pools.sampler_members[0]
            for index in range(2):
                world.now(f"sampler-{index}").actor.hold.clear()
            async with asyncio.TaskGroup() as tasks:
                rollouts = [tasks.create_task(died(pools.samplers.rollout(ref, 0, 1))) for _ in range(2)]
                await world.until(lambda: all(world.now(f"sampler-{index}").actor.rollouts for index in range(2)))
                member.condemn("it did not drop b")
                await world.until(lambda: member.deaths == 1)
                world.now("sampler-1").actor.hold.set()
            assert sorted(task.result() for task in rollouts) == [False, True]
            assert "it did not drop b" in member.last_death

    run(law())


def test_a_death_ends_the_requests_of_a_connection_that_looks_whole() -> None:
    async def law() -> None:
        async with running() as (pools, world):
            ref = await pools.add("a")
            for index in range(2):
                world.now(f"sampler-{index}").actor.hold.clear()
            async with asyncio.TaskGroup() as tasks:
                rollouts = [tasks.create_task(died(pools.samplers.rollout(ref, 0, 1))) for _ in range(2)]
                await world.until(lambda: all(world.now(f"sampler-{index}").actor.rollouts for index in range(2)))
                for index in range(2):
                    world.now(f"sampler-{index}").dead.set()
            assert all(task.result() for task in rollouts)

    run(law())


def test_a_sampler_that_comes_while_a_version_is_on_its_way_serves_that_one_or_none() -> None:
    async def law() -> None:
        async with running() as (pools, world):
            ref, newer = await pools.ahead()
            world.may_start.clear()
            await world.kill("sampler-0")
            await world.until(lambda: 0 not in world.now("relay").actor.endpoints)
            world.now("relay").actor.hold.clear()
            world.distributing.clear()
            async with asyncio.TaskGroup() as tasks:
                publishing = tasks.create_task(pools.sync.publish(newer, ref))
                await world.distributing.wait()
                world.may_start.set()
                await pools.samplers.wait_ready()
                world.held_back.add("sampler-1")
                world.now("relay").actor.hold.set()
                await publishing
                assert not world.now("sampler-0").actor.installed
                await world.kill("sampler-1")
            await world.until(lambda: not pools.sampler_members[1].ready)
            assert (await pools.samplers.rollout(newer, 0, 1)).ref == newer
            assert pools.having(newer) == {0}
            world.held_back.clear()

    run(law())


def test_a_sampler_that_cannot_be_given_a_version_is_restarted_and_one_that_refuses_it_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def law() -> None:
        async with running(DEADLINE_S) as (pools, world):
            ref = await pools.add("a")
            world.unanswered.add(("relay", messages.Serve))
            await world.kill("sampler-0")
            await pools.samplers.wait_ready()
            await world.kill("sampler-1")
            await world.until(lambda: not pools.sampler_members[1].ready)
            with pytest.raises(PeerDiedError):
                await pools.samplers.rollout(ref, 0, 1)
            world.unanswered.clear()
            assert (await pools.samplers.rollout(ref, 0, 1)).ref == ref
            await pools.samplers.wait_ready()
            deaths = [member.deaths for member in pools.sampler_members]
            world.uninstallable.add("a")
            (home,) = pools.having(ref)
            await world.kill(f"sampler-{home}")
            await world.until(lambda: not pools.sampler_members[home].ready)
            with pytest.raises((InstallError, RemoteError)):
                await pools.samplers.rollout(ref, 0, 1)
            assert pools.sampler_members[1 - home].deaths == deaths[1 - home]

    monkeypatch.setattr("weft.actors.sync_pool.PAUSE_S", 0.01)
    run(law())


def test_an_adapter_without_places_in_the_engines_is_refused_by_its_own_fault_and_the_others_never_notice() -> None:
    async def law() -> None:
        async with running() as (pools, world):
            for name in "abcdefgh":  # four in each engine
                await pools.samplers.add(AdapterConfig(name), 0)
            await pools.trainers.add(AdapterConfig("a"), 0)
            ref = AdapterRef("a", 0, 0)
            await pools.sync.publish(ref, None)
            await pools.samplers.add(AdapterConfig("a"), 1)  # a new lineage takes no second places
            with pytest.raises(AdapterFault) as refusal:
                await pools.samplers.add(AdapterConfig("i", max_staleness=0), 0)
            assert "0 are free: 12 of 12" in str(refusal.value)
            await pools.samplers.drop("b")
            with pytest.raises(AdapterFault) as refusal:
                await pools.samplers.add(AdapterConfig("i", max_staleness=2), 0)
            assert "max_staleness=2 takes 4 places" in str(refusal.value)
            assert "3 are free: 9 of 12" in str(refusal.value)
            assert "i" not in world.now("sampler-0").actor.told
            assert await pools.samplers.add(AdapterConfig("i", max_staleness=1), 0) == 7
            assert (await pools.samplers.rollout(ref, 0, 1)).ref == ref

    run(law())


async def died(call: Awaitable[Any]) -> bool:
    try:
        await call
    except PeerDiedError:
        return True
    return False
