"""Sums, maxima and rows that the micro-batches of an optimizer step leave behind."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.distributed import collectives


class Stats:
    """What a loss function measures besides the loss, accumulated over this rank's micro-batches.

    Everything keeps the dtype and device of its values, so that adding does not wait for a GPU;
    pass `.double()` where rounding to float32 matters.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.maxima: dict[str, Tensor] = {}
        self.rows: dict[str, list[Tensor]] = {}

    def add(self, **values: Tensor) -> None:
        """Add each scalar to the sum of that name. Gradients are not kept."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()

    def maximum(self, **values: Tensor) -> None:
        """Keep the largest value of each name."""
        for name, value in values.items():
            value, largest = value.detach(), self.maxima.get(name)
            self.maxima[name] = value if largest is None else torch.maximum(largest, value)

    def append(self, **columns: Tensor) -> None:
        """Keep a tensor per name with a row for each row of the micro-batch, (b, ...)."""
        for name, column in columns.items():
            self.rows.setdefault(name, []).append(column.detach())

    def reduce(self, device: torch.device) -> dict[str, float]:
        """The sums over all micro-batches and ranks, in float64. All ranks need the same names."""
        names = sorted(self.sums)
        local = torch.stack([self.sums[name].double() for name in names]).tolist()
        return dict(zip(names, collectives.all_reduce_sum(local, device)))

    def gather(self, name: str) -> Tensor:
        """The rows of that name of all ranks, in rank order, float64, in host memory.

        All ranks need as many.
        """
        return collectives.all_gather_rows(torch.cat(self.rows[name])).cpu().double()
