"""Between a composed configuration, a run's config.yaml and the typed schema."""

from __future__ import annotations

import typing
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from rlhf.base.errors import UserError
from rlhf.base.files import atomic_path
from rlhf.config.keys import unknown_keys, with_suggestion
from rlhf.config.schema import Config


def to_typed(cfg: DictConfig) -> Config:
    """The composed configuration as plain typed objects.

    Raises: UserError naming all unknown keys and all keys without a value.
    """
    problems = [f"unknown key {with_suggestion(key)}" for key in unknown_keys(cfg)]
    problems += [f"{key} has no value: give one, {key}=..." for key in missing_keys(cfg)]
    if problems:
        raise UserError("\n".join(problems))
    typed = typing.cast(Config, OmegaConf.to_object(cfg))
    for node in (typed.rl, typed.eval):  # NAME: null removes a source
        node.rewards = {name: source for name, source in node.rewards.items() if source}
    return typed


def missing_keys(cfg: DictConfig) -> list[str]:
    """The keys that only the user can give a value, and that have none."""
    try:
        return sorted(OmegaConf.missing_keys(cfg))
    except InterpolationToMissingValueError as error:  # another key follows it
        return [str(error).splitlines()[0].rsplit(" ", 1)[-1]]


def load_config(path: Path) -> Config:
    """Read a run's resolved config.yaml. Raises: UserError where an earlier version wrote it."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
    except OmegaConfBaseException as error:
        line = str(error).splitlines()[0]
        raise UserError(f"{path}: made by an earlier version of this project ({line})") from None
    return to_typed(typing.cast(DictConfig, merged))


def save_config(cfg: Config, path: Path) -> None:
    """Write the resolved configuration of a run."""
    with atomic_path(path) as temporary:
        temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(cfg), resolve=True))
