"""A sampler: one vLLM engine that holds many adapter versions at once and plays rollouts of any of them.

    AddAdapter ──> environment                         Rollout ──lease──> episodes ──> Group
    Receive ──> side thread of the worker ──> Install ──Canary──> leases ──Retire, last lease──> removed from the engine

Nothing here pauses the engine or touches its prefix cache: a new version is a new name, id and path, so blocks of an older
one can never be taken for its own (DESIGN laws 2, 4, 5).
"""

from __future__ import annotations

import asyncio
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.actors.blame import blamed_on
from weft.actors.canary import canary_allowance, canary_tokens
from weft.actors.environment import Environment, Prompt
from weft.actors.environment_thread import EnvironmentThread
from weft.actors.environments.load import load_environment, num_prompts
from weft.actors.episode import Bounds, Chat, Turn, run_episode, seed_of
from weft.actors.leases import Lease, Leases, Version
from weft.actors.sampler_engine import CallError, Engine, engine_arguments
from weft.actors.transcript import told, transcript
from weft.configs.build import build
from weft.configs.schema import AdapterConfig, SamplerConfig
from weft.transport.errors import AdapterFault, EngineLostError, InstallError
from weft.transport.messages import (
    AdapterAdded,
    AdapterRef,
    AddAdapter,
    Canary,
    Done,
    DropAdapter,
    GetStatistics,
    Group,
    Install,
    Receive,
    Retire,
    Rollout,
    Sample,
    SamplerStatistics,
)

_FIRST_POLL_S, _LAST_POLL_S = 0.0003, 0.01  # between two looks at a slab that is on its way; doubles


@dataclass(frozen=True)
class _Adapter:
    """What AddAdapter made. settings: the mapping it came from, by which a repetition is known."""

    config: AdapterConfig
    environment: EnvironmentThread
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class _Announced:
    """A slab that was announced, with the id that it will have in the engine, and the trainer's canary when that is known."""

    message: Receive
    lora_id: int
    canary: asyncio.Future[Canary]


class Sampler:
    """Answers the sampler's messages. `fatal` ends with an exception when the engine has died, and the process must follow.

    max_lora_rank: of any adapter to come; max_live_versions: places for versions in the engine, over all adapters;
    tensor_parallel: workers that the model is split over, on a GPU each; largest_group: of rollouts of one prompt.
    """

    def __init__(
        self,
        model_folder: str,
        model_dtype: str,
        config: SamplerConfig,
        index: int,
        device: str,
        max_lora_rank: int,
        max_live_versions: int,
        tensor_parallel: int = 1,
        largest_group: int = 1,
    ) -> None:
        arguments = engine_arguments(
            model_folder, model_dtype, config, device, max_lora_rank, max_live_versions, tensor_parallel, largest_group
        )
        self._engine = Engine(arguments, device)
        self._config = config
        self._index = index
        self._dtype = model_dtype
        self._max_lora_rank = int(arguments["max_lora_rank"])
        self._leases = Leases(max_live_versions)
        self._adapters: dict[str, _Adapter] = {}
        self._announced: dict[AdapterRef, _Announced] = {}
        self._installing: dict[AdapterRef, asyncio.Event] = {}
        self._removal = asyncio.Lock()
        self._in_flight = self._installs = 0
        self._busy = _BusyClock()
        self.fatal: asyncio.Future[None]

    async def start(self) -> None:
        """Load the model; returns when the engine answers."""
        self.fatal = asyncio.get_running_loop().create_future()
        await self._engine.start()
        self._chat = Chat(self._engine.tokenizer, self._config.max_model_len)

    async def aclose(self) -> None:
        """End the engine and its process."""
        self._engine.close()

    async def handle(self, message: object) -> object:
        """The reply to one message. Many run at once; cancelling one ends what it does."""
        try:
            match message:
                case Rollout():
                    return await self._rollout(message)
                case Receive():
                    return await self._receive(message)
                case Install():
                    return await self._install(message.ref)
                case Canary(ref):
                    if (announced := self._announced.get(ref)) is not None and not announced.canary.done():
                        announced.canary.set_result(message)
                    return Done()
                case Retire():
                    self._leases.retire(message.ref)
                    await self._remove_retired()
                    return Done()
                case AddAdapter():
                    return await self._add(message)
                case DropAdapter():
                    return await self._drop(message.name)
                case GetStatistics():
                    return self._statistics()
        except EngineLostError as error:
            if not self.fatal.done():
                self.fatal.set_exception(error)
            raise
        raise ValueError(f"{type(message).__name__} is no message for a sampler")

    # ---- adapters ----

    async def _add(self, message: AddAdapter) -> AdapterAdded:
        config = build(AdapterConfig, message.config)
        if config.lora.rank > self._max_lora_rank:  # now, not when it has trained its first step
            raise AdapterFault(
                f"{config.name}: lora.rank={config.lora.rank}: must be at most {self._max_lora_rank}, "
                "which is what the running samplers take",
                "ValueError",
            )
        held = self._adapters.get(config.name)
        if held is None or held.settings != message.config:
            with blamed_on(config.name, f"making its environment {config.environment.target}"):
                # On a thread: importing a library of tasks takes seconds, in which the others' rollouts go on.
                environment = await asyncio.to_thread(load_environment, config.environment.target, config.environment.settings)
            held = self._adapters[config.name] = _Adapter(config, EnvironmentThread(config.name, environment), message.config)

        async def count(environment: Environment) -> int | None:
            return num_prompts(environment)

        return AdapterAdded(num_prompts=await held.environment.run("its environment's num_prompts", count))

    async def _drop(self, name: str) -> Done:
        if name in self._adapters:
            self._adapters.pop(name).environment.close()
        for ref in [ref for ref in self._announced if ref.name == name]:
            del self._announced[ref]
        await self._engine.call("slab_discard", name)
        self._leases.retire_all(name)
        await self._remove_retired()
        return Done()

    # ---- versions ----

    async def _receive(self, message: Receive) -> Done:
        handle = message.handle
        slab = {key: getattr(handle, key) for key in ("nbytes", "dtype", "rank", "scale", "checksum")}
        slab["modules"] = list(handle.modules)
        keys = ("store", "epoch", "rank", "world_size", "backend", "deadline_s")
        group = None if handle.data is not None else {key: getattr(message, key) for key in keys}
        data = None if handle.data is None else handle.data.tobytes()
        for stale in [ref for ref in self._announced if ref.name == handle.ref.name and ref not in self._installing]:
            await self._engine.call("slab_discard", str(stale))  # it never was installed, and would keep its slot
            self._announced.pop(stale, None)
        lora_id, canary = self._leases.new_id(), asyncio.get_running_loop().create_future()
        if handle.ref in self._installing and (before := self._announced.get(handle.ref)) is not None:
            canary = before.canary  # which is being waited for: the relay that was to send it may have died
        if handle.canary_logprob is not None and not canary.done():
            canary.set_result(Canary(handle.ref, handle.canary_logprob, handle.canary_noise))
        # from now on: one that is given up here may have its slot there
        self._announced[handle.ref] = _Announced(message, lora_id, canary)
        try:
            await self._engine.call("slab_receive", str(handle.ref), slab, group, data, lora_id, message.sequence)
        except CallError as error:
            self._announced.pop(handle.ref, None)
            raise InstallError(f"sampler {self._index} cannot take {handle.ref}: {error}") from error
        return Done()

    async def _install(self, ref: AdapterRef) -> Done:
        while ref in self._installing:  # a relay that serves a late joiner may say it twice at once
            await self._installing[ref].wait()
        if self._leases.restore(ref):
            if self._announced.pop(ref, None) is not None:  # the slab came again, of a version that had stayed
                await self._engine.call("slab_discard", str(ref))
            return Done()
        if ref not in self._announced:
            raise InstallError(f"sampler {self._index}: no slab of {ref} was announced")
        announced = self._announced[ref]
        self._installing[ref] = asyncio.Event()
        try:
            await self._remove_retired()
            await self._install_in(self._leases.reserve(ref, announced.lora_id), announced)
        finally:
            self._installing.pop(ref).set()
        return Done()

    async def _install_in(self, version: Version, announced: _Announced) -> None:
        """Install an announced slab in the place that `version` has."""
        try:
            await self._apply(version, announced.message.deadline_s)
            await self._check_canary(version, announced)
        except BaseException:
            self._leases.give_up(version)
            await self._remove_retired()
            raise
        else:
            self._leases.publish(version)
            self._installs += 1
            if version.dropped:
                await self._remove_retired()
        finally:
            if self._announced.get(version.ref) is announced:  # else it has been announced again
                del self._announced[version.ref]

    async def _apply(self, version: Version, deadline_s: float) -> None:
        """Into the engine, as soon as the slab is there."""
        pause = _FIRST_POLL_S
        try:
            async with asyncio.timeout(deadline_s):
                # The worker must not wait, and has no way to call back: so it is asked again.
                while "pending" in await self._engine.call_each("slab_install", str(version.ref), version.lora_id):
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, _LAST_POLL_S)
        except TimeoutError as error:
            raise InstallError(f"sampler {self._index}: the slab of {version.ref} did not come in {deadline_s} s") from error
        except CallError as error:
            raise InstallError(f"sampler {self._index} could not install {version.ref}: {error}") from error

    async def _check_canary(self, version: Version, announced: _Announced) -> None:
        """Refuse an audited version under which the engine does not give the canary tokens the trainer's log-probability, which
        may come after the engine has given its own."""
        if not announced.message.handle.audited:
            return
        tokens, base = canary_tokens(self._engine.vocab_size), announced.message.handle.base_logprob
        found = await self._engine.score(tokens, version)
        try:
            async with asyncio.timeout(announced.message.deadline_s):
                canary = await announced.canary
        except TimeoutError as error:
            raise InstallError(f"sampler {self._index}: the trainer's canary of {version.ref} did not come") from error
        wanted, allowed = canary.logprob, canary_allowance(self._dtype, canary.noise, canary.logprob - base)
        if abs(found - wanted) <= allowed:
            return
        why = "it is not the adapter that the trainer published"
        if abs(found - base) <= allowed:
            why = "the engine samples as the base model, without the adapter"
        proofs = await self._engine.call_each("slab_prove", version.lora_id)
        stands = next((proof for proof in proofs if proof), "the engine holds to the bit what was packed")
        raise InstallError(
            f"sampler {self._index}: canary of {version.ref} has log-probability {found:.5f}, the trainer's is "
            f"{wanted:.5f}, the base's {base:.5f} (tolerance {allowed:.5f}): {why}; {stands}"
        )

    async def _remove_retired(self) -> None:
        """Free the places of retired versions whose last lease has ended. What a cancelled call leaves, the next one does."""
        async with self._removal:
            while (version := self._leases.next_removable()) is not None:
                await self._engine.call("slab_remove", version.lora_id)
                self._leases.forget(version)

    # ---- rollouts ----

    async def _rollout(self, message: Rollout) -> Group:
        adapter = self._adapters.get(message.ref.name)
        if adapter is None:
            raise InstallError(f"sampler {self._index} has no adapter {message.ref.name!r}")

        async def ask(environment: Environment) -> tuple[Prompt, list[int]]:
            prompt = environment.prompt(message.prompt_index, message.held_out)
            return prompt, self._chat.prompt(prompt)

        prompt, tokens = await adapter.environment.run("its environment's prompt", ask)
        self._check_length(adapter.config.name, message.prompt_index, tokens)
        leases = [self._leases.acquire(message.ref) for _ in range(message.group_size)]
        self._count(message.group_size)
        try:
            async with asyncio.TaskGroup() as tasks:
                episodes = [
                    tasks.create_task(self._episode(adapter, message, prompt, tokens, lease, sample))
                    for sample, lease in enumerate(leases)
                ]
        except BaseExceptionGroup as group:
            raise _root(group) from None
        finally:
            self._count(-message.group_size)
            for lease in leases:
                self._leases.release(lease)
            await self._remove_retired()
        samples = told([episode.result() for episode in episodes], message.texts)
        oldest = min(int(sample.versions[sample.versions >= 0].min()) for sample in samples)
        ref = AdapterRef(message.ref.name, message.ref.lineage, oldest)
        asked = transcript(prompt.messages) if message.texts else ()
        return Group(ref, message.prompt_index, samples, self._index, asked)

    async def _episode(
        self, adapter: _Adapter, message: Rollout, prompt: Prompt, tokens: Sequence[int], lease: Lease, sample: int
    ) -> Sample:
        config = adapter.config
        moves = config.rollout_version == "between_turns"

        # A finite task asks the same prompt in each epoch, at times twice under one version: other noise each time, but the
        # same for base and final evaluation.
        draw = "held out" if message.held_out else message.epoch
        source = (config.sampling.seed, config.name, message.prompt_index, draw)

        async def generate(tokens: Sequence[int], ref: AdapterRef, max_tokens: int, seed: int) -> Turn:
            assert lease.version.ref == ref, "a turn samples under the version it leases"
            try:
                return await self._engine.generate(tokens, lease.version, config.sampling, max_tokens, seed)
            except ValueError as error:
                trace = traceback.format_exc()
                raise AdapterFault(f"{config.name}: vLLM refuses its request: {error}", type(error).__name__, trace) from error

        return await run_episode(
            config.name,
            adapter.environment,
            prompt,
            tokens,
            self._chat,
            generate,
            Bounds(config.environment.max_turns, config.sampling.max_tokens, self._config.max_model_len),
            version=lambda: self._leases.renew(lease) if moves else lease.version.ref,
            seed=lambda turn: seed_of(*source, sample, turn),
        )

    def _check_length(self, name: str, index: int, tokens: Sequence[int]) -> None:
        limit = self._config.max_model_len
        if len(tokens) >= limit:
            raise AdapterFault(
                f"{name}: prompt {index} has {len(tokens)} tokens, and cluster.sampler.max_model_len={limit} must be above that"
            )

    def _count(self, change: int) -> None:
        self._in_flight += change
        self._busy.run(self._in_flight > 0)

    def _statistics(self) -> SamplerStatistics:
        self._engine.check()
        return SamplerStatistics(
            pid=os.getpid(),
            engine_pid=self._engine.pid,
            live_versions=tuple(map(str, self._leases.live)),
            rollouts_in_flight=self._in_flight,
            tokens_sampled=self._engine.tokens_sampled,
            installs=self._installs,
            busy_seconds=self._busy.seconds,
            prompt_tokens=self._engine.prompt_tokens,
            cached_tokens=self._engine.cached_tokens,
        )


def _root(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first exception of a group that is one: siblings are cancelled because of it."""
    first = group.exceptions[0]
    return _root(first) if isinstance(first, BaseExceptionGroup) else first


class _BusyClock:
    """Seconds during which it ran."""

    def __init__(self) -> None:
        self._total = 0.0
        self._since: float | None = None

    def run(self, running: bool) -> None:
        now = time.monotonic()
        self._total += now - self._since if self._since is not None else 0.0
        self._since = now if running else None

    @property
    def seconds(self) -> float:
        return self._total + (time.monotonic() - self._since if self._since is not None else 0.0)
