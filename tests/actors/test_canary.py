"""How far an engine's canary may be from the trainer's."""

from weft.actors.canary import CANARY_LENGTH, TOLERANCE, canary_allowance, canary_tokens


def test_what_is_allowed_is_per_scored_token_and_the_same_for_every_adapter() -> None:
    for dtype, nats in TOLERANCE.items():
        assert canary_allowance(dtype) == nats * (len(canary_tokens(1000)) - 1) == nats * (CANARY_LENGTH - 1)


def test_a_difference_that_nobody_has_explained_is_refused() -> None:
    found, trainers = -363.09070, -356.35640  # one install of 73, Qwen3-4B shape, two H200s
    assert abs(found - trainers) > canary_allowance("bfloat16")
