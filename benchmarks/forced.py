"""Work whose size is known beforehand: a base of a chosen shape with random weights, and an environment to match.

Random weights over a large vocabulary all but never sample the end of a turn, so every rollout is as long as
`sampling.max_tokens` says; rewards are a coin's, so that every group trains.
"""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weft.actors.environment import Prompt, Reply

LETTERS = "abcdefghijklmnopqrstuvwxyz "


class Coin:
    """Prompts of `characters` random letters; the reward is 0 or 1, by the text that was sampled."""

    num_prompts: int | None = None

    def __init__(self, characters: int = 96) -> None:
        self.characters = characters

    def prompt(self, index: int, held_out: bool) -> Prompt:
        draw = random.Random(f"{index}/{held_out}")
        return Prompt([{"role": "user", "content": "".join(draw.choices(LETTERS, k=self.characters))}])

    async def respond(self, prompt: Prompt, turns: Sequence[Any]) -> Reply:
        said = str(turns[-1]["content"]).encode()
        return Reply(done=True, reward=float(hashlib.sha256(said + str(random.random()).encode()).digest()[0] % 2))


def base_folder(folder: Path) -> str:
    """A Hugging Face folder of the Qwen3-4B shape with random weights, and the tokenizer of the base that ships. Made by a
    process of its own, which leaves no memory of the GPU taken."""
    if not (folder / "config.json").exists():
        subprocess.run([sys.executable, __file__, str(folder)], check=True)
    return str(folder)


def _write_base(folder: Path) -> None:
    import torch
    from step_contenders import QWEN3_4B, random_decoder

    from weft.actors.base_model import tiny_path
    from weft.actors.model import save_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    save_model(random_decoder(QWEN3_4B, device, torch.bfloat16), folder, tokenizer_from=tiny_path())


def overrides(folder: Path, adapters: int, *settings: str) -> Sequence[str]:
    """What `weft` takes for that base and `adapters` experiments of one kind: r = 32 on all linears."""
    return (
        "adapters=single",
        "model=local",
        f"model.path={folder}",
        f"sweep.sampling.seed=[{','.join(map(str, range(adapters)))}]",
        "template.environment.target=forced.Coin",
        "template.lora.rank=32",
        "template.lora.alpha=32",
        # Rewards of a coin teach nothing: larger steps would only take random weights ever further from where they began.
        "template.optimizer.learning_rate=1e-6",
        "every.eval_prompts=0",
        *settings,
    )


if __name__ == "__main__":
    _write_base(Path(sys.argv[1]))
