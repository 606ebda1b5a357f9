"""What a trainer compiles before it trains: enough for every launch that can come, and nothing of it stays."""

import random
from collections.abc import Callable
from typing import Any

import torch

from weft.actors.warm_up import WarmUp, needed_forms
from weft.configs.schema import AdapterConfig, LoraConfig
from weft.transport.messages import TrainBatch

torch.set_num_threads(1)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = "bfloat16" if DEVICE.type == "cuda" else "float32"


def test_the_forms_of_some_ranks_are_those_of_every_launch_that_they_can_share() -> None:
    draw = random.Random(0)
    for _ in range(500):
        ranks = [draw.randint(1, 128) for _ in range(draw.randint(1, 6))]
        item_bytes = draw.choice((2, 4))
        needed = needed_forms(ranks, item_bytes)
        assert len(needed) <= 2 * 4
        shared = draw.sample(ranks, draw.randint(1, len(ranks)))
        assert needed_forms(shared, item_bytes) <= needed
    assert needed_forms([256], 2) == set()  # no launch of the kernels holds it


def test_a_warm_up_leaves_every_adapter_as_it_was_and_none_of_its_own(
    make: Callable[..., Any], batch: Callable[..., TrainBatch]
) -> None:
    configs = [AdapterConfig(name=name, lora=LoraConfig(rank=rank)) for name, rank in (("one", 8), ("two", 3))]
    warm, cold = (make(*configs, dtype=DTYPE, device=str(DEVICE), token_budget=4096) for _ in range(2))
    trainer = warm.trainer
    work = WarmUp(trainer._learner, trainer._store, trainer._shapes, trainer._dtype.itemsize)
    before, metrics = warm.step(batch("one"), batch("two")), cold.step(batch("one"), batch("two"))
    assert work.lacks([8, 3])
    work.run([8, 3])
    assert not work.lacks([8, 3]) and not work.lacks([16]) and work.lacks([17])
    assert before == metrics
    assert warm.step(batch("one", 1), batch("two", 1)) == cold.step(batch("one", 1), batch("two", 1))
    assert sum(trainer._store.statistics().__dict__[tier] for tier in ("device", "host", "disk")) == 2
    for name in ("one", "two"):
        assert torch.equal(warm.state(name), cold.state(name))
