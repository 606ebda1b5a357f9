"""The one page: how many adapters learn at once on three pools. One `_live` task an adapter; they share the pools.

    prompts ──> [gate] ──> samplers ──> FIFO of groups ──> trainers ──> param sync ──.
                  ^        (FairShare)                   (StepScheduler)              |
                  '──────────── release(groups_per_step) after install ───────────────'

    loop            waits for                                      who unblocks it
    _live           its trainer, after that died                   the pool, which restarts it
    _watch          the death of its trainer                       the pool, or the end of the lineage
    _train          the oldest groups                              Rollouts; or whoever interrupts: leave, a death, a fault
                    its place in a trainer launch, and the launch  StepScheduler, when that of its trainer ends
                    every sampler to install the version           the parameter sync
    _sample         a place of the gate                            _train, after the install
    Rollouts        places where its adapter lives, in fair shares any group that ends there
                    a sampler that is ready; after several         the pool, which restarts them
                    deaths all of them, and the other suspects     and the suspect that runs, when it ends

A fault of one adapter (its reward raises, its loss is not finite) and the death of a trainer interrupt `_train` only where it
waits for groups, and an evaluation: a trainer launch or a sync that has begun is never cancelled under the other adapters that
share it. Whatever is neither one adapter's (AdapterFault; InstallError: its weights do not sample as they should;
CheckpointError: its files are not what was written) nor PeerDiedError is a fault of ours and ends the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from weft.configs.schema import AdapterConfig, Config, RunConfig, TrainerConfig
from weft.pipeline.adapter import Adapter
from weft.pipeline.batch import Ready, count_late, figures, make_batch, token_ages, transcripts
from weft.pipeline.checkpoint import check_resume
from weft.pipeline.evaluate import evaluate
from weft.pipeline.events import Observer, Phase, PipelineStatistics
from weft.pipeline.interfaces import Pools
from weft.pipeline.journal import Journal
from weft.pipeline.prompts import PromptSource
from weft.pipeline.recovery import Recovery
from weft.pipeline.rollout import Rollouts
from weft.pipeline.schedule import FairShare, StepScheduler
from weft.pipeline.staleness import StalenessGate, staleness
from weft.transport.errors import AdapterFault, CheckpointError, InstallError, PeerDiedError
from weft.transport.messages import Group

BARREN_STEPS = 3
BARREN = (
    f"nothing to learn from in its first {BARREN_STEPS} steps: every rollout of a prompt had the same reward. Its task is too "
    "hard or too easy for it, or its reward never changes"
)
MAX_DEATHS = 5  # of a trainer under one adapter between two steps: more are no accident
Groups = asyncio.Queue[asyncio.Task[Group | None]]


async def run(config: Config, pools: Pools, observers: Sequence[Observer] = ()) -> PipelineStatistics:
    """Train every adapter of `config` to its end, resuming what `config.run.dir` holds; then say how it went."""
    pipeline = Pipeline(config.run, config.cluster.trainer, pools, observers)
    return await pipeline.run(config.adapters)


class Pipeline:
    """Adapters join and leave while it runs. It is made, run and asked within one event loop.

    clock: seconds, for all that it tells of time; the loop's if None (which is uvloop's in whole milliseconds).
    """

    def __init__(
        self,
        settings: RunConfig,
        trainer: TrainerConfig,
        pools: Pools,
        observers: Sequence[Observer] = (),
        clock: Callable[[], float] | None = None,
    ) -> None:
        clock = clock or asyncio.get_running_loop().time
        self._settings = settings
        self._pools = pools
        self._adapters: dict[str, Adapter] = {}
        self._tasks = asyncio.TaskGroup()
        self._journal = Journal(observers, clock)
        self._recovery = Recovery(settings, pools.trainers, self._journal)
        self._share = FairShare(pools.samplers, clock, self._journal.rollouts_changed)
        self._rollouts = Rollouts(pools.samplers, self._share, self._journal)
        self._steps = StepScheduler(pools.trainers, trainer.token_budget, self._tasks, clock, self._journal.launch_ended)

    async def run(self, configs: Iterable[AdapterConfig]) -> PipelineStatistics:
        """Train `configs` and all that join meanwhile; returns when every adapter has ended.

        Raises ValueError as `join` does, before any pool is asked, and an ExceptionGroup for a fault that is no adapter's own.
        """
        configs = tuple(configs)
        for config in configs:
            check_resume(self._settings.dir, config)
        try:
            async with self._tasks:
                for config in configs:
                    self.join(config)
        finally:
            for adapter in self._adapters.values():
                adapter.gone.set()  # whoever waits in `leave` does not outwait the run
        return self.statistics()

    def join(self, config: AdapterConfig) -> None:
        """Begin an adapter, or go on with it. ValueError: it is training now, or was here under another configuration."""
        before = self._adapters.get(config.name)
        if before is not None and not before.gone.is_set():
            raise ValueError(f"name={config.name!r}: must not be that of an adapter that is training")
        check_resume(self._settings.dir, config)
        adapter = self._adapters[config.name] = Adapter(config, self._journal.now())
        finished = self._recovery.finished(config)
        if finished is None:
            self._journal.note_phase(adapter)
            self._tasks.create_task(self._live(adapter))
        else:
            adapter.progress = finished
            self._end(adapter, Phase.FINISHED)
            adapter.gone.set()
        self._tell_trainers()

    async def leave(self, name: str) -> None:
        """End an adapter after what is under way: checkpointed, exported, dropped. Returns when it is gone."""
        adapter = self._adapters[name]
        adapter.interrupt(None)
        await adapter.gone.wait()

    def warn(self, message: str) -> None:
        """Say, once, what the user should know of the run as a whole."""
        self._journal.warn_once("", message)

    def statistics(self) -> PipelineStatistics:
        """Everything now."""
        adapters = {name: adapter.statistics(self._share.in_flight(name)) for name, adapter in self._adapters.items()}
        samplers, trainers = self._share.statistics(), self._steps.statistics()
        return PipelineStatistics(self._journal.now(), adapters, samplers, trainers, self._journal.warnings())

    # ---- one adapter ----

    async def _live(self, adapter: Adapter) -> None:
        """From joining to the end, through any number of lineages. Here its own faults end, and nobody else's."""
        try:
            while not adapter.phase.ended:
                try:
                    await self._run_lineage(adapter)
                except* PeerDiedError as died:
                    await self._roll_back(adapter, died)
        except* (AdapterFault, InstallError, CheckpointError) as fault:
            self._fail(adapter, fault)
        await self._drop(adapter)

    async def _run_lineage(self, adapter: Adapter) -> None:
        await self._recovery.begin_lineage(adapter)
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(self._watch(adapter))
            await self._learn(adapter)
            watching.cancel()

    async def _watch(self, adapter: Adapter) -> None:
        """Tell an adapter that waits for rollouts, and calls no trainer, that there is none for them."""
        adapter.interrupt(PeerDiedError(await self._pools.trainers.wait_lost(adapter.name)))

    async def _learn(self, adapter: Adapter) -> None:
        config = adapter.config
        num_prompts = await self._pools.samplers.add(config, adapter.ref.lineage)
        await self._publish(adapter)
        if adapter.version == 0 and adapter.progress.eval_base is None:
            await self._evaluate(adapter, final=False)
        with self._steps.on_policy(adapter.name) if config.max_staleness == 0 else contextlib.nullcontext():
            await self._train(adapter, PromptSource(num_prompts, config.sampling.seed, adapter.progress.prompts))
        if adapter.checkpointed != adapter.version:
            await self._recovery.checkpoint(adapter)
        done = adapter.version == config.num_steps
        if done and adapter.progress.eval_final is None:
            await self._evaluate(adapter, final=True)
        await self._recovery.export(adapter)
        self._end(adapter, Phase.FINISHED if done else Phase.LEFT)

    async def _train(self, adapter: Adapter, prompts: PromptSource) -> None:
        config = adapter.config
        gate = adapter.gate = StalenessGate(config.groups_per_step, config.max_staleness)
        groups: Groups = asyncio.Queue(gate.places)
        async with asyncio.TaskGroup() as tasks:
            sampling = tasks.create_task(self._sample(adapter, prompts, gate, groups))
            taught = adapter.version > 0  # by an earlier session, as far as this one knows
            while adapter.version < config.num_steps:
                asked = self._enter(adapter, Phase.SAMPLING)
                ready = await next_batch(adapter, groups)
                if ready is None:  # it is to leave
                    break
                waited = self._enter(adapter, Phase.QUEUED) - asked
                entered = partial(self._journal.enter, adapter, Phase.TRAINING)
                step = await self._steps.submit(ready.batch, entered)
                if step.result.fault:
                    raise AdapterFault(f"{adapter.ref}: {step.result.fault}", "FloatingPointError")
                late, told = count_late(ready.token_ages, config.max_staleness), ready.figures
                adapter.take_step(told.reward, told.tokens_sampled, step.result.tokens, ready.ages, late)
                sync_seconds = await self._publish(adapter)
                gate.release(config.groups_per_step)
                self._journal.step_taken(adapter, ready, waited, step, sync_seconds)
                taught = taught or bool(ready.batch.advantages.any())
                if not taught and adapter.version == BARREN_STEPS:
                    self._journal.warn_once(adapter.name, BARREN)
                if adapter.version % self._settings.checkpoint_every == 0:
                    await self._recovery.checkpoint(adapter)
            sampling.cancel()

    async def _sample(self, adapter: Adapter, prompts: PromptSource, gate: StalenessGate, groups: Groups) -> None:
        """One task a group, as places allow; ends with the last group that the last step needs."""
        async with asyncio.TaskGroup() as rollouts:
            while prompts.position < adapter.config.num_steps * adapter.config.groups_per_step:
                await gate.admit()
                first = prompts.position % adapter.config.groups_per_step == 0  # of its step, to be told as text
                groups.put_nowait(rollouts.create_task(self._rollouts.sample(adapter, *prompts.next(), texts=first)))

    async def _publish(self, adapter: Adapter) -> float:
        """Returns when every sampler has the adapter's version, with the seconds that took; new rollouts start with it."""
        began = self._enter(adapter, Phase.SYNCING)
        done = await self._pools.sync.publish(adapter.ref, adapter.installed)
        adapter.installed = adapter.ref
        return self._journal.synced(adapter, began, done)

    async def _evaluate(self, adapter: Adapter, final: bool) -> None:
        if not adapter.config.eval_prompts:
            return
        self._enter(adapter, Phase.EVALUATING)
        rollout = partial(self._rollouts.sample, adapter, held_out=True)
        result = await evaluate(adapter.config.eval_prompts, rollout, adapter.faulted)
        adapter.raise_fault()
        assert result is not None, "a rollout that is given up says why"
        if final:
            adapter.progress = replace(adapter.progress, eval_final=result.figures.reward)
        else:
            adapter.progress = replace(adapter.progress, eval_base=result.figures.reward)
        self._journal.evaluated(adapter, result, final)

    # ---- how it ends ----

    async def _roll_back(self, adapter: Adapter, died: BaseExceptionGroup[PeerDiedError]) -> None:
        """Wait for a trainer to begin a new lineage on. The death is counted if the trainer had something to do for it."""
        reason = next(leaves(died))
        adapter.deaths += adapter.phase not in (Phase.SAMPLING, Phase.EVALUATING)
        if adapter.deaths > MAX_DEATHS:
            raise reason
        self._journal.warn_once("", f"a trainer died, its adapters go back to their last checkpoints: {reason}")
        adapter.progress = replace(adapter.progress, rollbacks=adapter.progress.rollbacks + 1)
        self._enter(adapter, Phase.ROLLING_BACK)
        await self._pools.trainers.wait_ready()
        self._enter(adapter, Phase.JOINING)

    def _fail(self, adapter: Adapter, fault: BaseExceptionGroup[AdapterFault | InstallError | CheckpointError]) -> None:
        reason = next(leaves(fault))
        adapter.traceback = "".join(traceback.format_exception(reason))
        self._end(adapter, Phase.FAILED)
        self._journal.failed(adapter, str(reason.args[0] if reason.args else reason).split("\n")[0])

    async def _drop(self, adapter: Adapter) -> None:
        await self._pools.samplers.drop(adapter.name)
        with contextlib.suppress(PeerDiedError):  # which drops it too
            await self._pools.trainers.drop(adapter.name)
        adapter.gone.set()
        self._tell_trainers()

    def _tell_trainers(self) -> None:
        """How many adapters they are for. One that has ended, in an earlier run or in this one, is none of them."""
        self._pools.trainers.expect(sum(not adapter.phase.ended for adapter in self._adapters.values()))

    def _end(self, adapter: Adapter, phase: Phase) -> None:
        adapter.ended = self._enter(adapter, phase)

    def _enter(self, adapter: Adapter, phase: Phase) -> float:
        self._journal.enter(adapter, phase)
        return self._journal.now()


async def next_batch(adapter: Adapter, groups: Groups) -> Ready | None:
    """The oldest groups of a step, in order; waits for each. None: it is to leave. Raises its fault, or StalenessError."""
    oldest: list[Group] = []
    while len(oldest) < adapter.config.groups_per_step and not adapter.interrupted.done():
        head = await groups.get()
        await asyncio.wait((head, adapter.interrupted), return_when=asyncio.FIRST_COMPLETED)
        if not adapter.interrupted.done() and (group := head.result()) is not None:
            oldest.append(group)
    adapter.raise_fault()
    if adapter.interrupted.done():
        return None
    ages = tuple(staleness(group, adapter.version, adapter.config.max_staleness) for group in oldest)
    batch = make_batch(adapter.config, adapter.ref, oldest)
    return Ready(batch, figures(oldest), ages, token_ages(batch), transcripts(oldest))


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions in a group, however deep."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error
