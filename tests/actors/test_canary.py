"""How far an engine's canary may be from the trainer's."""

import math

import pytest

from weft.actors.canary import CANARY_LENGTH, NOISES, TOLERANCE, canary_allowance, canary_tokens

USUAL = TOLERANCE["bfloat16"] * (CANARY_LENGTH - 1)
# A random base of the Qwen3-4B shape, steps of 1e-3, bfloat16 on a CPU. Of versions before and while the adapter runs away: how
# far its canary is from the base's; what the same weights rewritten, and the sums in an engine's order, differ by; and what the
# version before does.
SEEN = (
    (-1.1, (-0.278, -0.096, -0.213, -0.228), 0.068, -0.561),
    (0.6, (-0.064, -0.162, -0.245, -0.153), 0.194, -0.624),
    (-13.1, (-0.782, -0.086, -1.056, -0.026), 0.011, 9.115),
    (-25.3, (-1.216, -0.654, -1.182, -1.251), -1.231, 12.252),
    (-19.3, (-0.163, 0.388, 0.277, -1.019), 0.492, -5.967),
    (-13.8, (0.300, -0.257, -0.330, -0.148), 0.219, -5.599),
    (-8.8, (0.923, 0.381, 0.468, 0.930), 0.986, -4.941),
)


def test_what_is_usual_is_per_scored_token_and_the_same_for_every_adapter() -> None:
    for dtype, nats in TOLERANCE.items():
        assert canary_allowance(dtype) == nats * (len(canary_tokens(1000)) - 1) == nats * (CANARY_LENGTH - 1)
        assert canary_allowance(dtype, 0.0, 80.0) == canary_allowance(dtype), "what the adapter does allows for nothing"


@pytest.mark.parametrize(("shift", "rewritten", "engine", "stale"), SEEN)
def test_what_rounding_does_is_allowed_and_a_version_that_is_another_is_refused(
    shift: float, rewritten: tuple[float, ...], engine: float, stale: float
) -> None:
    allowed = canary_allowance("bfloat16", math.sqrt(sum(one**2 for one in rewritten) / len(rewritten)), shift)
    assert abs(engine) <= allowed
    assert abs(stale) > allowed or abs(stale) < USUAL, "below what is usual only checksums tell versions apart"


@pytest.mark.parametrize("noise", [0.0, 0.3, 2.0, 100.0])
@pytest.mark.parametrize("shift", [-65.0, -9.0, 4.0, -2.0, 1.2, 0.5, 0.0])
def test_noise_never_hides_an_adapter_left_out_or_half_there_whose_difference_is_above_the_usual(
    noise: float, shift: float
) -> None:
    allowed = canary_allowance("bfloat16", noise, shift)
    assert USUAL <= allowed <= max(USUAL, NOISES * noise)
    for difference in (abs(shift), abs(shift) / 2):
        assert (difference > allowed) == (difference > USUAL)
