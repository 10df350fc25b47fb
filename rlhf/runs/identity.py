"""A run's identity and its directory, as functions of the configuration. No torch here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from enum import Enum
from pathlib import Path
from typing import Any

from rlhf.base.locations import BUILTIN
from rlhf.config.schema import Config
from rlhf.config.stage_graph import (
    BASE,
    config_nodes,
    has_critic,
    is_rl,
    parent_stages,
    unused_keys,
    uses_trained_reward_model,
)
from rlhf.runs.command import Command

MAX_NAME = 100  # characters of a run's name before its hash


def run_identity(command: Command, stage: str) -> dict[str, Any]:
    """All values that decide the result of `stage`, by dotted key.

    They are those of the nodes that it and its parent stages read. A trained model given by hand
    replaces the stage that would make it.
    """
    command = command.for_stage(stage)
    identity = own_settings(command.cfg, stage)
    for parent, given in parent_stages(command.cfg, stage).items():
        if given:
            continue
        settings = run_identity(command, parent)
        if is_rl(parent):  # several algorithms may be parents: each under its own name
            settings = {re.sub(r"^rl\.", f"{parent}.", key): v for key, v in settings.items()}
        identity |= settings
    return identity


def own_settings(cfg: Config, stage: str) -> dict[str, Any]:
    """The values that a stage reads itself, without those that have no effect on its result."""
    flat: dict[str, Any] = {}
    for node in config_nodes(stage):
        flatten(getattr(cfg, node), node, flat)
    if is_rl(stage):
        unused = unused_keys(cfg)
        flat = {key: v for key, v in flat.items() if not any(is_below(key, u) for u in unused)}
        if has_critic(cfg.rl):
            flatten(cfg.reward.lora, "reward.lora", flat)  # the critic's adapter
    if stage == "eval" and BASE in cfg.eval.policies and cfg.actor.path.startswith(BUILTIN):
        flat["seed"] = cfg.seed  # of its random weights
    return flat


def is_below(key: str, node: str) -> bool:
    """Whether a dotted key is a node, or lies below it."""
    return key == node or key.startswith(f"{node}.")


def flatten(value: Any, key: str, out: dict[str, Any]) -> None:
    """Collect the hashed fields below a node of the schema as plain values."""
    if dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            if f.metadata["hashed"]:
                flatten(getattr(value, f.name), f"{key}.{f.name}", out)
    elif isinstance(value, dict):
        for name, item in value.items():
            flatten(item, f"{key}.{name}", out)
    else:
        out[key] = value.name if isinstance(value, Enum) else value


def run_name(command: Command, stage: str) -> str:
    """`<stage>-<models>[+key-value...]-<hash>`.

    The key-values are what differs from the baseline: the same choices of groups without any value
    set by hand. They are for people; the hash of the whole identity decides.
    """
    command = command.for_stage(stage)
    baseline = dataclasses.replace(command, cfg=command.baseline)
    values, plain = run_identity(command, stage), run_identity(baseline, stage)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
    cfg = command.cfg
    models = [cfg.actor.name] if stage != "rm" else []
    if stage == "rm" or uses_trained_reward_model(cfg, stage):
        models.append(cfg.reward.name)
    changed = [f"+{key}-{v}" for key, v in sorted(values.items()) if plain.get(key) != v]
    readable = re.sub(r"[^A-Za-z0-9._+-]+", "-", "-".join([stage, *models]) + "".join(changed))
    return f"{readable[:MAX_NAME]}-{digest}"


def run_dir_for(command: Command, stage: str) -> Path:
    """The directory of the run of a stage."""
    return Path(command.cfg.root).expanduser() / "outputs" / run_name(command, stage)
