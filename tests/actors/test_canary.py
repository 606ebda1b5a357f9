"""How far an engine's canary may be from the trainer's."""

import random

import pytest

from weft.actors.canary import TOLERANCE, canary_allowance


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_an_adapter_left_out_or_half_there_is_found_once_it_does_something(dtype: str) -> None:
    draw = random.Random(0)
    least = 4 * canary_allowance(dtype, 0.0, 0.0)  # nats: what it must have moved the canary by
    for _ in range(1000):
        base = -draw.uniform(50, 400)
        canary = base + draw.choice((-1, 1)) * draw.uniform(least, 200)
        allowed = canary_allowance(dtype, canary, base)
        assert allowed < abs(canary - base) / 2


def test_what_bfloat16_differs_by_in_an_adapter_that_does_much_is_allowed() -> None:
    found, trainers, base = -363.09070, -356.35640, -291.43241  # seen on a Qwen3-4B shape, and not explained yet
    assert abs(found - trainers) < canary_allowance("bfloat16", trainers, base) < abs(trainers - base) / 2
    assert canary_allowance("bfloat16", base, base) == pytest.approx(1.15)
