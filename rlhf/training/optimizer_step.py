"""The optimizer step that all stages use, with checks for values that are not finite."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rlhf.distributed import collectives
from rlhf.distributed.engine import Engine


def optimizer_step(
    engine: Engine[nn.Module], losses: Sequence[Callable[[], Tensor]], lr: float
) -> float:
    """One optimizer step over all micro-batches of this rank. All ranks need as many of them.

    Args:
        losses: for each micro-batch a function that computes its share of the step's loss: a sum
            that is already divided by the count over the whole step and all ranks.
        lr: learning rate of this step.
    Returns: the norm of the gradient before clipping.
    Raises: RuntimeError when the loss or the gradient is not finite; it names the first tensor
        that is not.
    """
    engine.gradient_notes.clear()
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    values = []
    for i, compute_loss in enumerate(losses):
        engine.set_gradient_accumulation_boundary(i == len(losses) - 1)
        loss = compute_loss()
        values.append(loss.detach())
        # DeepSpeed averages gradients over ranks; ours must be summed
        engine.backward(loss * collectives.world_size(), scale_wrt_gas=False)
    check_losses(engine, losses, values)
    norm = local_grad_norm(engine)
    engine.step()
    value = float(engine.get_global_grad_norm() if norm is None else norm)
    # fp16 loss scaling skips such steps by itself
    if not math.isfinite(value) and not engine.fp16_enabled():
        raise RuntimeError(
            f"the norm of the gradient is {value}, though the loss is finite"
            f"{first_nonfinite_grad(engine)}: lower the learning rate"
        )
    return value


def check_losses(
    engine: Engine[nn.Module], losses: Sequence[Callable[[], Tensor]], values: Sequence[Tensor]
) -> None:
    """Check the losses of a step's micro-batches before its update; the host waits here once.

    Args: losses: as in `optimizer_step`.  values: what they gave.
    Raises: RuntimeError for the first that is not finite.
    """
    for compute_loss, value in zip(losses, torch.stack(list(values)).tolist()):
        if not math.isfinite(value):
            where = first_nonfinite_output(engine, compute_loss)
            raise RuntimeError(
                f"the loss is {value}{where}: lower the learning rate, "
                "or look at the last samples in samples.jsonl"
            )


def local_grad_norm(engine: Engine[nn.Module]) -> Tensor | None:
    """The norm of the gradient, or None where DeepSpeed's optimizer measures it.

    With plain AdamW (ZeRO 0, fp32) it does not, and the gradients are ordinary tensors.
    """
    if hasattr(engine.optimizer, "_global_grad_norm"):
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else None


def first_nonfinite_grad(engine: Engine[nn.Module]) -> str:
    """Which weight has the first gradient that is not finite, as a part of a sentence."""
    notes = engine.gradient_notes.items()
    bad = {name for name, sums in notes if not torch.isfinite(torch.stack(sums)).all()}
    first = next((name for name, _ in engine.module.named_parameters() if name in bad), "")
    return f"; the first gradient that is not finite is that of {first}" if first else ""


def first_nonfinite_output(engine: Engine[nn.Module], compute_loss: Callable[[], Tensor]) -> str:
    """Which weight or module output is the first that is not finite, as a part of a sentence.

    Args: compute_loss: repeats the forward pass.
    """
    partitioned = any(hasattr(p, "ds_id") for p in engine.module.parameters())
    if collectives.world_size() > 1 and partitioned:
        return ""  # a forward pass of one rank alone would wait for the weights of the others
    for name, weight in engine.module.named_parameters():
        if not torch.isfinite(weight).all():
            return f"; the first weight that is not finite is {name}"
    bad: list[str] = []

    def check(
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        output: Tensor | tuple[Tensor, ...],
        name: str,
    ) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        floats = [x for x in outputs if isinstance(x, Tensor) and x.is_floating_point()]
        if not bad and not all(bool(torch.isfinite(x).all()) for x in floats):
            bad.append(name)

    leaves = [
        (name, module)
        for name, module in engine.module.named_modules()
        if not any(True for _ in module.children())
    ]
    hooks = [
        module.register_forward_hook(functools.partial(check, name=name)) for name, module in leaves
    ]
    try:
        compute_loss()
    finally:
        for hook in hooks:
            hook.remove()
    return f"; the first output that is not finite is that of {bad[0]}" if bad else ""
