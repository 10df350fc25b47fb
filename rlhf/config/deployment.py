"""Processes, threads and placement, derived from the deploy node."""

from __future__ import annotations

import os
from typing import Any

from rlhf.config.schema import Config, Device


def world_size(cfg: Config) -> int:
    """Processes on all nodes."""
    return cfg.deploy.gpus * cfg.deploy.nodes


def threads_per_process(cfg: Config) -> int:
    """CPU threads of each process."""
    return cfg.deploy.threads or max(1, (os.cpu_count() or 1) // cfg.deploy.gpus)


def placement(cfg: Config) -> dict[str, Any]:
    """Where and how a run computes: what must stay for it to go on bit for bit."""
    deploy = cfg.deploy
    counted: dict[str, Any] = {
        "deploy.gpus": deploy.gpus,
        "deploy.nodes": deploy.nodes,
        "deploy.zero_stage": deploy.zero_stage,
    }
    counted |= {
        "deploy.device": deploy.device.name,
        "deploy.offload.optimizer": deploy.offload.optimizer,
    }
    return counted | (
        {"deploy.threads": threads_per_process(cfg)} if deploy.device == Device.cpu else {}
    )


def describe_processes(cfg: Config) -> str:
    """The number of processes as the user set it."""
    nodes = f" x deploy.nodes={cfg.deploy.nodes}" if cfg.deploy.nodes > 1 else ""
    return f"deploy.gpus={cfg.deploy.gpus}{nodes}"
