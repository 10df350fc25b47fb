"""The optimizer step that all stages use, with checks for values that are not finite."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlhf.distributed import collectives

Batch = TypeVar("Batch")


def optimizer_step(
    engine: Any, micro_batches: Sequence[Batch], loss_of: Callable[[Batch], Tensor], lr: float
) -> float:
    """One optimizer step over all micro-batches of this process; every process must have the same number of them.

    Args: loss_of: the micro-batch's summed loss, already divided by the count over the whole step and all processes.
    Returns: the gradient norm before clipping.
    Raises: RuntimeError when the loss or the gradient is not finite, with the first tensor that is not.
    """
    engine.gradient_notes.clear()
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    for i, batch in enumerate(micro_batches):
        engine.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
        loss = loss_of(batch)
        if not torch.isfinite(loss):
            where = first_nonfinite_output(engine, functools.partial(loss_of, batch))
            raise RuntimeError(
                f"the loss is {loss.item()}{where}: lower the learning rate, or look at the last samples in samples.jsonl"
            )
        # DeepSpeed averages gradients over processes; ours must be summed
        engine.backward(loss * collectives.world_size(), scale_wrt_gas=False)
    # DeepSpeed's optimizers measure the norm themselves; with plain AdamW (ZeRO 0, fp32) the gradients lie open
    gradients = (
        []
        if hasattr(engine.optimizer, "_global_grad_norm")
        else [p.grad for p in engine.module.parameters() if p.grad is not None]
    )
    norm = torch.nn.utils.get_total_norm(gradients) if gradients else None
    engine.step()
    value = float(engine.get_global_grad_norm() if norm is None else norm)
    if (
        not math.isfinite(value) and not engine.fp16_enabled()
    ):  # whose loss scaling leaves such steps out by itself
        bad = [name for name, note in engine.gradient_notes.items() if not torch.isfinite(note)]
        first = next((name for name, _ in engine.module.named_parameters() if name in bad), "")
        where = f"; the first gradient that is not finite is that of {first}" if first else ""
        raise RuntimeError(
            f"the norm of the gradient is {value}, though the loss is finite{where}: lower the learning rate"
        )
    return value


def track_nonfinite_grads(module: Any) -> dict[str, Tensor]:
    """A note for each trained weight, made in the backward pass: 0, or NaN where its gradient was not finite. Nobody waits for it."""
    notes: dict[str, Tensor] = {}

    def note(gradient: Tensor, name: str) -> None:
        notes[name] = notes.get(name, 0) + gradient.detach().sum(dtype=torch.float32) * 0

    for name, p in module.named_parameters():
        if p.requires_grad:
            p.register_hook(functools.partial(note, name=name))
    return notes


def first_nonfinite_output(engine: Any, again: Callable[[], Any]) -> str:
    """Where a forward that is computed again first gives something that is not finite, as a part of a sentence."""
    if collectives.world_size() > 1 and any(
        hasattr(p, "ds_id") for p in engine.module.parameters()
    ):
        return ""  # a forward of one process alone would wait for the others' weights
    found: list[str] = []

    def look(module: Any, inputs: Any, output: Any, name: str) -> None:
        outputs = [
            x
            for x in (output if isinstance(output, tuple) else (output,))
            if isinstance(x, Tensor) and x.is_floating_point()
        ]
        if not found and not all(bool(torch.isfinite(x).all()) for x in outputs):
            found.append(name)

    weights = (name for name, p in engine.module.named_parameters() if not torch.isfinite(p).all())
    if weight := next(weights, ""):
        return f"; the first weight that is not finite is {weight}"
    leaves = [
        (name, module)
        for name, module in engine.module.named_modules()
        if not any(True for _ in module.children())
    ]
    hooks = [
        module.register_forward_hook(functools.partial(look, name=name)) for name, module in leaves
    ]
    try:
        again()
    finally:
        for hook in hooks:
            hook.remove()
    return f"; the first output that is not finite is that of {found[0]}" if found else ""
