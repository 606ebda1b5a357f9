"""The trainer's laws on the device that is here: Triton kernels in bfloat16 on a card, over the base as it is and in FP8; plain
torch in fp32 on a CPU."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from weft.actors import recompute
from weft.actors.launch import longest_row
from weft.configs.schema import AdapterConfig, LoraConfig, LossConfig, OptimizerConfig
from weft.kernels.fp8 import can_multiply
from weft.transport import messages
from weft.transport.messages import AdapterRef, TrainBatch

torch.set_num_threads(1)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE, BOUND = ("bfloat16", 1e-2) if DEVICE.type == "cuda" else ("float32", 1e-5)
PRECISIONS = ("full", "fp8") if can_multiply(DEVICE) else ("full",)
FAST = OptimizerConfig(learning_rate=1e-2)
MIXED = (
    AdapterConfig(name="one", lora=LoraConfig(rank=8), optimizer=FAST),
    AdapterConfig(name="two", lora=LoraConfig(rank=3, target_modules=("q_proj", "down_proj")), loss=LossConfig(name="gspo")),
    AdapterConfig(name="three", lora=LoraConfig(rank=40, exclude_modules=("qkv_proj",)), loss=LossConfig(name="cross_entropy")),
    AdapterConfig(name="four", lora=LoraConfig(rank=16, target_modules=("up_proj",)), loss=LossConfig(kl_coefficient=0.1)),
)
Make = Callable[..., Any]  # conftest.py: adapters' configurations -> Bench
MakeBatch = Callable[..., TrainBatch]


@pytest.fixture(params=PRECISIONS)
def here(request: pytest.FixtureRequest, make: Make) -> Make:
    """A trainer on this device."""

    def bench(*adapters: AdapterConfig, **settings: Any) -> Any:
        made = make(*adapters, **{"dtype": DTYPE, "device": str(DEVICE), "base_precision": request.param, **settings})
        made.perturb(*(config.name for config in adapters))
        return made

    return bench


def near(left: Tensor, right: Tensor) -> bool:
    return float((left - right).norm()) <= BOUND * float(right.norm())


def same(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.view(torch.int32), right.view(torch.int32))


def test_together_adapters_of_mixed_ranks_get_the_gradients_that_each_gets_alone(here: Make, batch: MakeBatch) -> None:
    together, batches = here(*MIXED), [batch(config.name, rows=9) for config in MIXED]
    together.ask(messages.ForwardBackward(tuple(batches)))
    for config, one in zip(MIXED, batches, strict=True):
        alone = here(config)
        alone.ask(messages.ForwardBackward((one,)))
        assert float(alone.gradient(config.name).norm()) > 0
        assert near(together.gradient(config.name), alone.gradient(config.name))


def test_who_does_not_step_keeps_its_bits_and_a_nan_reaches_nobody(here: Make, batch: MakeBatch) -> None:
    clean, bench = here(*MIXED), here(*MIXED)
    before = {config.name: bench.state(config.name) for config in MIXED}
    batches = [batch(name) for name in ("one", "two", "three")]
    clean.step(*batches)
    batches[1].advantages[1] = np.nan
    results = bench.step(*batches)
    assert "not finite" in results["two"].fault and not results["one"].fault + results["three"].fault
    for name in ("two", "four"):
        assert same(bench.state(name), before[name])
    for name in ("one", "three"):
        assert same(bench.state(name), clean.state(name)) and not same(bench.state(name), before[name])


def test_a_row_that_the_device_has_no_room_for_fails_its_adapter_alone(
    here: Make, batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where there is room for the rows but not for all of them at once, the launch is split."""
    clean, bench = here(*MIXED), here(*MIXED)
    batches = [batch(config.name, rows=3, seed=seed) for seed, config in enumerate(MIXED)]
    longest = [longest_row(one) for one in batches]
    room = sorted(longest)[-2]  # one of them is too long
    assert longest.count(max(longest)) == 1 and room < max(longest)
    architecture = bench.trainer._learner._decoder.architecture
    enough = recompute.needed_bytes(architecture, room, getattr(torch, DTYPE))
    clean.step(*batches)
    monkeypatch.setattr("weft.actors.learner.free_bytes", lambda device: enough)
    results = bench.step(*batches)
    for config, size in zip(MIXED, longest, strict=True):
        result = results[config.name]
        if size > room:
            assert f"a row of {size} tokens" in result.fault and f"room for {room} tokens" in result.fault
            assert result.fault.count("GiB") == 2 and result.ref.version == 0
        else:
            assert not result.fault and near(bench.state(config.name)[0], clean.state(config.name)[0])


def test_adapters_move_through_the_tiers_as_they_train(here: Make, batch: MakeBatch) -> None:
    large, small = here(*MIXED), here(*MIXED, device_adapters=1, host_adapters=1)
    for version in range(2):
        batches = [batch(config.name, version) for config in MIXED]
        large.step(*batches)
        small.step(*batches)
    for config in MIXED:
        assert near(small.state(config.name)[0], large.state(config.name)[0])
    assert small.ask(messages.GetStatistics()).adapters == {"device": 1, "host": 1, "disk": 2}


def test_what_is_published_is_what_was_trained_and_its_canary_is_of_the_exact_base(
    here: Make, make: Make, batch: MakeBatch
) -> None:
    bench, exact = here(MIXED[0]), make(MIXED[0], dtype=DTYPE, device=str(DEVICE))
    bench.step(batch("one"))
    handle = bench.ask(messages.Publish(AdapterRef("one", 0, 1)))
    raw = np.fromfile(handle.path, np.uint8)
    with bench.trainer._store.hold(["one"]) as (slabs,):
        assert torch.equal(torch.from_numpy(raw).view(slabs.weights.dtype), slabs.weights.cpu())
        assert same(slabs.weights.float(), slabs.master.to(slabs.weights.dtype).float())
    assert handle.base_logprob == exact.trainer._learner.base_canary


def test_it_learns_a_batch_by_heart(here: Make, batch: MakeBatch) -> None:
    bench = here(replace(MIXED[2], optimizer=replace(FAST, learning_rate=3e-2)))
    batches = [replace(batch("three", version), advantages=np.ones(6, np.float32)) for version in range(30)]
    losses = [bench.step(one)["three"].metrics["loss"] for one in batches]
    assert losses[-1] < 0.4 * losses[0]


def test_fp8_is_refused_where_there_are_no_such_products(make: Make, trainer_base: Path) -> None:
    for device, dtype in (("cpu", "bfloat16"), (str(DEVICE), "float32")):
        with pytest.raises(ValueError, match="FP8 products need a base in bfloat16 on a Hopper GPU or later, this one is"):
            make(dtype=dtype, device=device, base_precision="fp8")
