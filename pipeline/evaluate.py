"""Held-out prompts of one adapter, sampled as its training rollouts are (temperature too), one rollout each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from weft.pipeline.batch import RolloutFigures, figures, transcripts
from weft.pipeline.events import Transcript
from weft.transport.messages import Group


@dataclass(frozen=True)
class Evaluation:
    """reward in `figures`: the mean, which is the success rate where rewards are 0 and 1."""

    prompts: int
    figures: RolloutFigures
    transcripts: tuple[Transcript, ...]  # of those that came with texts


async def evaluate(
    prompts: int, rollout: Callable[[int], Coroutine[Any, Any, Group | None]], faulted: asyncio.Future[None]
) -> Evaluation | None:
    """Roll out the held-out prompts 0 .. prompts - 1, all at once: the samplers' fair share decides how many run.

    Waits for the slowest of them, or until `faulted` is done, which ends those that run. None: there is a fault, and the
    adapter knows it.
    """

    def end(_: asyncio.Future[None]) -> None:
        for task in results:
            task.cancel()

    async with asyncio.TaskGroup() as tasks:
        results = [tasks.create_task(rollout(index)) for index in range(prompts)]
        faulted.add_done_callback(end)
    faulted.remove_done_callback(end)
    groups = [group for task in results if not task.cancelled() and (group := task.result()) is not None]
    return Evaluation(prompts, figures(groups), transcripts(groups)) if len(groups) == prompts else None
