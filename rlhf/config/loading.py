"""Between Hydra's composed configuration, a run's config.yaml and the typed schema."""

from __future__ import annotations

import os
import typing
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from rlhf.config.keys import unknown_keys, with_suggestion
from rlhf.config.schema import Config


def register_schema() -> None:
    """Make the schema known to Hydra, under the name that conf/config.yaml starts with."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store("schema", Config)


def to_typed(cfg: DictConfig) -> Config:
    """The composed configuration as plain typed objects. Raises ValueError naming all unknown and all missing keys."""
    problems = [f"unknown key {with_suggestion(key)}" for key in unknown_keys(cfg)]
    problems += [
        f"{key} has no value: give one, {key}=..." for key in sorted(OmegaConf.missing_keys(cfg))
    ]
    if problems:
        raise ValueError("\n".join(problems))
    return typing.cast(Config, OmegaConf.to_object(cfg))


def load_config(path: Path) -> Config:
    """Read a run's resolved config.yaml."""
    return to_typed(
        typing.cast(DictConfig, OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path)))
    )


def save_config(cfg: Config, path: Path) -> None:
    """Write the resolved configuration of a run, through a temporary name."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(cfg), resolve=True))
    os.replace(temporary, path)
