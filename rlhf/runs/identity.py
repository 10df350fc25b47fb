"""A run's identity and its directory, as functions of the configuration. No torch here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from enum import Enum
from pathlib import Path
from typing import Any

from rlhf.config.deployment import world_size
from rlhf.config.schema import Config, Stage
from rlhf.config.stage_graph import (
    CONFIG_NODES,
    parent_stages,
    uses_own_reward_model,
)
from rlhf.runs.locations import BUILTIN


def run_identity(cfg: Config, stage: Stage) -> dict[str, Any]:
    """All values that decide the result of `stage`, by dotted key: those of the nodes that it and the stages below it read. A trained
    model given by hand replaces the stage that would make it."""
    flat: dict[str, Any] = {}
    for node in CONFIG_NODES[stage]:
        flatten(getattr(cfg, node), node, flat)
    if stage == Stage.ppo:
        flatten(cfg.reward.lora, "reward.lora", flat)  # the critic's adapter
    switches = cfg.ppo.dschat
    if (stage == Stage.sft and cfg.sft.micro_batch_means) or (
        stage == Stage.ppo and (switches.micro_batch_means or switches.dropout)
    ):
        flat |= {
            "deploy.micro_batch": cfg.deploy.micro_batch,
            "processes": world_size(cfg),
        }  # then they do change the result
    if stage == Stage.ppo and switches.dropout:
        flat["deploy.eval_micro_batch"] = cfg.deploy.eval_micro_batch
    if stage == Stage.eval and "base" in cfg.eval.policies and cfg.actor.path.startswith(BUILTIN):
        flat["seed"] = cfg.seed  # of its random weights
    for parent, given in parent_stages(cfg, stage).items():
        flat |= {} if given else run_identity(cfg, parent)
    return flat


def flatten(value: Any, key: str, out: dict[str, Any]) -> None:
    """Collect the identity fields below a node of the schema as plain values."""
    if dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            if f.metadata.get("identity", True):
                flatten(getattr(value, f.name), f"{key}.{f.name}", out)
    elif isinstance(value, dict):
        for name, item in value.items():
            flatten(item, f"{key}.{name}", out)
    else:
        out[key] = value.name if isinstance(value, Enum) else value


def run_name(cfg: Config, stage: Stage, baseline: Config) -> str:
    """`<stage>-<models>[+key-value...]-<hash>`: the key-values are what differs from `baseline`, the same choices of groups
    without any value set by hand; they are for people, the hash of the whole identity decides."""
    values, plain = run_identity(cfg, stage), run_identity(baseline, stage)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
    models = [cfg.actor.name] if stage != Stage.rm else []
    models += [cfg.reward.name] if stage == Stage.rm or uses_own_reward_model(cfg, stage) else []
    readable = "-".join([stage.name, *models])
    readable += "".join(
        f"+{key}-{value}" for key, value in sorted(values.items()) if plain.get(key) != value
    )
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", readable)[:100] + "-" + digest


def run_dir_for(cfg: Config, stage: Stage, baseline: Config) -> Path:
    return Path(cfg.root).expanduser() / "outputs" / run_name(cfg, stage, baseline)
