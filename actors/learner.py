"""Gradients and optimizer steps of many adapters at once, on one frozen base.

    batches ──plan──> launches ──decoder──> hidden at loss positions ──kernels.logprob──> log-probabilities
                                                                                              |
    weights, moments <──kernels.optim── gradient slab of each adapter <──backward── sum of the adapters' losses

One forward and backward carries every adapter of a launch; what is summed over tokens is summed over one adapter's: its loss,
its gradient slab, its norm, its moments. So a loss that is not finite reaches no other adapter. The host waits for the device
once, at the end: while one launch computes, the next is packed.
T packed tokens, P loss tokens, D elements of one adapter, V vocabulary.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weft.actors.adapter_store import AdapterStore, Slabs
from weft.actors.canary import REWRITTEN, canary_tokens
from weft.actors.launch import Launch, Piece, longest_row, plan, upload
from weft.actors.lora import LoraBatch, SlabLayout
from weft.actors.loss import Denominators, LossResult, LossTokens, adapter_loss
from weft.actors.model import Decoder
from weft.actors.recompute import free_bytes, most_tokens, needed_bytes
from weft.actors.slab_batch import SlabBatch
from weft.configs.schema import AdapterConfig, OptimizerConfig
from weft.kernels.logprob import token_logprobs
from weft.kernels.optim import SlabStep, adamw_steps
from weft.transport.messages import UNSAMPLED, AdapterRef, Scores, TrainBatch

Trained = Sequence[Any]  # of each adapter what LoraBatch.build takes, or on CUDA SlabBatch.build


@dataclass
class Adapter:
    """What the trainer knows of one adapter beside its slabs. The optimizer's step count is the version."""

    config: AdapterConfig
    ref: AdapterRef
    layout: SlabLayout
    fault: str = ""  # of the gradient that it holds
    lock: threading.Lock = field(default_factory=threading.Lock)  # held by whoever reads or changes its weights

    @property
    def name(self) -> str:
        return self.config.name


@dataclass
class Tally:
    """Sums over the launches of one adapter's batch, on the device until `metrics` reads them, once."""

    config: AdapterConfig
    loss: Tensor | float = 0.0
    ratio_max: Tensor | float = 0.0
    sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    fresh: int = 0  # loss tokens sampled under the very version that trains

    def add(self, result: LossResult, tokens: LossTokens, entropy: Tensor, fresh: Tensor, count: int) -> None:
        gap = (tokens.logprobs.detach() - tokens.sampler_logprobs).abs()
        parts = {"entropy": entropy, "clip_fraction": result.clipped, "logprob_diff": gap[fresh]}
        if self.config.loss.correction != "none":
            parts["truncated_fraction" if self.config.loss.correction == "tis" else "masked_fraction"] = result.corrected
        if result.kl is not None:
            parts["kl"] = result.kl
        for name, values in parts.items():
            self.sums[name] = self.sums.get(name, torch.zeros((), device=values.device)) + values.sum()
        if result.ratio is not None:
            self.ratio_max = torch.maximum(torch.as_tensor(self.ratio_max, device=result.ratio.device), result.ratio.max())
        self.loss = self.loss + result.loss.detach()
        self.tokens += len(gap)
        self.fresh += count

    def metrics(self) -> dict[str, float]:
        """Only what there is something to say about, and only finite numbers, but for the loss itself."""
        values = {name: float(total) / max(self.tokens, 1) for name, total in self.sums.items()}
        values.pop("logprob_diff", None)
        if self.fresh:
            values["logprob_diff"] = float(self.sums["logprob_diff"]) / self.fresh
        if self.config.loss.name == "cross_entropy":
            values.pop("clip_fraction", None)
        elif self.tokens:
            values["ratio_max"] = float(self.ratio_max)
        return {"loss": float(self.loss), **{name: value for name, value in values.items() if math.isfinite(value)}}


class Learner:
    """The compute of a trainer. Blocking; for one thread, but `canaries` for any."""

    def __init__(self, decoder: Decoder, store: AdapterStore, device: torch.device, token_budget: int) -> None:
        self._decoder, self._store, self._device, self._token_budget = decoder, store, device, token_budget
        self._canary = torch.tensor(canary_tokens(decoder.head.shape[0]), device=device)
        self.base_canary = self.score_base()  # now, so that the decoder's tables are long enough for any canary

    def forward_backward(self, adapters: Sequence[Adapter], batches: Sequence[TrainBatch]) -> list[dict[str, float]]:
        """Adds to the adapters' gradients; returns each one's metrics. Where a loss is not finite, `Adapter.fault` says so, and
        that adapter's gradient is not for use; so too where the device has no room for a row of its batch. At most as many
        adapters as the store's device tier holds."""
        tallies = [Tally(adapter.config) for adapter in adapters]
        with self._store.hold([adapter.name for adapter in adapters]) as held:
            try:
                for slabs in held:
                    if slabs.gradient is None:
                        slabs.gradient = torch.zeros_like(slabs.master)
                trained = self._trained(adapters, held, gradients=True)
                most = self._most_tokens()
                too_long = self._refuse_too_long(adapters, batches, most)
                for pieces in plan(batches, min(self._token_budget, most), too_long):
                    self._launch(pieces, adapters, batches, trained, tallies)
                metrics = [tally.metrics() for tally in tallies]  # within the hold: slabs move only when their sums are done
            except BaseException:  # half a gradient is none: what failed may be tried again
                if self._device.type == "cuda":  # what was launched still writes to memory that would be another's next
                    with suppress(RuntimeError):  # of a device that has failed, which the first error says
                        torch.cuda.current_stream(self._device).synchronize()
                for slabs in held:
                    slabs.gradient = None
                raise
        for adapter, own in zip(adapters, metrics, strict=True):
            if not math.isfinite(own["loss"]):
                adapter.fault = f"loss of {adapter.ref} ({adapter.config.loss.name}) is not finite: {own['loss']}"
        return metrics

    def _most_tokens(self) -> int:
        """Packed tokens of one launch that the device has room for, everything made again that can be."""
        return most_tokens(self._decoder.architecture, self._decoder.head.dtype, free_bytes(self._device))

    def _refuse_too_long(self, adapters: Sequence[Adapter], batches: Sequence[TrainBatch], most: int) -> set[int]:
        """-> indices of the batches that hold a row of more than `most` tokens; `Adapter.fault` says so."""
        refused = set()
        for index, (adapter, batch) in enumerate(zip(adapters, batches, strict=True)):
            if (longest := longest_row(batch)) > most:
                architecture, dtype = self._decoder.architecture, self._decoder.head.dtype
                needed = needed_bytes(architecture, longest, dtype) / 2**30
                there = needed_bytes(architecture, most, dtype) / 2**30
                adapter.fault = (
                    f"a row of {longest} tokens for {adapter.ref} needs {needed:.2f} GiB, layer by layer, and the device has "
                    f"{there:.2f} GiB: room for {most} tokens"
                )
                refused.add(index)
        return refused

    def optim_steps(self, adapters: Sequence[Adapter]) -> list[dict[str, float]]:
        """Clip, step, drop the gradients, all in one launch. Where loss or gradient is not finite, `Adapter.fault` says so and
        nothing else of that adapter has changed; otherwise it has its next version. At most the store's device tier."""
        metrics, ready, steps = [], [], []
        with self._store.hold([adapter.name for adapter in adapters]) as held:
            for adapter, slabs in zip(adapters, held, strict=True):
                settings, step = adapter.config.optimizer, adapter.ref.version + 1
                lr = learning_rate(settings, adapter.ref.version, adapter.config.num_steps)
                metrics.append({"learning_rate": lr})
                gradient, slabs.gradient = slabs.gradient, None
                if adapter.fault or gradient is None:
                    adapter.fault = adapter.fault or f"adapter {adapter.name!r} holds no gradient to step with"
                    continue
                rule = (step, lr, settings.betas, settings.eps, settings.weight_decay, settings.max_grad_norm)
                steps.append(SlabStep(slabs.master, slabs.exp_avg, slabs.exp_avg_sq, gradient, slabs.weights, *rule))
                ready.append((adapter, metrics[-1]))
            norms = adamw_steps(steps).tolist() if steps else []
        for (adapter, own), norm in zip(ready, norms, strict=True):
            if math.isfinite(norm):
                adapter.ref = replace(adapter.ref, version=adapter.ref.version + 1)
                own["grad_norm"] = norm
            else:
                adapter.fault = f"gradient of {adapter.ref} is not finite: its norm is {norm}"
        return metrics

    def score(self, adapter: Adapter, batch: TrainBatch) -> Scores:
        """Log-probabilities of the masked tokens under the adapter and under the base."""
        scores = Scores(np.zeros(len(batch.tokens), np.float32), np.zeros(len(batch.tokens), np.float32))
        with torch.no_grad(), self._store.hold([adapter.name]) as (slabs,):
            trained = self._trained([adapter], [slabs], gradients=False)
            for pieces in plan([batch], self._token_budget):
                (piece,) = pieces  # of one batch
                scores.logprobs[piece.sources] = self._logprobs(pieces, [adapter], trained)[0][0].cpu().numpy()
                scores.base_logprobs[piece.sources] = self._logprobs(pieces, [adapter], None)[0][0].cpu().numpy()
        return scores

    def canaries(self, adapters: Sequence[Adapter]) -> dict[str, float]:
        """By name the canary's log-probability under each adapter's weights, temperature 1: by one forward of as many as the
        store's device tier holds."""
        found: dict[str, float] = {}
        for first in range(0, len(adapters), self._store.device_capacity):
            some = adapters[first : first + self._store.device_capacity]
            with self._store.hold([adapter.name for adapter in some]) as held:
                rows = [(one, slabs.weights, one.config.lora.scale) for one, slabs in zip(some, held, strict=True)]
                found |= zip((adapter.name for adapter in some), self._canary_rows(rows), strict=True)
        return found

    def canary_noise(self, adapter: Adapter) -> float:
        """What rounding does to this adapter's canary, in nats: how far it is, in the mean of squares, from the same adapter
        written in other numbers, weights times c under a scale by 1 / c^2, of which nothing is rounded as before. It varies by
        a hundred from one version to the next (canary.py)."""
        with self._store.hold([adapter.name]) as (slabs,):
            if slabs.weights.dtype == torch.float32:
                return 0.0
            scale = adapter.config.lora.scale
            rewritten = [(adapter, slabs.weights * factor, scale / factor**2) for factor in REWRITTEN]
            own, *others = self._canary_rows([(adapter, slabs.weights, scale), *rewritten])
        return math.sqrt(sum((other - own) ** 2 for other in others) / len(others))

    def score_base(self) -> float:
        """The canary's log-probability under the base alone."""
        return self._canary_logprobs(LoraBatch((0,), ()), [0, len(self._canary) - 1])[0]

    def _canary_rows(self, rows: Sequence[tuple[Adapter, Tensor, float]]) -> list[float]:
        """The canary's log-probability under each adapter with such weights, and such a scale."""
        length, build = len(self._canary) - 1, SlabBatch.build if self._device.type == "cuda" else LoraBatch.build
        offsets = list(range(0, len(rows) * length + 1, length))
        pairs: Trained = [(adapter.layout, weights, None) for adapter, weights, _ in rows]
        if self._device.type != "cuda":
            pairs = [layout.leaves(*rest) for layout, *rest in pairs]
        return self._canary_logprobs(build(offsets, [scale for *_, scale in rows], pairs), offsets)

    @torch.no_grad()
    def _canary_logprobs(self, lora: LoraBatch | SlabBatch, offsets: Sequence[int]) -> list[float]:
        rows = len(offsets) - 1
        inputs, targets = self._canary[:-1].repeat(rows), self._canary[1:].repeat(rows)
        hidden = self._decoder(inputs, offsets, lora, exact=True)  # as samplers compute it
        logprobs, _ = token_logprobs(hidden, self._decoder.head, targets, torch.ones(len(targets), device=self._device))
        found: list[float] = logprobs.double().view(rows, -1).sum(1).tolist()
        return found

    def _launch(
        self,
        pieces: Sequence[Piece],
        adapters: Sequence[Adapter],
        batches: Sequence[TrainBatch],
        trained: Trained,
        tallies: Sequence[Tally],
    ) -> None:
        base = self._base_logprobs(pieces, adapters)
        logprobs, entropies = self._logprobs(pieces, adapters, trained)
        losses = []
        for piece, own, entropy in zip(pieces, logprobs, entropies, strict=True):
            adapter, batch = adapters[piece.adapter], batches[piece.adapter]
            tokens = self._loss_tokens(piece, adapter, own, base.get(piece.adapter))
            max_tokens = adapter.config.sampling.max_tokens
            result = adapter_loss(adapter.config.loss, tokens, Denominators(batch.loss_tokens, batch.loss_rows, max_tokens))
            fresh = piece.versions == adapter.ref.version
            index = upload(np.flatnonzero(fresh), self._device)
            tallies[piece.adapter].add(result, tokens, entropy, index, int(fresh.sum()))
            losses.append(result.loss)
        torch.autograd.backward(torch.stack(losses).sum())

    def _logprobs(
        self, pieces: Sequence[Piece], adapters: Sequence[Adapter], trained: Trained | None
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """-> log-probabilities [P] and entropies [P] of each piece. trained None: under the base alone."""
        launch = Launch.join(pieces, self._device)
        lora: LoraBatch | SlabBatch | None = None
        if trained is not None:
            scales = [adapters[piece.adapter].config.lora.scale for piece in pieces]
            chosen = [trained[piece.adapter] for piece in pieces]
            build = SlabBatch.build if self._device.type == "cuda" else LoraBatch.build
            lora = build(launch.token_offsets, scales, chosen)
        hidden = self._decoder(launch.tokens, launch.row_offsets, lora).index_select(0, launch.positions)
        temperatures = [adapters[piece.adapter].config.sampling.temperature for piece in pieces]
        temperature = upload(np.repeat(np.asarray(temperatures, np.float32), launch.loss_tokens), self._device)
        logprobs, entropy = token_logprobs(hidden, self._decoder.head, launch.targets, temperature)
        return torch.split(logprobs, launch.loss_tokens), torch.split(entropy, launch.loss_tokens)

    def _trained(self, adapters: Sequence[Adapter], held: Sequence[Slabs], gradients: bool) -> Trained:
        """What the decoder needs of each adapter: its slabs on CUDA, elsewhere leaves over them."""
        pairs = [(adapter.layout, slabs.weights, slabs.gradient if gradients else None)
                 for adapter, slabs in zip(adapters, held, strict=True)]  # fmt: skip
        return pairs if self._device.type == "cuda" else [layout.leaves(*slabs) for layout, *slabs in pairs]

    @torch.no_grad()
    def _base_logprobs(self, pieces: Sequence[Piece], adapters: Sequence[Adapter]) -> dict[int, Tensor]:
        """The base's log-probabilities [P], by index of those adapters alone that have a KL term."""
        wanted = [piece for piece in pieces if adapters[piece.adapter].config.loss.kl_coefficient > 0]
        if not wanted:
            return {}
        logprobs, _ = self._logprobs(wanted, adapters, None)
        return {piece.adapter: own for piece, own in zip(wanted, logprobs, strict=True)}

    def _loss_tokens(self, piece: Piece, adapter: Adapter, logprobs: Tensor, base_logprobs: Tensor | None) -> LossTokens:
        staleness = np.where(piece.versions == UNSAMPLED, 0, adapter.ref.version - piece.versions).astype(np.float32)
        arrays = (piece.sampler_logprobs, piece.advantages, piece.rows, piece.row_tokens, staleness)
        sampler, advantages, rows, row_tokens, stale = (upload(array, self._device) for array in arrays)
        return LossTokens(logprobs, sampler, advantages, rows, row_tokens, stale, base_logprobs)


def learning_rate(settings: OptimizerConfig, version: int, num_steps: int) -> float:
    """Of the step that makes version + 1. Linear warm-up over warmup_steps, whose first step is not 0; then constant, or linear
    or half a cosine down to 0 after num_steps."""
    if version < settings.warmup_steps:
        return settings.learning_rate * (version + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    done = min(1.0, (version - settings.warmup_steps) / max(1, num_steps - settings.warmup_steps))
    share = 1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return settings.learning_rate * share
