"""What a user asked for, in the forms that runs are named and found by."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field

from rlhf.config import presets
from rlhf.config.schema import Config
from rlhf.config.stage_graph import config_nodes, is_rl


@dataclass
class Command:
    """One command line, or one job of a sweep."""

    cfg: Config
    baseline: Config  # the same choices of groups, without any value set by hand
    overrides: list[str]  # as typed
    algorithms: dict[str, Command] = field(default_factory=dict)  # with other rl presets, by name

    def for_stage(self, stage: str) -> Command:
        """The command that describes a stage: of another algorithm, its own."""
        return self.algorithms.get(stage, self)

    def as_typed(self) -> str:
        """The command line, for a shell. Of a sweep: that of this job alone."""
        flags: list[str] = []
        if folders := presets.config_dirs[1:]:
            flags = ["--config-dir", str(folders[0])]
            more = ",".join(f"file://{folder}" for folder in folders[1:])
            flags += [f"hydra.searchpath=[{more}]"] if more else []
        return shlex.join(["python", "train.py", *flags, *self.overrides])

    def to_train(self, stage: str) -> list[str]:
        """The overrides with which `stage` alone is trained, for advice to the user."""
        nodes = set(config_nodes(stage))
        others = {"stage", "pipeline", "rl", "sft", "rm", "dpo", "eval", "rollout"} - nodes
        if is_rl(stage):
            others -= {"sft", "rm"}
        kept = [arg for arg in self.overrides if root_of(arg) not in others | {"stage"}]
        return [f"stage={stage}", *kept]


def root_of(arg: str) -> str:
    """The first part of an override's key: `rl` for ++rl.rewards.gold.weight=1."""
    return arg.lstrip("+~").partition("=")[0].partition(".")[0]
