"""DeepSpeed engines, and the one optimizer step that all stages use."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rlhf import comm
from rlhf.config import Config
from rlhf.ds import build_ds_config, optim_of

Batch = TypeVar("Batch")


def build_engine(module: nn.Module, cfg: Config, role: str, run_dir: Path) -> Any:
    """Wrap `module` in the DeepSpeed engine of its role; its configuration is written to run_dir/ds_<role>.json.

    A trained role gets its optimizer (no weight decay on vectors: biases and norms); a frozen one gets none, and no gradients.
    """
    import deepspeed

    ds_config = build_ds_config(cfg, role, comm.world_size())
    if comm.rank() == 0:
        (run_dir / f"ds_{role}.json").write_text(json.dumps(ds_config, indent=2))
    optim = optim_of(cfg, role)
    if optim is None:
        module.requires_grad_(False).eval()
        return deepspeed.initialize(model=module, config=ds_config)[0]
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return deepspeed.initialize(model=module, config=ds_config, model_parameters=[g for g in groups if g["params"]])[0]


def optimizer_step(engine: Any, micro_batches: Sequence[Batch], loss_of: Callable[[Batch], Tensor], lr: float) -> float:
    """One optimizer step over all micro-batches of this process; every process must have the same number of them.

    Args: loss_of: the micro-batch's summed loss, already divided by the count over the whole step and all processes.
    Returns: the gradient norm before clipping.
    Raises: RuntimeError when the loss is not finite.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    for i, batch in enumerate(micro_batches):
        engine.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
        loss = loss_of(batch)
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {loss.item()}: lower the learning rate, or look at the last samples in samples.jsonl")
        # DeepSpeed averages gradients over processes; ours must be summed
        engine.backward(loss * comm.world_size(), scale_wrt_gas=False)
    # DeepSpeed's optimizers measure the norm themselves; with plain AdamW (ZeRO 0, fp32) the gradients lie open
    gradients = [] if hasattr(engine.optimizer, "_global_grad_norm") else [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) if gradients else None
    engine.step()
    return float(engine.get_global_grad_norm() if norm is None else norm)


@contextlib.contextmanager
def gathered(engine: Any) -> Iterator[None]:
    """Within this context the whole weights are there, also where ZeRO-3 partitions them."""
    import deepspeed

    partitioned = [p for p in engine.module.parameters() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
        yield


def init_distributed() -> torch.device:
    """Join the other processes; returns the device of this one. Skips DeepSpeed's compiled communication op, which saves
    a minute of compiling and is not needed: gloo and nccl do the same."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    if not on_gpu:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device
