"""One adapter's step on several trainers at once: each has some of the rows, and gradients are added up before all step.

    pool      split ──rows──> TrainShare to each trainer ──> join: one result
    trainer   forward and backward of its rows ──all-reduce──> the gradient of them all ──> the same optimizer step everywhere

A loss is a sum over rows, over a denominator that is the whole batch's: so the sum of the parts' gradients is the gradient. The
trainers' states stay equal to the bit, since each adds the same to the same. Only this adapter's gradient crosses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from weft.actors.adapter_store import AdapterStore
from weft.actors.learner import Adapter, Learner
from weft.transport.broadcast import BroadcastGroup
from weft.transport.errors import DeadlineError, PeerDiedError, RendezvousError
from weft.transport.messages import StepResult, TrainBatch, TrainShare

ELSEWHERE = "another trainer could not take its part of the batch"
MAX_GROUPS = 4  # kept; an adapter has one at a time
SAME = ("learning_rate", "grad_norm")  # metrics that all trainers of a step agree on


def split(batch: TrainBatch, number: int) -> list[TrainBatch]:
    """The rows of a batch in `number` parts of about as many tokens; its denominators are kept."""
    lengths = np.diff(batch.offsets)
    parts: list[list[int]] = [[] for _ in range(number)]
    tokens = [0] * number
    for row in sorted(range(len(lengths)), key=lambda row: (-int(lengths[row]), row)):
        least = tokens.index(min(tokens))
        parts[least].append(row)
        tokens[least] += int(lengths[row])
    return [_rows(batch, np.array(sorted(part), np.int64)) for part in parts]


def _rows(batch: TrainBatch, rows: np.ndarray) -> TrainBatch:
    lengths = np.diff(batch.offsets)
    chosen = np.zeros(len(lengths), bool)
    chosen[rows] = True
    there = np.repeat(chosen, lengths)
    return replace(
        batch,
        tokens=batch.tokens[there],
        offsets=np.concatenate([[0], np.cumsum(lengths[rows])]).astype(batch.offsets.dtype),
        mask=batch.mask[there],
        sampler_logprobs=batch.sampler_logprobs[there],
        versions=batch.versions[there],
        advantages=batch.advantages[rows],
        groups=batch.groups[rows],
    )


def join(batches: Sequence[TrainBatch], results: Sequence[StepResult]) -> StepResult:
    """What the step came to: losses add up, other means are weighted by the tokens that they are of."""
    faults = [result.fault for result in results if result.fault]
    own = [fault for fault in faults if fault != ELSEWHERE]
    fault = (own or faults or [""])[0]
    weights = [int(batch.mask.sum()) for batch in batches]
    fresh = [int((batch.mask & (batch.versions == batch.ref.version)).sum()) for batch in batches]
    metrics: dict[str, float] = {}
    for name in {name: None for result in results for name in result.metrics}:
        there = [(result.metrics[name], index) for index, result in enumerate(results) if name in result.metrics]
        values = [value for value, _ in there]
        if name in SAME:
            metrics[name] = values[0]
        elif name == "loss":
            metrics[name] = sum(values)
        elif name == "ratio_max":
            metrics[name] = max(values)
        else:
            counts = [(fresh if name == "logprob_diff" else weights)[index] for _, index in there]
            metrics[name] = sum(map(float.__mul__, values, map(float, counts))) / max(sum(counts), 1)
    return StepResult(results[0].ref, sum(result.tokens for result in results), metrics, fault)


class SharedSteps:
    """A trainer's part. `step` is for the thread that trains, `end` for any."""

    def __init__(self, store: AdapterStore) -> None:
        self._store = store
        self._groups: dict[str, BroadcastGroup] = {}

    def step(
        self,
        message: TrainShare,
        adapter: Adapter | None,
        refusal: str,
        learner: Learner,
        optim_step: Callable[[Sequence[Adapter]], Sequence[StepResult]],
    ) -> StepResult:
        """Returns when all have stepped, or none. Raises RendezvousError when another trainer dies or does not come, or their
        group breaks: then the adapter is as it was, and the group of no more use."""
        batch, metrics = message.batch, dict[str, float]()
        try:
            if not refusal:
                assert adapter is not None
                (metrics,) = learner.forward_backward([adapter], [batch])
                refusal = adapter.fault
            if self._any(message, bool(refusal)):
                self._forget(adapter)
                return StepResult(batch.ref, len(batch.tokens), metrics, refusal or ELSEWHERE)
            assert adapter is not None
            with self._store.hold([adapter.name]) as (slabs,):
                assert slabs.gradient is not None
                self._add_up(message, slabs.gradient)
        except BaseException as error:
            self._forget(adapter)
            self.end(message.epoch)
            if isinstance(error, PeerDiedError | DeadlineError):  # a caller would take it for this process's, or the adapter's
                raise RendezvousError(f"the group of this step is no more: {error}") from error
            raise
        (result,) = optim_step([adapter])
        return replace(result, tokens=len(batch.tokens), metrics={**metrics, **result.metrics})

    def end(self, epoch: str) -> None:
        """Leave the group; what waits in it ends."""
        group = self._groups.pop(epoch, None)
        if group is not None:
            group.close()

    def _any(self, message: TrainShare, here: bool) -> bool:
        on_gpu = message.backend == "nccl" and torch.cuda.is_available()
        flag = torch.tensor([float(here)], device="cuda" if on_gpu else "cpu")
        self._group(message).all_reduce(flag)
        return bool(flag.item())

    def _add_up(self, message: TrainShare, gradient: Tensor) -> None:
        if message.backend == "gloo" and gradient.is_cuda:
            there = gradient.cpu()
            self._group(message).all_reduce(there)
            gradient.copy_(there)
        else:
            self._group(message).all_reduce(gradient)

    def _forget(self, adapter: Adapter | None) -> None:
        """A step that is not taken leaves nothing behind."""
        if adapter is not None:
            adapter.fault = ""
            with self._store.hold([adapter.name]) as (slabs,):
                slabs.gradient = None

    def _group(self, message: TrainShare) -> BroadcastGroup:
        group = self._groups.get(message.epoch)
        if group is None:
            address = (message.store, message.epoch, message.rank, message.world_size)
            try:
                group = BroadcastGroup(*address, message.backend, message.deadline_s)
            except ValueError as error:  # a backend that is not here is a group that cannot form
                raise RendezvousError(str(error)) from error
            self._groups[message.epoch] = group
            while len(self._groups) > MAX_GROUPS:
                self.end(next(iter(self._groups)))
        return group
