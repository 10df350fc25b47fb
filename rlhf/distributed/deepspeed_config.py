"""The DeepSpeed configuration of each role, as a pure function of ours. No torch.

DeepSpeed accepts unknown top-level keys silently, so no user's dictionary is passed through.
"""

from __future__ import annotations

from typing import Any

from rlhf.config.choices import Device, Precision
from rlhf.config.deployment import BYTES, built_stage
from rlhf.config.schema import Config
from rlhf.config.stage_graph import node_name, optimizer_nodes
from rlhf.config.stage_nodes import Optim

TRAINED = ("actor", "critic", "reward_trained")
FROZEN = ("ref", "reward", "policy")


def build_ds_config(cfg: Config, role: str, world_size: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Args:
        role: trained: "actor" (a policy), "critic", "reward_trained" (in the reward stage);
            frozen: "ref", "reward", "policy" (one that is evaluated).
        world_size: processes of the run on all nodes.
    Raises: ValueError for another role.
    """
    if role not in TRAINED + FROZEN:
        raise ValueError(f"role {role!r}: must be one of {', '.join(TRAINED + FROZEN)}")
    deploy, optim = cfg.deploy, optim_of(cfg, role)
    config: dict[str, Any] = {
        # training.optimizer_step sets the accumulation boundary; for DeepSpeed every micro-batch
        # is a batch
        "train_micro_batch_size_per_gpu": deploy.micro_batch,
        "gradient_accumulation_steps": 1,
        "train_batch_size": deploy.micro_batch * world_size,
        "zero_optimization": zero_section(cfg, role),
        "bf16": {"enabled": deploy.precision == Precision.bf16},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,  # our tracker reports
    }
    if deploy.precision == Precision.fp16:
        # the window is DeepSpeed-Chat's; the loss scale starts at 2^16
        config["fp16"] = {"enabled": True, "loss_scale_window": 100}
    if deploy.precision == Precision.autocast:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if optim and BYTES[deploy.precision] == 2:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if optim:
        config["gradient_clipping"] = optim.grad_clip
        config["optimizer"] = {
            "type": "AdamW",
            # torch's fused AdamW is as fast as DeepSpeed's and needs no compiler, not even for
            # offload to CPU
            "params": {
                "lr": 0.0,
                "betas": list(optim.betas),
                "eps": optim.adam_eps,
                "torch_adam": True,
                "fused": True,
            },
        }
    return config


def zero_section(cfg: Config, role: str) -> dict[str, Any]:
    """What is partitioned and what is kept in host memory."""
    deploy, offload = cfg.deploy, cfg.deploy.offload
    host = {"device": "cpu", "pin_memory": deploy.device == Device.gpu}
    if role in FROZEN:
        # only stage 3 partitions weights, and only it fetches them from the host layer by layer
        zero: dict[str, Any] = {"stage": 3 if deploy.zero_stage == 3 or offload.frozen else 0}
        return zero | {"offload_param": host} if offload.frozen else zero
    zero = {"stage": built_stage(deploy)}
    if zero["stage"]:
        # DeepSpeed wants an even number
        elements = int(deploy.bucket_mb * 2**20) // BYTES[deploy.precision] // 2 * 2
        zero |= {"overlap_comm": deploy.overlap_comm, "reduce_bucket_size": elements}
        fetch = "stage3_prefetch" if zero["stage"] == 3 else "allgather"
        zero[f"{fetch}_bucket_size"] = elements
    if offload.optimizer:
        zero["offload_optimizer"] = host
    if offload.parameters:
        zero["offload_param"] = host
    return zero


def optim_of(cfg: Config, role: str) -> Optim | None:
    """The optimizer settings of a role in the stage that runs; None for a frozen role."""
    if role in FROZEN:
        return None
    return optimizer_nodes(cfg)["rl.critic" if role == "critic" else node_name(cfg.stage.name)]
