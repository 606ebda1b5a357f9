"""What train_step's figures say, and what was tried: part of its result."""

from __future__ import annotations

NOTES: tuple[str, ...] = (
    "Conditions are in `runs`, by the number that a row names. Run 0 was on another card of the same kind than 1 and 2: there "
    "the base alone took 1,043 ms at S=2,048 and PEFT 2,061, in 1 and 2 1,075 and 2,103, in 3 and 4 1,054 and 2,065. Compare "
    "rows of one run. 'weft, one adapter at a time' is of run 0; N=1 and N=64 with S=2,048 are of 3 and 4, whose code has all "
    "that is told below; a `profile_ms` is of the run in `profile_run`. Learning is of run 5.",
    "Batching: 64 adapters of 256 tokens, one step of all 562 ms, the same kernels one adapter at a time 7,256 ms: 12.9x. "
    "With 4,096 tokens an adapter (N=8) it is 1.08x: there a single adapter fills the card.",
    "Fusion: the same kernels one adapter at a time against PEFT's loop, without batching: 1.84x at 64 x 256 tokens, 1.75x at "
    "8 x 4,096. At N=1 all of the 1.78x is fusion and attention (cuDNN's for rows of one length); neither side recomputes. "
    "Against stack + torch._grouped_mm over the same decoder (N=8): 1.16x.",
    "Recompute: with room for 32,768 tokens of activations the step took 1,156 ms, with all layers recomputed (53 GiB of the "
    "card free) 1,663: deciding it from free memory is worth 30 % of the step that recomputes.",
    "FP8: 1,158 -> 858 ms (N=1), 1,192 -> 893 (N=8), 1,096 -> 799 (N=8, S=512): 1.35x, 1.34x, 1.37x, no side recomputing. An "
    "earlier version took 941 ms: since then its products add themselves to the deltas (expand 74 -> 44 ms), gradients for "
    "the adapters' sums stay in bf16 (outer 78 -> 28), and rows leave no lane idle (114 -> 61).",
    "FP8's error: the gradient differs from bf16's by 0.66 to 0.74 of its norm at 36 layers of random weights (0.18 on the "
    "gate's two layers against fp32, where bf16 has 0.016): e4m3 has four bits fewer than bf16, so an error about eleven "
    "times as large, and it grows with depth. `learning`: on the shipped base of three layers, after 24 steps, bf16 ends at "
    "0.97 (calculator) and 0.97 (larger), FP8 at 1.00 and 0.95, one run each; a None is a step whose groups all paid alike.",
    "Registered adapters: 1,536 instead of 64 with 64 active, 1,084.0 and 1,086.0 ms: a tie.",
    "PEFT's loop over 64 adapters is timed over 16 of its equal turns, four times as long. Launches bound it, so its host "
    "matters: 64 x 256 tokens took 8.5 s in run 2 and 13.4 s in run 0 (weft: 14.8x and 23.8x).",
    "Did not help: SwiGLU's kernels adding the deltas of gate, up and of its own gradient (103 ms against 51 + 21 for SwiGLU "
    "and separate deltas): tiles in the matrix unit's layout are read and written four bytes a thread.",
    "Did not help: SwiGLU's backward with three of the adapters' sums in passing, in bf16: alone 1.29 ms a layer against "
    "1.46, within the step 59 + 20 ms for what took 34 + 39. In FP8 it is part of outer's gain.",
    "Did not help: the fastest of cuBLAS' algorithms, measured for every shape, instead of its own choice. Single products "
    "gained up to 8 % (gate_up 658 -> 715 TFLOP/s, qkv 661 -> 716), the step 0.4 % (1,194 -> 1,189 ms; base alone 1,078 -> "
    "1,075), for what lasts a second runs slower than what lasts milliseconds, whatever the algorithm (probably the card's "
    "power; not measured): runs 1 and 2 had it on, and it was taken out. Nor a transposed copy of the weights for input "
    "gradients (o 607 against 639, down 637 against 644).",
    "Did not help: scales for blocks of 128 instead of rows (429 ms of products for 36 layers against 328), tensor-wide "
    "scales (375), sums of FP8 products in fp32 (386); the bf16 products in halves or quarters of the rows (691, 689 against "
    "689).",
    "Missed, 30,000 tokens a second at S=2,048 and 32,000 at S=512 (27.5k to 28.3k, 29.0k to 31.1k; in FP8 36.7k to 38.2k and "
    "41.0k): the base alone, without LoRA, reaches 30.5k to 31.4k and 33.5k to 34.7k. Its products take 740 to 762 of 1,043 "
    "to 1,075 ms, 690 to 712 TFLOP/s of the 796 that a short run of products reaches; attention 182 to 198. Between kernels "
    "the card idles 7 ms.",
    "Missed, 1.9x PEFT's best: 1.78x (N=1) and 1.83x (N=8) at S=2,048, 1.83x and 1.92x at S=512; 2.41x to 2.63x in FP8. At "
    "N=64, S=2,048 PEFT's loop took 10.6 s on one host and 13.1 s on another (weft 2.27x and 2.79x).",
    "LoRA over the base at S=2,048: 9.9 % in run 3 (N=1, 1,158 and 1,054 ms), 10.7 % and 11.3 % in run 1 (N=1, N=8): at the "
    "10 % that were asked for, not clearly below. Its kernels take 110 ms, of which "
    "bytes alone need about 85 at 4.3 TB/s: expand 43, outer and SwiGLU's sums about 40, shrink 31. Next: one read of dY for "
    "shrink and outer, and for large groups deltas inside the product (x beside its low rows, W beside B), which spares "
    "expand's 43 ms.",
    "Not measured: stack + torch._grouped_mm at 64 x 256 tokens ran out of memory.",
)
