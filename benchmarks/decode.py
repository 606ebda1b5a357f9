"""Decoding with many adapters: vLLM with its own LoRA kernels, with weft's, and without LoRA, in turns on one card.

    python benchmarks/decode.py                  one GPU, Qwen3-4B shape, r = 32  -> benchmarks/results/decode-<GPU>.json
    python benchmarks/decode.py --parts ranks    r = 8, 16, 64, mixed; `many`: 256 slots; --keep what is there already
    python benchmarks/decode.py --smoke          the kernels' gate on this CPU, and a result of its form
    python benchmarks/decode.py --redraw RESULT  its notes, and the plot beside it

Every contender is an engine in a process of its own (decode_engine.py); all of a part start together and stay; the rounds go
A B C A B C. A row is N adapters mixed over a batch: prompts of 128 random tokens, `generated` tokens each, log-probabilities
returned; tokens a second are of the generated ones, end to end. retention is of the row without LoRA at the same batch,
ratio_to_vllm of vLLM's own kernels in the same row. Before any number: decode_check.py.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from decode_check import check_engines, check_kernels
from decode_engine import PROMPT, Arm, Engine, Load
from decode_notes import NOTES
from record import RESULTS, commit, hardware, spread, versions, write_result

BASE = Arm("no LoRA")
ZIPF = 1.1  # exponent
SMALL_CACHE = 7.4  # GB: 256 sequences of 192 tokens
LEAST_CACHE = 5.0  # GB: 256 sequences of 128 tokens
TINY_CACHE = 1.0  # GB, for the base that ships
ROUNDS = 3  # of each row, at least
SHORTEST = 640  # tokens of each sequence that a row takes the time of, at least
MOST_TURNS = 10  # of a row whose sequences are short: a prefill's alone has one token


@dataclass(frozen=True)
class Row:
    """arms: the contenders beside the base alone, by name."""

    adapters: int
    batch: int
    arms: tuple[str, ...]
    generated: int = 256
    zipf: bool = False
    prompt: int = PROMPT

    def load(self, seed: int) -> Load:
        draw = random.Random(0)
        weights = [1 / (n + 1) ** ZIPF for n in range(self.adapters)]
        chosen = draw.choices(range(self.adapters), weights, k=self.batch) if self.zipf else None
        adapters = chosen or [n % self.adapters for n in range(self.batch)]
        return Load(tuple(adapters), self.generated, self.prompt, seed)


FEW, MOST, OURS = "vllm, 8 slots", "vllm, 64 slots", "weft, 64 slots"
FEW_ARM = Arm(FEW, 8, counts=True, dual=True)
MAIN = (BASE, FEW_ARM, Arm(MOST, 64, counts=True), Arm(OURS, 64, ours=True))
MAIN_ROWS = (
    Row(8, 256, (FEW, OURS)), Row(64, 256, (MOST, OURS)), Row(8, 64, (FEW, OURS)), Row(64, 64, (MOST, OURS)),
    Row(1, 256, (FEW, OURS), 64), Row(1, 64, (FEW, OURS), 64), Row(8, 8, (FEW, OURS), 64), Row(1, 8, (FEW, OURS), 64),
    Row(64, 256, (MOST, OURS), 64, zipf=True), Row(64, 64, (MOST, OURS), 64, zipf=True), Row(8, 64, (FEW, OURS), 64, zipf=True),
    Row(8, 8, (FEW, OURS), 1, prompt=2048),
)  # fmt: skip


def of_ranks(*several: tuple[str, tuple[int, ...]]) -> tuple[tuple[Arm, ...], tuple[Row, ...]]:
    """Both kernels at each of these ranks, eight adapters; without the base alone, for which the card has no room."""
    arms, rows = [], []
    for name, ranks in several:
        theirs = Arm(f"vllm, {name}", 8, ranks, counts=True, dual=True, cache_gb=LEAST_CACHE)
        ours = Arm(f"weft, {name}", 8, ranks, ours=True, cache_gb=LEAST_CACHE)
        arms += [theirs, ours]
        rows += [Row(8, batch, (theirs.name, ours.name), 64, prompt=64) for batch in (64, 256)]
    return tuple(arms), tuple(rows)


WIDE, WIDE_OURS, FEW_OURS = "vllm, 256 slots", "weft, 256 slots", "weft, 8 slots"
MANY = (
    Arm(BASE.name, cache_gb=SMALL_CACHE), Arm(WIDE, 256, cache_gb=SMALL_CACHE),
    Arm(WIDE_OURS, 256, ours=True, cache_gb=SMALL_CACHE), Arm(FEW_OURS, 8, ours=True, cache_gb=SMALL_CACHE),
)  # fmt: skip
MANY_ROWS = (
    Row(256, 256, (WIDE, WIDE_OURS), 64), Row(8, 64, (WIDE, WIDE_OURS, FEW_OURS), 64), Row(8, 256, (WIDE_OURS, FEW_OURS), 64),
    Row(256, 64, (WIDE, WIDE_OURS), 64),
)  # fmt: skip
PARTS = {
    "main": (MAIN, MAIN_ROWS),
    "many": (MANY, MANY_ROWS),
    "ranks": of_ranks(("r=8", (8,)), ("r=16", (16,)), ("r=64", (64,)), ("r=8 to 64", (8, 16, 32, 64))),
}


def measure(part: str, engines: dict[str, Engine], rounds: int, shortest: int) -> Iterator[dict[str, Any]]:
    """Rows of a part, each when its case is done; the base alone once a batch and length, for it knows no adapters."""
    rows = PARTS[part][1]
    cases: dict[tuple[int, int, int], list[Row]] = {}
    for row in rows:
        cases.setdefault((row.batch, row.generated, row.prompt), []).append(row)
    for (batch, generated, prompt), together in cases.items():
        alone = Row(1, batch, (), generated, prompt=prompt)
        turns = [(engines[BASE.name], alone)] if BASE.name in engines else []
        turns += [(engines[name], row) for row in together for name in row.arms if name in engines]
        took: list[list[float]] = [[] for _ in turns]
        for turn in range(-1, turns_of(generated, rounds, shortest)):
            for (engine, row), times in zip(turns, took, strict=True):
                load = row.load(1000 + turn)
                warm_up = Load(load.adapters, min(8, generated), prompt, 999)
                seconds = engine.ask("time", load if turn >= 0 else warm_up)
                if turn >= 0:
                    times.append(seconds)
        yield from shape(part, turns, took)


def turns_of(generated: int, rounds: int, shortest: int) -> int:
    """Timed runs of a row."""
    return max(rounds, min(MOST_TURNS, -(-shortest // generated)))


def shape(part: str, turns: list[tuple[Engine, Row]], took: list[list[float]]) -> list[dict[str, Any]]:
    found = []
    for (engine, row), times in zip(turns, took, strict=True):
        spent = spread(times)
        arm = engine.arm
        one: dict[str, Any] = {
            "part": part,
            "contender": arm.name,
            "adapters": row.adapters if arm.slots else 0,
            "batch": row.batch,
        }
        one |= {"mix": "zipf" if row.zipf else "uniform", "ranks": list(arm.ranks) if arm.slots else [], "slots": arm.slots}
        one |= {"prompt": row.prompt, "generated": row.generated, "runs": spent["count"]}
        one |= {f"{key}_s": round(float(spent[key] or 0), 4) for key in ("median", "p10", "p90")}
        one["tokens_per_second"] = round(row.batch * row.generated / float(spent["median"] or 1))
        found.append(one)
    for (_, row), one in zip(turns, found, strict=True):
        if one["adapters"]:
            if not found[0]["adapters"]:
                one["retention"] = round(found[0]["median_s"] / one["median_s"], 3)
            same = [
                other
                for (_, its), other in zip(turns, found, strict=True)
                if its is row and other["contender"] != one["contender"]
            ]
            rival = next((other for other in same if other["contender"].startswith("vllm")), None)
            if rival and one["contender"].startswith("weft"):
                one["ratio_to_vllm"] = round(rival["median_s"] / one["median_s"], 2)
    return found


def profiles(engines: dict[str, Engine]) -> dict[str, Any]:
    """One decode step at batches 64 and 256 with 8 adapters and with 64: of 16 steps more, a sixteenth."""
    found: dict[str, Any] = {}
    for batch, adapters, names in (
        (64, 8, (BASE.name, FEW, OURS)), (64, 64, (MOST, OURS)), (256, 8, (BASE.name, FEW, OURS)), (256, 64, (OURS,)),
    ):  # fmt: skip
        for name in [one for one in names if one in engines]:
            load = Row(adapters, batch, ()).load(5)
            short, long = (
                engines[name].ask("profile", Load(load.adapters, count, load.prompt, load.seed)) for count in (2, 18)
            )
            step = {
                kind: {key: round((long[kind][key] - short.get(kind, {}).get(key, 0)) / 16, 2) for key in own}
                for kind, own in long.items()
            }
            step["all"] = {key: round(sum(own[key] for own in step.values()), 2) for key in ("launches", "microseconds")}
            found[f"{name}, {adapters if name != BASE.name else 0} adapters, batch {batch}"] = step
    return found


def run_part(part: str, folder: str, options: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> None:
    """write: called with all that there is of the part whenever there is more: engines that fail leave what they had."""
    arms, _ = PARTS[part]
    engines: dict[str, Engine] = {}
    faults: dict[str, str] = {}
    result: dict[str, Any] = {"gate": {}, "profiles": {}, "rows": []}
    try:
        for arm in arms:
            if arm.name in asked_of(part, options):
                engines[arm.name] = Engine(replace(arm, cache_gb=TINY_CACHE) if options.tiny else arm, folder, options.logs)
        for name in [*engines]:
            try:
                engines[name].ready()
                print(name, engines[name].facts, flush=True)
            except RuntimeError as error:
                faults[name] = str(error)
                print(faults[name], flush=True)
                engines.pop(name).close()
                if next(arm for arm in arms if arm.name == name).ours:
                    raise
        for engine in engines.values():
            assert not engine.arm.ours or engine.facts["wrapper"] == "DecodeLora", f"{engine.arm.name}: {engine.facts}"
        result["gate"] = check_engines([*engines.values()], folder, 64)
        print(json.dumps(result["gate"]), flush=True)
        wanted = not options.tiny and (BASE.name in engines or BASE.name not in [arm.name for arm in arms])
        result["rows"] = [{"part": part, "contender": name, "fault": fault} for name, fault in faults.items()]
        write(result)
        for row in measure(part, engines, options.rounds, options.shortest) if wanted else ():
            print(json.dumps(row), flush=True)
            result["rows"].append(row)
            write(result)
        if options.profile and wanted and part == "main":
            result["profiles"] = profiles(engines)
            write(result)
    finally:
        for engine in engines.values():
            engine.close()


def asked_of(part: str, options: argparse.Namespace) -> list[str]:
    """The contenders of a part that are to run."""
    names = [arm.name for arm in PARTS[part][0]]
    return [name for name in names if name in options.arms.split(";")] if options.arms else names


def beside(kept: dict[str, Any], part: str, arms: list[str], tiny: bool, done: dict[str, Any]) -> dict[str, Any]:
    """What was kept with what has been done of a part: only rows of the same contenders go, and what the gate said of them."""
    name = f"{part}, the base that ships" if tiny else part
    before = kept["gate"].get(name, {})
    gate = kept["gate"] | {name: {kind: before.get(kind, {}) | own for kind, own in done["gate"].items()} or before}
    if tiny:
        return kept | {"gate": gate}
    others = [row for row in kept["rows"] if row["part"] != part or row["contender"] not in arms]
    return kept | {"gate": gate, "rows": others + done["rows"], "profiles": kept["profiles"] | done["profiles"]}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--parts", default="main")
    parser.add_argument("--arms", default="", help="of the part, by name, separated by ;")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--shortest", type=int, default=SHORTEST, help="tokens of each sequence that a row takes the time of")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "weft-decode-base")
    parser.add_argument("--tiny", action="store_true", help="the gate alone, on the base that ships")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--keep", action="store_true", help="what other parts and contenders have in the result")
    parser.add_argument("--no-profile", dest="profile", action="store_false")
    parser.add_argument("--redraw", type=Path, help="notes and plot alone, of a result that is there")
    return parser.parse_args()


def redraw(path: Path) -> None:
    """Its notes as they are now, and the plot beside it."""
    from decode_plot import plot  # matplotlib is not where the card is

    result = json.loads(path.read_text()) | {"notes": NOTES}
    write_result(path, result)
    plot(result, path.with_suffix(".png"))


def main() -> None:
    options = arguments()
    if options.redraw:
        redraw(options.redraw)
        return
    device = torch.device("cpu" if options.smoke else "cuda")
    gate: dict[str, Any] = dict(check_kernels(device))
    gpu = "" if options.smoke else torch.cuda.get_device_name().removeprefix("NVIDIA ")
    output = (
        options.output or (Path(tempfile.mkdtemp()) if options.smoke else RESULTS) / f"decode-{gpu.lower() or 'smoke'}.json"
    )
    kept = json.loads(output.read_text()) if options.keep and output.exists() else {"rows": [], "profiles": {}, "gate": {}}
    result: dict[str, Any] = {
        "benchmark": "decode",
        "form": "smoke" if options.smoke else "full",
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/decode.py", *sys.argv[1:]]),
        "hardware": hardware() | ({"gpu": f"NVIDIA {gpu}", "cuda": torch.version.cuda} if gpu else {}),
        "versions": versions(("torch", "triton", "vllm")),
        "settings": {part: {arm.name: arm.settings | arm.environment for arm in PARTS[part][0]} for part in PARTS},
        "gate": kept["gate"] | gate,
        "rows": kept["rows"],
        "profiles": kept["profiles"],
        "notes": NOTES,
    }
    options.logs.mkdir(parents=True, exist_ok=True)
    if not options.smoke:
        from forced import base_folder

        from weft.actors.base_model import tiny_path

        folder = tiny_path() if options.tiny else base_folder(options.folder)
        for part in options.parts.split(","):
            before = dict(result)

            def write(done: dict[str, Any], part: str = part, before: dict[str, Any] = before) -> None:
                result.update(beside(before, part, asked_of(part, options), options.tiny, done))
                write_result(output, result)

            run_part(part, folder, options, write)
    write_result(output, result)
    print(output)


if __name__ == "__main__":
    main()
