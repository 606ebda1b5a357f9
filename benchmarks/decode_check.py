"""The correctness gate of decode.py. A number is printed only after it has passed, planted errors included.

T tokens, S slots, R rank, I in, O out.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from decode_engine import Engine, Load, random_slab
from torch import Tensor

from weft.kernels.lora_decode import Work, add_lora

KERNEL_BOUND = 1e-2  # relative error, norm against norm, of one linear in bf16
NEAR_TIE = 0.15  # of two log-probabilities, where two engines in bf16 part: what is nearer than that is a tie between tokens
SEEN = 2  # times the largest difference with the adapters is the largest without them, at least
TRAINER_BOUND = 0.02  # mean absolute difference of sampled tokens' log-probabilities


def check_kernels(device: torch.device) -> dict[str, float]:
    """One linear of three parts, mixed ranks, some tokens without adapter: against each token alone, in fp32."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    draw, widths, ranks = torch.Generator().manual_seed(0), (256, 64, 64), [32, 8, 16, 24]
    a = [torch.randn(4, 1, 32, 320, generator=draw) for _ in widths]
    b = [torch.randn(4, 1, width, 32, generator=draw) for width in widths]
    for slot, rank in enumerate(ranks):
        for part_a, part_b in zip(a, b, strict=True):
            part_a[slot, 0, rank:], part_b[slot, 0, :, rank:] = 0, 0
    a, b = ([one.to(dtype) for one in stacks] for stacks in (a, b))
    x, y = (torch.randn(60, width, generator=draw).to(dtype) for width in (320, sum(widths)))
    mix = np.arange(60) * 7 % 5 - 1
    wanted = y.float().clone()
    for token, slot in enumerate(mix.tolist()):
        if slot >= 0:
            low = [part[slot, 0].float() @ x[token].float() for part in a]
            wanted[token] += torch.cat([part[slot, 0].float() @ one for part, one in zip(b, low, strict=True)])
    work = Work(64, 4, device)

    def error(slots: np.ndarray, scale: float = 1.0) -> float:
        work.update(slots, ranks)
        found = y.to(device, copy=True)
        add_lora(found, x.to(device), [one.to(device) for one in a], [one.to(device) for one in b], work.table, 64, scale)
        return float((found.float().cpu() - wanted).norm() / wanted.norm())

    right, skipped, scaled = error(mix), error(np.where(mix == 2, -1, mix)), error(mix, 1.1)
    assert right < KERNEL_BOUND < min(skipped, scaled), f"errors {right}, planted {skipped}, {scaled}"
    return {"kernel_relative_error": right, "planted_skipped_group_seen_as": skipped, "planted_scale_seen_as": scaled}


def check_greedy(ours: Engine, theirs: Engine, adapters: int, generated: int) -> dict[str, float]:
    """The same greedy tokens, up to where two of them are as good as one another."""
    load = Load(tuple(n % adapters for n in range(2 * adapters)), generated, seed=-1, temperature=0.0, logprobs=4)
    one, two = ours.ask("run", load), theirs.ask("run", load)
    same, gaps = 0, [0.0]
    for mine, other, mine_p, other_p in zip(one["tokens"], two["tokens"], one["logprobs"], two["logprobs"], strict=True):
        parted = next((at for at, (x, y) in enumerate(zip(mine, other, strict=True)) if x != y), None)
        if parted is None:
            same += 1
            continue
        for seen in (mine_p[parted], other_p[parted]):
            gaps.append(abs(seen.get(mine[parted], -99.0) - seen.get(other[parted], -99.0)))
    assert max(gaps) < NEAR_TIE, f"{ours.arm.name} and {theirs.arm.name} part at tokens that are {max(gaps):.3f} apart"
    return {"greedy_sequences": len(one["tokens"]), "the_same": same, "widest_gap_where_they_part": round(max(gaps), 4)}


def check_trainer(engine: Engine, folder: str, adapters: int, generated: int, device: str = "cuda") -> dict[str, float]:
    """Sampled tokens' log-probabilities against those of the trainer's decoder with the same adapter; without it, the
    difference must be seen."""
    from weft.actors.lora import LoraBatch, SlabLayout, linear_shapes
    from weft.actors.model import load_model
    from weft.kernels.logprob import token_logprobs

    load = Load(tuple(range(adapters)), generated, seed=-2)
    sampled = engine.ask("run", load)
    decoder = load_model(folder, torch.bfloat16, device)
    shapes = linear_shapes(json.loads((Path(folder) / "config.json").read_text()))
    apart, bare = [], []
    for n in range(adapters):
        layout = SlabLayout.build(shapes, tuple(shapes), engine.arm.ranks[n % len(engine.arm.ranks)])
        prompt, tokens = sampled["prompts"][n], sampled["tokens"][n]
        ids = torch.tensor([*prompt, *tokens], device=device)
        pairs = layout.views(random_slab(layout.numel, n + 1, device))
        lora = LoraBatch.build([0, len(ids) - 1], [1.0], [pairs])
        theirs = torch.tensor([position[token] for position, token in zip(sampled["logprobs"][n], tokens, strict=True)])
        for batch, differences in ((lora, apart), (None, bare)):
            with torch.no_grad():
                hidden = decoder(ids[:-1], [0, len(ids) - 1], batch)[len(prompt) - 1 :]
                found, _ = token_logprobs(hidden, decoder.head, ids[len(prompt) :], torch.ones(len(tokens), device=device))
            differences.append(_mean_difference(found.cpu(), theirs))
    del decoder
    if device == "cuda":
        torch.cuda.empty_cache()
    said = f"{engine.arm.name} and the trainer: {apart}; without adapter {bare}"
    assert max(apart) < TRAINER_BOUND and max(bare) > SEEN * max(apart), said
    means = {"mean_difference_of_log_probabilities": sum(apart) / adapters, "without_adapter": sum(bare) / adapters}
    return {name: round(value, 5) for name, value in means.items()} | {"worst_adapter": round(max(apart), 5)}


def _mean_difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().mean())
