"""Linear layers with few rows through our CPU kernel."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.sampling.cpu import kernels

# Rows; with more, torch's matrix products are as fast as ours. A traced step, which is traced with
# few rows, uses ours for any number.
MAX_KERNEL_ROWS = 64


@contextlib.contextmanager
def fast_linear_layers(hf: nn.Module) -> Iterator[None]:
    """Use our kernel for the float32 linear layers on CPU inside the context; needs no_grad."""
    layers = [
        layer
        for layer in hf.modules()
        if type(layer) is nn.Linear
        and layer.weight.is_cpu
        and layer.weight.dtype == torch.float32
        and layer.weight.is_contiguous()
    ]
    # autocast asks for another precision than that of the weights
    if not layers or torch.is_autocast_enabled("cpu") or not kernels.load():
        layers = []
    previous = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        vars(layer)["forward"] = functools.partial(small_batch_linear, layer)
    try:
        yield
    finally:
        for layer, forward in zip(layers, previous):
            if forward is None:
                del vars(layer)["forward"]
            else:
                vars(layer)["forward"] = forward


def small_batch_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer's output for x (..., k) -> (..., n), by our kernel if x has few rows."""
    multiply = kernels.linear if x.numel() <= MAX_KERNEL_ROWS * x.shape[-1] else F.linear
    return multiply(x, layer.weight, layer.bias)
