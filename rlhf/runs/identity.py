"""A run's identity and its directory, as functions of the configuration. No torch here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from rlhf.base.locations import BUILTIN
from rlhf.config.keys import find_key
from rlhf.config.schema import Config, Data
from rlhf.config.stage_graph import (
    BASE,
    config_nodes,
    evaluation_keys,
    has_critic,
    is_rl,
    parent_stages,
    unused_keys,
    uses_trained_reward_model,
)
from rlhf.runs.command import Command

MAX_NAME = 100  # characters of a run's name before its hash
MAX_HEAD = 75  # of stage, models and data in it; longer ones are cut to MAX_LABEL each
MAX_LABEL = 20
MAX_PART = 50  # of one key-value
DATA_FILE = r"\.(jsonl|json|csv|parquet)(\.gz)?$"


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
    unused = evaluation_keys(stage) + (unused_keys(cfg) if is_rl(stage) else [])
    values = read_by(cfg, stage).items()
    flat = {key: v for key, v in values if not any(is_below(key, u) for u in unused)}
    if is_rl(stage) and has_critic(cfg.rl):
        flatten(cfg.reward.lora, "reward.lora", flat)  # the critic's adapter
    if stage == "eval" and BASE in cfg.eval.policies and cfg.actor.path.startswith(BUILTIN):
        flat["seed"] = cfg.seed  # of its random weights
    return flat


def evaluation_settings(cfg: Config, stage: str) -> dict[str, Any]:
    """The values that decide only how the result of a training stage is measured."""
    keys, values = evaluation_keys(stage), read_by(cfg, stage).items()
    return {key: v for key, v in values if any(is_below(key, k) for k in keys)}


def settings_to_record(command: Command, stage: str) -> dict[str, Any]:
    """What a run is compared by: its identity, and how it is measured."""
    cfg = command.for_stage(stage).cfg
    return run_identity(command, stage) | evaluation_settings(cfg, stage)


def measured_otherwise(before: dict[str, Any], cfg: Config, stage: str) -> str:
    """The evaluation settings of an earlier command that are others now: "data.eval_rows=256".

    Args: before: its settings by dotted key.  cfg: as the command is now.
    Returns: "" where there are none.
    """
    now = evaluation_settings(cfg, stage)
    changed = {key: before[key] for key in now if key in before and before[key] != now[key]}
    return ", ".join(f"{key}={'null' if v is None else v}" for key, v in changed.items())


def read_by(cfg: Config, stage: str) -> dict[str, Any]:
    """All hashed values of the nodes that a stage reads itself."""
    flat: dict[str, Any] = {}
    for node in config_nodes(stage):
        flatten(getattr(cfg, node), node, flat)
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
            if item == {}:  # a value: an argument of a function
                out[f"{key}.{name}"] = {}
    else:
        out[key] = value.name if isinstance(value, Enum) else value


def run_name(command: Command, stage: str) -> str:
    """`<stage>-<models>[-<data>][+key-value...]-<hash>`.

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
    changed = [
        f"{key}-{v}"
        for key, v in sorted(values.items())
        if plain.get(key, default_of(key)) != v and not is_label(key, v)
    ]
    labels = [stage, *models, *data_labels(cfg.data)]
    if sum(map(len, labels)) > MAX_HEAD:
        labels = [label[:MAX_LABEL] for label in labels]
    head = "-".join(labels)
    return f"{short_name(head, changed)}-{digest}"


def default_of(key: str) -> Any:
    """The value of a key in a node that the user adds by name; None where it has no default."""
    found = find_key(key)
    default = found.field.default if found and found.field else None
    return None if default is dataclasses.MISSING else default


def data_labels(data: Data) -> list[str]:
    """Short names of the sources, the first ones of many; none for the built-in sandbox."""
    if data.world:
        return [] if data.sandbox is not None else [data.world]
    labels = [source_label(name, source.path) for name, source in data.sources.items()]
    more = [f"{len(labels) - 2}more"] if len(labels) > 3 else []
    return labels[:2] + more if more else labels


def is_label(key: str, value: Any) -> bool:
    """Whether a key is the path of a source that is named by it."""
    found = re.fullmatch(r"data\.sources\.([^.]+)\.path", key)
    return found is not None and source_label(found[1], value) != found[1]


def source_label(name: str, path: str) -> str:
    """A source's name where that says what it is; of `mine`, and of files, the end of the path.

    /x/pairs.jsonl is pairs; DIR/*.jsonl is DIR; /x/math/train.jsonl is math-train.
    """
    is_hub_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", path) and not re.search(DATA_FILE, path)
    if is_hub_id and name != "mine":
        return name
    parts = [re.sub(DATA_FILE, "", part) for part in path.split("/")]
    parts = [part for part in parts if part.strip(".~") and not set("*?[") & set(part)]
    if len(parts) > 1 and parts[-1] in ("train", "data", "all"):
        parts[-2:] = ["-".join(parts[-2:])]
    return parts[-1] if parts else name


def short_name(head: str, changed: Sequence[str]) -> str:
    """`head+key-value...` as the name of a folder; `+3more` stands for those that do not fit.

    Args: changed: "key-value" each. The seed comes last, and is never cut.
    """
    head, *parts = (re.sub(r"[^A-Za-z0-9._+-]+", "-", part) for part in (head, *changed))
    seed = [part for part in parts if part.startswith("seed-")]
    others = [part[:MAX_PART] for part in parts if part not in seed]
    for kept in range(len(others), -1, -1):
        more = [f"{len(others) - kept}more"] if kept < len(others) else []
        tail = "".join(f"+{part}" for part in (*others[:kept], *more, *seed))
        if len(head + tail) <= MAX_NAME:
            break
    return (head[: MAX_NAME - len(tail)] + tail).lstrip("+")


def run_dir_for(command: Command, stage: str) -> Path:
    """The directory of the run of a stage."""
    return Path(command.cfg.root).expanduser() / "outputs" / run_name(command, stage)
