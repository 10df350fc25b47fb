"""Linear layers of small batches through our CPU kernels."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.sampling.cpu import kernels

MAX_KERNEL_ROWS = 64  # rows; with more, torch's products are as fast as ours. A recorded step, made of few rows, uses ours for any number


@contextlib.contextmanager
def fast_linear_layers(hf: Any) -> Iterator[None]:
    """Within this context, in which there are no gradients, the linear layers of a float32 model on CPU are faster where rows are few."""
    linear: list[Any] = [m for m in hf.modules() if type(m) is nn.Linear]
    layers = [
        m
        for m in linear
        if m.weight.is_cpu and m.weight.dtype == torch.float32 and m.weight.is_contiguous()
    ]
    if (
        not layers or torch.is_autocast_enabled("cpu") or not kernels.load()
    ):  # autocast: another precision than the weights' is wanted
        layers = []
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = functools.partial(small_batch_linear, layer)
    try:
        yield
    finally:
        for layer, own in zip(layers, before):
            if own is None:
                del layer.forward
            else:
                layer.forward = own


def small_batch_linear(layer: Any, x: Tensor) -> Tensor:
    multiply = kernels.linear if x.numel() <= MAX_KERNEL_ROWS * x.shape[-1] else F.linear
    return multiply(x, layer.weight, layer.bias)
