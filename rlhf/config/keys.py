"""Dotted keys of the schema: which exist, what they mean, their values in a configuration."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf.config.field import node_type
from rlhf.config.limits import MOST
from rlhf.config.schema import Config

LIMITS = {
    "above": (lambda value, limit: value > limit, "above"),
    "at_least": (lambda value, limit: value >= limit, "at least"),
    "below": (lambda value, limit: value < limit, "below"),
    "at_most": (lambda value, limit: value <= limit, "at most"),
}


@dataclass(frozen=True)
class Key:
    """One dotted key of the schema; a name that the user chooses stands as `*`."""

    name: str
    annotation: Any  # its type, as written in the schema
    field: dataclasses.Field[Any] | None  # None for `*`

    @property
    def meaning(self) -> str:
        return self.field.metadata["meaning"] if self.field else "by a name of your choice"

    @property
    def hashed(self) -> bool:
        return self.field is None or self.field.metadata["hashed"]

    @property
    def is_node(self) -> bool:
        return dataclasses.is_dataclass(node_type(self.annotation))

    @property
    def is_dictionary(self) -> bool:
        """Whether users add to it by names of their choice."""
        return typing.get_origin(self.annotation) is dict

    @property
    def is_optional(self) -> bool:
        return type(None) in typing.get_args(self.annotation)

    @property
    def limits(self) -> dict[str, float]:
        """The range by the names of LIMITS."""
        metadata = self.field.metadata if self.field else {}
        return {name: metadata[name] for name in LIMITS if metadata.get(name) is not None}

    @property
    def range(self) -> str:
        """The range in words: "above 0, at most 1"; empty where there is none."""
        return ", ".join(f"{LIMITS[name][1]} {in_digits(n)}" for name, n in self.limits.items())


def in_digits(limit: float) -> str:
    """A limit for people: 1,000,000; 0.5."""
    return f"{limit:,.0f}" if abs(limit) >= 10_000 else f"{limit:g}"


@functools.cache
def schema(node: type = Config, prefix: str = "") -> dict[str, Key]:
    """All keys of the schema by their dotted names, nodes included, in the order of the schema."""
    keys: dict[str, Key] = {}
    hints = typing.get_type_hints(node)
    for field in dataclasses.fields(node):
        name, annotation = prefix + field.name, hints[field.name]
        keys[name] = Key(name, annotation, field)
        if typing.get_origin(annotation) is dict:
            name = f"{name}.*"
            keys[name] = Key(name, typing.get_args(annotation)[1], None)
        if dataclasses.is_dataclass(child := node_type(annotation)):
            keys |= schema(typing.cast(type, child), f"{name}.")
    return keys


@functools.cache
def find_key(key: str) -> Key | None:
    """The key of the schema that a dotted key means; None where there is none."""
    parts = key.split(".")
    for pattern, found in schema().items():
        known = pattern.split(".")
        if len(known) == len(parts) and all(a in (b, "*") for a, b in zip(known, parts)):
            return found
    return None


def unknown_keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    """Keys that are in `cfg` but not in the schema, where `+key=value` puts them."""
    unknown = []
    for name in cfg:
        key = f"{prefix}{name!s}"
        found = find_key(key)
        if not found:
            unknown.append(key)
        elif (
            found.annotation is not Any  # as an argument of a function is
            and not OmegaConf.is_missing(cfg, name)
            and isinstance(child := cfg._get_node(name), DictConfig)
            and not child._is_none()
        ):
            unknown += unknown_keys(child, f"{key}.")
    return unknown


def lookup(cfg: Any, key: str) -> Any:
    """The value of a dotted key of a typed configuration."""
    for name in key.split("."):
        cfg = cfg[name] if isinstance(cfg, dict) else getattr(cfg, name)
    return cfg


def values(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a typed configuration, leaves only."""
    if dataclasses.is_dataclass(node):
        children = [(field.name, getattr(node, field.name)) for field in dataclasses.fields(node)]
    elif isinstance(node, dict):
        children = list(node.items())
    else:
        yield prefix, node
        return
    for name, child in children:
        yield from values(child, f"{prefix}.{name}" if prefix else name)


def out_of_range(cfg: Config) -> list[str]:
    """The numbers of a configuration that are outside the range on their field, one line each.

    A number without a range must be finite, and a whole one within `MOST`.
    """
    lines = []
    for name, value in values(cfg):
        key = find_key(name)
        numbers = value if isinstance(value, list) else [value]
        if key is None or key.annotation is Any or not all(map(is_number, numbers)):
            continue
        if not all(isinstance(number, int) or math.isfinite(number) for number in numbers):
            range = f", {key.range}" if key.range else ""
            lines.append(f"{name}={value}: must be a finite number{range}")
        elif not all(
            LIMITS[limit][0](number, bound)
            for number in numbers
            for limit, bound in key.limits.items()
        ):
            lines.append(f"{name}={value}: must be {key.range}")
        elif any(isinstance(number, int) and abs(number) > MOST for number in numbers):
            lines.append(f"{name}={value}: must be at most {in_digits(MOST)}")
    return lines


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
