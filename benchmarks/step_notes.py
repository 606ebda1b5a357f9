"""What train_step's figures say, and what was tried: part of its result."""

from __future__ import annotations

NOTES: tuple[str, ...] = (
    "Conditions are in `runs`, by the number that a row names. Cases that say '53 GiB free' ran while another process held the "
    "rest of the card, so that every layer was recomputed: compare them with one another alone.",
    "Batching: 64 adapters of 256 tokens, one step of all 562 ms, the same kernels one adapter at a time 7,256 ms: 12.9x. With "
    "4,096 tokens an adapter (N=8) it is 1.08x: there a single adapter fills the card.",
    "Fusion: the same kernels one adapter at a time against PEFT's loop, without batching: 1.84x at 64 x 256 tokens, 1.75x at "
    "8 x 4,096. At N=1 all of the 1.78x is fusion and attention (cuDNN's for rows of one length); neither side recomputes.",
    "Recompute: with room for 32,768 tokens of activations the step takes 1,156 ms, with all layers recomputed 1,663 ms: "
    "deciding it from free memory is worth 30 % of the step that recomputes.",
    "FP8, both sides with all layers recomputed: 1,663 -> 1,247 ms (N=1) and 1,666 -> 1,252 ms (N=8), 1.33x each. Without "
    "recompute only an earlier version was measured: 941 ms, 1.23x of 1,156. Of what has changed since, its adapters' kernels "
    "converted gradients from FP8 to bf16 before a transposed product (outer 74 ms, in bf16 31 ms).",
    "FP8's error: the gradient differs from bf16's by 0.67 of its norm at 36 layers of random weights (0.18 on the gate's two "
    "layers against fp32, where bf16 has 0.016): e4m3 has four bits fewer than bf16, so an error about eleven times as large, "
    "and it grows with depth. `learning`: on the shipped base of three layers both precisions reach 0.97 to 0.98 (calculator) "
    "and 0.92 to 0.97 (larger) within 18 steps, one run each; in FP8 the calculator fell to 0.63 for two steps on its way.",
    "Did not help: SwiGLU's kernels adding the deltas of gate, up and of its own gradient (103 ms against 51 + 21 for SwiGLU "
    "and separate deltas): tiles in the matrix unit's layout are read and written four bytes a thread.",
    "Did not help: scales for blocks of 128 instead of rows (429 ms of products for 36 layers against 328), tensor-wide scales "
    "(375), sums of FP8 products in fp32 (386); the bf16 products in halves or quarters of the rows (691, 689 against 689).",
    "Did help a little: more and smaller programs for the sums of chunks in outer, 39.4 -> 35.8 ms.",
    "Missed, 30,000 tokens a second at S=2,048 (28.3k) and 32,000 at S=512 (31.1k at N=8): the base alone, without LoRA, "
    "reaches 31.4k and 34.7k; products are 740 of its 1,043 ms (712 TFLOP/s), attention 182. LoRA's kernels take 110 ms, of "
    "which bytes alone need about 85 at 4.3 TB/s: expand 41, outer 36 to 39, shrink 30.",
    "Missed, LoRA at most 10 % over the base: 10.8 % at S=2,048 (N=1, 8), before outer's 3.6 ms. Next: deltas added by "
    "kernels that read their tiles through TMA; one read of dY for shrink and outer.",
    "Since these rows, seen alone and not yet within a step (32,768 tokens, kernels/bench_products.py, TFLOP/s of PyTorch's "
    "product, then of the fastest of cuBLAS' algorithms, the later of two turns each): gate_up 658 to 715, its input "
    "gradient 674 to 699; down 663 to 693, 644 to 654; qkv 661 to 716, 707 to 753; o 659 to 705, 639 to 644. FP8 products "
    "that add themselves to what is there are as fast as those that do not (gate_up 1,296 and 1,292), which spares reading "
    "30,720 columns a token and layer.",
    "Since these rows, likewise: SwiGLU's backward that sums down's A and gate's and up's B in passing, 1.29 ms a layer "
    "against 1.46 ms for the three kernels apart (kernels/bench_lora.py --only mlp --sweep); in more registers a thread, "
    "1.53 ms.",
    "Did not help: a transposed copy of the weight for input gradients (qkv 662 TFLOP/s against 707, o 607 against 639, "
    "gate_up 682 against 674, down 637 against 644).",
    "Not measured: 1,536 registered adapters on the card, N=64 with S=512, and stack + torch._grouped_mm, which ran out of "
    "memory beside the other process.",
)
