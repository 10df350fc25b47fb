"""Which configuration nodes a stage reads, and which stages it is trained from."""

from __future__ import annotations

import re
from typing import Any, Optional

from rlhf.config.schema import ALIGNMENT, ONLINE, POLICIES, Config, Model, RewardSource, Stage

# The nodes that a stage reads itself; those of the stages it stands on come to them.
CONFIG_NODES = {
    Stage.sft: ["actor", "data", "sft", "deploy", "seed"],
    Stage.rm: ["reward", "data", "rm", "deploy", "seed"],
    **{stage: ["actor", "data", stage.name, "rollout", "deploy", "seed"] for stage in ALIGNMENT},
    Stage.eval: ["actor", "data", "eval", "rollout", "deploy"],  # its draws are always the same
    Stage.inspect: ["actor", "data"],
}


def parent_stages(cfg: Config, stage: Stage) -> dict[Stage, Optional[str]]:
    """The stages whose results `stage` stands on, each with the trained model that is given in its place. A reward model is needed
    where it is a part of the score, and not where python functions and other models give that."""
    node: Any = getattr(cfg, stage.name, None)
    found: dict[Stage, Optional[str]] = {}
    if stage in ALIGNMENT:
        found[Stage.sft] = node.actor
    if stage == Stage.eval:
        found |= {policy: None for policy in POLICIES if policy.name in cfg.eval.policies}
    if (stage in ONLINE or stage == Stage.eval) and uses_own_reward_model(cfg, stage):
        found[Stage.rm] = None if stage == Stage.eval else node.reward
    return found


def uses_own_reward_model(cfg: Config, stage: Stage) -> bool:
    """Whether a part of the stage's score is the reward model of this configuration (or one given in its place)."""
    return any(
        source.path is None and source.function is None
        for source in sources_of_score(cfg, stage).values()
    )


def sources_of_score(cfg: Config, stage: Stage) -> dict[str, RewardSource]:
    """The parts of the score of a stage, by name; none where it has no score."""
    return getattr(cfg, stage.name).rewards if stage in ONLINE or stage == Stage.eval else {}


def is_named(policy: str) -> bool:
    """Whether one of eval.policies is the base model or a stage's, so that no path is needed."""
    return policy == "base" or policy in [stage.name for stage in POLICIES]


def policy_labels(policies: list[str]) -> dict[str, str]:
    """Short names of eval.policies, and which they mean: the end of a path or hub id, of a run its stage and hash; all of it where two
    end alike."""
    ends = [
        next((part for part in reversed(policy.split("/")) if part not in ("", "model")), policy)
        for policy in policies
    ]
    ends = [
        re.sub(
            rf"^({'|'.join(stage.name for stage in POLICIES)})-.*(-[0-9a-f]{{8}})$", r"\1\2", end
        )
        for end in ends
    ]
    return {end if ends.count(end) == 1 else policy: policy for end, policy in zip(ends, policies)}


def stage_config(cfg: Config) -> Any:
    """The settings of the stage that runs."""
    return getattr(cfg, cfg.stage.name)


def adapter_only(model: Model) -> bool:
    """Whether switching a policy's adapter off switches off all that is trained: it then is its own reference."""
    return model.lora.rank > 0 and not model.lora.embeddings
