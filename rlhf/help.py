"""What `python train.py --help` prints, `--help KEY`, and what tab completion offers. No torch."""

from __future__ import annotations

import glob
import os
import typing
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf import arguments, compose
from rlhf.arguments import group_names, group_options
from rlhf.config.keys import Key, find_key, schema
from rlhf.config.loading import as_text
from rlhf.config.reference import type_name
from rlhf.config.suggestions import with_suggestion

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
    options = []
    if name in group_names():
        options = [f"{name}=OPTION chooses one of {', '.join(group_options(name))}"]
    if key is None:
        return "\n".join(options) or f"unknown key {with_suggestion(name)}"
    if not key.is_node:
        return one_key(name, key, cfg)
    below = [k for k in schema() if k.startswith(f"{key.name}.") and not k.endswith("*")]
    lines = [f"{name}: {key.meaning}", *options, ""]
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


# --------------------------------------------------------------------------------- tab completion


def complete(line: str, folders: Sequence[Path]) -> list[str]:
    """What the last word of a command line can become.

    Args: line: as typed so far, up to the cursor.  folders: the user's, with option files.
    """
    *before, word = line.split(" ")
    prefix = word[: len(word) - len(word.lstrip("+~"))]
    word = word[len(prefix) :]
    given = [arg.strip("'\"") for arg in before if "=" in arg and not arg.startswith("hydra")]
    try:
        typed = [arguments.allow_user_names(arg) for arg in given]
        cfg = compose.compose_alone(typed, folders)
    except Exception:  # the words before are not finished or wrong, which the command will say
        cfg = compose.compose_alone([], folders)
    if "=" in word:
        key, _, value = word.partition("=")
        done = value[: max(value.rfind(","), value.rfind("[")) + 1]  # of a sweep or a list
        names = [f"{key}={done}{choice}" for choice in choices(key, value[len(done) :], cfg)]
    else:
        names = keys_below(word.rpartition(".")[0], cfg)
        if "--help" in before or "-h" in before:
            names = [name.removesuffix("=") for name in names]
    return sorted(prefix + name for name in names if name.startswith(word))


def choices(key: str, begun: str, cfg: DictConfig) -> list[str]:
    """Values for a key or a group. Args: begun: of the value; a path gets files and folders."""
    if key in group_names():
        return group_options(key)
    found = find_key(key)
    if found is None or found.is_node:
        return []
    kinds = [found.annotation, *typing.get_args(found.annotation)]
    values = ["null"] if found.is_optional else []
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Enum):
            return [*kind.__members__, *values]
        if kind is bool:
            return ["true", "false", *values]
    if begun.startswith(("/", ".", "~")):
        files = glob.glob(os.path.expanduser(glob.escape(begun)) + "*")
        return [f"{file}/" if os.path.isdir(file) else file for file in files]
    now: Any = OmegaConf.select(cfg, key, default=None)
    return [*values, as_text(now)] if isinstance(now, (int, float, str)) else values


def keys_below(node: str, cfg: DictConfig) -> list[str]:
    """The keys in a node ("" for the top) as a user continues them: `rl.kl.`, `rl.lr=`, `actor=`.

    Nodes that the user has named are those of the configuration.
    """
    found = find_key(node)
    if node and found is None:
        return []
    pattern = f"{found.name}." if found else ""
    names = [key.removeprefix(pattern) for key in schema() if key.startswith(pattern)]
    names = [name for name in names if "." not in name]
    if names == ["*"]:
        names = [str(name) for name in OmegaConf.select(cfg, node) or {}]
    if not node:
        names = [name for name in names if name != "inputs"]
    made = [f"{node}.{name}" if node else name for name in names]
    return ([f"{group}=" for group in group_names()] if not node else []) + [
        key + ("." if has_keys(key, cfg) else "=") for key in made if key != "pipeline"
    ]


def has_keys(key: str, cfg: DictConfig) -> bool:
    """Whether a key is a node with keys now: not null."""
    found = find_key(key)
    is_node = found is not None and (found.is_node or found.is_dictionary)
    return is_node and OmegaConf.select(cfg, key) is not None
