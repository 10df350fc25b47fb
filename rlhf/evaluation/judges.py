"""Who judges responses in stage=eval."""

from __future__ import annotations

from rlhf.base.log import log
from rlhf.config.schema import Config
from rlhf.config.stage_nodes import Eval
from rlhf.data.records import Dataset


def say_who_does_not_judge(cfg: Config) -> None:
    """Name the functions that an evaluated policy was trained with and that are no judges here."""
    judges = {one.function for one in cfg.eval.rewards.values() if one}
    for name, source in cfg.rl.rewards.items() if cfg.rl.name in cfg.eval.policies else ():
        if source and source.function and source.function not in judges:
            log.info(
                f"rl.rewards.{name} does not judge here: eval.rewards.{name}.function="
                f"{source.function} makes it a judge"
            )


def judges_of(node: Eval, data: Dataset) -> list[str]:
    """Names of the judges: the gold reward first where it is known, then the sources."""
    gold = ["gold"] if data.gold and "gold" not in node.rewards else []
    return [*gold, *node.rewards]
