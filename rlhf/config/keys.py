"""Dotted keys of the schema: which exist, and the closest match to one that does not."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf.config.schema import Config


def _node_type(annotation: Any) -> Any:
    """The dataclass behind an annotation, also behind Optional and dict[str, ...]; else the annotation."""
    inner = [a for a in typing.get_args(annotation) if a is not type(None)]
    return _node_type(inner[-1]) if inner else annotation


@functools.cache
def schema_keys(node: Any = Config, prefix: str = "") -> list[str]:
    """All dotted keys of the schema, nodes included; a name that the user chooses stands as `*`."""
    keys = []
    for name, annotation in typing.get_type_hints(node).items():
        key = prefix + name
        keys.append(key)
        star = ".*" if typing.get_origin(annotation) is dict else ""
        keys += [key + star] if star else []
        if dataclasses.is_dataclass(child := _node_type(annotation)):
            keys += schema_keys(typing.cast(type, child), f"{key}{star}.")
    return keys


@functools.cache
def is_known(key: str) -> bool:
    parts = key.split(".")
    return any(
        len(known := pattern.split(".")) == len(parts)
        and all(a in (b, "*") for a, b in zip(known, parts))
        for pattern in schema_keys()
    )


def with_suggestion(key: str) -> str:
    """`key` with the nearest known name: "ppo.lrr (did you mean ppo.lr?)"."""
    names = schema_keys()
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    last = [name for name in names if name.split(".")[-1] == key.split(".")[-1]]
    guesses = near or last
    return (
        f"{key} (did you mean {guesses[0]}?)" if guesses else f"{key} (see python train.py --help)"
    )


def unknown_keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    """Keys that are in `cfg` but not in the schema: `+key=value` puts them there unasked."""
    found = []
    for name in cfg:
        key = f"{prefix}{name!s}"
        if not is_known(key):
            found.append(key)
        elif (
            not OmegaConf.is_missing(cfg, name)
            and isinstance(child := cfg._get_node(name), DictConfig)
            and not child._is_none()
        ):
            found += unknown_keys(child, f"{key}.")
    return found


def lookup(cfg: Any, key: str) -> Any:
    for name in key.split("."):
        cfg = getattr(cfg, name)
    return cfg
