"""AdamW on the pretended GPU, in place of DeepSpeed's engine (distributed.engine.Engine)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from device import NAME, move_module
from torch import Tensor, nn


class PlainEngine:
    """A module on the device, and where it is trained its optimizer.

    Args: config: DeepSpeed's.  groups: parameters for AdamW, still on the host; None: frozen.
    """

    def __init__(self, module: nn.Module, config: dict[str, Any], groups: list[dict] | None):
        moved = move_module(module)
        self.module, self.device = module, torch.device(NAME, 0)
        self.gradient_notes: dict[str, list[Tensor]] = {}
        self.enable_backward_allreduce = True
        self.checkpoint_engine = self  # takes a function for its `load`
        if groups is None:
            return
        for group in groups:
            group["params"] = [moved[p] for p in group["params"]]
        settings = config["optimizer"]["params"]
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings["lr"], betas=tuple(settings["betas"]), eps=settings["eps"]
        )
        self.clip = config["gradient_clipping"]

    def __call__(self, *args: object) -> Any:
        return self.module(*args)

    def train(self, mode: bool = True) -> PlainEngine:
        self.module.train(mode)
        return self

    def eval(self) -> None:
        self.module.eval()

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        pass

    def backward(self, loss: Tensor, scale_wrt_gas: bool = True) -> Tensor:
        loss.backward()
        return loss

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def fp16_enabled(self) -> bool:
        return False

    def torch_autocast_enabled(self) -> bool:
        return False

    def save_checkpoint(self, save_dir: Path, tag: str, **options: Any) -> bool:
        raise NotImplementedError("the pretended runs have no checkpoints")


def initialize(
    model: nn.Module, config: dict[str, Any], model_parameters: list[dict] | None = None
) -> tuple[PlainEngine]:
    """In place of `deepspeed.initialize`."""
    return (PlainEngine(model, config, model_parameters),)
