"""The multi-adapter training step: from batches on the device to the weights of all N adapters updated.

    python benchmarks/train_step.py            on one GPU, Qwen3-4B shape  -> benchmarks/results/train_step-<GPU>.json
    python benchmarks/train_step.py --smoke    a tiny shape, on this CPU: the gate and every row once
    python benchmarks/train_step.py --redraw   the notes and the plot of a result that is there

Before any number: a small model's gradients, joint and solo, against plain torch in fp32, and planted errors must be seen
(step_check.py). Contenders (step_contenders.py) take turns within one process; each is warmed up every time it comes on.
tokens_per_second counts real tokens; percent_of_ceiling is of the card's measured matrix rate at the arithmetic that the step
cannot avoid (`flop_per_token`); ratio_to_peft is of tokens_per_second, to PEFT's own row of the same case.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, commit, hardware, spread, versions, write_result
from step_check import check
from step_contenders import QWEN3_4B, SMALL, Adapter, Base, Case, Peft, Weft, make_adapters, random_decoder
from step_grouped import Grouped
from step_learning import learn
from step_notes import NOTES
from step_plot import plot
from step_profile import profile

from weft.actors.model import Decoder

MATRIX_RATE = 796e12  # bf16 FLOP/s of one H200 on random data: shared by every percent_of_ceiling
LARGEST_BASE = 32768  # tokens of a step of the base alone: more of them take longer and say the same
SLOW_RUNS = 2  # timed runs of each turn of a loop over many adapters: it takes seconds, and repeats itself
OTHERS_BYTES = 4 << 30  # of a card that is in use, drivers and this process aside
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
CASES = {
    case.name: case
    for case in (
        Case("N=1 S=2048", 1, 32768, 2048, fp8=True),
        Case("N=8 S=2048", 8, 4096, 2048, solo=True, fp8=True),
        Case("N=64 S=2048", 64, 2048, 2048, launch_tokens=16384),
        Case("N=1 S=512", 1, 32768, 512),
        Case("N=8 S=512", 8, 4096, 512, fp8=True),
        Case("N=64 S=512", 64, 512, 512, launch_tokens=16384),
        Case("N=64 S=256", 64, 256, 256, launch_tokens=16384, solo=True),
        Case("N=8 mixed rows", 8, 4096, 0, lengths=(1700, 900, 620, 410, 260, 140, 66)),
        Case("64 of 64, r=4 attention", 64, 512, 512, 8192, rank=4, targets=ATTENTION),
        Case("64 of 1536, r=4 attention", 64, 512, 512, 8192, rank=4, targets=ATTENTION, registered=1536),
    )
}
SMOKE = {"smoke": Case("smoke", 3, 128, 64, launch_tokens=256, rank=4, solo=True)}


def flop_per_token(case: Case, config: dict[str, Any]) -> float:
    """4 P (forward, input gradient) + 4 V h (head) + 6 p (LoRA: forward, both gradients) + 6 q S layers (causal attention)."""
    decoder_linears = (config["num_attention_heads"] * 2 + config["num_key_value_heads"] * 2) * config["head_dim"]
    hidden, width, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    base = layers * (decoder_linears * hidden + 3 * hidden * width)
    lora = make_layout_numel(case, config)
    row = sum(n * n for n in case.rows()) / case.tokens_each
    query = config["num_attention_heads"] * config["head_dim"]
    return 4 * base + 4 * config["vocab_size"] * hidden + 6 * lora + 6 * query * row * layers


def make_layout_numel(case: Case, config: dict[str, Any]) -> int:
    from weft.actors.lora import SlabLayout, linear_shapes, resolve_targets

    shapes = linear_shapes(config)
    return SlabLayout.build(shapes, resolve_targets(shapes, case.targets), case.rank).numel


class Turns:
    """Times contenders of one case in turns: A B A B, each warmed up every time it comes on."""

    def __init__(self, case: Case, config: dict[str, Any], device: torch.device, runs: int, rounds: int) -> None:
        self.case, self.config, self.device, self.runs, self.rounds = case, config, device, runs, rounds
        self.times: dict[str, list[float]] = {}
        self.memory: dict[str, float] = {}
        self.faults: dict[str, str] = {}

    def run(self, contenders: dict[str, Any]) -> list[dict[str, Any]]:
        """contenders: name -> what makes it. -> one row each; one that fails is a row too."""
        for turn in range(self.rounds):
            for name, make in contenders.items():
                if name in self.faults:
                    continue
                try:
                    self._turn(name, make, warm_up=1 if turn else 2)
                except (RuntimeError, ImportError, ValueError) as error:
                    self.faults[name] = f"{type(error).__name__}: {str(error)[:300]}"
                _free(self.device)
        return [self._row(name) for name in contenders]

    def _turn(self, name: str, make: Any, warm_up: int) -> None:
        contender = make()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        slow = name in ("peft", "weft, one adapter at a time") and self.case.adapters >= 8
        for index in range(-1 if slow else -warm_up, SLOW_RUNS if slow else self.runs):
            _wait(self.device)
            began = time.perf_counter()
            contender.step()
            _wait(self.device)
            if index >= 0:
                took = time.perf_counter() - began
                self.times.setdefault(name, []).append(took * getattr(contender, "stands_for", 1))
        if self.device.type == "cuda":
            self.memory[name] = max(self.memory.get(name, 0.0), torch.cuda.max_memory_allocated() / 2**30)

    def _row(self, name: str) -> dict[str, Any]:
        case = self.case
        row: dict[str, Any] = {"case": case.name, "contender": name, "adapters": case.adapters, "tokens": case.tokens}
        row |= {"row_tokens": case.row or list(case.lengths), "rank": case.rank, "registered": case.registered or case.adapters}
        row["launch_tokens"] = case.launch_tokens
        if name in self.faults:
            return row | {"fault": self.faults[name]}
        took = spread(self.times[name])
        rate = case.tokens / float(took["median"] or 1)
        row |= {f"{key}_ms": round(float(took[key] or 0) * 1e3, 2) for key in ("median", "p10", "p90")}
        row |= {"runs": took["count"], "tokens_per_second": round(rate), "peak_memory_gib": round(self.memory.get(name, 0), 1)}
        if self.config is QWEN3_4B:
            row["percent_of_ceiling"] = round(100 * rate * flop_per_token(case, self.config) / MATRIX_RATE, 1)
        return row


def measure(case: Case, config: dict[str, Any], device: torch.device, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one case."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    decoder = random_decoder(config, device, dtype)
    adapters = make_adapters(case, config, device, dtype)
    contenders: dict[str, Any] = {"weft": lambda: Weft(decoder, adapters, case)}
    if case.fp8 and device.type == "cuda":
        contenders["weft, base in FP8"] = lambda: Weft(decoder, adapters, case, fp8=True)
    if not case.registered and case.row and case.tokens <= LARGEST_BASE:
        contenders["base without LoRA"] = lambda: Base(decoder, case)
    if case.solo and options.solo:
        contenders["weft, one adapter at a time"] = lambda: Weft(decoder, adapters, case, solo=True)
    if case.solo and device.type == "cuda":
        contenders[Grouped.name] = lambda: Grouped(decoder, case)
    if options.peft and case.row and case.targets == ("all-linear",):
        made: list[Peft] = []
        contenders["peft"] = lambda: made[0] if made else made.append(Peft(case, device, config)) or made[0]
    rows = Turns(case, config, device, options.runs, options.rounds).run(contenders)
    for row in rows if case.name in chosen(options.profile.split(",")) else []:
        if "fault" not in row and row["contender"] in ("weft", "weft, base in FP8", Base.name):
            row["profile_ms"] = profile(contenders[row["contender"]]().step)
            _free(device)
    if "peft" in contenders:
        _compare(rows)
    for row in rows:
        if row["contender"] == "weft, base in FP8" and "fault" not in row:
            row["gradient_error_to_bf16"] = round(fp8_error(decoder, adapters, case), 4)
    return rows


def fp8_error(decoder: Decoder, adapters: list[Adapter], case: Case) -> float:
    """Of the gradients of the first launch over the base in FP8, against those over bf16: norm of the difference to norm."""
    taken = []
    for fp8 in (False, True):
        step = Weft(decoder, adapters, case, fp8=fp8)
        step.gradients(step.launches[0])
        taken.append(torch.cat([adapters[n].gradient for n in step.launches[0]]))
    return float((taken[1] - taken[0]).norm() / taken[0].norm())


def _compare(rows: list[dict[str, Any]]) -> None:
    (peft,) = [row for row in rows if row["contender"] == "peft"]
    for row in rows:
        if "fault" not in row and "fault" not in peft:
            row["ratio_to_peft"] = round(row["tokens_per_second"] / peft["tokens_per_second"], 2)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape on this CPU")
    parser.add_argument("--cases", default="", help="names, or parts of names, divided by commas, in the order in which to run")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each turn")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each contender")
    parser.add_argument("--no-peft", dest="peft", action="store_false")
    parser.add_argument("--no-solo", dest="solo", action="store_false")
    parser.add_argument("--profile", default="", help="time by kind of kernel, of weft's step: of these cases, named likewise")
    parser.add_argument("--learning", type=int, default=24, help="steps of the learning run; 0: none")
    parser.add_argument(
        "--keep", action="store_true", help="rows and learning that the result has already, and that do not run now"
    )
    parser.add_argument("--redraw", action="store_true", help="notes and plot alone, of the result that is there")
    parser.add_argument("--output", type=Path, help="where the result goes")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.smoke else "cpu")
    if options.redraw:
        paths = [options.output] if options.output else sorted(RESULTS.glob("train_step-*.json"))
        for path in paths:
            finish(path, json.loads(path.read_text()))
        return
    if options.smoke:
        torch.set_num_threads(1)
    if device.type == "cuda":
        check_alone()
    checked = check(device)
    print("gate:", checked, flush=True)
    name = torch.cuda.get_device_name().split()[-1].lower() if device.type == "cuda" else "cpu"
    path = options.output or RESULTS / f"train_step-{name}.json"
    result = begin(device, checked, path, options)
    cases = SMOKE if options.smoke else chosen(options.cases.split(",")) if options.cases else CASES
    for case in cases.values():
        rows = measure(case, SMALL if options.smoke else QWEN3_4B, device, options)
        for row in rows:
            row["run"] = len(result["runs"]) - 1
            print({key: value for key, value in row.items() if key not in ("case", "profile_ms")}, flush=True)
            print("   ", row.get("profile_ms", ""), flush=True)
        ran = {(row["case"], row["contender"]) for row in rows}
        result["rows"] = [row for row in result["rows"] if (row["case"], row["contender"]) not in ran] + rows
        if not options.smoke or options.output:
            finish(path, result)
    if options.learning:
        result["learning"] = learn(device, 1 if options.smoke else options.learning, ("full", "fp8")[: 1 + (name != "cpu")])
    if not options.smoke or options.output:
        finish(path, result)


def chosen(parts: list[str]) -> dict[str, Case]:
    """The cases that have one of these parts in their names, in the order of the parts."""
    return {name: case for part in parts if part for name, case in CASES.items() if part in name}


def check_alone() -> None:
    """A card that others use has other figures: less memory means recomputing."""
    free, total = torch.cuda.mem_get_info()
    if total - free > OTHERS_BYTES:
        raise SystemExit(f"train_step: others hold {(total - free) / 2**30:.1f} GiB of this card: it must be free")


def begin(device: torch.device, checked: dict[str, Any], path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A result without rows, or with those of an earlier run (`--keep`)."""
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if device.type == "cuda" else {}
    command, date = shlex.join(["python", *sys.argv]), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result = {
        "benchmark": "train_step",
        "commit": commit(),
        "date": date,
        "command": command,
        "hardware": hardware() | gpu,
        "versions": versions(["torch", "triton", "transformers", "peft"]),
        "settings": {"matrix_rate": MATRIX_RATE, "runs": options.runs, "rounds": options.rounds, "weights": "N(0, 0.02), bf16"},
        "gate": checked,
        "runs": [],
        "rows": [],
    }
    if options.keep and path.exists():
        before = json.loads(path.read_text())
        result |= {key: before[key] for key in ("rows", "runs", "learning") if key in before}
    result["runs"] = [*result["runs"], {"command": command, "commit": result["commit"], "date": date}]
    return result


def finish(path: Path, result: dict[str, Any]) -> None:
    """Writes the result with its notes, and the plot beside it."""
    write_result(path, result | {"notes": list(NOTES)})
    plot(result, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
