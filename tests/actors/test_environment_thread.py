"""A task that does not give way holds up its own adapter, and nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoTokenizer

from weft.actors import environment_thread
from weft.actors.base_model import tiny_path
from weft.actors.environment import Environment, Prompt, Reply
from weft.actors.environment_thread import EnvironmentThread
from weft.actors.episode import Bounds, Chat, Turn, run_episode
from weft.transport.errors import AdapterFault
from weft.transport.messages import AdapterRef, Sample

LONG_S = 120.0  # a deadline that nothing here may reach
PROMPT = Prompt([{"role": "user", "content": "2 + 2?"}])


class Task:
    """Does `what` in each call of respond."""

    num_prompts = 5

    def __init__(self, what: Callable[[], Any] = lambda: None) -> None:
        self.what = what
        self.loops: list[asyncio.AbstractEventLoop] = []

    def prompt(self, index: int, held_out: bool) -> Prompt:
        self.what()
        return PROMPT

    async def respond(self, prompt: Prompt, turns: Any) -> Reply:
        self.loops.append(asyncio.get_running_loop())
        self.what()
        await asyncio.sleep(0)
        return Reply(done=True, reward=1.0)


async def prompt_of(environment: EnvironmentThread) -> Prompt:
    async def ask(task: Environment) -> Prompt:
        return task.prompt(0, False)

    return await environment.run("its environment's prompt", ask)


async def play(environment: EnvironmentThread, reply_s: float = LONG_S) -> Sample:
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())

    async def generate(tokens: Any, ref: AdapterRef, room: int, seed: int) -> Turn:
        return Turn([tokenizer.eos_token_id], [-0.5], "4")

    chat = Chat(tokenizer)
    bounds = Bounds(max_turns=2, max_tokens=4, max_length=100, reply_s=reply_s)
    return await run_episode(
        "a", environment, PROMPT, chat.prompt(PROMPT), chat, generate, bounds, lambda: AdapterRef("a", 0, 0), hash
    )


@pytest.fixture
def released() -> Any:
    event = threading.Event()
    yield event
    event.set()


def blocks(released: threading.Event) -> None:
    released.wait()


def computes(released: threading.Event) -> None:
    for _ in itertools.takewhile(lambda _: not released.is_set(), itertools.count()):
        pass


@pytest.mark.parametrize("way", [blocks, computes])
def test_a_task_that_never_gives_way_ends_by_its_deadline_while_the_others_go_on(way: Any, released: threading.Event) -> None:
    async def law() -> None:
        stuck, lively = EnvironmentThread("stuck", Task(lambda: way(released))), EnvironmentThread("lively", Task())
        async with asyncio.timeout(LONG_S), asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(fault_of(play(stuck, reply_s=1.0)))
            for _ in range(3):
                assert (await play(lively)).reward == 1.0
            fault = await waiting
        assert fault.kind == "TimeoutError"
        assert "no answer within 1 s" in str(fault)
        stuck.close()
        lively.close()

    asyncio.run(law())


def test_a_prompt_that_does_not_come_is_waited_for_beside_the_others(released: threading.Event) -> None:
    async def law() -> None:
        stuck, lively = EnvironmentThread("stuck", Task(lambda: blocks(released))), EnvironmentThread("lively", Task())
        async with asyncio.timeout(LONG_S), asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(prompt_of(stuck))
            assert await prompt_of(lively) == PROMPT
            released.set()
            assert await waiting == PROMPT
        stuck.close()
        lively.close()

    asyncio.run(law())


class Own(BaseException):
    """A user's own."""


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise SystemExit


def raises(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, Own, Unspeakable])
def test_whatever_a_task_raises_is_its_adapters_fault_and_the_thread_goes_on(error: type[BaseException]) -> None:
    async def law() -> None:
        task = Task(lambda: raises(error()))
        environment = EnvironmentThread("a", task)
        for call in (play, prompt_of):
            fault = await fault_of(call(environment))
            assert fault.kind == error.__name__
        task.what = lambda: None
        assert (await play(environment)).reward == 1.0
        assert len(set(task.loops)) == 1, "what the task keeps may belong to its loop"
        environment.close()

    asyncio.run(law())


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_callback_that_ends_the_tasks_loop_ends_nothing_else(error: type[BaseException]) -> None:
    async def law() -> None:
        task = Task()
        task.what = lambda: task.loops[-1].call_soon(raises, error())
        environment = EnvironmentThread("a", task)
        for _ in range(2):
            assert (await play(environment)).reward == 1.0
        environment.close()

    asyncio.run(law())


def test_a_closed_one_leaves_no_thread() -> None:
    async def law() -> None:
        environment = EnvironmentThread("closed", Task())
        await prompt_of(environment)
        thread = thread_of("closed")
        environment.close()
        await asyncio.to_thread(thread.join, LONG_S)
        assert not thread.is_alive()
        environment.close()

    asyncio.run(law())


def thread_of(name: str) -> threading.Thread:
    (thread,) = (thread for thread in threading.enumerate() if thread.name == f"environment of {name}")
    return thread


@pytest.mark.parametrize("given_up", [False, True])
def test_closing_lets_what_is_under_way_end_in_order_and_whoever_waits_learns_at_once(
    given_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment_thread, "ENDING_S", LONG_S)

    async def law() -> None:
        environment, told = EnvironmentThread("leaving", Task()), list[str]()
        begun, ending, closed = threading.Event(), threading.Event(), threading.Event()

        async def beside() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                raise SystemExit  # a user's own, in the loop's next turn: the others' ends go on

        async def call(task: Environment) -> None:
            loop = asyncio.get_running_loop()
            own = [loop.create_task(beside()) for _ in range(2)]
            try:
                begun.set()
                await asyncio.Event().wait()
            finally:
                ending.set()
                while not closed.is_set():  # noqa: ASYNC110  what tells of it is no event of this loop
                    await asyncio.sleep(0)
                for step in range(20):
                    told.append(f"step {step}")
                    await asyncio.sleep(0.001)
                told.append(f"{sum(one.done() for one in own)} beside it")

        async with asyncio.timeout(LONG_S), asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(fault_of(environment.run("its environment's respond", call)))
            await asyncio.to_thread(begun.wait)
            thread = thread_of("leaving")
            if given_up:  # by whoever waited, and it is about to end already
                waiting.cancel()
                await asyncio.to_thread(ending.wait)
            environment.close()
            closed.set()
            assert given_up or "its environment's respond" in str(await waiting)
            await asyncio.to_thread(thread.join)
        assert told == [*(f"step {step}" for step in range(20)), "2 beside it"]

    asyncio.run(law())


async def heedless(released: threading.Event) -> None:
    while not released.is_set():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.001)


async def stuck(released: threading.Event) -> None:
    released.wait()


@pytest.mark.parametrize("way", [heedless, stuck])
def test_who_waits_for_a_task_that_heeds_no_close_learns_at_once_too(
    way: Any, released: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment_thread, "ENDING_S", LONG_S)

    async def law() -> None:
        environment, begun = EnvironmentThread("heedless", Task()), threading.Event()

        async def call(task: Environment) -> None:
            begun.set()
            await way(released)

        async with asyncio.timeout(LONG_S), asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(fault_of(environment.run("its environment's respond", call)))
            await asyncio.to_thread(begun.wait)
            thread = thread_of("heedless")
            environment.close()
            await waiting
            assert thread.is_alive()
            released.set()
            await asyncio.to_thread(thread.join)

    asyncio.run(law())


def test_a_task_that_heeds_no_close_has_its_second_and_no_more(released: threading.Event) -> None:
    async def law() -> None:
        environment, begun = EnvironmentThread("endless", Task()), threading.Event()

        async def call(task: Environment) -> None:
            begun.set()
            await heedless(released)

        async with asyncio.timeout(LONG_S), asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(fault_of(environment.run("its environment's respond", call)))
            await asyncio.to_thread(begun.wait)
            thread = thread_of("endless")
            environment.close()
            await waiting
            await asyncio.to_thread(thread.join)

    asyncio.run(law())


def test_a_closed_one_refuses_at_once() -> None:
    async def law() -> None:
        environment = EnvironmentThread("refusing", Task())
        environment.close()
        async with asyncio.timeout(LONG_S):
            assert "closed" in str(await fault_of(prompt_of(environment)))

    asyncio.run(law())


async def fault_of(call: Any) -> AdapterFault:
    with pytest.raises(AdapterFault) as caught:
        await call
    return caught.value
