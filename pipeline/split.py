"""How much of each pool an adapter-step needs, how many of them a cluster can do at most, and how to split it for more.

A step of one adapter is rolled out, trained and synced. With n adapters in rollout on one sampler their rollouts take
R(n) = a + b n seconds: a is what each waits for its tokens one after the other, b what its tokens cost beside the others'. A
sampler has places for `room` steps at once, so its work for one is W_s = R(room) / room = b + a / room when it is full. A
trainer's is W_t, and a sync takes Y, in which neither works. Its training takes D = W_t / max(floor(M / N), 1) seconds on M
trainers: where adapters are fewer, a step is shared by several (actors/trainer_pool.py).

Bound. N adapters have I = sum of (max_staleness + 1) steps under way at most: n of them in rollout on K samplers, X (D + Y)
being trained and synced, where X = n / R(n / K) by Little's law. So X is at most where n + X (D + Y) = I, or n = K room if that
comes first (there X = K / W_s). On M trainers the fullest is home to ceil(N / M) adapters, so X <= N / (ceil(N / M) D); and
steps of one adapter follow each other, so X <= N / (D + Y). Left out: waiting for a launch that runs already, evaluations,
checkpoints, the beginning and the end, when fewer adapters are there. What is achieved is therefore less.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weft.pipeline.history import GroupSpan, History, LaunchSpan, Line

PASSES = 4  # of the fit: how fast a sampler goes decides what of a group's life each load had
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Work:
    """What one adapter-step needs; all in seconds but `room`."""

    latency: float  # a
    marginal: float  # b
    room: float  # steps that have places on one sampler at once
    training: float  # W_t: its part of the launches that it shared, all of these on all of its trainers
    sync: float  # Y

    @property
    def sampler_seconds(self) -> float:
        """W_s = b + a / room: of a full sampler."""
        return self.marginal + self.latency / self.room

    @property
    def trainer_seconds(self) -> float:
        """W_t."""
        return self.training


@dataclass(frozen=True)
class Wanted:
    """What the cluster is for. adapters: N; under_way: I = sum over them of (max_staleness + 1)."""

    adapters: int
    under_way: int


@dataclass(frozen=True)
class Split:
    """So many samplers and trainers, and the most adapter-steps a second that they can do."""

    samplers: int
    trainers: int
    bound: float


def bound(work: Work, wanted: Wanted, samplers: int, trainers: int) -> float:
    """The most adapter-steps a second (X of the module's text)."""
    launch = work.training / max(trainers // wanted.adapters, 1)
    elsewhere = launch + work.sync
    shared = work.marginal / samplers
    # n of n + (D + Y) n / (a + b n / K) = I: the positive root
    half = (work.latency + elsewhere - wanted.under_way * shared) / 2
    product = wanted.under_way * work.latency
    if shared > 0:
        root = math.sqrt(half * half + shared * product)
        in_rollout = (root - half) / shared if half <= 0 else product / (root + half)  # the form that does not cancel
    else:
        in_rollout = product / (work.latency + elsewhere)
    full = in_rollout >= samplers * work.room
    sampling = samplers / work.sampler_seconds if full else (wanted.under_way - in_rollout) / elsewhere
    home = math.ceil(wanted.adapters / trainers)
    return min(sampling, wanted.adapters / (home * launch), wanted.adapters / elsewhere)


def splits(work: Work, wanted: Wanted, cards: int, of_each: tuple[int, int] = (1, 1)) -> list[Split]:
    """Every split of `cards`, each pool with a process at least. of_each: cards of a sampler, and of a trainer."""
    per_sampler, per_trainer = of_each
    pairs = [(k, (cards - k * per_sampler) // per_trainer) for k in range(1, (cards - per_trainer) // per_sampler + 1)]
    return [Split(*pair, bound(work, wanted, *pair)) for pair in pairs]


def recommend(work: Work, wanted: Wanted, cards: int, of_each: tuple[int, int] = (1, 1)) -> Split:
    """The split with the highest bound; of several within a thousandth, the one whose busier pool is the least busy."""
    every = splits(work, wanted, cards, of_each)
    most = max(split.bound for split in every)

    def busiest(split: Split) -> float:
        return max(work.sampler_seconds / split.samplers, work.trainer_seconds / split.trainers)

    return min((split for split in every if split.bound >= 0.999 * most), key=busiest)


def account(
    history: History, samplers: int, trainers: int, capacity: int, of_each: tuple[int, int] = (1, 1)
) -> dict[str, Any] | None:
    """What the newest session needed, did and could have done, for summary.json. None: it took no step.

    samplers: how many there were, 0 for as many as sampled; capacity: rollouts that all of them run at once; of_each: cards of
    a sampler, and of a trainer (a process that has none, or a share of one, counts as one).
    """
    samplers = samplers or samplers_seen(history)
    work, wanted = measure(history, capacity / max(samplers, 1)), wanted_of(history)
    if work is None:
        return None
    sampling, training = defaultdict(list), defaultdict(list)
    for group in _newest(history):
        sampling[group.sampler].append((group.start, group.end))
    for launch in _newest_launches(history):
        training[launch.trainer].append((launch.start, launch.end))
    seconds = history.seconds - history.sessions[-1]
    cards = samplers * of_each[0] + trainers * of_each[1]
    return {
        "sampler_seconds": work.sampler_seconds,
        "trainer_seconds": work.trainer_seconds,
        "sync_seconds": work.sync,
        "latency_seconds": work.latency,
        "marginal_seconds": work.marginal,
        "room": work.room,
        **asdict(wanted),
        "samplers": samplers,
        "trainers": trainers,
        "steps_per_second": achieved(history),
        "samplers_busy": busy(sampling, samplers, seconds),
        "trainers_busy": busy(training, trainers, seconds),
        "bound": bound(work, wanted, samplers, trainers),
        "cards": cards,
        "recommended": asdict(recommend(work, wanted, cards, of_each)),
        "splits": [asdict(split) for split in splits(work, wanted, cards, of_each)],
    }


def busy(spans: Mapping[int, Sequence[tuple[float, float]]], members: int, seconds: float) -> float:
    """The share of `seconds` in which a process had anything in flight, a mean over `members`. spans: of each process."""
    whole = 0.0
    for own in spans.values():
        until = -math.inf
        for start, end in sorted(own):
            whole += max(end - max(start, until), 0.0)
            until = max(until, end)
    return whole / (members * seconds)


def achieved(history: History) -> float:
    """Adapter-steps a second in the newest session, from the first rollout that was trained to the last step."""
    began = min(group.start for group in _newest(history) if not group.held_out)
    lines = _newest_lines(history)
    seconds: float = max(line["time"] for line in lines) + history.sessions[-1] - began
    return len(lines) / seconds


def samplers_seen(history: History) -> int:
    """How many samplers have sampled in the newest session."""
    return len({group.sampler for group in _newest(history)})


def wanted_of(history: History) -> Wanted:
    """The adapters that took steps in the newest session."""
    bounds = {line["adapter"]: int(line["staleness/bound"]) for line in _newest_lines(history)}
    return Wanted(len(bounds), sum(bounds.values()) + len(bounds))


def measure(history: History, places: float) -> Work | None:
    """The work of the newest session's steps. places: rollouts that one sampler runs at once. None: it took no step."""
    groups = _newest(history)
    training = [group for group in groups if not group.held_out]
    launches = _newest_launches(history)
    syncs = [line["time/sync"] for line in _newest_lines(history)]
    steps = len(syncs)  # not those of the launches: a step that several trainers share is in one of each
    if not (launches and training and steps):
        return None
    first, more = fit(groups)
    rollouts = sum(group.rollouts for group in training) / steps
    tokens = sum(group.tokens for group in training) / steps
    trained = sum(launch.end - launch.start for launch in launches) / steps
    latency = first * tokens / rollouts
    return Work(latency, more * tokens, places / rollouts, trained, sum(syncs) / steps)


def fit(groups: Sequence[GroupSpan]) -> tuple[float, float]:
    """(t0, t1): with B rollouts on a sampler each of them gets a token in t0 + t1 B seconds.

    By least squares over the groups' durations, each of as many tokens as its mean rollout and under the mean load of its own
    sampler during its life: a mean over its tokens, so it is weighted by how fast the sampler was under each load. Neither is
    negative. Where the load never changed, all is put down to t1: then at least that load is right.
    """
    seconds = np.array([group.end - group.start for group in groups])
    tokens = np.array([max(group.tokens / group.rollouts, 1.0) for group in groups])
    first, more = 1.0, 0.0
    for _ in range(PASSES):
        loads = _mean_loads(groups, first, more)
        one, other = tokens, tokens * loads
        determinant = (one @ one) * (other @ other) - (one @ other) ** 2
        if determinant <= 1e-9 * (one @ one) * (other @ other):
            return 0.0, float(other @ seconds / (other @ other))
        first = float(((other @ other) * (one @ seconds) - (one @ other) * (other @ seconds)) / determinant)
        more = float(((one @ one) * (other @ seconds) - (one @ other) * (one @ seconds)) / determinant)
        if first < 0:
            first, more = 0.0, float(other @ seconds / (other @ other))
        elif more < 0:
            first, more = float(one @ seconds / (one @ one)), 0.0
    return first, more


def _mean_loads(groups: Sequence[GroupSpan], first: float, more: float) -> Values:
    """Of each group: the rollouts in flight on its sampler while it lived, a mean over tokens at t0 + t1 B seconds each."""
    loads = np.zeros(len(groups))
    for sampler in {group.sampler for group in groups}:
        own = [index for index, group in enumerate(groups) if group.sampler == sampler]
        starts, ends = (np.array([getattr(groups[index], name) for index in own]) for name in ("start", "end"))
        rollouts = np.array([float(groups[index].rollouts) for index in own])
        times, places = np.unique(np.concatenate([starts, ends]), return_inverse=True)
        changes = np.bincount(places, np.concatenate([rollouts, -rollouts]), len(times))
        in_flight = np.maximum(np.cumsum(changes)[:-1], 0.0)
        tokens = np.diff(times) / np.maximum(first + more * in_flight, 1e-12)
        upto = np.concatenate([[0.0], np.cumsum(tokens)])
        weighed = np.concatenate([[0.0], np.cumsum(tokens * in_flight)])
        begun, ended = places[: len(own)], places[len(own) :]
        lived = upto[ended] - upto[begun]
        loads[own] = np.where(lived > 0, (weighed[ended] - weighed[begun]) / np.where(lived > 0, lived, 1.0), rollouts)
    return loads


def _newest(history: History) -> list[GroupSpan]:
    """The groups of the newest session."""
    return [group for group in history.groups if group.start >= history.sessions[-1]] if history.sessions else []


def _newest_launches(history: History) -> list[LaunchSpan]:
    """The launches of the newest session."""
    return [launch for launch in history.launches if launch.start >= history.sessions[-1]] if history.sessions else []


def _newest_lines(history: History) -> list[Line]:
    """The steps of the newest session, those that a rollback undid too."""
    newest = len(history.sessions) - 1
    every = (line for adapter in history.adapters.values() for line in (*adapter.redone, *adapter.steps))
    return [line for line in every if line["session"] == newest]
