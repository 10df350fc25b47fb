"""What a user asked for, in the forms that runs are named and found by."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf.base.commands import command_line, override_text
from rlhf.config import presets
from rlhf.config.schema import Config
from rlhf.config.stage_graph import config_nodes, is_aligned, is_rl


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

    def to_continue(self) -> str:
        """The command line that resumes a run which this one has begun, for a shell.

        Of a sweep: that of this job alone.
        """
        kept = [arg for arg in self.overrides if root_of(arg) != "fresh"]
        return command_line("train.py", *folder_options(), *kept)

    def to_train(self, *stages: str) -> str:
        """The command that trains these stages, for advice to the user: a pipeline where there are
        several. Values that none of them depends on are dropped.

        Args: stages: in their order; what the last one is trained from, or it alone.
        """
        last = stages[-1]
        nodes = set(config_nodes(last)).union(*map(config_nodes, stages))
        if is_aligned(last):  # its directory depends on them
            nodes |= {"sft", "rm"} if is_rl(last) else {"sft"}
        dropped = {
            "stage",
            "pipeline",
            "fresh",
            "rl",
            "sft",
            "rm",
            "dpo",
            "eval",
            "rollout",
        } - nodes
        kept = [arg for arg in self.overrides if root_of(arg) not in dropped]
        chosen = f"stage={last}" if len(stages) == 1 else f"pipeline={last}"
        return command_line("train.py", chosen, *kept, *folder_options())


def root_of(arg: str) -> str:
    """The first part of an override's key: `rl` for ++rl.rewards.gold.weight=1."""
    return arg.lstrip("+~").partition("=")[0].partition(".")[0]


def folder_options() -> list[str]:
    """The options that name the user's folders with option files."""
    folders = [str(folder) for folder in presets.config_dirs[1:]]
    if len(folders) == 1:
        return ["--config-dir", folders[0]]
    paths = ",".join(override_text(f"file://{folder}") for folder in folders)
    return [f"hydra.searchpath=[{paths}]"] if folders else []
