"""What decode.py's figures do not say themselves; part of every result."""

from __future__ import annotations

NOTES: list[str] = [
    "Met (r=32, 128 + 256 tokens): retention 0.926 with 8 adapters and 0.816 with 64 at batch 256 (0.90 and 0.75 were "
    "wanted), 0.817 and 0.607 at batch 64 (0.80 and 0.60); 4.33x vLLM's own kernels with 64 adapters at batch 64 (2.5x were "
    "wanted). Beside what was asked for: 1.56x with 8 adapters at batch 64; with 256 adapters 4.95x at batch 256 and 5.56x "
    "at 64; eight prompts of 2,048 tokens 1.40x; r=8, r=64 and r=8 to 64 1.38x, 1.78x and 1.76x at batch 64, 1.08x, 1.53x "
    "and 1.12x at 256.",
    "Retention at batch 256 is of a base alone that was slow in this run: 21,978 tokens a second, p10 to p90 20,233 to "
    "22,956, where an earlier run on a card of the kind had 24,444. Of that one ours keep 0.83 and 0.73, below what was "
    "wanted; vLLM's own kernels were as fast as then (15,408 and 15,600; 7,261 and 7,204). At batch 64 the bases are alike "
    "(12,243 and 12,352).",
    "Missed at batch 256: 1.32x vLLM's own with 8 adapters (1.4x were wanted), 2.47x with 64 (2.5x; ours 3.655 s where "
    "3.611 were needed, p10 to p90 3.60 to 4.11: a tie). vLLM's own keep 0.70 of the base alone there, so adapters that "
    "cost nothing at all would be 1.43x: 1.4x is a retention of 0.98, which is what reading the adapters once allows.",
    "Missed, never slower in any row: 1 adapter at batch 256 has 0.99x, three turns, p10 to p90 1.20 to 1.52 s of ours and "
    "1.41 to 1.59 s of vLLM's: a tie that such turns cannot break. r=8 at batch 256 has 1.08x, 1.34 to 1.54 s and 1.48 to "
    "1.88 s. 64-token rows take ten turns by default since.",
    "What limits: at batch 64 a step's 144 linears with 8 adapters take 32 us a layer more than the base product, of which "
    "the adapters' bytes explain 7; with 64 adapters 94, of which bytes are 55 (differences of the 256-token rows). The "
    "rest are two launches a linear with dependent loads: 4.5 to 8.4 us a linear with next to nothing to read "
    "(lora_decode-h200.json). At batch 256 the base's output is read and written once more, 31 MB a layer.",
    "Profile, batch 64: a step has 502 launches without LoRA, 1,117 with vLLM's own kernels and 8 adapters (10.9 ms of "
    "kernels), 786 with ours (6.5 ms; without LoRA 4.8); with 64 adapters 975 (38.2 ms) and 786 (8.6 ms). A chained "
    "kernel's time has its waiting for the one before in it, so the sum is more than the step.",
    "Registered but inactive, 256 slots against 8, 8 adapters active: 1.0 % slower at batch 64 (552.5 and 547.0 ms), 6 % "
    "faster at batch 256 (1.126 and 1.200 s), three turns each, whose p10 to p90 overlap: within 2 % at 64, at 256 noise is "
    "larger.",
    "Gate on the base that ships: log-probabilities 0.0039 from the trainer's in the mean, vLLM's own 0.0037, and 16 of 16 "
    "greedy sequences the same. On the random 4B the 0.02 that were wanted are missed by both alike: ours 0.0368 (r=32) and "
    "0.0362 (r=8), vLLM's own 0.0351 and 0.0335 (r=32) and 0.0372 (r=8 to 64): that is bf16 over 36 layers of random "
    "weights; without the adapter it is 0.49 to 0.81. Greedy sequences part there, all 16, at tokens at most 0.094 nats "
    "apart.",
    "The parts main and ranks were measured before the gate was mended, by a driver that measures on when it is red; `gate` "
    "has what it said, and each side's figures. Engines of r=64 and of mixed ranks were not compared with anything in that "
    "run: the kernels at those ranks are (64 tests on the same card), vLLM with them on CPUs.",
    "Tried in the kernels, alone in graphs on a card (lora_decode-h200.json): shrink on a second stream beside the base "
    "product took 5 to 6 % less than the chained launches in three of eight cases and 4 to 19 % more in five, so it is not "
    "used. In vLLM, with VLLM_LORA_ENABLE_DUAL_STREAM, that was never measured for ours; vLLM's own kernels have it on here "
    "wherever they have 8 slots, and graphs by the number of active adapters.",
    "Tried: launches that are not chained (13 to 28 % more at 8 adapters), programs that leave at once where they have no "
    "work, longer chunks for wide inputs (1,024: slower for `down` with 8 adapters, 12.2 against 9.1 us; 512 are used).",
    "Not measured: r=16 (three pairs of engines ran at once, not four). Next for the misses: expand within the base "
    "product's own epilogue at batch 256, which spares the output one reading and writing; and 10 turns of every row.",
]
