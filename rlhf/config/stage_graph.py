"""Which configuration nodes a stage reads, and which stages it is trained from.

A stage is one of FIXED_STAGES or the name of a preset of online RL (a file in conf/rl).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields

from rlhf.config.choices import NEEDS_CRITIC, PER_TOKEN, KlController
from rlhf.config.presets import preset_names
from rlhf.config.schema import Config, Model
from rlhf.config.stage_nodes import Dpo, Eval, Optim, RewardSource, Rl, Rm, Sft

FIXED_STAGES = ("sft", "rm", "dpo", "eval", "inspect")
BASE = "base"  # in eval.policies: the model that SFT starts from


def is_rl(stage: str) -> bool:
    """Whether a stage trains a policy on its own responses: every stage but FIXED_STAGES."""
    return stage not in FIXED_STAGES


def module_of(stage: str) -> str:
    """The module that runs a stage."""
    name = "rl" if is_rl(stage) else {"eval": "evaluate"}.get(stage, stage)
    return f"rlhf.stages.{name}"


def is_aligned(stage: str) -> bool:
    """Whether a stage trains a policy that starts from SFT: what can end a pipeline."""
    return is_rl(stage) or stage == "dpo"


def is_policy(stage: str) -> bool:
    """Whether a stage trains a policy."""
    return is_aligned(stage) or stage == "sft"


def config_nodes(stage: str) -> list[str]:
    """The nodes that a stage reads itself; those of its parent stages come to them."""
    if is_rl(stage):
        return ["actor", "data", "rl", "rollout", "deploy", "seed"]
    return {
        "sft": ["actor", "data", "sft", "deploy", "seed"],
        "rm": ["reward", "data", "rm", "deploy", "seed"],
        "dpo": ["actor", "data", "dpo", "rollout", "deploy", "seed"],
        "eval": ["actor", "data", "eval", "rollout", "deploy"],  # its random numbers never change
        "inspect": ["actor", "data"],
    }[stage]


def evaluation_keys(stage: str) -> list[str]:
    """Prefixes of the keys that decide only how the result of a stage is measured.

    They are part of the identity of stage=eval alone: what a training stage learns does not depend
    on them.
    """
    if stage in ("eval", "inspect"):
        return []
    looked_at = ["data.eval_rows", "data.arithmetic.harder"]
    if is_rl(stage):
        return [*looked_at, "rl.evaluation"]
    return [*looked_at, *(["rollout"] if stage == "dpo" else [])]  # dpo samples to evaluate


def unused_keys(cfg: Config) -> list[str]:
    """Prefixes of the keys of the rl node that this algorithm does not read."""
    unused = []
    if not has_critic(cfg.rl):
        unused += ["rl.critic", "rl.gae_lambda"]
    if cfg.rl.advantage not in PER_TOKEN:
        unused += ["rl.gamma", "rl.whiten_rewards"]
    return unused


def idle_keys(cfg: Config, stages: Sequence[str]) -> dict[str, str]:
    """Keys that nothing reads because of another value, and that value."""
    idle: dict[str, str] = {}
    if any(map(is_rl, stages)):
        controller = f"rl.kl.controller={cfg.rl.kl.controller.name}"
        if cfg.rl.kl.controller != KlController.adaptive:
            idle |= dict.fromkeys(("rl.kl.target", "rl.kl.horizon"), controller)
        if cfg.rl.kl.controller != KlController.linear:
            idle["rl.kl.final_coef"] = controller
    if cfg.data.world:  # it divides its prompts itself, and has no bad rows
        unused = ("data.shares", "data.eval_share", "data.on_bad_row", "data.max_row_mb")
        idle |= dict.fromkeys(unused, f"the built-in {cfg.data.world}")
    for node, model in (("actor", cfg.actor), ("reward", cfg.reward)):
        if not model.lora.rank:
            names = {field.name for field in fields(model.lora)} - {"rank"}
            idle |= {f"{node}.lora.{name}": f"{node}.lora.rank=0" for name in names}
    return idle


def has_critic(rl: Rl) -> bool:
    """Whether advantages need the values of a critic."""
    return rl.advantage in NEEDS_CRITIC


def prompts_per_rollout(rl: Rl) -> int:
    """Prompts of a rollout; each gets rl.responses_per_prompt responses."""
    return rl.batch_size // rl.responses_per_prompt


def parent_stages(cfg: Config, stage: str) -> dict[str, str | None]:
    """The stages that `stage` is trained from, each with the trained model given instead of it.

    The reward model is a parent where it is a part of the score, not where functions and other
    models give the score. Of stage=eval: the stages named in eval.policies.
    """
    parents: dict[str, str | None] = {}
    if is_aligned(stage):
        parents["sft"] = aligned_node(cfg, stage).actor
    if stage == "eval":
        parents |= {policy: None for policy in cfg.eval.policies if is_stage_name(policy)}
    if uses_trained_reward_model(cfg, stage):
        parents["rm"] = None if stage == "eval" else cfg.rl.reward
    return parents


def uses_trained_reward_model(cfg: Config, stage: str) -> bool:
    """Whether a part of the stage's score is the reward model of this configuration."""
    functions = function_sources(cfg, stage)
    return any(
        source.path is None and name not in functions
        for name, source in score_sources(cfg, stage).items()
    )


def score_sources(cfg: Config, stage: str) -> dict[str, RewardSource]:
    """The parts of the score of a stage, by name; none where it has no score."""
    if not is_rl(stage) and stage != "eval":
        return {}
    rewards = cfg.eval.rewards if stage == "eval" else cfg.rl.rewards
    return {name: source for name, source in rewards.items() if source is not None}


def function_sources(cfg: Config, stage: str) -> dict[str, RewardSource]:
    """The parts of the score that are no reward models: python functions, servers and judges."""
    return {
        name: source
        for name, source in score_sources(cfg, stage).items()
        if source.function or source.url or source.judge
    }


def verifiers(cfg: Config) -> list[str]:
    """The sources of stage=eval that check responses: functions, but for the sandbox's gold reward,
    which is a grade, as the scores of a server may be."""
    sources = function_sources(cfg, "eval").items()
    return [name for name, one in sources if one.function and name != "gold"]


def is_stage_name(policy: str) -> bool:
    """Whether an entry of eval.policies is the name of a stage (not base, a path or a hub id)."""
    return policy in ("sft", "dpo", *preset_names())


def policy_labels(policies: list[str]) -> dict[str, str]:
    """Short names of eval.policies, and which they mean.

    The last part of a path or hub id, of a run its stage and hash; all of it where two end alike.
    """
    ends = [
        next((part for part in reversed(policy.split("/")) if part not in ("", "model")), policy)
        for policy in policies
    ]
    ends = [re.sub(r"^(\w+)-.*(-[0-9a-f]{8})$", r"\1\2", end) for end in ends]
    return {end if ends.count(end) == 1 else policy: policy for end, policy in zip(ends, policies)}


def node_name(stage: str) -> str:
    """The configuration node with a stage's settings: its own name, or rl."""
    return "rl" if is_rl(stage) else stage


def stage_node(cfg: Config, stage: str) -> Sft | Rm | Dpo | Rl | Eval:
    """The settings of a stage that trains or evaluates."""
    return cfg.rl if is_rl(stage) else getattr(cfg, stage)


def trains_critic(cfg: Config, stage: str) -> bool:
    """Whether a stage trains a critic beside the policy."""
    return is_rl(stage) and has_critic(cfg.rl)


def aligned_node(cfg: Config, stage: str) -> Rl | Dpo:
    """The settings of a stage that starts from SFT."""
    return cfg.rl if is_rl(stage) else cfg.dpo


def optimizer_nodes(cfg: Config) -> dict[str, Optim]:
    """All nodes with the settings of an optimizer, by their dotted names."""
    return {"sft": cfg.sft, "rm": cfg.rm, "dpo": cfg.dpo, "rl": cfg.rl, "rl.critic": cfg.rl.critic}


def adapter_only(model: Model) -> bool:
    """Whether the adapter is all that is trained: with it off, the policy is its own reference."""
    return model.lora.rank > 0 and not model.lora.embeddings
