"""The DeepSpeed configuration of each role, as a pure function of ours. No torch.

DeepSpeed accepts unknown top-level keys silently, so nothing here is passed through from the user unread.
"""

from __future__ import annotations

from typing import Any

from rlhf.config import Config, Optim, Precision

TRAINED = ("actor", "critic", "reward_trained")
FROZEN = ("ref", "reward")


def build_ds_config(cfg: Config, role: str, world_size: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Args:
        role: "actor" (SFT and PPO), "critic" (PPO), "reward_trained" (reward stage); "ref", "reward" (PPO, frozen).
        world_size: all processes of the run.
    Raises: ValueError for another role.
    """
    if role not in TRAINED + FROZEN:
        raise ValueError(f"role {role!r}: must be one of {', '.join(TRAINED + FROZEN)}")
    optim = optim_of(cfg, role)
    # DeepSpeed partitions weights at stage 3 only; a model without an optimizer has nothing else to partition
    zero_stage = cfg.deploy.zero_stage if optim else (3 if cfg.deploy.zero_stage == 3 else 0)
    config: dict[str, Any] = {
        # we own the accumulation boundary (engines.optimizer_step); for DeepSpeed every micro-batch is a whole one
        "train_micro_batch_size_per_gpu": cfg.deploy.micro_batch,
        "gradient_accumulation_steps": 1,
        "train_batch_size": cfg.deploy.micro_batch * world_size,
        "zero_optimization": {"stage": zero_stage},
        "bf16": {"enabled": cfg.deploy.precision == Precision.bf16},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,  # our tracker reports
    }
    if optim:
        config["gradient_clipping"] = optim.grad_clip
        config["optimizer"] = {
            "type": "AdamW",
            # torch's own fused AdamW: needs no compiler, and is as fast as DeepSpeed's
            "params": {"lr": 0.0, "betas": list(optim.betas), "eps": optim.adam_eps, "torch_adam": True, "fused": True},
        }
    return config


def optim_of(cfg: Config, role: str) -> Optim | None:
    """The node with the optimizer's settings of a role in the stage that runs; None for a frozen one."""
    if role in FROZEN:
        return None
    if role == "reward_trained":
        return cfg.rm
    return cfg.sft if cfg.stage.name == "sft" else cfg.ppo
