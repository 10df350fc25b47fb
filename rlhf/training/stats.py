"""Sums, maxima and rows that the micro-batches of an optimizer step leave behind."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.distributed import collectives


class Stats:
    """What a loss function measures besides the loss, accumulated over this rank's micro-batches.

    A sum keeps the dtype and device of its values, so that adding does not wait for a GPU; pass
    `.double()` where rounding to float32 matters.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.maxima: dict[str, float] = {}
        self.rows: dict[str, list[Tensor]] = {}

    def add(self, **values: Tensor | float) -> None:
        """Add each scalar to the sum of that name. Gradients are not kept."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + _detached(value)

    def maximum(self, **values: Tensor | float) -> None:
        """Keep the largest value of each name; 0 where none is larger."""
        for name, value in values.items():
            self.maxima[name] = max(self.maxima.get(name, 0.0), float(value))

    def append(self, **columns: Tensor) -> None:
        """Keep a tensor per name with a row for each row of the micro-batch, (b, ...)."""
        for name, column in columns.items():
            self.rows.setdefault(name, []).append(column.detach())

    def reduce(self, device: torch.device) -> dict[str, float]:
        """The sums over all micro-batches and ranks, in float64. All ranks need the same names."""
        names = sorted(self.sums)
        local = [float(self.sums[name]) for name in names]
        return dict(zip(names, collectives.all_reduce_sum(local, device)))

    def reduce_maximum(self, name: str, device: torch.device) -> float:
        """The maximum of that name over all micro-batches and ranks."""
        return collectives.all_reduce_max(self.maxima.get(name, 0.0), device)

    def gather(self, name: str) -> Tensor:
        """The rows of that name of all ranks, in rank order, float64. All ranks need as many."""
        return collectives.all_gather_rows(torch.cat(self.rows[name])).double()


def _detached(value: Tensor | float) -> Tensor | float:
    return value.detach() if isinstance(value, Tensor) else value
