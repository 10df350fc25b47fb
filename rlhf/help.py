"""What `python train.py --help` prints, and `--help KEY`. No torch here."""

from __future__ import annotations

from enum import Enum

from omegaconf import DictConfig, OmegaConf

from rlhf.compose import group_names, group_options
from rlhf.config.keys import Key, find_key, schema, with_suggestion
from rlhf.config.reference import type_name

OVERVIEW = """RLHF, from a base model to a policy: SFT, reward model, PPO; RLOO, GRPO, DPO.

  python train.py                                             the whole pipeline, tiny model, on CPU
  python train.py stage=sft actor=opt1.3b deploy=single_gpu   one stage of a real one
  python train.py rl.kl.coef=0.02 seed=2                      any key; finished stages are reused

What can be chosen by name (GROUP=OPTION):

{groups}

Keys (KEY=VALUE): nodes {nodes}.
  One key or node with meaning, type, range and value:  python train.py --help rl.kl
  All keys: docs/keys.md.  What a command would run with:  python train.py ... --cfg job
  Where values come from:  python train.py ... --info defaults-tree
  Sweep over anything:  python train.py -m rl.kl.coef=0.02,0.1 seed=1,2
  Your own option files:  python train.py --config-dir DIR data=mine
  Tab completion in bash:  eval "$(python train.py -sc install=bash)"
"""


def overview() -> str:
    """The groups with their options, and where to read about keys."""
    width = max(map(len, group_names()))
    groups = [f"  {name:<{width}}  {', '.join(group_options(name))}" for name in group_names()]
    nodes = [name for name, key in schema().items() if key.is_node and "." not in name]
    return OVERVIEW.format(groups="\n".join(groups), nodes=", ".join(nodes))


def describe(name: str, cfg: DictConfig) -> str:
    """A key, or all keys of a node: meaning, type, range and value. Args: cfg: as composed."""
    key = find_key(name)
    if key is None:
        return f"unknown key {with_suggestion(name)}"
    if not key.is_node:
        return one_key(name, key, cfg)
    below = [k for k in schema() if k.startswith(f"{key.name}.") and not k.endswith("*")]
    lines = [f"{name}: {key.meaning}", ""]
    for child in below:
        shown = name + child.removeprefix(key.name)
        if not schema()[child].is_node:
            lines += [one_key(shown, schema()[child], cfg), ""]
    return "\n".join(lines).rstrip()


def one_key(name: str, key: Key, cfg: DictConfig) -> str:
    """Meaning, type, range and value of one key, a line each."""
    limits = f", {key.range}" if key.range else ""
    lines = [name, f"    {key.meaning}", f"    {type_name(key.annotation)}{limits}"]
    if "*" not in name and (value := OmegaConf.select(cfg, name, default="")) != "":
        lines.append(f"    value: {value.name if isinstance(value, Enum) else value}")
    if not key.hashed:
        lines.append("    changes no result, so it is not part of a run's identity")
    return "\n".join(lines)
