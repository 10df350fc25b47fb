"""From token ids to tensors: padding, order, micro-batches, and the rows of each rank.

Masks are made here and carried along; no mask is derived from ids. All of it is in host memory:
models upload what they read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rlhf.base.log import log
from rlhf.distributed import collectives

T = TypeVar("T")


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """ids and mask (B, T) int64, padded on the right to the longest row."""
    return _pad(rows, pad_id, left=False)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """ids and mask (B, T) int64, padded on the left to the longest row."""
    return _pad(rows, pad_id, left=True)


def _pad(rows: Sequence[Sequence[int]], pad_id: int, left: bool) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place] = row
        mask[i, place] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def upload(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies on a GPU of tensors in host memory; on a CPU the tensors themselves.

    There is one copy for each dtype, which the host does not wait for.
    """
    if device.type == "cpu":
        return tensors
    moved = {}
    for dtype in {x.dtype for x in tensors}:
        same = [x for x in tensors if x.dtype == dtype]
        flat = torch.cat([x.flatten() for x in same]).pin_memory().to(device, non_blocking=True)
        moved[dtype] = iter(flat.split([x.numel() for x in same]))
    return tuple(next(moved[x.dtype]).view(x.shape) for x in tensors)


def global_batches(n: int, batch_size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """Row numbers of each batch, the same on every rank. In online RL: prompts of each rollout.

    Each epoch is a new permutation; its last, incomplete batch is dropped.
    """
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(n)
        for start in range(0, n - batch_size + 1, batch_size):
            yield order[start : start + batch_size].tolist()


def micro_batches(
    rows: Sequence[int],
    lengths: Sequence[int],
    micro_batch: int,
    rank: int,
    world: int,
    longest: int | None = None,
) -> list[Sequence[int]]:
    """This rank's part of a batch, in micro-batches of rows of similar length (less padding).

    Args:
        rows: row numbers of the batch.
        lengths: tokens of each row of the data, indexed by row number.
        micro_batch: the largest number of rows. With `longest`, the largest number of tokens, in
            rows of that length: as many rows as have micro_batch * longest tokens with padding.
        longest: the tokens of a row of full length.
    Returns: row numbers of each micro-batch; the same number of micro-batches on every rank when
        len(rows) is divisible by `world`.
    """
    order = sorted(rows, key=lambda row: lengths[row])
    if longest is None:
        return chunks(order[rank::world], micro_batch)
    parts = [chunk_by_tokens(order[r::world], lengths, micro_batch * longest) for r in range(world)]
    mine = parts[rank]
    most = max(len(part) for part in parts)
    while len(mine) < most:  # another rank needs more micro-batches: halve the fullest one
        fullest = max(range(len(mine)), key=lambda i: len(mine[i]))
        middle = (len(mine[fullest]) + 1) // 2
        mine[fullest : fullest + 1] = [mine[fullest][:middle], mine[fullest][middle:]]
    return mine


def chunk_by_tokens(
    order: Sequence[int], lengths: Sequence[int], tokens: int
) -> list[Sequence[int]]:
    """Consecutive chunks of at most `tokens` tokens with padding, or of a single longer row.

    Args: order: row numbers, short rows first.  lengths: tokens of each row, by row number.
    """
    parts: list[Sequence[int]] = []
    start = 0
    for i in range(1, len(order) + 1):
        if i == len(order) or (i + 1 - start) * lengths[order[i]] > tokens:
            parts.append(order[start:i])
            start = i
    return parts


def chunks(rows: Sequence[T], size: int) -> list[Sequence[T]]:
    """Consecutive chunks of at most `size` rows."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def map_across_ranks(
    lengths: Sequence[int],
    micro_batch: int,
    work: Callable[[Sequence[int]], Tensor],
    used: np.ndarray | None = None,
) -> Tensor:
    """The results of `work` for all rows, in the order of the rows, in host memory of every rank.

    Each rank computes its part in micro-batches of rows of similar length.

    Args:
        lengths: tokens of each row.
        micro_batch: the largest number of rows of a call.
        work: from row numbers to a tensor with a row for each of them, (B, ...).
        used: the rows that are needed (bool, one per row); None: all. Micro-batches without any of
            them are skipped, and their rows are NaN. The others are as without `used`, so a result
            does not depend on which other rows are needed.
    """
    rank, world = collectives.rank(), collectives.world_size()
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    order += order[:1] * (-len(order) % world)  # the same number of rows on every rank
    parts = [chunks(order[r::world], micro_batch) for r in range(world)]
    numbers = [  # of the micro-batches that some rank needs: all ranks compute those
        k
        for k in range(len(parts[0]))
        if used is None or any(used[row] for part in parts for row in part[k])
    ]
    results = collectives.all_gather_rows(
        torch.cat([work(parts[rank][k]) for k in with_progress(numbers)])
    ).cpu()
    gathered = [row for part in parts for k in numbers for row in part[k]]
    position = {row: i for i, row in enumerate(gathered)}
    full = results.new_full((len(lengths), *results.shape[1:]), math.nan)
    full[list(position)] = results[list(position.values())]
    return full


def with_progress(items: Sequence[T]) -> Iterator[T]:
    """The items, with a bar on a terminal, elsewhere a line every 10 seconds; rank 0 only."""
    is_main, started = collectives.rank() == 0, time.time()
    bar = tqdm(items, unit="batch", delay=5, leave=False, disable=None if is_main else True)
    last_line = started
    for done, item in enumerate(bar):
        if is_main and bar.disable and time.time() - last_line > 10:
            last_line = time.time()
            left = (last_line - started) / done * (len(items) - done) if done else math.nan
            log.info(f"{done:,} of {len(items):,} micro-batches, {left:.0f} s left")
        yield item


class PromptOrder:
    """The order in which online RL draws prompts: that of `global_batches`, epoch after epoch.

    Where dynamic sampling draws more prompts than the epochs of a run have, further epochs follow.

    Args: n: prompts.  batch_size: prompts of a rollout; what does not fill one is dropped.
    """

    def __init__(self, n: int, batch_size: int, seed: int):
        self.n, self.seed = n, seed
        self.per_epoch = n // batch_size * batch_size
        self.drawn = 0  # since the start of the run
        self.epoch, self.rows = -1, np.empty(0, dtype=np.int64)

    def take(self, count: int) -> list[int]:
        """The next row numbers, the same on every rank."""
        taken: list[int] = []
        while len(taken) < count:
            epoch, start = divmod(self.drawn, self.per_epoch)
            if epoch != self.epoch:
                self.epoch = epoch
                self.rows = np.random.default_rng([self.seed, epoch]).permutation(self.n)
            part = self.rows[start : min(start + count - len(taken), self.per_epoch)]
            taken += part.tolist()
            self.drawn += len(part)
        return taken

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.drawn = state["drawn"]


def uniforms(stream: str, numbers: Sequence[int], seed: int, step: int, n: int) -> Tensor:
    """Random numbers in [0, 1) for sampling, (len(numbers), n) float64.

    A row depends on (stream, seed, step, its number) only, so a sample does not change with the
    batch or the rank that it is drawn on.
    """
    tag = int.from_bytes(stream.encode(), "big")
    return torch.from_numpy(
        np.stack([np.random.default_rng([tag, seed, step, number]).random(n) for number in numbers])
    )


def first_loss_token(prompt: Sequence[int], train_on_prompt: bool) -> int:
    """Position of the first token in the loss; all later tokens are in the loss too.

    Never 0: no token predicts the first one.
    """
    return 1 if train_on_prompt else max(1, len(prompt))
