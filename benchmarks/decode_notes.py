"""What decode.py's figures do not say themselves; part of every result."""

from __future__ import annotations

NOTES: list[str] = [
    "Met (r=32, 128 + 256 tokens): retention 0.935 with 8 adapters and 0.825 with 64 at batch 256 (0.90 and 0.75 were "
    "wanted), 0.605 with 64 at batch 64 (0.60); 2.52x vLLM's own kernels with 64 adapters at batch 256 and 4.36x at 64 "
    "(2.5x). Never slower in any row: 1.04x is the least (one adapter at batch 8, 0.37 to 0.45 s and 0.41 to 0.54 s).",
    "Beside what was asked for: 1.58x with 8 adapters at batch 64; with 256 adapters 5.19x at batch 256 and 5.65x at 64; "
    "eight prompts of 2,048 tokens 1.32x; r=8, 16, 64 and 8 to 64 1.55x, 1.38x, 1.70x and 1.78x at batch 64, 1.26x, 1.38x, "
    "1.31x and 1.20x at 256.",
    "Missed: 1.33x vLLM's own with 8 adapters at batch 256 (1.4x were wanted): the base alone was 1.42x vLLM's own in this "
    "run, so 1.4x would take adapters that cost next to nothing. Retention 0.792 with 8 at batch 64 (0.80): 1.649 to 1.700 "
    "s where 1.661 were needed; 0.799 in the run before, 0.817 in the one before that.",
    "At batch 256 the base alone is paced by the host: a step has 8.4 to 9.0 ms of kernels and takes 10 to 11 ms. It had "
    "22,343 tokens a second in this run (p10 to p90 2.73 to 3.03 s), 20,669 and 21,978 in the two before, and once 24,444 "
    "(no row of it is here), of which ours would keep 0.85 and 0.75. vLLM's own kernels were as fast in every run (15,385 "
    "to 15,759; 7,204 to 7,313), and at batch 64 the bases are alike (12,243 to 12,352).",
    "What limits: at batch 64 a step's 144 linears with 8 adapters take 38 us a layer more than the base product, of which "
    "the adapters' bytes explain 7; with 64 adapters 94, of which bytes are 55 (differences of the 256-token rows). The "
    "rest are two launches a linear with dependent loads: 4.5 to 8.4 us a linear with next to nothing to read "
    "(lora_decode-h200.json). At batch 256 the base's output is read and written once more, 31 MB a layer.",
    "Profile of a step, launches and kernels' time: batch 64, without LoRA 498 and 4.6 ms; 8 adapters, vLLM's own 1,117 and "
    "10.5 ms, ours 791 and 6.9 ms; 64 adapters 973 and 37.2 ms, ours 786 and 8.8 ms. Batch 256, without LoRA 501 and 8.4 "
    "ms; 8 adapters, vLLM's own 1,210 and 15.5 ms, ours 841 and 11.2 ms; 64 adapters, ours 787 and 12.4 ms. A chained "
    "kernel's time has its waiting for the one before in it, so the sum is more than the step. At batch 256 some of the 16 "
    "steps differ by one more prefill.",
    "Registered but inactive, 256 slots against 8, 8 adapters active: 0.7 % faster at batch 64 (522 and 526 ms), 2.1 % "
    "slower at batch 256 (1.160 and 1.136 s), five turns each, whose p10 to p90 overlap (1.11 to 1.23 and 1.12 to 1.46 s): "
    "within 2 % at 64, at 256 noise is larger; the run before had it the other way round there (1.126 and 1.200 s).",
    "Gate, green in every part: on the base that ships log-probabilities 0.0038 from the trainer's in the mean, as vLLM's "
    "own, and 16 of 16 greedy sequences the same. On the random 4B the 0.02 that were wanted are missed by both alike: ours "
    "0.034 to 0.037, vLLM's own 0.033 to 0.035: that is bf16 over 36 layers of random weights; without the adapter it is "
    "0.47 to 1.04. Greedy sequences part there, all 16, at tokens at most 0.125 nats apart (0.16 at r=64).",
    "Parts main and many ran at the same time, on the two cards of one machine with 32 cores; r=64 and r=8 to 64 are of the "
    "run before, at 92abcf0, whose kernels and wrapper are the same (`runs`).",
    "Tried in the kernels, alone in graphs on a card (lora_decode-h200.json): shrink on a second stream beside the base "
    "product took 5 to 6 % less than the chained launches in three of eight cases and 4 to 19 % more in five, so it is not "
    "used. In vLLM, with VLLM_LORA_ENABLE_DUAL_STREAM, that was never measured for ours; vLLM's own kernels have it on here "
    "wherever they have 8 slots, and graphs by the number of active adapters.",
    "Tried: launches that are not chained (13 to 28 % more at 8 adapters), programs that leave at once where they have no "
    "work, longer chunks for wide inputs (1,024: slower for `down` with 8 adapters, 12.2 against 9.1 us; 512 are used).",
    "Next for the misses: expand within the base product's own epilogue at batch 256, which spares the output one reading "
    "and writing; and a host that keeps up with the base, which this vLLM's does not at batch 256.",
]
