"""What the policies of experiments.py are compared with: each other, and what their pools could reach at most.

The bound X of the pools' model, beside what a policy reached:

N adapters with staleness s; R(n) = a + b n the rollout time of a step with n adapters sampling at once on all samplers, D the
time of one trainer for a step of one adapter, M trainers, Y a sync:

    X <= min(N (s + 1) / (a + b + D / M + Y), 1 / b, M / D)    adapter-steps a second
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from policies import RULES

BASELINE = "serial"
TIMES = ("first_experiment_time", "mean_experiment_time", "final_experiment_time")


def bounds(policies: Mapping[str, Mapping[str, Any]], adapters: int, staleness: Mapping[str, int]) -> dict[str, Any]:
    """policies: numbers as experiments.measure gives them, of a serial one and of one in lock step. staleness: of each policy.

    a and b are from how long a step waited for its rollouts alone (serial) and with all others (lock step). D is the least
    trainer time a step of any policy, so that the bound holds for each of them. That a step could be shared by all trainers
    (D / M) is more than any policy does with more adapters than trainers.
    """
    serial, lock_step = policies["serial-on-policy"], policies["lock-step"]
    alone, together = (policy["step_parts"]["rollout"]["median"] for policy in (serial, lock_step))
    b = (together - alone) / (adapters - 1)
    a, y = alone - b, serial["step_parts"]["sync"]["median"]
    d = min(policy["train_seconds_a_step"] for policy in policies.values())
    m = max(policy["pools"]["trainers"]["capacity"] for policy in policies.values())
    found: dict[str, Any] = {"a": a, "b": b, "D": d, "M": m, "Y": y, "N": adapters, "steps_per_second": {}}
    for name, policy in policies.items():
        reached = policy["steps"] / policy["final_experiment_time"]
        at_once = 1 if name.startswith("serial") else adapters
        terms = {"N(s+1)/(a+b+D/M+Y)": at_once * (staleness[name] + 1) / (a + b + d / m + y), "M/D": m / d}
        if b > 0:
            terms["1/b"] = 1 / b
        limit = min(terms, key=terms.__getitem__)
        found["steps_per_second"][name] = {
            "bound": terms[limit], "by": limit, "reached": reached, "share": reached / terms[limit],
        }  # fmt: skip
    return found


def versus(policies: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """How many times sooner each policy is than the first that does one adapter after the other, for each experiment time; the
    first alone where it did fewer experiments."""
    baseline = next((policy for policy in policies if RULES[policy].one_by_one and not RULES[policy].time_shared), None)
    if baseline is None:
        return {}
    own, found = policies[baseline], {}
    for policy, measured in policies.items():
        names = TIMES if measured["experiments"] == own["experiments"] else TIMES[:1]
        found[policy] = {"baseline": baseline, **{name: own[name] / measured[name] for name in names}}
    found.pop(baseline)
    return found


def ratios(policies: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """How many times sooner together is than the baseline, for each of the three experiment times."""
    return {
        name: {
            "baseline": BASELINE,
            "formula": "serial / together",
            "value": policies["serial"][name] / policies["together"][name],
        }
        for name in TIMES
    }
