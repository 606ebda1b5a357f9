"""Adapters on several real trainers: moved from one to another between two steps."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from weft.actors.member import Member
from weft.actors.trainer import Trainer
from weft.actors.trainer_pool import TrainerPool
from weft.configs.schema import AdapterConfig, LoraConfig, LossConfig, TrainerConfig
from weft.transport import messages
from weft.transport.errors import PeerDiedError, RemoteError
from weft.transport.memory import Client, Server
from weft.transport.messages import AdapterRef, TrainBatch

CONFIG = {"max_staleness": 4, "num_steps": 50, "lora": LoraConfig(rank=4, alpha=8), "loss": LossConfig(kl_coefficient=0.1)}
MakeBatch = Callable[..., TrainBatch]
LONG_S = 120.0  # a deadline that nothing here may reach


class Process:
    """A real trainer, served in this process until it is stopped."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.pid, self.endpoint = trainer, 1, ""
        self.server = Server(trainer.handle)
        self.dead = asyncio.Event()

    async def wait_death(self) -> str:
        await self.dead.wait()
        return "it was killed"

    async def stop(self) -> None:
        if not self.dead.is_set():
            await self.server.aclose()
            self.dead.set()
            await self.trainer.aclose()


class Bench:
    def __init__(self, base: Path, folder: Path, tasks: asyncio.TaskGroup, number: int) -> None:
        self.base, self.folder, self.tasks = base, folder, tasks
        self.now: dict[str, Process] = {}
        members = [Member(f"trainer-{index}", partial(self.spawn, f"trainer-{index}"), Client) for index in range(number)]
        self.members = members
        self.pool = TrainerPool(members, LONG_S, str(folder))

    async def spawn(self, name: str) -> Process:
        trainer = Trainer(str(self.base), "float32", TrainerConfig(), str(self.folder / name), str(self.folder / "slabs"))
        try:
            await trainer.start()
        except BaseException:  # a test that has ended waits for no successor of one that it stopped
            await trainer.aclose()
            raise
        process = self.now[name] = Process(trainer)
        process.endpoint = await process.server.start("memory://")
        self.tasks.create_task(process.server.serve())
        return process

    def state(self, index: int, name: str) -> torch.Tensor:
        with self.now[f"trainer-{index}"].trainer._store.hold([name]) as (slabs,):
            return slabs.state.clone()

    def holders(self, name: str) -> set[int]:
        return {index for index in range(len(self.members)) if name in self.now[f"trainer-{index}"].trainer._adapters}


@asynccontextmanager
async def trainers(base: Path, folder: Path, number: int = 2) -> AsyncIterator[Bench]:
    async with asyncio.timeout(2 * LONG_S), asyncio.TaskGroup() as tasks:
        bench = Bench(base, folder, tasks, number)
        kept = [
            tasks.create_task(member.keep(partial(bench.pool.prepare, member), partial(bench.pool.lost, member)))
            for member in bench.members
        ]
        await bench.pool.wait_ready()
        try:
            yield bench
        finally:
            for task in kept:
                task.cancel()


def test_a_moved_adapter_has_the_same_state_to_the_bit_and_is_lost_with_the_trainer_that_has_it_now(
    trainer_base: Path, tmp_path: Path, batch: MakeBatch
) -> None:
    async def law() -> None:
        async with trainers(trainer_base, tmp_path) as bench:
            pool = bench.pool
            for name in ("a", "b", "c"):  # a and c on the first
                await pool.add(AdapterConfig(name, **CONFIG), 3)
            ref = AdapterRef("a", 3, 0)
            for version in range(2):
                (result,) = (await pool.step([of(batch("a", version), ref)])).results
                ref = result.ref
            before = bench.state(0, "a")
            lost = bench.tasks.create_task(pool.wait_lost("a"))
            assert not await pool.move(ref, {pool.home("b")}), "there is none that is idle"
            assert await pool.move(ref, {pool.home("a")})
            assert pool.home("a") == pool.home("b") != pool.home("c")
            assert bench.holders("a") == {1}
            assert torch.equal(bench.state(1, "a"), before)
            assert (await pool.publish(ref)).ref == ref
            await pool.step([of(batch("a", 2), ref), of(batch("b", 0), AdapterRef("b", 3, 0))])  # one launch
            await bench.now["trainer-0"].stop()  # where it was: it does not notice
            while not bench.members[0].deaths:  # noqa: ASYNC110  until that is known, of which nobody is told
                await asyncio.sleep(0)
            await pool.wait_ready()
            assert not lost.done()
            await bench.now["trainer-1"].stop()
            assert "killed" in await lost

    asyncio.run(law())


def test_steps_after_a_move_are_those_of_an_adapter_that_stayed(trainer_base: Path, tmp_path: Path, batch: MakeBatch) -> None:
    async def law(moves: bool) -> torch.Tensor:
        async with trainers(trainer_base, tmp_path / str(moves)) as bench:
            await bench.pool.add(AdapterConfig("a", **CONFIG), 0)
            for version in range(4):
                if moves and version:
                    assert await bench.pool.move(AdapterRef("a", 0, version), ())
                await bench.pool.step([of(batch("a", version), AdapterRef("a", 0, version))])
            (holder,) = bench.holders("a")
            assert holder == (1 if moves else 0)
            return bench.state(holder, "a")

    assert torch.equal(asyncio.run(law(True)), asyncio.run(law(False)))


def test_a_move_that_fails_leaves_the_adapter_where_it_is(trainer_base: Path, tmp_path: Path, batch: MakeBatch) -> None:
    async def law() -> None:
        async with trainers(trainer_base, tmp_path) as bench:
            pool, ref = bench.pool, AdapterRef("a", 0, 0)
            await pool.add(AdapterConfig("a", **CONFIG), 0)
            home, before = pool.home("a"), bench.state(0, "a")
            del bench.now["trainer-1"].trainer._calls[messages.Load]
            assert not await pool.move(ref, ())
            assert pool.home("a") == home and bench.holders("a") == {0} and torch.equal(bench.state(0, "a"), before)
            await pool.step([of(batch("a"), ref)])
            await bench.now["trainer-0"].stop()
            with pytest.raises(PeerDiedError):  # the one that has it is dead
                await pool.move(AdapterRef("a", 0, 1), ())

    asyncio.run(law())


def test_a_trainer_that_shared_an_adapter_keeps_nothing_of_it_when_it_lives_on_another_alone(
    trainer_base: Path, tmp_path: Path
) -> None:
    async def law() -> None:
        async with trainers(trainer_base, tmp_path) as bench:
            pool = bench.pool
            pool.expect(1)
            await pool.add(AdapterConfig("a", **CONFIG), 0)
            pool.expect(2)
            await pool.add(AdapterConfig("b", **CONFIG), 0)
            assert bench.holders("a") == {0, 1} and bench.holders("b") == {0}
            await bench.now["trainer-1"].stop()
            await pool.wait_lost("a")
            await pool.add(AdapterConfig("a", **CONFIG), 1)
            assert bench.holders("a") == {1} and bench.holders("b") == {0}

    asyncio.run(law())


def test_an_adapter_that_one_of_its_trainers_could_not_make_is_gone_from_the_others_when_it_is_dropped(
    trainer_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def law() -> None:
        async with trainers(trainer_base, tmp_path) as bench:
            it_can, it_cannot = (bench.now[f"trainer-{index}"].trainer for index in (0, 1))
            make, is_made = it_can._add, threading.Event()

            def makes(*asked: Any) -> messages.AdapterAdded:
                added = make(*asked)
                is_made.set()
                return added

            def refuses(*_: Any) -> messages.AdapterAdded:
                assert is_made.wait(LONG_S)
                raise ValueError("no room")

            monkeypatch.setattr(it_can, "_add", makes)
            monkeypatch.setattr(it_cannot, "_add", refuses)
            bench.pool.expect(1)
            with pytest.raises(RemoteError, match="no room"):
                await bench.pool.add(AdapterConfig("a", **CONFIG), 0)
            await bench.pool.drop("a")
            assert not bench.holders("a")

    asyncio.run(law())


def of(batch: TrainBatch, ref: AdapterRef) -> TrainBatch:
    fields: dict[str, Any] = {**vars(batch), "ref": ref}
    return TrainBatch(**fields)
