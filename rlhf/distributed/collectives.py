"""Collectives across ranks; no-ops in a single process."""

from __future__ import annotations

import datetime
import os
import re
from typing import TypeVar

import torch
import torch.distributed as dist

from rlhf.base import watchdog

T = TypeVar("T")
# The others wait at a barrier while rank 0 alone saves a model: hours, to a slow disk
BARRIER_TIMEOUT = datetime.timedelta(hours=3)
CONNECT_TIMEOUT = datetime.timedelta(minutes=5)
_barrier_group: dist.ProcessGroup | None = None  # None: the default group


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(values: list[float], device: torch.device) -> list[float]:
    """Element-wise sum over all ranks, in float64. Args: device: of this rank's tensors."""
    if world_size() == 1:
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64, device=exchange_device(device))
    dist.all_reduce(total)
    return total.tolist()


def all_reduce_max(value: float, device: torch.device) -> float:
    """The largest value of all ranks. Args: device: of this rank's tensors."""
    if world_size() == 1:
        return float(value)
    top = torch.tensor(value, dtype=torch.float64, device=exchange_device(device))
    dist.all_reduce(top, op=dist.ReduceOp.MAX)
    return float(top)


def all_gather_rows(x: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, in rank order: (b, ...) of each becomes (b * world, ...).

    All ranks must have the same shape. The result is on the device of `x`.
    """
    if world_size() == 1:
        return x
    if not x.numel():  # NCCL takes no empty tensors
        return x.new_empty((len(x) * world_size(), *x.shape[1:]))
    own = x.to(exchange_device(x.device)).contiguous()
    parts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(parts, own)
    return torch.cat(parts).to(x.device)


def exchange_device(device: torch.device) -> torch.device:
    """Where a tensor of `device` has to be for a collective: NCCL takes those of GPUs only."""
    if device.type == "cpu" and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def all_gather_objects(value: T) -> list[T]:
    """The value of each rank, in rank order. Args: value: small; it travels as a pickle."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def assert_same_across_ranks(value: str, what: str) -> None:
    """Raises: RuntimeError on every rank when they do not all have the same value."""
    values = all_gather_objects(value)
    if len(set(values)) > 1:
        different = ", ".join(dict.fromkeys(values))
        raise RuntimeError(f"the processes do not agree on {what}: {different}")


def make_barrier_group() -> None:
    """Create a gloo group for barriers: its own timeout, and waiting ranks do not spin a GPU.

    It uses the network interface that NCCL is told to use, where gloo is told none.
    """
    global _barrier_group
    if world_size() == 1:
        return
    interface = os.environ.get("NCCL_SOCKET_IFNAME", "")
    if re.fullmatch(r"\w+", interface):  # NCCL also takes lists, prefixes and exclusions
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # ranks that cannot reach each other end soon; the long wait is for barriers only
    _barrier_group = dist.new_group(backend="gloo", timeout=CONNECT_TIMEOUT)
    dist.distributed_c10d._set_pg_timeout(BARRIER_TIMEOUT, _barrier_group)


def barrier() -> None:
    if world_size() > 1:
        with watchdog.while_waiting():
            dist.barrier(_barrier_group)
