"""What decode.py's figures do not say themselves; part of every result."""

from __future__ import annotations

NOTES: list[str] = [
    "Met (r=32, 128 + 256 tokens): retention 0.992 with 8 adapters and 0.878 with 64 at batch 256 (0.90 and 0.75 were "
    "wanted), 0.600 with 64 at batch 64 (0.60); 4.30x vLLM's own kernels with 64 adapters at batch 64 (2.5x). Never slower in "
    "any row: 1.08x is the least (r=8 at batch 256, 1.34 to 1.54 s and 1.48 to 1.88 s, of an earlier run). A tie: 0.799 with 8 "
    "at batch 64 (0.80: 1.641 to 1.670 s where 1.664 were needed).",
    "Beside what was asked for: 1.56x with 8 adapters at batch 64; with 256 adapters 4.95x at batch 256 and 5.56x at 64; "
    "eight prompts of 2,048 tokens 1.38x; r=16, r=64 and r=8 to 64 1.44x, 1.70x and 1.78x at batch 64, 1.39x, 1.31x and "
    "1.20x at 256.",
    "Missed at batch 256: 1.33x vLLM's own with 8 adapters (1.4x were wanted), 2.49x with 64 (2.5x: 3.610 s where 3.600 were "
    "needed, a tie). The base alone was 1.34x vLLM's own with 8 adapters in this run: 1.4x could not be had there by "
    "adapters that cost nothing.",
    "Retention at batch 256 is of a base alone that was slow: 20,669 tokens a second, p10 to p90 2.89 to 3.26 s, where "
    "24,444 had been seen once (no row of it is here) and the run before this one had 21,978. Of the fastest ours keep 0.84 "
    "and 0.74. A step of the base has 9.0 ms of kernels there and takes 10 to 11 ms: what it waits for is the host, of which "
    "ours ask no more. vLLM's own kernels were as fast in every run (15,385 to 15,600; 7,204 to 7,282), and at batch 64 the "
    "bases are alike (12,243 to 12,352).",
    "What limits: at batch 64 a step's 144 linears with 8 adapters take 36 us a layer more than the base product, of which "
    "the adapters' bytes explain 7; with 64 adapters 96, of which bytes are 55 (differences of the 256-token rows). The "
    "rest are two launches a linear with dependent loads: 4.5 to 8.4 us a linear with next to nothing to read "
    "(lora_decode-h200.json). At batch 256 the base's output is read and written once more, 31 MB a layer.",
    "Profile of a step, launches and kernels' time: batch 64, without LoRA 498 and 4.7 ms; 8 adapters, vLLM's own 1,117 and "
    "10.6 ms, ours 791 and 6.5 ms; 64 adapters 973 and 37.2 ms, ours 788 and 9.0 ms. Batch 256, without LoRA 532 and 9.0 ms; 8 "
    "adapters, vLLM's own 1,052 and 13.9 ms, ours 838 and 11.1 ms; 64 adapters, ours 787 and 12.7 ms. A chained kernel's time "
    "has its waiting for the one before in it, so the sum is more than the step. At batch 256 some of the 16 steps differ by "
    "one more prefill.",
    "Registered but inactive, 256 slots against 8, 8 adapters active: 1.0 % slower at batch 64 (552.5 and 547.0 ms), 6 % "
    "faster at batch 256 (1.126 and 1.200 s), three turns each, whose p10 to p90 overlap: within 2 % at 64, at 256 noise is "
    "larger.",
    "Gate on the base that ships: log-probabilities 0.0038 from the trainer's in the mean, as vLLM's own, and 16 of 16 greedy "
    "sequences the same. On the random 4B the 0.02 that were wanted are missed by both alike: ours 0.033 to 0.037 (r=16 to "
    "64), vLLM's own 0.033 to 0.035: that is bf16 over 36 layers of random weights; without the adapter it is 0.65 to 1.03. "
    "Greedy sequences part there, all 16, at tokens at most 0.16 nats apart (0.19 in another start).",
    "Part many and r=8 are of commit 2300143, whose gate was red by mistakes of the gate: `gate` has what it said. Since then "
    "the kernels have changed for three parts of rank 128 alone. Everything else ran at 92abcf0 with the gate green, but for "
    "r=64 and r=8 to 64, where greedy tokens had been allowed 0.15 nats at first and 0.3 when the rows were measured; the rule "
    "is 8 times vLLM's own difference from the trainer now, 0.28 there, and 0.3 at most.",
    "Tried in the kernels, alone in graphs on a card (lora_decode-h200.json): shrink on a second stream beside the base "
    "product took 5 to 6 % less than the chained launches in three of eight cases and 4 to 19 % more in five, so it is not "
    "used. In vLLM, with VLLM_LORA_ENABLE_DUAL_STREAM, that was never measured for ours; vLLM's own kernels have it on here "
    "wherever they have 8 slots, and graphs by the number of active adapters.",
    "Tried: launches that are not chained (13 to 28 % more at 8 adapters), programs that leave at once where they have no "
    "work, longer chunks for wide inputs (1,024: slower for `down` with 8 adapters, 12.2 against 9.1 us; 512 are used).",
    "Next for the misses: expand within the base product's own epilogue at batch 256, which spares the output one reading and "
    "writing; and a host that keeps up with the base, which this vLLM's does not at batch 256.",
]
