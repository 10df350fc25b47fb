"""Processes, threads and placement, derived from the deploy node."""

from __future__ import annotations

from rlhf.base.processors import default_threads
from rlhf.config.choices import Device, Precision
from rlhf.config.schema import Config, Deploy

# of a weight
BYTES = {Precision.fp32: 4, Precision.bf16: 2, Precision.fp16: 2, Precision.autocast: 4}


def world_size(cfg: Config) -> int:
    """Processes on all nodes."""
    return cfg.deploy.processes_per_node * cfg.deploy.nodes


def threads_per_process(cfg: Config) -> int:
    """CPU threads of each process."""
    return cfg.deploy.threads or default_threads(cfg.deploy.processes_per_node)


def placement(cfg: Config) -> dict[str, str | int | bool]:
    """Where and how a run computes: what must stay the same to resume it bit for bit."""
    deploy = cfg.deploy
    placed: dict[str, str | int | bool] = {
        "deploy.processes_per_node": deploy.processes_per_node,
        "deploy.nodes": deploy.nodes,
        "deploy.zero_stage": built_stage(deploy),
        "deploy.device": deploy.device.name,
        "deploy.offload.optimizer": deploy.offload.optimizer,
    }
    if deploy.device == Device.cpu:
        placed["deploy.threads"] = threads_per_process(cfg)
    return placed


def describe_processes(cfg: Config) -> str:
    """The number of processes as the user sets it."""
    nodes = f" x deploy.nodes={cfg.deploy.nodes}" if cfg.deploy.nodes > 1 else ""
    return f"deploy.processes_per_node={cfg.deploy.processes_per_node}{nodes}"


def built_stage(deploy: Deploy) -> int:
    """ZeRO stage of a trained model: deploy.zero_stage, in bf16 and fp16 at least 2.

    Below 2 DeepSpeed 0.19.8 takes an extra Adam step (stage 0), divides by a loss scale that it has
    not applied (fp16, stage 0), and sums the gradients of micro-batches in 16 bits (0 and 1). On
    one process nothing is partitioned at any stage.
    """
    return max(2, deploy.zero_stage) if BYTES[deploy.precision] == 2 else deploy.zero_stage
