"""The folders with option files, and the presets of online RL in them."""

from __future__ import annotations

from pathlib import Path

CONF = Path(__file__).parents[2] / "conf"
config_dirs = [CONF]  # and the user's own: --config-dir DIR, hydra.searchpath=[file://DIR]


def options(group: str) -> list[str]:
    """The names of the option files of a group, in all folders."""
    return sorted({file.stem for folder in config_dirs for file in folder.glob(f"{group}/*.yaml")})


def preset_names() -> list[str]:
    """The presets of online RL: files in conf/rl. Each is a stage of that name, too."""
    return options("rl")


def pipeline_ends() -> list[str]:
    """What pipeline=NAME can be: a preset of online RL, or dpo."""
    return [*preset_names(), "dpo"]
