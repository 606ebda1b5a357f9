"""The sampler over a real vLLM on this CPU, against transformers and PEFT. One engine serves the module (~20 s)."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import peft
import psutil
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from weft.actors.canary import canary_tokens
from weft.actors.checksum import checksum
from weft.actors.episode import seed_of
from weft.actors.lora import SlabLayout, linear_shapes, resolve_targets
from weft.actors.sampler import Sampler
from weft.actors.sampler_engine import STEP_TOKENS_CPU
from weft.configs.schema import AdapterConfig, EnvironmentConfig, LoraConfig, SamplerConfig, SamplingConfig
from weft.transport.broadcast import BroadcastGroup, RendezvousStore
from weft.transport.errors import AdapterFault, EngineLostError, InstallError
from weft.transport.messages import (
    UNSAMPLED,
    AdapterRef,
    AddAdapter,
    Canary,
    DropAdapter,
    GetStatistics,
    Group,
    Install,
    Receive,
    Retire,
    Rollout,
    SamplerStatistics,
    SlabHandle,
)

T = TypeVar("T")
MAX_LENGTH = 256
GROUP = 16  # of rollouts
LIVE = 6
PATIENT_S = 200.0  # of what a quiet machine does within a second
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Environments under test control: `gates` hold a turn's reply until the test lets it go.
ENVIRONMENTS = '''
import asyncio
from weft.actors.environment import Prompt, Reply

arrived, gates = {}, {}

class Talk:
    """`turns` turns, then done; if `gated`, every reply but the last waits for the test."""
    num_prompts = 7
    def __init__(self, turns=1, gate="", words="count", scored=False):
        self.turns, self.gate, self.words, self.scored = turns, gate, words, scored
    def prompt(self, index, held_out):
        return Prompt([{"role": "user", "content": f"{self.words} {index}"}])
    async def respond(self, prompt, turns):
        said = [turn for turn in turns if turn["role"] == "assistant"]
        if len(said) >= self.turns:
            reward = float(sum(len(turn["content"]) for turn in said)) if self.scored else 1.0
            return Reply(done=True, reward=reward, metrics={"characters": len(said[-1]["content"])})
        if self.gate:
            arrived[self.gate].set()
            await gates[self.gate].wait()
        return Reply([{"role": "user", "content": "go on"}])

class Broken(Talk):
    async def respond(self, prompt, turns):
        raise RuntimeError("the kettle is on fire")
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of 0.2 M parameters with a byte-level tokenizer."""
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("qwen3")
    config = Qwen3Config(
        vocab_size=272,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.15,
        eos_token_id=256,
    )
    Qwen3ForCausalLM(config).save_pretrained(made)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(made)
    return made


@dataclass
class Reference:
    """transformers and PEFT: what every log-probability has to be."""

    folder: Path
    shapes: dict[str, tuple[int, int]] = field(init=False)
    slabs: dict[AdapterRef, SlabHandle] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shapes = linear_shapes(json.loads((self.folder / "config.json").read_text()))

    def slab(self, ref: AdapterRef, rank: int = 8, targets: tuple[str, ...] = ("all-linear",), size: float = 0.3) -> SlabHandle:
        """A random adapter, different for every ref; alpha is 2 * rank."""
        modules = resolve_targets(self.shapes, targets)
        layout = SlabLayout.build(self.shapes, modules, rank)
        generator = torch.Generator().manual_seed(seed_of(ref))
        flat = torch.randn(layout.numel, generator=generator) * size
        data = flat.view(torch.uint8).numpy()
        words = int(checksum(flat))
        handle = SlabHandle(ref, data.nbytes, "float32", rank, 2.0, modules, 0.0, 0.0, data=data, checksum=words)
        self.slabs[ref] = handle
        tokens = torch.tensor(canary_tokens(272))
        sums = [float(self.logprobs(which, tokens)[1:].sum()) for which in (ref, None)]
        self.slabs[ref] = dataclasses.replace(handle, canary_logprob=sums[0], base_logprob=sums[1])
        return self.slabs[ref]

    def model(self, ref: AdapterRef | None) -> Any:
        base = Qwen3ForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        if ref is None:
            return base
        handle = self.slabs[ref]
        layout = SlabLayout.build(self.shapes, handle.modules, handle.rank)
        assert handle.data is not None
        pairs = layout.views(torch.from_numpy(handle.data.copy()).view(torch.float32))
        config = peft.LoraConfig(
            r=handle.rank, lora_alpha=handle.scale * handle.rank, target_modules=list(handle.modules), lora_dropout=0.0
        )
        model = peft.get_peft_model(base, config)
        state = {}
        for name, (a, b) in pairs.items():
            state[f"base_model.model.{name}.lora_A.weight"] = a
            state[f"base_model.model.{name}.lora_B.weight"] = b
        peft.set_peft_model_state_dict(model, state)
        return model.eval()

    def logprobs(self, ref: AdapterRef | None, tokens: Any, temperature: float = 1.0) -> np.ndarray:
        """log p(token | those before it), 0 for the first."""
        with torch.no_grad():
            ids = torch.as_tensor(tokens).long()
            logits = self.model(ref)(ids[None]).logits[0].float() / temperature
            found = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        return np.concatenate([[0.0], found.numpy()])


class Gate:
    """An event that an environment, on its own thread, and the test both know."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.set = self._event.set

    async def wait(self) -> None:
        await asyncio.to_thread(self._event.wait, PATIENT_S)


@dataclass
class Bench:
    """One sampler and the loop it lives on."""

    runner: asyncio.Runner
    sampler: Sampler
    reference: Reference
    environments: Any
    names: Iterator[int] = field(default_factory=itertools.count)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(2 * PATIENT_S):
                return await work

        return self.runner.run(bounded())

    async def add(
        self, sampling: SamplingConfig | None = None, target: str = "Talk", pinned: bool = True, **settings: Any
    ) -> str:
        """A new adapter; returns its name."""
        name = f"a{next(self.names)}"
        config = AdapterConfig(
            name,
            rollout_version="pinned" if pinned else "between_turns",
            environment=EnvironmentConfig(f"weft_test_environments.{target}", settings),
            sampling=sampling or SamplingConfig(max_tokens=24),
        )
        await self.sampler.handle(AddAdapter(dataclasses.asdict(config)))
        return name

    async def publish(self, handle: SlabHandle) -> None:
        await self.sampler.handle(Receive(handle, "", "", 1, 1, "gloo", PATIENT_S))
        await self.sampler.handle(Install(handle.ref))

    async def adapter(self, version: int = 1, **settings: Any) -> AdapterRef:
        """A new adapter with one random version installed."""
        ref = AdapterRef(await self.add(**settings), 0, version)
        await self.publish(self.reference.slab(ref))
        return ref

    async def rollout(self, ref: AdapterRef, group_size: int = 2, index: int = 0) -> Group:
        group = await self.sampler.handle(Rollout(ref, index, group_size))
        assert isinstance(group, Group)
        return group

    async def statistics(self) -> SamplerStatistics:
        found = await self.sampler.handle(GetStatistics())
        assert isinstance(found, SamplerStatistics)
        return found

    def gate(self, name: str) -> tuple[Gate, Gate]:
        """(a reply waits, let it go)"""
        self.environments.arrived[name], self.environments.gates[name] = Gate(), Gate()
        return self.environments.arrived[name], self.environments.gates[name]

    def check(self, group: Group, ref: AdapterRef | None = None, temperature: float = 1.0) -> None:
        """Every sampled token has the log-probability that the reference gives it under `ref`."""
        ref = ref or group.ref
        for sample in group.samples:
            wanted = self.reference.logprobs(ref, sample.tokens, temperature)
            sampled = sample.versions == ref.version
            assert sampled.any()
            assert np.abs(wanted - sample.logprobs)[sampled].mean() < 1e-3


async def refusal(installing: Awaitable[object]) -> str:
    """Why it was refused; nothing if it was not."""
    try:
        await installing
    except InstallError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def bench(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("environments")
    (place / "weft_test_environments.py").write_text(ENVIRONMENTS)
    sys.path.insert(0, str(place))
    import weft_test_environments  # type: ignore[import-not-found]

    config = SamplerConfig(max_num_seqs=96, max_model_len=MAX_LENGTH, kv_cache_gib=0.25)
    sampler = Sampler(str(folder), "float32", config, 3, "cpu", max_lora_rank=12, max_live_versions=LIVE, largest_group=GROUP)
    with asyncio.Runner() as runner:
        runner.run(sampler.start())
        yield Bench(runner, sampler, Reference(folder), weft_test_environments)
        runner.run(sampler.aclose())
    sys.path.remove(str(place))


@pytest.fixture(autouse=True)
def nothing_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each law: no lease, no version, no request is left behind."""
    yield
    if "bench" not in request.fixturenames:
        return
    bench: Bench = request.getfixturevalue("bench")

    async def sweep() -> None:
        for name in list(bench.sampler._adapters):
            await bench.sampler.handle(DropAdapter(name))
        left = await bench.statistics()
        assert left.live_versions == () and left.rollouts_in_flight == 0
        assert (await bench.sampler._engine.call("slab_statistics"))["lora_ids"] == []

    bench.run(sweep())


def test_sampled_logprobs_equal_transformers_and_peft_for_adapters_of_any_rank_and_targets(bench: Bench) -> None:
    async def law() -> list[Group]:
        refs = []
        for rank, targets in [
            (1, ("all-linear",)),
            (12, ("q_proj", "v_proj")),
            (4, ("up_proj", "down_proj", "k_proj")),
            (8, ("o_proj",)),
        ]:
            ref = AdapterRef(await bench.add(), 0, 5)
            await bench.publish(bench.reference.slab(ref, rank, targets, size=0.5))
            refs.append(ref)
        async with asyncio.TaskGroup() as tasks:  # all in the same batches
            work = [tasks.create_task(bench.rollout(ref, 3, index)) for index in range(2) for ref in refs]
        return [task.result() for task in work]

    for group in bench.run(law()):
        assert group.sampler == 3 and len(group.samples) == 3
        bench.check(group)


def test_logprobs_are_of_the_distribution_sampled_from(bench: Bench) -> None:
    warm = SamplingConfig(max_tokens=24, temperature=0.6)
    group = bench.run(bench.rollout(bench.run(bench.adapter(sampling=warm)), 3))
    bench.check(group, temperature=0.6)


def test_truncation_of_the_distribution_is_in_the_logprobs(bench: Bench) -> None:
    group = bench.run(bench.rollout(bench.run(bench.adapter(sampling=SamplingConfig(max_tokens=24, top_k=1))), 2))
    for sample in group.samples:
        assert (sample.logprobs == 0).all(), "the only token left has probability 1"


def test_the_end_of_a_turn_is_sampled_and_a_cut_one_is_said_to_be_cut(bench: Bench) -> None:
    group = bench.run(bench.rollout(bench.run(bench.adapter(sampling=SamplingConfig(max_tokens=100))), 16))
    ended = [sample for sample in group.samples if not sample.truncated]
    assert ended and len(ended) < 16
    for sample in group.samples:
        assert (sample.tokens[-1] == 256) == (not sample.truncated)
        said = sample.tokens[sample.versions != UNSAMPLED]
        text = bench.sampler._engine.tokenizer.decode(said if sample.truncated else said[:-1])
        assert sample.metrics["characters"] == len(text), "the environment hears all but the mark of the turn's end"


def test_texts_come_for_the_best_and_the_worst_where_they_are_asked_for_and_are_what_the_tokens_decode_to(bench: Bench) -> None:
    async def law() -> list[Group]:
        ref = await bench.adapter(turns=2, scored=True)
        asked = [Rollout(ref, 3, 8, texts=True), Rollout(ref, 3, 8)]
        return [await bench.sampler.handle(message) for message in asked]  # type: ignore[misc]

    group, silent = bench.run(law())
    assert silent.prompt == () and not any(sample.messages for sample in silent.samples)
    assert group.prompt == ({"role": "user", "content": "count 3"},)
    rewards = [sample.reward for sample in group.samples]
    told = [sample for sample in group.samples if sample.messages]
    assert len(set(rewards)) > 2 and sorted(sample.reward for sample in told) == [min(rewards), max(rewards)]
    tokenizer = bench.sampler._engine.tokenizer
    for sample in told:
        own = itertools.groupby(zip(sample.tokens, sample.versions, strict=True), lambda pair: pair[1] != UNSAMPLED)
        turns = [[int(token) for token, _ in run if token != 256] for sampled, run in own if sampled]
        first, second = (tokenizer.decode(turn) for turn in turns)
        said, reply, last = sample.messages
        assert (said, reply) == ({"role": "assistant", "content": first}, {"role": "user", "content": "go on"})
        assert last == {"role": "assistant", "content": second} and sample.reward == len(first + second)


def test_stop_strings_and_tokens_end_a_turn(bench: Bench) -> None:
    stops = SamplingConfig(max_tokens=200, stop=("e", "a"), stop_token_ids=(20, 30))
    group = bench.run(bench.rollout(bench.run(bench.adapter(sampling=stops)), 16))
    tokenizer = bench.sampler._engine.tokenizer
    ends = {tokenizer.decode([int(sample.tokens[-1])]) for sample in group.samples if not sample.truncated}
    held = {end for end in ends if "e" in end or "a" in end}
    assert held & {"e", "a"} and ends - held <= {*tokenizer.batch_decode([[20], [30], [256]])}


def test_a_stop_string_may_be_a_special_token(bench: Bench) -> None:
    """As the environment's text shows them: tool calls of some models begin with one."""
    stops = SamplingConfig(max_tokens=200, stop=("<|im_start|>",))
    group = bench.run(bench.rollout(bench.run(bench.adapter(sampling=stops)), 16))
    (start,) = bench.sampler._engine.tokenizer.encode("<|im_start|>")
    own = [sample.tokens[sample.versions != UNSAMPLED] for sample in group.samples]
    assert any(start in tokens for tokens in own)
    assert not any(start in tokens[:-1] for tokens in own), "the turn goes on behind its stop string"


def test_the_same_seed_gives_the_same_tokens_and_siblings_differ(bench: Bench) -> None:
    async def law() -> list[Group]:
        ref = await bench.adapter()
        return [await bench.rollout(ref, 4), await bench.rollout(ref, 4), await bench.rollout(ref, 4, index=1)]

    first, again, other = bench.run(law())
    assert [s.tokens.tolist() for s in first.samples] == [s.tokens.tolist() for s in again.samples]
    assert len({tuple(s.tokens.tolist()) for s in first.samples + other.samples}) == 8


def test_a_prompt_that_comes_again_is_drawn_anew_and_a_held_out_one_is_not(bench: Bench) -> None:
    """In another epoch, though under the same version: a task with fewer prompts than places asks them twice under one."""

    async def law() -> list[Group]:
        ref = await bench.adapter()
        later = dataclasses.replace(ref, version=2)  # the same weights
        await bench.publish(dataclasses.replace(bench.reference.slabs[ref], ref=later))
        asked = [Rollout(ref, 0, 2), Rollout(ref, 0, 2, epoch=1), Rollout(ref, 0, 2, True), Rollout(later, 0, 2, True)]
        return [await bench.sampler.handle(message) for message in asked]  # type: ignore[misc]

    first, again, held_out, held_out_again = (
        [sample.tokens.tolist() for sample in group.samples] for group in bench.run(law())
    )
    assert not {tuple(tokens) for tokens in first} & {tuple(tokens) for tokens in again}
    assert held_out == held_out_again


def test_an_adapter_that_has_run_away_fails_alone_and_leaves_nothing_behind(bench: Bench) -> None:
    """Its weights are finite, what the model computes with them is not: neither may others' tokens be, where they read what it
    has left in the cache, or beside it in a batch."""

    async def law() -> list[Group]:
        bad = AdapterRef(await bench.add(), 0, 1)
        slab = bench.reference.slab(bad, size=1e19)
        await bench.publish(dataclasses.replace(slab, audited=False))
        sound, groups = await bench.adapter(), []

        async def fail(index: int) -> None:
            with pytest.raises(AdapterFault, match=f"{bad.name}: .* no numbers"):
                await bench.rollout(bad, 8, index)

        for index in range(6):
            async with asyncio.TaskGroup() as tasks:
                failing = [tasks.create_task(fail(4 * index + n)) for n in range(4)]
                beside = tasks.create_task(bench.rollout(sound, 8, index))
            groups += [beside.result(), await bench.rollout(sound, 8, index + 100)]
            assert all(one.done() for one in failing)
        return groups

    for group in bench.run(law()):
        bench.check(group)


def test_a_pinned_rollout_keeps_its_version_while_others_are_installed_and_its_own_is_retired(bench: Bench) -> None:
    arrived, go = bench.gate("pinned")

    async def law() -> tuple[Group, Group, SamplerStatistics, SamplerStatistics]:
        old = await bench.adapter(turns=2, gate="pinned")
        new = AdapterRef(old.name, 0, 2)
        async with asyncio.TaskGroup() as tasks:
            work = tasks.create_task(bench.rollout(old))
            await arrived.wait()
            await bench.publish(bench.reference.slab(new))
            await bench.sampler.handle(Retire(old))
            during = await bench.statistics()
            go.set()
        return work.result(), await bench.rollout(old), during, await bench.statistics()

    group, later, during, after = bench.run(law())
    assert group.ref.version == 1 and all((s.versions[s.versions != UNSAMPLED] == 1).all() for s in group.samples)
    assert all(s.turns == 2 for s in group.samples)
    bench.check(group)
    assert sorted(during.live_versions) == [f"{group.ref.name}/0/1", f"{group.ref.name}/0/2"]
    assert after.live_versions == (f"{group.ref.name}/0/2",), "the last lease took the retired version with it"
    assert later.ref.version == 2, "a rollout of a retired version gets the newest of its lineage"
    bench.check(later)


def test_installs_beside_running_requests_change_nothing_in_them(bench: Bench) -> None:
    async def law() -> tuple[Group, Group]:
        ref = await bench.adapter(sampling=SamplingConfig(max_tokens=150, stop_token_ids=()))
        alone = await bench.rollout(ref, 4)
        async with asyncio.TaskGroup() as tasks:
            work = tasks.create_task(bench.rollout(ref, 4))
            other = AdapterRef(await bench.add(), 0, 0)
            while not work.done():
                other = dataclasses.replace(other, version=other.version + 1)
                await bench.publish(bench.reference.slab(other))
                await bench.sampler.handle(Retire(other))
        return alone, work.result()

    alone, disturbed = bench.run(law())
    bench.check(disturbed)
    assert [s.tokens.tolist() for s in alone.samples] == [s.tokens.tolist() for s in disturbed.samples]


def test_between_turns_moves_to_the_newest_and_every_token_knows_its_version(bench: Bench) -> None:
    arrived, go = bench.gate("moving")

    async def law() -> tuple[Group, AdapterRef, AdapterRef, tuple[str, ...]]:
        old = await bench.adapter(turns=2, gate="moving", pinned=False)
        new = AdapterRef(old.name, 0, 2)
        async with asyncio.TaskGroup() as tasks:
            work = tasks.create_task(bench.rollout(old))
            await arrived.wait()
            await bench.publish(bench.reference.slab(new))
            await bench.sampler.handle(Retire(old))
            go.set()
        return work.result(), old, new, (await bench.statistics()).live_versions

    group, old, new, live = bench.run(law())
    assert group.ref == old and live == (str(new),)
    for sample in group.samples:
        assert set(sample.versions.tolist()) == {UNSAMPLED, 1, 2}
    bench.check(group, old)
    bench.check(group, new)


def test_a_new_version_never_samples_over_the_prefix_cache_of_an_older_one(bench: Bench) -> None:
    async def law() -> tuple[list[Group], list[int]]:
        ref = await bench.adapter(words="a prompt of several cache blocks, the same for every version of the adapter " * 2)
        groups, cached = [], [(await bench.statistics()).cached_tokens]

        async def rollout() -> None:
            groups.append(await bench.rollout(ref))
            told = await bench.statistics()
            assert told.cached_tokens <= told.prompt_tokens
            cached.append(told.cached_tokens)

        await rollout()
        await rollout()
        for version in (2, 3):
            ref = dataclasses.replace(ref, version=version)
            await bench.publish(bench.reference.slab(ref))
            await rollout()
        return groups, [now - before for before, now in itertools.pairwise(cached)]

    groups, cached = bench.run(law())
    assert cached[1] > cached[0] == cached[2] == cached[3], "hits are of the same version alone"
    assert [group.ref.version for group in groups] == [1, 1, 2, 3]
    for group in groups:
        bench.check(group)


def test_a_wrong_slab_is_refused_by_its_canary_and_leaves_nothing(bench: Bench) -> None:
    async def law() -> None:
        ref = await bench.adapter()
        wanted = bench.reference.slab(dataclasses.replace(ref, version=2))
        other = bench.reference.slab(dataclasses.replace(ref, version=3))
        with pytest.raises(InstallError, match="not the adapter that the trainer published"):
            await bench.publish(dataclasses.replace(wanted, data=other.data, checksum=other.checksum))
        assert wanted.data is not None
        with pytest.raises(InstallError, match="samples as the base model"):
            await bench.publish(dataclasses.replace(wanted, data=np.zeros_like(wanted.data), checksum=0))
        with pytest.raises(InstallError, match="not the adapter"):
            await bench.publish(dataclasses.replace(wanted, scale=4.0))
        assert (await bench.statistics()).live_versions == (str(ref),)
        await bench.publish(wanted)
        bench.check(await bench.rollout(wanted.ref))

    bench.run(law())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 64}, "above the engine's max_lora_rank 16"),
        ({"modules": ("model.layers.9.mlp.up_proj",)}, "model.layers.9"),
        ({"nbytes": 12}, "12 bytes, but these modules"),
        ({"data": np.full(1, np.nan, np.float32)}, "not every weight is finite"),
        ({"checksum": 1}, "the bytes that came are not those that the trainer published"),
    ],
)
def test_a_slab_that_cannot_be_applied_is_refused_before_the_engine_sees_it(
    bench: Bench, change: Mapping[str, Any], message: str
) -> None:
    async def law() -> None:
        ref = await bench.adapter()
        handle = bench.reference.slab(dataclasses.replace(ref, version=2))
        if "rank" in change:
            handle = bench.reference.slab(handle.ref, rank=64)
        elif "data" in change:
            data = np.full(handle.nbytes // 4, np.nan, np.float32).view(np.uint8)
            handle = dataclasses.replace(handle, data=data, checksum=0)
        else:
            handle = dataclasses.replace(handle, **change)
        with pytest.raises(InstallError, match=message):
            await bench.publish(handle)
        bench.check(await bench.rollout(ref))

    bench.run(law())


def test_what_is_not_installed_is_an_error_and_the_engine_lives(bench: Bench) -> None:
    async def law() -> None:
        ref = await bench.adapter()
        for unknown in (AdapterRef("nobody", 0, 0), AdapterRef(ref.name, 1, 0)):
            with pytest.raises(InstallError):
                await bench.rollout(unknown)
        with pytest.raises(InstallError, match="announced"):
            await bench.sampler.handle(Install(AdapterRef(ref.name, 0, 9)))
        bench.check(await bench.rollout(ref))

    bench.run(law())


def test_more_live_versions_than_places_are_refused_with_both_numbers(bench: Bench) -> None:
    async def law() -> None:
        ref = await bench.adapter()
        for version in range(2, LIVE + 1):
            await bench.publish(bench.reference.slab(dataclasses.replace(ref, version=version), rank=1))
        extra = bench.reference.slab(dataclasses.replace(ref, version=99), rank=1)
        with pytest.raises(InstallError, match=f"{LIVE} versions are live and max_live_versions is {LIVE}"):
            await bench.publish(extra)
        await bench.sampler.handle(Retire(ref))
        await bench.publish(extra)
        bench.check(await bench.rollout(extra.ref))

    bench.run(law())


def test_ids_in_the_engine_are_never_reused(bench: Bench) -> None:
    async def law() -> list[list[int]]:
        ref, seen = await bench.adapter(), []
        for version in range(2, 6):
            seen.append((await bench.sampler._engine.call("slab_statistics"))["lora_ids"])
            newer = dataclasses.replace(ref, version=version)
            await bench.publish(bench.reference.slab(newer, rank=1))
            await bench.sampler.handle(Retire(ref))
            ref = newer
        return seen

    ids = bench.run(law())
    assert all(len(held) == 1 for held in ids)
    flat = [held[0] for held in ids]
    assert flat == sorted(set(flat))


def test_a_cancelled_rollout_aborts_its_requests_and_frees_its_leases(bench: Bench) -> None:
    async def law() -> None:
        ref = await bench.adapter(sampling=SamplingConfig(max_tokens=200))
        before = (await bench.statistics()).tokens_sampled
        async with asyncio.TaskGroup() as tasks:
            work = tasks.create_task(bench.rollout(ref, 8))
            while (await bench.statistics()).rollouts_in_flight < 8:
                await bench.sampler._engine.call("slab_statistics")
            await bench.sampler.handle(Retire(ref))
            work.cancel()
        after = await bench.statistics()
        assert after.live_versions == () and after.rollouts_in_flight == 0 and after.tokens_sampled == before
        assert bench.sampler._engine._llm.get_num_unfinished_requests() == 0

    bench.run(law())


def test_a_removal_that_is_cut_short_is_done_by_the_next_call_and_never_comes_back(bench: Bench) -> None:
    async def law() -> None:
        ref = await bench.adapter()
        newer = dataclasses.replace(ref, version=2)
        await bench.publish(bench.reference.slab(newer))
        async with asyncio.TaskGroup() as tasks:
            retiring = tasks.create_task(bench.sampler.handle(Retire(ref)))
            await asyncio.sleep(0)  # it awaits the engine now
            retiring.cancel()
        await bench.publish(bench.reference.slabs[ref])  # again, of the version that the engine may have let go of
        bench.check(await bench.rollout(ref))
        for old in (ref, newer):
            await bench.sampler.handle(Retire(old))
        assert (await bench.statistics()).live_versions == ()
        assert (await bench.sampler._engine.call("slab_statistics"))["lora_ids"] == []

    bench.run(law())


def test_an_environment_that_raises_is_its_adapters_fault_alone(bench: Bench) -> None:
    async def law() -> tuple[Group, BaseException]:
        broken = await bench.adapter(target="Broken")
        sound = await bench.adapter()
        async with asyncio.TaskGroup() as tasks:
            work = tasks.create_task(bench.rollout(sound, 4))
            with pytest.raises(AdapterFault, match="the kettle is on fire") as caught:
                await bench.rollout(broken, 4)
        return work.result(), caught.value

    group, fault = bench.run(law())
    bench.check(group)
    assert isinstance(fault, AdapterFault) and fault.kind == "RuntimeError" and "in respond" in fault.traceback


def test_a_request_that_vllm_refuses_is_its_adapters_fault(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async def law() -> None:
        ref = await bench.adapter()
        monkeypatch.setattr(bench.sampler._chat, "prompt", lambda prompt: [1, 2, 99999])  # a tokenizer of another model
        with pytest.raises(AdapterFault, match="vLLM refuses its request: .*99999.*vocabulary"):
            await bench.rollout(ref)
        monkeypatch.undo()
        bench.check(await bench.rollout(ref))

    bench.run(law())


def test_a_prompt_too_long_for_the_model_names_both_numbers(bench: Bench) -> None:
    async def law() -> None:
        ref = await bench.adapter(words="x" * 300)
        with pytest.raises(AdapterFault, match=rf"prompt 0 has 3\d\d tokens, and .*max_model_len={MAX_LENGTH}"):
            await bench.rollout(ref)

    bench.run(law())


def test_a_turn_is_cut_to_what_the_model_has_left(bench: Bench) -> None:
    group = bench.run(bench.rollout(bench.run(bench.adapter(words="x" * 220, sampling=SamplingConfig(max_tokens=200))), 4))
    assert all(len(sample.tokens) <= MAX_LENGTH for sample in group.samples)
    assert any(sample.truncated and len(sample.tokens) == MAX_LENGTH for sample in group.samples)


def test_more_prompt_tokens_than_one_step_takes_are_no_harm(bench: Bench) -> None:
    group = bench.run(bench.rollout(bench.run(bench.adapter(sampling=SamplingConfig(max_tokens=3))), 96))
    assert sum((sample.versions == UNSAMPLED).sum() for sample in group.samples) > STEP_TOKENS_CPU
    bench.check(dataclasses.replace(group, samples=group.samples[-4:]))


def test_a_rank_above_the_engines_is_refused_when_the_adapter_is_added(bench: Bench) -> None:
    wide = AdapterConfig("wide", environment=EnvironmentConfig("weft_test_environments.Talk"), lora=LoraConfig(rank=17))
    with pytest.raises(AdapterFault, match=r"wide: lora.rank=17: must be at most 16"):
        bench.run(bench.sampler.handle(AddAdapter(dataclasses.asdict(wide))))
    assert "wide" not in bench.sampler._adapters


def test_adding_an_adapter_twice_changes_nothing_and_says_how_many_prompts_there_are(bench: Bench) -> None:
    async def law() -> None:
        name = await bench.add()
        held = bench.sampler._adapters[name]
        for _ in range(2):
            reply = await bench.sampler.handle(AddAdapter(held.settings))
            assert getattr(reply, "num_prompts", None) == 7
        assert bench.sampler._adapters[name] is held

    bench.run(law())


@pytest.fixture
def scored(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set when the engine has scored a canary."""
    score, scored = bench.sampler._engine.score, asyncio.Event()

    async def scoring(tokens: Any, version: Any) -> float:
        found = await score(tokens, version)
        scored.set()
        return found

    monkeypatch.setattr(bench.sampler._engine, "score", scoring)
    return scored


@pytest.mark.parametrize("known_first", [True, False])
def test_a_version_is_offered_when_the_trainers_canary_has_come_and_is_the_engines_own(
    bench: Bench, known_first: bool, scored: asyncio.Event
) -> None:
    async def law() -> None:
        ref = AdapterRef(await bench.add(), 0, 1)
        for wrong in (True, False):
            handle = bench.reference.slab(ref)
            assert handle.canary_logprob is not None
            canary = Canary(ref, handle.canary_logprob - 5 * wrong)
            alone = dataclasses.replace(handle, canary_logprob=None)
            await bench.sampler.handle(Receive(alone, "", "", 1, 1, "gloo", PATIENT_S))
            if known_first:
                await bench.sampler.handle(canary)
            async with asyncio.TaskGroup() as tasks:
                installing = tasks.create_task(refusal(bench.sampler.handle(Install(ref))))
                if not known_first:
                    await scored.wait()
                    scored.clear()
                    await asyncio.sleep(0)
                    assert not bench.sampler._leases.holds(ref) and not installing.done()
                    await bench.sampler.handle(canary)
            assert ("the trainer's is" in installing.result()) == wrong
        bench.check(await bench.rollout(ref))

    bench.run(law())


@pytest.mark.parametrize("scored_first", [True, False])
def test_an_install_whose_relay_died_before_the_canary_ends_with_that_of_the_next_relay(
    bench: Bench, scored_first: bool, scored: asyncio.Event
) -> None:
    async def law() -> None:
        ref = AdapterRef(await bench.add(), 0, 1)
        handle = bench.reference.slab(ref)
        announced = Receive(dataclasses.replace(handle, canary_logprob=None), "", "", 1, 1, "gloo", PATIENT_S)
        installs = (await bench.statistics()).installs
        async with asyncio.TaskGroup() as tasks:
            await bench.sampler.handle(announced)
            old = tasks.create_task(refusal(bench.sampler.handle(Install(ref))))
            await (scored.wait() if scored_first else asyncio.sleep(0))
            await bench.sampler.handle(announced)
            tasks.create_task(bench.sampler.handle(Install(ref)))
            assert handle.canary_logprob is not None
            await bench.sampler.handle(Canary(ref, handle.canary_logprob))
        assert not old.result() or not scored_first, "the engine had it already, and it had a slot of its own"
        statistics = await bench.statistics()
        assert statistics.installs == installs + 1 and str(ref) in statistics.live_versions and not bench.sampler._announced
        bench.check(await bench.rollout(ref))

    bench.run(law())


def test_a_version_that_is_not_audited_is_offered_when_its_bytes_are_proven_and_asks_the_engine_nothing(bench: Bench) -> None:
    async def law() -> None:
        ref = await bench.adapter()
        newer, newest = (dataclasses.replace(ref, version=version) for version in (2, 3))
        handles = [bench.reference.slab(one) for one in (newer, newest)]
        quiet = [dataclasses.replace(handle, canary_logprob=None, audited=False) for handle in handles]
        prompts = bench.sampler._engine._requests
        before = next(prompts)
        with pytest.raises(InstallError, match="not those that the trainer published"):
            await bench.publish(dataclasses.replace(quiet[0], data=quiet[1].data))
        await bench.publish(quiet[0])
        assert next(prompts) == before + 1, "no request came in between"
        bench.check(await bench.rollout(newer))

    bench.run(law())


def test_an_audit_waits_for_no_rollouts_end(bench: Bench) -> None:
    async def law() -> None:
        ref = await bench.adapter(sampling=SamplingConfig(max_tokens=200, top_k=1))
        slab = bench.reference.slab(dataclasses.replace(ref, version=2))  # the engine would sample on while it is made
        requests = bench.sampler._engine._llm.output_processor.request_states
        async with asyncio.TaskGroup() as tasks:
            most = bench.sampler._config.max_num_seqs + GROUP - 1  # the last place taken by the first of a group
            sampling = tasks.create_task(bench.rollout(ref, group_size=most))
            while len(requests) < most:
                assert not sampling.done()
                await asyncio.sleep(0.001)
            await bench.publish(slab)
            assert not sampling.done() and len(requests) == most, "all of them sample on"

    bench.run(law())


def test_a_canary_that_never_comes_ends_the_install_and_leaves_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def law() -> None:
        ref, score = await bench.adapter(), bench.sampler._engine.score
        newer = dataclasses.replace(ref, version=2)
        handle = dataclasses.replace(bench.reference.slab(newer), canary_logprob=None)
        announced = Receive(handle, "", "", 1, 1, "gloo", PATIENT_S)

        async def scoring(tokens: Any, version: Any) -> float:
            object.__setattr__(announced, "deadline_s", 0.01)  # short from here on: the slab itself may take its time
            return await score(tokens, version)

        monkeypatch.setattr(bench.sampler._engine, "score", scoring)
        await bench.sampler.handle(announced)
        with pytest.raises(InstallError, match="canary of .* did not come"):
            await bench.sampler.handle(Install(newer))
        assert (await bench.statistics()).live_versions == (str(ref),)

    bench.run(law())


def test_an_adapter_that_leaves_while_its_version_is_installed_leaves_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def law() -> None:
        ref, score = AdapterRef(await bench.add(), 0, 1), bench.sampler._engine.score

        async def scoring(tokens: Any, version: Any) -> float:
            found = await score(tokens, version)
            await bench.sampler.handle(DropAdapter(ref.name))
            return found

        monkeypatch.setattr(bench.sampler._engine, "score", scoring)
        await bench.publish(bench.reference.slab(ref))
        assert (await bench.statistics()).live_versions == ()
        assert (await bench.sampler._engine.call("slab_statistics"))["lora_ids"] == []

    bench.run(law())


def test_a_version_told_twice_is_installed_once(bench: Bench) -> None:
    async def law() -> None:
        ref = AdapterRef(await bench.add(), 0, 1)
        handle = bench.reference.slab(ref)
        installs = (await bench.statistics()).installs
        await bench.sampler.handle(Receive(handle, "", "", 1, 1, "gloo", PATIENT_S))
        async with asyncio.TaskGroup() as tasks:
            for _ in range(3):
                tasks.create_task(bench.sampler.handle(Install(ref)))
        await bench.publish(handle)
        assert (await bench.statistics()).installs == installs + 1
        bench.check(await bench.rollout(ref))

    bench.run(law())


def broadcast(bench: Bench, handle: SlabHandle, group: BroadcastGroup, store: str, epoch: str, sequence: int = 0) -> None:
    async def work() -> None:
        announced = dataclasses.replace(handle, data=None)
        await bench.sampler.handle(Receive(announced, store, epoch, 1, 2, "gloo", PATIENT_S, sequence))
        async with asyncio.TaskGroup() as tasks:
            install = tasks.create_task(bench.sampler.handle(Install(handle.ref)))  # waits for the slab; the engine does not
            bench.check(await bench.rollout(dataclasses.replace(handle.ref, version=0)))
            assert not install.done()
            await asyncio.to_thread(group.broadcast, torch.from_numpy(handle.data))

    bench.run(work())


def test_slabs_come_by_broadcast_while_the_engine_goes_on(bench: Bench) -> None:
    ref = bench.run(bench.adapter(version=0))
    store = RendezvousStore()
    for epoch in ("a", "b"):  # a relay that forms its group anew
        group = BroadcastGroup(store.address, epoch, 0, 2, deadline_s=PATIENT_S)
        for sequence in range(2):  # a group is kept for the next slab
            ref = dataclasses.replace(ref, version=ref.version + 1)
            handle = bench.reference.slab(ref)
            broadcast(bench, handle, group, store.address, epoch, sequence)
            bench.check(bench.run(bench.rollout(ref)))
            bench.run(bench.sampler.handle(Retire(ref)))
        group.close()


def test_a_broadcast_that_never_comes_is_an_install_error_and_the_next_one_is_taken(bench: Bench) -> None:
    ref = bench.run(bench.adapter(version=0))
    store = RendezvousStore()
    handle = bench.reference.slab(dataclasses.replace(ref, version=1))

    async def law() -> None:
        announced = dataclasses.replace(handle, data=None)
        await bench.sampler.handle(Receive(announced, store.address, "gone", 1, 2, "gloo", PATIENT_S))
        store.dissolve("gone")
        with pytest.raises(InstallError, match="gone"):
            await bench.sampler.handle(Install(handle.ref))

    bench.run(law())
    group = BroadcastGroup(store.address, "again", 0, 2, deadline_s=PATIENT_S)
    broadcast(bench, handle, group, store.address, "again")
    group.close()
    bench.check(bench.run(bench.rollout(handle.ref)))


def test_a_slab_that_comes_after_its_install_was_given_up_never_touches_the_version_that_has_its_place(bench: Bench) -> None:
    ref = bench.run(bench.adapter(version=0))
    store = RendezvousStore()
    late, other, last = (bench.reference.slab(dataclasses.replace(ref, version=version)) for version in (1, 2, 3))
    group = BroadcastGroup(store.address, "late", 0, 2, deadline_s=PATIENT_S)

    async def announce(handle: SlabHandle, sequence: int) -> None:
        announced = dataclasses.replace(handle, data=None)
        await bench.sampler.handle(Receive(announced, store.address, "late", 1, 2, "gloo", PATIENT_S, sequence))

    async def law() -> None:
        await announce(late, 0)
        async with asyncio.TaskGroup() as tasks:
            install = tasks.create_task(bench.sampler.handle(Install(late.ref)))
            while str(late.ref) not in (await bench.statistics()).live_versions:
                await bench.sampler._engine.call("slab_statistics")
            install.cancel()
        await bench.publish(other)  # into the place that is free now
        await announce(last, 1)
        for handle in (late, last):
            await asyncio.to_thread(group.broadcast, torch.from_numpy(handle.data))
        await bench.sampler.handle(Install(last.ref))  # one thread receives both: the late one has come, too
        for version in (other, last):
            bench.check(await bench.rollout(version.ref))
        assert len((await bench.sampler._engine.call("slab_statistics"))["lora_ids"]) == 3
        for version in (other, last):
            await bench.sampler.handle(Retire(version.ref))

    bench.run(law())
    group.close()


ALONE = """
    import asyncio, sys
    from weft.actors.sampler import Sampler
    from weft.configs.schema import SamplerConfig
    from weft.transport.messages import GetStatistics

    async def main():
        config = SamplerConfig(max_num_seqs=4, max_model_len=128, kv_cache_gib=0.1)
        sampler = Sampler(sys.argv[1], "float32", config, 0, "cpu", 8, 2, tensor_parallel=int(sys.argv[2]))
        await sampler.start()
        print("engine", (await sampler.handle(GetStatistics())).engine_pid, flush=True)
        try:
            sys.stdin.readline()
            async with asyncio.timeout(200):
                while True:  # vLLM hears of a death on a thread of its own, a little later
                    await sampler.handle(GetStatistics())
                    await asyncio.sleep(0)
        except Exception as error:  # whatever it is, the test looks at its name
            print("fault", type(error).__name__, sampler.fatal.done() and type(sampler.fatal.exception()).__name__, flush=True)
        await sampler.aclose()

    if __name__ == "__main__":
        asyncio.run(main())
"""


@pytest.fixture
def lone(folder: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], psutil.Process]]]:
    """Starts a sampler of so many workers in a process of its own; gives it and its (first) worker's process."""
    script = tmp_path / "alone.py"
    script.write_text(textwrap.dedent(ALONE))
    started: list[subprocess.Popen[str]] = []

    def start(workers: int = 1) -> tuple[subprocess.Popen[str], psutil.Process]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        few = {"OMP_NUM_THREADS": "1"} | ({"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if workers > 1 else {})
        command = [sys.executable, str(script), str(folder), str(workers)]
        started.append(subprocess.Popen(command, env=os.environ | few, **pipes))
        lines = started[0].stdout
        assert lines is not None
        pid = next(int(line.split()[1]) for line in lines if line.startswith("engine "))  # vLLM writes there too
        return started[0], psutil.Process(pid)

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_sampler_killed_leaves_no_process_behind(
    lone: Callable[..., tuple[subprocess.Popen[str], psutil.Process]], workers: int
) -> None:
    sampler, engine = lone(workers)
    family = psutil.Process(sampler.pid).children(recursive=True)
    assert engine in family
    sampler.send_signal(signal.SIGKILL)
    sampler.wait()
    assert psutil.wait_procs(family, timeout=PATIENT_S)[1] == []


def test_a_dead_engine_is_soon_fatal_to_its_sampler(lone: Callable[..., tuple[subprocess.Popen[str], psutil.Process]]) -> None:
    sampler, engine = lone()
    engine.kill()
    psutil.wait_procs([engine], timeout=PATIENT_S)
    output, _ = sampler.communicate("go\n", timeout=2 * PATIENT_S)
    assert f"fault {EngineLostError.__name__} {EngineLostError.__name__}" in output.splitlines()
