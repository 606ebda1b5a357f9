"""What `weft --help` prints. Groups and defaults are read from the files and the schema, so that it cannot be out of date."""

from __future__ import annotations

import textwrap
from typing import Any

from weft.configs.compose import defaults, descriptions
from weft.configs.schema import ADVANTAGES, LOSSES, MAX_RANK, AdapterConfig, ClusterConfig, RunConfig

WIDTH = 118
USAGE = """\
weft trains many LoRA adapters at once, by reinforcement learning, on one frozen base model.

usage: weft [GROUP=CHOICE ...] [SETTING=VALUE ...] [--cfg] [--config-dir DIR]

  --cfg              print the configuration that the arguments come to, as YAML, and exit
  --config-dir DIR   a folder with groups of your own: DIR/adapters/mine.yaml is chosen by adapters=mine
  --help             this page
"""
SETTINGS = """\
An adapter is environment <- template <- adapters.NAME <- every <- one point of the sweep; what is further right wins.
  template.X=...            every adapter that does not set X itself
  adapters.NAME.X=...       one adapter
  every.X=...               every adapter, whatever it sets itself
  sweep.X=[a,b]             multiplies the adapters: one for each value (of each combination, where several are swept)
  run.X=..., cluster.X=...  the run and what it runs on
"""
EXAMPLES = """\
examples
  weft adapters=demo                                           eight adapters learn at once on this machine
  weft environment=reasoning_gym environment.settings.task=spell_backward
  weft environment=jsonl environment.settings.path=questions.jsonl template.num_steps=100
  weft environment.target=mypackage.tasks.Riddles              a class of your own (weft/actors/environment.py)
  weft sweep.learning_rate=[1e-4,3e-4] sweep.rank=[8,32]       four adapters out of the template
  weft model=local model.path=/models/Qwen3-0.6B cluster=h200x2 adapters=demo
  weft adapters=demo run.dir=outputs/demo                      given again: goes on from its checkpoints
  weft adapters=demo run.dir=outputs/demo run.fresh=true       given again: starts anew, the earlier run is moved aside
"""
MAIN = (
    ("X of an adapter", AdapterConfig("adapter"), (
        ("num_steps", "optimizer steps"),
        ("batch_size", "rollouts an optimizer step; a multiple of group_size"),
        ("group_size", "rollouts of one prompt"),
        ("max_staleness", "optimizer steps between the oldest token sampled and the step that trains it, at most"),
        ("eval_prompts", "held-out prompts before and after training; 0: none"),
        ("lora.rank", f"1 to {MAX_RANK}"),
        ("lora.alpha", "the update is alpha / rank * B A"),
        ("lora.target_modules", "all-linear, or names such as [q_proj,v_proj]"),
        ("lora.warm_start", "a PEFT folder of the same shape"),
        ("optimizer.learning_rate", "of AdamW"),
        ("loss.name", ", ".join(LOSSES)),
        ("loss.advantage", ", ".join(ADVANTAGES) + "; auto: the loss's own"),
        ("loss.kl_coefficient", "weight of the KL divergence to the base"),
        ("sampling.temperature", ""),
        ("sampling.max_tokens", "new tokens a turn"),
    )),
    ("run", RunConfig(), (
        ("dir", "where everything is written; one run at a time"),
        ("fresh", "true: an earlier run there is moved aside"),
        ("checkpoint_every", "optimizer steps of an adapter between its checkpoints"),
        ("table", "auto, live, plain"),
    )),
    ("cluster", ClusterConfig(), (
        ("samplers", "vLLM engines"),
        ("gpus_per_sampler", ""),
        ("gpus_per_trainer", ""),
        ("dashboard_port", "of Ray's dashboard; 0: any free one"),
        ("sampler.max_model_len", "tokens of a prompt and all its turns, at most"),
    )),
)  # fmt: skip


def help_text(config_dir: str | None = None) -> str:
    """The page. config_dir: as in `weft --config-dir`."""
    groups = ["groups and their choices (* is the default)"]
    default = defaults()
    for group, choices in descriptions(config_dir).items():
        groups.append(f"  {group}=")
        groups += [_row(f"  {'*' if default[group] == name else ' '} {name}", text) for name, text in choices.items()]
    settings = [SETTINGS.rstrip()]
    for title, section, names in MAIN:
        settings.append(f"{title}:" if " " in title else f"{title}.X:")
        settings += [_row(f"    {name}={_shown(section, name)}", text) for name, text in names]
    settings.append("All settings with their values: weft --cfg. Each is described in weft/configs/schema.py.")
    return "\n".join([USAGE, *groups, "", "settings", *settings, "", EXAMPLES.rstrip()])


def _row(left: str, text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=f"{left:<42} ", subsequent_indent=" " * 43) if text else left


def _shown(section: Any, name: str) -> str:
    value = section
    for part in name.split("."):
        value = getattr(value, part)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
