"""Between a composed configuration, a run's config.yaml and the typed schema."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import typing
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from yaml import YAMLError

from rlhf.base.errors import UserError
from rlhf.base.files import atomic_path
from rlhf.config.keys import find_key, schema, unknown_keys
from rlhf.config.reference import type_name
from rlhf.config.schema import Config
from rlhf.config.suggestions import with_suggestion

BOOLEANS = ("true", "false", "yes", "no", "on", "off", "1", "0")


def to_typed(cfg: DictConfig) -> Config:
    """The composed configuration as plain typed objects.

    Raises: UserError naming all unknown keys and all keys without a value.
    """
    unknown = unknown_keys(cfg)
    typed = None
    with contextlib.suppress(MissingMandatoryValue, InterpolationToMissingValueError):
        typed = None if unknown else typing.cast(Config, OmegaConf.to_object(cfg))
    if typed is None:
        problems = [f"unknown key {with_suggestion(key)}" for key in unknown]
        problems += [f"{key} has no value: give one, {key}=..." for key in missing_keys(cfg)]
        raise UserError("\n".join(problems))
    for node in (typed.rl, typed.eval):  # NAME: null removes a source
        node.rewards = {name: source for name, source in node.rewards.items() if source}
    return typed


def wrong_values(key: str, value: Any) -> list[str]:
    """What is wrong with the type of a value for a key, a line each; none where it fits.

    Args: value: as Hydra reads it from the command line: a number, text, list, or a dictionary,
        whose keys are looked at one by one.
    """
    found = find_key(key)
    if found is None:
        return [f"unknown key {with_suggestion(key)}"]
    inner = [a for a in typing.get_args(found.annotation) if a is not type(None)]
    kind = inner[0] if found.is_optional else found.annotation
    is_node = found.is_node or typing.get_origin(kind) is dict
    if kind is typing.Any or (isinstance(value, str) and "${" in value):
        return []  # an argument of a user's function; or what it stands for is not known yet
    if is_node and isinstance(value, dict):
        return [
            line for name, item in value.items() for line in wrong_values(f"{key}.{name}", item)
        ]
    shown = f"{key}={as_text(value)}"
    if value is None:
        fix = f"give {one(kind)}" if not is_node else f"see python train.py --help {key}"
        return [] if found.is_optional else [f"{shown}: cannot be null; {fix}"]
    if is_node:
        *above, last = key.split(".")
        if found.field is None and find_key(f"{found.name}.{last}"):  # data.sources.path=FILE
            mine = ".".join([*above, "mine", last])
            return [f"{shown}: a name of your choice is missing: {mine}={as_text(value)}"]
        first = next(
            name for name in schema() if name.startswith(f"{found.name}.") and name[-1] != "*"
        )
        inside = f"{key}{first.removeprefix(found.name).replace('*', 'mine')}"
        fix = f"set one in it, such as {inside} (python train.py --help {key})"
        return [f"{shown}: {key} is not a single key; {fix}"]
    null = " or null" if found.is_optional else ""
    if value == "":
        return [f"{shown}: has no value; give {one(kind)}{null}"]
    if typing.get_origin(kind) is list:
        wrong = not isinstance(value, list)
        return [f"{shown}: must be a list; in quotes: '{key}=[{as_text(value)}]'"] if wrong else []
    if isinstance(value, list):
        several = ",".join(map(as_text, value))
        return [f"{shown}: must be one value; to try several: python train.py -m {key}={several}"]
    near = [n for n in getattr(kind, "__members__", ()) if n.lower() == str(value).lower()]
    hint = f" (did you mean {near[0]}?)" if near else ""
    return [] if fits(kind, value) else [f"{shown}: must be {one(kind)}{null}{hint}"]


def one(kind: Any) -> str:
    """A type of the schema in a sentence: "a number", "one of fixed, adaptive, linear"."""
    name = type_name(kind)
    return f"a {name}" if name in ("number", "whole number", "text") else name


def fits(kind: Any, value: Any) -> bool:
    """Whether a single value can be of a type of the schema."""
    if issubclass(kind, Enum):
        return str(value).rpartition(".")[2] in kind.__members__
    if kind is str:
        return not isinstance(value, dict)
    if kind is bool:
        return str(value).lower() in BOOLEANS
    if isinstance(value, (bool, dict)):
        return False
    try:
        return float(value) == kind(value) and (kind is float or not isinstance(value, float))
    except (ValueError, OverflowError):  # of int(inf)
        return False


def as_text(value: Any) -> str:
    """A value as a user types it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(as_text, value))}]" if isinstance(value, list) else str(value)


def missing_keys(cfg: DictConfig) -> list[str]:
    """The keys that only the user can give a value, and that have none."""
    try:
        return sorted(OmegaConf.missing_keys(cfg))
    except InterpolationToMissingValueError as error:  # another key follows it
        return [str(error).splitlines()[0].rsplit(" ", 1)[-1]]


def load_config(path: Path) -> Config:
    """Read a run's resolved config.yaml. Raises: UserError where an earlier version wrote it, or it
    is damaged."""
    try:
        saved = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read ({line})") from None
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), saved)
    except OmegaConfBaseException as error:
        line = str(error).splitlines()[0]
        raise UserError(f"{path}: made by an earlier version of this project ({line})") from None
    return to_typed(typing.cast(DictConfig, merged))


def save_config(cfg: Config, path: Path) -> None:
    """Write the configuration of a run, whose texts are as they are: "${" in them is no
    interpolation."""
    with atomic_path(path) as temporary:
        text = OmegaConf.to_yaml(OmegaConf.create(without_interpolations(plain(cfg))))
        temporary.write_text(text, encoding="utf-8")


def plain(value: Any) -> Any:
    """A typed configuration, or a part of it, as plain dictionaries, lists and values."""
    if dataclasses.is_dataclass(value):
        return {one.name: plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.name if isinstance(value, Enum) else value


def without_interpolations(value: Any) -> Any:
    """Plain values with "${" in texts marked as text, for OmegaConf."""
    if isinstance(value, dict):
        return {key: without_interpolations(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_interpolations(item) for item in value]
    if isinstance(value, str):  # backslashes in front of it are doubled, and one is added
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value
