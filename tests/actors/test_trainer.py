"""The laws of the trainer, over messages: joint equals solo, nobody touches anybody, what is saved goes on to the bit."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from weft.actors.lora import LoraBatch
from weft.actors.model import load_model
from weft.configs.expand import to_mapping
from weft.configs.schema import AdapterConfig, LoraConfig, LossConfig, OptimizerConfig, SamplingConfig
from weft.transport import messages
from weft.transport.messages import AdapterRef, TrainBatch

torch.set_num_threads(1)
VOCAB = 61  # conftest.py: the base's
FAST = OptimizerConfig(learning_rate=1e-2)
MIXED = (
    AdapterConfig(name="one", lora=LoraConfig(rank=8), optimizer=FAST),
    AdapterConfig(
        name="two",
        lora=LoraConfig(rank=3, alpha=7.0, target_modules=("q_proj", "down_proj")),
        optimizer=OptimizerConfig(learning_rate=3e-3, betas=(0.8, 0.99), weight_decay=0.1, max_grad_norm=0.01),
        loss=LossConfig(name="gspo", kl_coefficient=0.1),
        sampling=SamplingConfig(temperature=0.7),
    ),
    AdapterConfig(
        name="three",
        lora=LoraConfig(rank=1, target_modules=("all-linear",), exclude_modules=("qkv_proj",)),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=2),
        loss=LossConfig(name="cross_entropy"),
    ),
    AdapterConfig(
        name="four",
        lora=LoraConfig(rank=16, target_modules=("model.layers.1.self_attn.v_proj",)),
        optimizer=FAST,
        loss=LossConfig(name="cispo", normalization="sequence", correction="tis", correction_cap=1.1),
    ),
)
Make = Callable[..., Any]  # conftest.py: adapters' configurations -> Bench
MakeBatch = Callable[..., TrainBatch]


def near(left: Tensor, right: Tensor, relative: float) -> bool:
    return float((left - right).norm()) <= relative * float(right.norm())


# ---- law 6: joint equals solo, idle is untouched ----


def test_adapters_of_different_shape_and_loss_trained_together_equal_each_alone(make: Make, batch: MakeBatch) -> None:
    eight = (*MIXED, *(replace(config, name=f"{config.name}-on-policy", max_staleness=0) for config in MIXED))
    together = make(*eight)
    together.perturb(*(config.name for config in eight))
    batches = [batch(config.name) for config in eight]
    joint = together.ask(messages.ForwardBackward(tuple(batches))).results
    for config, one, result in zip(eight, batches, joint, strict=True):
        alone = make(config)
        alone.perturb(config.name)
        (solo,) = alone.ask(messages.ForwardBackward((one,))).results
        assert near(together.gradient(config.name), alone.gradient(config.name), 1e-5)
        assert result.metrics == pytest.approx(solo.metrics, rel=1e-4, abs=1e-6)
        alone.ask(messages.OptimStep((config.name,)))
        together.ask(messages.OptimStep((config.name,)))
        assert near(together.state(config.name), alone.state(config.name), 1e-5)


def test_an_adapter_that_does_not_step_is_unchanged_to_the_bit(make: Make, batch: MakeBatch) -> None:
    bench = make(*MIXED)
    bench.perturb("one", "two")
    bench.step(batch("one"), batch("two"))
    kept = {config.name: bench.state(config.name) for config in MIXED}
    for version in (1, 2):
        bench.step(batch("two", version), batch("three", version - 1))
    for name in ("one", "four"):
        assert torch.equal(bench.state(name), kept[name])
    for name in ("two", "three"):
        assert not torch.equal(bench.state(name), kept[name])


def test_the_gradient_is_that_of_a_dense_model_row_by_row(make: Make, trainer_base: Path, batch: MakeBatch) -> None:
    """Against a base whose weights have the adapter folded in, one row at a time, the loss written out."""
    config = replace(MIXED[0], loss=LossConfig(name="importance_sampling"), sampling=SamplingConfig(temperature=1.3))
    bench = make(config)
    bench.perturb("one")
    one = batch("one")
    bench.ask(messages.ForwardBackward((one,)))
    layout = bench.trainer._adapters["one"].layout
    leaf = bench.state("one")[0].requires_grad_()
    decoder = load_model(trainer_base, torch.float32)
    loss = torch.zeros(())
    for row in range(len(one.offsets) - 1):
        here = slice(one.offsets[row], one.offsets[row + 1])
        tokens, mask = torch.tensor(one.tokens[here]).long(), torch.tensor(one.mask[here])
        lora = LoraBatch.build([0, len(tokens)], [config.lora.scale], [layout.views(leaf)])
        logits = decoder(tokens, [0, len(tokens)], lora) @ decoder.head.T / 1.3
        logprobs = logits[:-1].log_softmax(-1).gather(1, tokens[1:, None]).squeeze(1)
        ratio = (logprobs - torch.tensor(one.sampler_logprobs[here][1:])).exp()
        loss = loss - (ratio * float(one.advantages[row]) * mask[1:]).sum() / one.loss_tokens
    loss.backward()
    assert leaf.grad is not None
    assert near(bench.gradient("one"), leaf.grad, 1e-5)


def test_launches_under_a_small_token_budget_equal_one_launch(make: Make, batch: MakeBatch) -> None:
    whole, split = make(*MIXED), make(*MIXED, token_budget=17)
    for version in range(2):
        batches = [batch(config.name, version) for config in MIXED]
        left, right = whole.step(*batches), split.step(*batches)
        for config in MIXED:
            assert left[config.name].metrics == pytest.approx(right[config.name].metrics, rel=1e-4, abs=1e-6)
            assert near(split.state(config.name), whole.state(config.name), 1e-5)


def test_adapters_beyond_the_device_tier_train_as_if_it_were_large(make: Make, batch: MakeBatch) -> None:
    large, small = make(*MIXED), make(*MIXED, device_adapters=1, host_adapters=1)
    for version in range(2):
        for some in (MIXED[:3], MIXED[3:]):
            batches = [batch(config.name, version) for config in some]
            large.step(*batches)
            small.step(*batches)
    for config in MIXED:
        assert near(small.state(config.name), large.state(config.name), 1e-5)
    assert small.ask(messages.GetStatistics()).adapters == {"device": 1, "host": 1, "disk": 2}


# ---- law 7: what is per adapter ----


def test_clip_schedule_and_bias_correction_are_each_adapters_own(make: Make, batch: MakeBatch) -> None:
    """Each adapter's steps are torch's AdamW on its own gradients; they begin at different times."""
    bench = make(*MIXED)
    parameters, optimizers = {}, {}
    for turn in range(4):
        active = [config for i, config in enumerate(MIXED) if turn >= i]
        batches = [batch(config.name, turn - MIXED.index(config)) for config in active]
        before = {config.name: bench.state(config.name) for config in active}
        bench.ask(messages.ForwardBackward(tuple(batches)))
        for config in active:
            name, settings = config.name, config.optimizer
            if name not in parameters:
                parameters[name] = torch.nn.Parameter(before[name][0].clone())
                rule = {"betas": settings.betas, "eps": settings.eps, "weight_decay": settings.weight_decay}
                optimizers[name] = torch.optim.AdamW([parameters[name]], **rule)
            parameters[name].grad = bench.gradient(name)
            norm = torch.nn.utils.clip_grad_norm_([parameters[name]], settings.max_grad_norm)
            (result,) = bench.ask(messages.OptimStep((name,))).results
            assert result.metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
            optimizers[name].param_groups[0]["lr"] = result.metrics["learning_rate"]
            optimizers[name].step()
            torch.testing.assert_close(bench.state(name)[0], parameters[name].detach(), rtol=1e-6, atol=1e-6)
    assert bench.trainer._adapters["one"].ref.version == 4
    assert bench.trainer._adapters["four"].ref.version == 1


def test_the_learning_rate_follows_each_adapters_own_schedule(make: Make, batch: MakeBatch) -> None:
    linear = OptimizerConfig(learning_rate=1.0, schedule="linear", warmup_steps=2)
    names = {"a": linear, "b": replace(linear, schedule="cosine"), "c": replace(linear, schedule="constant")}
    bench = make(*(AdapterConfig(name=name, num_steps=6, optimizer=settings) for name, settings in names.items()))
    seen: dict[str, list[float]] = {name: [] for name in names}
    for version in range(6):
        for name, result in bench.step(*(batch(name, version, rows=2) for name in names)).items():
            seen[name].append(round(result.metrics["learning_rate"], 6))
    assert seen["a"] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert seen["b"] == [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]
    assert seen["c"] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_denominators_count_rows_that_were_left_out(make: Make, batch: MakeBatch) -> None:
    """Rows of advantage 0, in the batch or not: the same gradient."""
    kept = batch("one")
    kept.advantages[2:4] = 0.0
    start, stop = kept.offsets[2], kept.offsets[4]
    tokens = {
        name: np.delete(getattr(kept, name), slice(start, stop)) for name in ("tokens", "mask", "sampler_logprobs", "versions")
    }
    rows = {name: np.delete(getattr(kept, name), slice(2, 4)) for name in ("advantages", "groups")}
    offsets = np.concatenate([kept.offsets[:3], kept.offsets[5:] - (stop - start)])
    gradients = []
    for one in (kept, replace(kept, offsets=offsets, **tokens, **rows)):
        bench = make(MIXED[0])
        bench.perturb("one")
        bench.ask(messages.ForwardBackward((one,)))
        gradients.append(bench.gradient("one"))
    assert near(gradients[1], gradients[0], 1e-5)


# ---- law 5: a fault has one adapter as its blast radius ----


@pytest.mark.parametrize("how", ["advantage", "sampler_logprob", "weights"])
def test_a_loss_that_is_not_finite_stops_its_adapter_alone(make: Make, how: str, batch: MakeBatch) -> None:
    clean, bench = make(*MIXED), make(*MIXED)
    for one in (clean, bench):
        one.perturb("one", "two", "four")
    batches = [batch(config.name) for config in MIXED]
    expected = clean.step(*batches)
    broken = batch("two")
    if how == "advantage":
        broken.advantages[1] = np.nan
    if how == "sampler_logprob":
        broken.sampler_logprobs[np.flatnonzero(broken.mask)[3]] = -np.inf
    if how == "weights":
        with bench.trainer._store.hold(["two"]) as (slabs,):
            slabs.master[::7] = torch.nan
    kept = bench.state("two")
    results = bench.step(batches[0], broken, batches[2], batches[3])
    assert "not finite" in results["two"].fault
    assert results["two"].ref == broken.ref
    assert torch.equal(bench.state("two").view(torch.int32), kept.view(torch.int32))
    for name in ("one", "three", "four"):
        assert results[name].fault == ""
        assert results[name].ref.version == 1
        assert torch.equal(bench.state(name), clean.state(name))
        assert results[name].metrics == expected[name].metrics


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_not_kept(make: Make, batch: MakeBatch) -> None:
    bench = make(*MIXED[:2])
    bench.ask(messages.ForwardBackward((batch("one"), batch("two"))))
    with bench.trainer._store.hold(["one"]) as (slabs,):
        slabs.gradient[3] = torch.inf
    kept = bench.state("one")
    results = {result.ref.name: result for result in bench.ask(messages.OptimStep(("one", "two"))).results}
    assert "gradient of one/0/0 is not finite" in results["one"].fault
    assert torch.equal(bench.state("one"), kept)
    assert results["two"].fault == ""
    assert bench.step(batch("one"))["one"].ref.version == 1  # the next gradient starts afresh


def test_a_batch_that_must_not_train_is_the_fault_of_its_adapter_alone(make: Make, batch: MakeBatch) -> None:
    bench = make(replace(MIXED[0], max_staleness=1), MIXED[1])
    for version in range(2):
        bench.step(batch("one", version), batch("two", version))
    good = batch("one", 2)
    first = good.mask.copy()
    first[0] = True
    cases = {
        "has one/0/2": batch("one", 1),
        "version 0 in a batch for one/0/2: staler than max_staleness=1": batch("one", 2, sampled=0),
        "token ids from": replace(good, tokens=good.tokens + VOCAB),
        "first token has a loss": replace(good, mask=first),
        "loss_tokens=1: must be": replace(good, loss_tokens=1),
        "offsets must rise": replace(good, offsets=good.offsets[::-1].copy()),
        "'nobody' is not in this trainer": batch("nobody"),
    }
    kept = bench.state("one")
    for i, (text, bad) in enumerate(cases.items()):
        results = bench.step(bad, batch("two", 2 + i))
        assert text in results[bad.ref.name].fault
        assert results["two"].fault == ""
        assert results["two"].ref.version == 3 + i
    assert torch.equal(bench.state("one"), kept)
    assert bench.step(batch("one", 2, sampled=1))["one"].fault == ""


# ---- law 8: cost follows active adapters ----


def test_two_hundred_registered_adapters_cost_what_two_do(make: Make, batch: MakeBatch) -> None:
    costs = []
    for registered in (2, 200):
        bench = make(*(replace(MIXED[0], name=f"a{i}") for i in range(registered)), device_adapters=8, host_adapters=500)
        step = messages.TrainStep((batch("a0"), batch("a1")))
        with FlopCounterMode(display=False) as counter:
            bench.trainer._train_step(step)
        statistics = bench.trainer._store.statistics()
        costs.append((counter.get_total_flops(), statistics.bytes_up, statistics.bytes_down, statistics.device))
    assert costs[0] == costs[1]
    assert costs[0][0] > 0


def test_gradients_exist_only_between_backward_and_step(make: Make, batch: MakeBatch) -> None:
    bench = make(*MIXED)
    bench.ask(messages.ForwardBackward((batch("one"), batch("two"))))
    assert bench.trainer._store.statistics().gradients == 2
    bench.ask(messages.OptimStep(("one",)))
    assert bench.trainer._store.statistics().gradients == 1
    bench.ask(messages.OptimStep(("two",)))
    assert bench.trainer._store.statistics().gradients == 0


# ---- it learns; what it reports ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cross_entropy_learns_a_batch_by_heart(make: Make, dtype: str, batch: MakeBatch) -> None:
    bench = make(replace(MIXED[2], lora=LoraConfig(rank=8), optimizer=replace(FAST, learning_rate=3e-2)), dtype=dtype)
    plain = [replace(batch("three", version), advantages=np.ones(6, np.float32)) for version in range(30)]
    losses = [bench.step(one)["three"].metrics["loss"] for one in plain]
    assert losses[-1] < 0.4 * losses[0]


def test_metrics_say_what_happened_and_nothing_that_did_not(make: Make, batch: MakeBatch) -> None:
    bench = make(*MIXED)
    results = bench.step(*(batch(config.name) for config in MIXED))
    common = {"loss", "grad_norm", "learning_rate", "entropy", "logprob_diff"}
    assert set(results["one"].metrics) == common | {"ratio_max", "clip_fraction"}
    assert set(results["two"].metrics) == common | {"ratio_max", "clip_fraction", "kl"}
    assert set(results["three"].metrics) == common
    assert set(results["four"].metrics) == common | {"ratio_max", "clip_fraction", "truncated_fraction"}
    assert results["two"].metrics["kl"] == 0  # before its first step the adapter is the base
    stale = bench.step(batch("one", 1, sampled=0))["one"].metrics
    assert "logprob_diff" not in stale  # no token was sampled under the version that trains
    statistics = bench.ask(messages.GetStatistics())
    assert statistics.steps == 5
    assert statistics.tokens_trained == sum(len(batch(config.name).tokens) for config in (*MIXED, MIXED[0]))
    assert statistics.busy_seconds > 0


def test_logprob_diff_is_zero_against_the_trainers_own_scores(make: Make, batch: MakeBatch) -> None:
    bench = make(*MIXED)
    bench.perturb("two")
    one = batch("two")
    scores = bench.ask(messages.Score(one))
    assert not scores.logprobs[~one.mask].any()
    assert (scores.logprobs[one.mask] < 0).all()
    assert not np.allclose(scores.logprobs, scores.base_logprobs)
    metrics = bench.step(replace(one, sampler_logprobs=scores.logprobs))["two"].metrics
    assert metrics["logprob_diff"] < 1e-6
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-5)
    gap = (scores.base_logprobs - scores.logprobs)[one.mask]
    assert metrics["kl"] == pytest.approx(float((np.exp(gap) - gap - 1).mean()), rel=1e-3)


def test_a_step_without_rows_is_a_step_with_gradient_zero(make: Make, batch: MakeBatch) -> None:
    """All advantages were 0 and all rows left out: the moments decay, the version goes on."""
    bench = make(*MIXED[:2])
    full = batch("one")
    empty = TrainBatch(full.ref, *(np.zeros(0, array.dtype) for array in (full.tokens,)), np.zeros(1, np.int32),
                       np.zeros(0, bool), *(np.zeros(0, np.float32),), np.zeros(0, np.int32), np.zeros(0, np.float32),
                       np.zeros(0, np.int32), 40, 6)  # fmt: skip
    results = bench.step(empty, batch("two"))
    assert results["one"].ref.version == 1
    assert results["one"].metrics["grad_norm"] == 0.0
    assert results["one"].metrics["loss"] == 0.0


def test_statistics_and_another_adapters_version_come_while_the_trainer_computes(make: Make, batch: MakeBatch) -> None:
    bench, go = make(*MIXED[:2]), threading.Event()

    async def both() -> None:
        bench.trainer._training.submit(go.wait)
        async with asyncio.TaskGroup() as tasks:
            step = tasks.create_task(bench.trainer.handle(messages.TrainStep((batch("one"),))))
            try:
                statistics = await bench.trainer.handle(messages.GetStatistics())
                assert statistics.steps == 0
                handle = await bench.trainer.handle(messages.Publish(AdapterRef("two", 0, 0)))
                assert handle.ref.name == "two"
                assert not step.done()
            finally:
                go.set()
        assert step.result().results[0].ref.version == 1

    asyncio.run(both())


async def raised(work: Awaitable[Any]) -> str:
    with pytest.raises(ValueError) as caught:
        await work
    return str(caught.value)


@pytest.mark.parametrize("given_up", [False, True])
def test_an_adapter_that_is_dropped_while_it_is_made_or_given_up_and_dropped_leaves_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch, given_up: bool
) -> None:
    bench, going, go = make(MIXED[0]), threading.Event(), threading.Event()
    gone, forget = threading.Event(), bench.trainer._store.drop
    weights, add = bench.trainer._first_weights, messages.AddAdapter(to_mapping(MIXED[1]))

    def slowly(config: AdapterConfig) -> Any:
        going.set()
        assert go.wait(200)
        return weights(config)

    def drop(name: str) -> None:
        forget(name)
        gone.set()

    async def law() -> None:
        monkeypatch.setattr(bench.trainer, "_first_weights", slowly)
        monkeypatch.setattr(bench.trainer._store, "drop", drop)
        async with asyncio.TaskGroup() as tasks:
            making = tasks.create_task(asyncio.wait_for(raised(bench.trainer.handle(add)), 400))
            await asyncio.to_thread(going.wait, 200)
            if given_up:
                making.cancel()
                await asyncio.wait([making])
            await bench.trainer.handle(messages.DropAdapter("two"))
            go.set()
        assert making.cancelled() if given_up else "'two' was dropped while it was made" in making.result()
        assert await asyncio.to_thread(gone.wait, 200) and "two" not in bench.trainer._store
        assert list(bench.trainer._adapters) == ["one"]
        assert [await bench.trainer.handle(add) for _ in range(3)] == [messages.AdapterAdded()] * 3
        assert sorted(bench.trainer._adapters) == ["one", "two"]

    asyncio.run(law())


def test_versions_published_beside_training_are_whole_whatever_the_tiers(make: Make, batch: MakeBatch) -> None:
    """Steps of two adapters and publishes of the others run at once, with room for fewer adapters on the device than that."""
    alone, bench = make(*MIXED), make(*MIXED, device_adapters=2, host_adapters=1)
    for name in ("three", "four"):
        alone.perturb(name)
        bench.perturb(name)

    async def publish(name: str) -> list[str]:
        return [(await bench.trainer.handle(messages.Publish(AdapterRef(name, 0, 0)))).path for _ in range(6)]

    async def train() -> None:
        for version in range(4):
            pair = (batch("one", version), batch("two", version))
            await bench.trainer.handle(messages.TrainStep(pair))

    async def all_at_once() -> dict[str, list[str]]:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(train())
            published = {name: tasks.create_task(publish(name)) for name in ("three", "four")}
        return {name: task.result() for name, task in published.items()}

    for name, paths in asyncio.run(all_at_once()).items():
        for path in paths:
            slab = torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.float32)
            assert torch.equal(slab, alone.state(name)[0])
    for version in range(4):
        alone.step(batch("one", version), batch("two", version))
    for config in MIXED:
        assert torch.equal(bench.state(config.name), alone.state(config.name))
