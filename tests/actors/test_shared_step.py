"""One adapter on two trainers, in processes of their own that add up gradients over gloo, against the same adapter on one."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import runpy
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from weft.actors.member import Member
from weft.actors.shared_step import join, split
from weft.actors.trainer import Trainer
from weft.actors.trainer_pool import TrainerPool, _Life
from weft.configs.schema import AdapterConfig, LoraConfig, LossConfig, TrainerConfig
from weft.transport import messages
from weft.transport.broadcast import BroadcastGroup, RendezvousStore
from weft.transport.channel import Client, Server
from weft.transport.errors import AdapterFault, PeerDiedError, RemoteError, RendezvousError
from weft.transport.messages import AdapterRef, StepResult, TrainBatch

STEPS = 3
PATIENT_S = 200.0  # of what a quiet machine does within a second
LOSSES = {
    "token": LossConfig(kl_coefficient=0.1),
    "sequence": LossConfig(name="gspo", kl_coefficient=0.1),
    "constant": LossConfig(name="dr_grpo"),
}
MakeBatch = Callable[..., TrainBatch]


def config(loss: str = "token") -> AdapterConfig:
    return AdapterConfig("a", max_staleness=4, num_steps=50, lora=LoraConfig(rank=4, alpha=8), loss=LOSSES[loss])


async def _be_a_trainer(base: str, folder: str, ready: Connection) -> None:
    torch.set_num_threads(1)
    trainer = Trainer(base, "float32", TrainerConfig(), folder, folder + "-slabs")
    await trainer.start()
    server = Server(trainer.handle)
    ready.send(await server.start())
    await server.serve()


class Process:
    """A trainer in a process of its own."""

    def __init__(self, base: Path, folder: Path) -> None:
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(["pytest", "weft.actors.trainer"])
        self._ready, ready = forks.Pipe(duplex=False)
        arguments = (__file__, {"READY": ready, "BASE": str(base), "FOLDER": str(folder)}, "__main__")
        self.process = forks.Process(target=runpy.run_path, args=arguments, daemon=True)
        self.process.start()
        self.pid, self.endpoint = self.process.pid or 0, ""

    async def wait_death(self) -> str:
        await asyncio.to_thread(self.process.join)
        return f"pid {self.pid} was killed"

    async def stop(self) -> None:
        if self.process.is_alive():
            os.kill(self.pid, signal.SIGKILL)
        await asyncio.to_thread(self.process.join)

    async def start(self) -> Process:
        self.endpoint = await asyncio.to_thread(self._ready.recv)
        return self


@asynccontextmanager
async def trainers(
    base: Path, folder: Path, number: int, adapters: int, backend: str = "gloo"
) -> AsyncIterator[tuple[TrainerPool, list[Process]]]:
    alive: list[Process] = []

    async def spawn(index: int) -> Process:
        alive.append(await Process(base, folder / f"trainer-{index}").start())
        return alive[-1]

    async with asyncio.timeout(20 * PATIENT_S), asyncio.TaskGroup() as tasks:
        members = [Member(f"trainer-{index}", partial(spawn, index), Client) for index in range(number)]
        pool = TrainerPool(members, PATIENT_S, str(folder), backend)
        pool.expect(adapters)
        kept = [
            tasks.create_task(member.keep(partial(pool.prepare, member), partial(pool.lost, member))) for member in members
        ]
        await pool.wait_ready()
        try:
            yield pool, alive
        finally:
            for task in kept:
                task.cancel()


async def train(pool: TrainerPool, batch: MakeBatch, first: int = 0, last: int = STEPS) -> list[StepResult]:
    results = []
    for version in range(first, last):
        done = await pool.step([batch("a", version, rows=7, seed=version)])
        results += done.results
        if (number := len(pool.home("a"))) > 1:
            assert sorted(index for index, _ in done.shares) == list(range(number))
            assert sum(tokens["a"] for _, tokens in done.shares) == done.results[0].tokens
        assert not results[-1].fault and results[-1].ref == AdapterRef("a", 0, version + 1)
    return results


async def saved(pool: TrainerPool, folder: Path) -> torch.Tensor:
    await pool.save(AdapterRef("a", 0, STEPS), str(folder))
    tensors = load_file(folder / "adapter.safetensors")
    return torch.stack([tensors[name] for name in ("master", "exp_avg", "exp_avg_sq")])


@pytest.fixture
def stopped_is_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes: a process that is stopped answers no heartbeat either."""
    monkeypatch.setattr("weft.transport.channel._SILENCE_MS", int(20 * PATIENT_S * 1000))


def test_an_adapter_is_shared_where_fewer_are_expected_than_there_are_trainers(trainer_base: Path, tmp_path: Path) -> None:
    async def law() -> None:
        async with trainers(trainer_base, tmp_path, 2, 8) as (pool, _):
            for expected, homes in ((None, 1), (1, 2), (2, 1)):
                if expected is not None:
                    pool.expect(expected)
                await pool.add(config(), 0)
                assert len(pool.home("a")) == homes
                await pool.drop("a")

    asyncio.run(law())


@pytest.mark.parametrize("loss", LOSSES)
def test_an_adapter_on_two_trainers_is_the_same_adapter_on_one(
    trainer_base: Path, tmp_path: Path, batch: MakeBatch, loss: str
) -> None:
    async def law(number: int) -> tuple[torch.Tensor, list[StepResult]]:
        async with trainers(trainer_base, tmp_path / str(number), number, 1) as (pool, _):
            await pool.add(config(loss), 0)
            home = pool.home("a")
            assert isinstance(home, tuple) and len(home) == number
            results = await train(pool, batch)
            states = []
            for one in home:  # each of them can save it, and they agree to the bit
                pool._home["a"] = (one,)
                states.append(await saved(pool, tmp_path / f"{number}-{len(states)}"))
            assert all(torch.equal(state, states[0]) for state in states)
            return states[0], results

    (one, alone), (two, shared) = asyncio.run(law(1)), asyncio.run(law(2))
    assert (two - one).norm() / one.norm() < 1e-5
    assert (two[0] - one[0]).abs().max() > 0, "it is another sum of floats"
    for mine, theirs in zip(alone, shared, strict=True):
        assert mine.tokens == theirs.tokens
        assert mine.metrics.keys() == theirs.metrics.keys()
        for name, value in mine.metrics.items():
            assert theirs.metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


def test_one_of_two_dies_within_a_step_it_is_the_adapters_death_and_both_have_it_again(
    trainer_base: Path, tmp_path: Path, batch: MakeBatch, stopped_is_not_dead: None
) -> None:
    async def law() -> None:
        async with trainers(trainer_base, tmp_path, 2, 1) as (pool, alive):
            await pool.add(config(), 0)
            await train(pool, batch)
            await pool.save(AdapterRef("a", 0, STEPS), str(tmp_path / "checkpoint"))
            os.kill(alive[1].pid, signal.SIGSTOP)  # it takes the step, and does not come to add up
            async with asyncio.TaskGroup() as tasks:
                step = tasks.create_task(died(pool, batch("a", STEPS, rows=7)))
                lost = tasks.create_task(pool.wait_lost("a"))
                (well,) = [member for member in pool._members if member.endpoint == alive[0].endpoint]
                assert (await well.request(messages.GetStatistics())).steps == STEPS  # it answers when the step has begun
                assert not step.done()
                os.kill(alive[1].pid, signal.SIGKILL)
            assert step.result() == lost.result(), "one death in one set of words"
            await pool.wait_ready()
            await pool.add(config(), 1)
            again = AdapterRef("a", 1, STEPS)
            await pool.load(again, str(tmp_path / "checkpoint"))
            (result,) = (await pool.step([of(batch("a", STEPS, rows=7), again)])).results
            assert not result.fault and result.ref.version == STEPS + 1
            assert len(alive) == 3

    asyncio.run(law())


async def died(pool: TrainerPool, batch: TrainBatch) -> str:
    with pytest.raises(PeerDiedError) as caught:
        await pool.step([batch])
    return str(caught.value)


def test_what_one_trainer_cannot_take_no_trainer_takes_and_the_next_step_is_taken(
    trainer_base: Path, tmp_path: Path, batch: MakeBatch
) -> None:
    async def law() -> None:
        async with trainers(trainer_base, tmp_path, 2, 1) as (pool, _):
            await pool.add(config(), 0)
            bad = batch("a", 0, rows=7)
            bad.tokens[0] = 10_000  # in the rows of one of them
            (result,) = (await pool.step([bad])).results
            assert "token ids from" in result.fault
            (worse,) = (await pool.step([of(batch("a", 0, rows=7), AdapterRef("a", 0, 0), advantages=np.inf)])).results
            assert "not finite" in worse.fault
            await train(pool, batch)

    asyncio.run(law())


def test_where_nccl_cannot_be_had_the_same_step_goes_through_the_host_if_that_is_allowed_and_nobody_counts_as_dead(
    trainer_base: Path, tmp_path: Path, batch: MakeBatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def law(backend: str) -> None:
        async with trainers(trainer_base, tmp_path / backend, 2, 1, backend) as (pool, alive):
            await pool.add(config(), 0)
            home = pool.home("a")
            if backend == "nccl":
                with pytest.raises(AdapterFault, match="a/0/0: no step on 2 trainers: .*backend='nccl'"):
                    await pool.step([batch("a", 0, rows=7)])
            else:
                await train(pool, batch)
            assert pool.home("a") == home and len(alive) == 2
            assert not any(life.ended for life in pool._home["a"])

    asyncio.run(law("nccl-or-gloo"))
    assert "go through the host (gloo) from now on" in caplog.text
    asyncio.run(law("nccl"))


def test_a_group_that_breaks_though_nobody_has_died_costs_the_adapter_nothing(
    trainer_base: Path, tmp_path: Path, batch: MakeBatch, stopped_is_not_dead: None
) -> None:
    """As NCCL's does where it has no memory, say."""

    async def law() -> None:
        async with trainers(trainer_base, tmp_path, 2, 1) as (pool, alive):
            await pool.add(config(), 0)
            await train(pool, batch, 0, 1)
            os.kill(alive[1].pid, signal.SIGSTOP)
            async with asyncio.TaskGroup() as tasks:
                step = tasks.create_task(pool.step([batch("a", 1, rows=7, seed=1)]))
                (first,) = [member for member in pool._members if member.endpoint == alive[0].endpoint]
                assert (await first.request(messages.GetStatistics())).steps == 1  # it answers when the step has begun
                assert pool._store is not None
                pool._store.dissolve(pool._epochs[pool._home["a"]])
                while pool._epochs and not step.done():  # noqa: ASYNC110  until the other one has given the group up
                    await asyncio.sleep(0.01)
                os.kill(alive[1].pid, signal.SIGCONT)
            (result,) = step.result().results
            assert not result.fault and result.ref == AdapterRef("a", 0, 2)
            assert len(alive) == 2 and not any(life.ended for life in pool._home["a"])
            await train(pool, batch, 2, STEPS)

    asyncio.run(law())


def test_what_one_trainer_fails_by_is_the_reason_not_that_the_others_lost_it(batch: MakeBatch) -> None:
    class Trainers:
        """The first waits for the second, which has no memory."""

        name, deaths, ended = "trainer", 0, asyncio.Event()

        async def request(self, message: object, deadline_s: float | None = None) -> object:
            match message:
                case messages.TrainShare(rank=0):
                    await self.ended.wait()
                    raise RendezvousError("the group of this step is no more")
                case messages.TrainShare():
                    raise RemoteError("CUDA out of memory")
                case messages.EndShare():
                    self.ended.set()
            return messages.Done()

    async def law() -> None:
        pool = TrainerPool([], PATIENT_S, backend="nccl-or-gloo")
        home = (_Life(Trainers()), _Life(Trainers()))  # type: ignore[arg-type]
        with pytest.raises(AdapterFault, match="out of memory"):
            await pool._share(batch("a"), home)
        assert pool._backend == "nccl"

    asyncio.run(law())


def test_trainers_are_shared_out_evenly_and_one_each_where_adapters_are_as_many(trainer_base: Path, tmp_path: Path) -> None:
    async def law() -> None:
        async with trainers(trainer_base, tmp_path, 3, 2) as (pool, _):
            for name in ("a", "b", "c"):
                await pool.add(AdapterConfig(name), 0)
            homes = [set(pool._home[name]) for name in ("a", "b", "c")]
            assert [len(home) for home in homes] == [2, 1, 1]
            assert homes[1] == homes[2] and not homes[0] & homes[1], "who shares waits for all: nobody else lives there"
            ref = AdapterRef("b", 0, 0)
            assert not await pool.move(ref, [pool.home("b")]), "nor moves there"

    asyncio.run(law())


def test_parts_hold_every_row_once_and_about_as_many_tokens(batch: MakeBatch) -> None:
    whole = batch("a", 0, rows=11, seed=3)
    for number in (1, 2, 3, 16):
        parts = split(whole, number)
        assert sum(len(part.tokens) for part in parts) == len(whole.tokens)
        assert sorted(np.concatenate([part.advantages for part in parts])) == sorted(whole.advantages)
        assert {(part.loss_tokens, part.loss_rows) for part in parts} == {(whole.loss_tokens, whole.loss_rows)}
        if number <= 3:
            sizes = [len(part.tokens) for part in parts]
            assert max(sizes) - min(sizes) <= int(np.diff(whole.offsets).max())
    parts = split(whole, 2)
    results = [StepResult(whole.ref, 5, {"loss": 1.0, "kl": 2.0}), StepResult(whole.ref, 6, {"loss": 0.5, "kl": 4.0})]
    counts = [int(part.mask.sum()) for part in parts]
    joined = join(parts, results)
    assert joined.tokens == 11 and joined.metrics["loss"] == 1.5
    assert joined.metrics["kl"] == pytest.approx((2 * counts[0] + 4 * counts[1]) / sum(counts))


@pytest.mark.parametrize("size", [2, 3])
def test_a_sum_is_everybodys_and_the_same_bits_everywhere(size: int) -> None:
    store = RendezvousStore()
    tensors = [torch.randn(1001, generator=torch.Generator().manual_seed(rank)) for rank in range(size)]
    wanted = torch.stack(tensors).sum(0)
    links = [BroadcastGroup(store.address, "sum", rank, size, "gloo", PATIENT_S) for rank in range(size)]

    async def law() -> None:
        for link, tensor in zip(links, tensors, strict=True):
            assert link.statistics().broadcasts == 0 and tensor.is_contiguous()
        await asyncio.gather(*(asyncio.to_thread(link.all_reduce, one) for link, one in zip(links, tensors, strict=True)))

    asyncio.run(law())
    assert torch.allclose(tensors[0], wanted, atol=1e-5)
    assert all(torch.equal(tensor, tensors[0]) for tensor in tensors)
    for link in links:
        link.close()


def of(batch: TrainBatch, ref: AdapterRef, advantages: float | None = None) -> TrainBatch:
    fields = {**vars(batch), "ref": ref}
    if advantages is not None:
        fields["advantages"] = np.full_like(batch.advantages, advantages)
    return TrainBatch(**fields)


if __name__ == "__main__":
    asyncio.run(_be_a_trainer(globals()["BASE"], globals()["FOLDER"], globals()["READY"]))
