"""What a policy of experiments.py did, and its numbers."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from policies import RULES
from record import spread

from weft.configs.schema import AdapterConfig
from weft.pipeline.events import Event, GroupSampled, LaunchEnded, Phase, PhaseChanged, PipelineStatistics, StepTaken


@dataclass
class Policy:
    """What one policy did: its events, with times since the policy began, and the pools' figures of each pipeline in it."""

    name: str
    events: list[Event] = field(default_factory=list)
    pipelines: list[PipelineStatistics] = field(default_factory=list)
    moved_bytes: int = 0  # of adapters' states, to the trainers' cards and from them, where the policy is about that

    def experiments(self, adapters: Sequence[AdapterConfig]) -> Sequence[AdapterConfig]:
        """Those that it does."""
        return adapters[: RULES[self.name].first] if self.name in RULES else adapters

    def rename(self, adapter: AdapterConfig) -> AdapterConfig:
        """The adapter under its name in this policy."""
        staleness = RULES[self.name].max_staleness if self.name in RULES else None
        bound = adapter.max_staleness if staleness is None else staleness
        return dataclasses.replace(adapter, name=f"{adapter.name}.{self.name}", max_staleness=bound)

    def plain(self, name: str) -> str:
        """The name that the adapter has in both policies."""
        return name.removesuffix(f".{self.name}")

    def ends(self) -> dict[str, float]:
        """When each adapter had finished, by its plain name, in that order."""
        finished = [event for event in self.events if isinstance(event, PhaseChanged) and event.phase is Phase.FINISHED]
        return {self.plain(event.adapter): event.time for event in finished}

    def observer(self, shift: float) -> Any:
        """An observer for a pipeline that begins `shift` seconds after the policy."""

        def observe(event: Event) -> None:
            start = {"start": event.start + shift} if isinstance(event, GroupSampled) else {}
            self.events.append(dataclasses.replace(event, time=event.time + shift, **start))

        return observe


def measure(policy: Policy) -> dict[str, Any]:
    """The numbers of one policy. Seconds, but for shares (of its whole time) and counts."""
    finished = policy.ends()
    steps = [event for event in policy.events if isinstance(event, StepTaken)]
    groups = [event for event in policy.events if isinstance(event, GroupSampled) and not event.held_out]
    launches = [event for event in policy.events if isinstance(event, LaunchEnded)]
    final = max(finished.values())
    sampled, trained = sum(step.tokens_sampled for step in steps), sum(step.tokens_trained for step in steps)
    return {
        "experiments": len(finished),
        "first_experiment_time": min(finished.values()),
        "mean_experiment_time": statistics.fmean(finished.values()),
        "final_experiment_time": final,
        "ends": finished,
        "steps": len(steps),
        "step_time": spread([e.rollout_seconds + e.queue_seconds + e.train_seconds + e.sync_seconds for e in steps]),
        "step_parts": {
            part: spread([getattr(step, f"{part}_seconds") for step in steps]) for part in ("rollout", "queue", "train", "sync")
        },
        "rollout_time": spread([event.time - event.start for event in groups]),
        "launch_time": spread([launch.seconds for launch in launches]),
        "train_seconds_a_step": sum(launch.seconds for launch in launches) / len(steps),
        "adapters_per_launch": statistics.fmean(len(launch.tokens) for launch in launches),
        "moved_mb_a_step": policy.moved_bytes / len(steps) / 1e6,
        "tokens_sampled": sampled,
        "tokens_trained": trained,
        "tokens_sampled_per_second": sampled / final,
        "tokens_trained_per_second": trained / final,
        "pools": {name: share([(p.time, getattr(p, name)) for p in policy.pipelines]) for name in ("samplers", "trainers")},
        "staleness_violations": sum(p.staleness_violations for p in policy.pipelines),
        "max_staleness_seen": max(max(step.staleness) for step in steps),
        "held_out": {
            policy.plain(name): [adapter.eval_base, adapter.eval_final]
            for pipeline in policy.pipelines
            for name, adapter in pipeline.adapters.items()
        },
    }


def share(pools: Sequence[tuple[float, Any]]) -> dict[str, float]:
    """Busy share and load of one pool over pipelines that followed each other: (seconds, PoolStatistics) of each."""
    whole = sum(seconds for seconds, _ in pools)
    return {
        "busy": sum(pool.busy_seconds for _, pool in pools) / whole,
        "load": sum(pool.load * seconds for seconds, pool in pools) / whole,
        "capacity": pools[0][1].capacity,
    }


def merged(pipelines: Sequence[PipelineStatistics]) -> PipelineStatistics:
    """Pipelines that followed each other, as one."""
    pools = {}
    for name in ("samplers", "trainers"):
        whole = share([(pipeline.time, getattr(pipeline, name)) for pipeline in pipelines])
        busy = sum(getattr(pipeline, name).busy_seconds for pipeline in pipelines)
        last = getattr(pipelines[-1], name)
        pools[name] = dataclasses.replace(last, busy=whole["busy"], load=whole["load"], busy_seconds=busy)
    return PipelineStatistics(
        time=sum(pipeline.time for pipeline in pipelines),
        adapters={name: adapter for pipeline in pipelines for name, adapter in pipeline.adapters.items()},
        warnings=tuple(warning for pipeline in pipelines for warning in pipeline.warnings),
        **pools,
    )
