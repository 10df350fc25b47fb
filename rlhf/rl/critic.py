"""The critic: what it starts from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlhf.base.log import log
from rlhf.config import stage_graph
from rlhf.config.schema import Config
from rlhf.distributed.engine import Engine, build_engine
from rlhf.models.loading import load_scorer
from rlhf.models.wrappers import Scorer
from rlhf.rl.rewards import Rewards


def build_critic(
    cfg: Config, rewards: Rewards, tokenizer: PreTrainedTokenizerBase, run_dir: Path
) -> Engine[Scorer]:
    """The critic. It starts from the reward model of this configuration where that reads the same
    tokens, else from the policy at its start with a new head."""
    reward_models = [
        source
        for source in rewards.sources
        if source.engine
        and not source.reads_text
        and not stage_graph.score_sources(cfg, cfg.rl.name)[source.name].path
        and source.weight
    ]
    start = reward_models[0] if reward_models else None
    if start is None:
        given = "rl.actor" if cfg.rl.actor else "the SFT policy"
        log.info(
            "critic: it starts from the weights of the policy at its start "
            f"({given}: {cfg.inputs['sft']}), as no reward model of this configuration reads the "
            "policy's tokens"
        )
    path = cfg.inputs["rm" if start else "sft"]
    precision, adapter = cfg.deploy.precision, replace(cfg.reward.lora, dropout=0.0)

    def load_critic() -> Scorer:
        is_new = start is None
        critic = load_scorer(path, tokenizer, precision, zero_head=is_new, adapter=adapter)
        if start and start.engine:  # values have the unit of the scores as they count
            unit = start.engine.module.hf.config
            critic.hf.config.score_mean = unit.score_mean
            critic.hf.config.score_std = unit.score_std / start.weight
        return critic

    return build_engine(load_critic, cfg, "critic", run_dir)
