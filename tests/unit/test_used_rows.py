"""What a run does not use is not computed: DPO's reference, and progress of long computations."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from helpers import composed

from rlhf.data import batches
from rlhf.data.batches import global_batches, map_across_ranks
from rlhf.stages.dpo import used_pairs


@pytest.mark.parametrize("epochs, steps", [(1, 3), (1, 6), (3, 8), (3, 18)])
def test_the_pairs_of_a_run_are_those_of_its_steps(epochs: int, steps: int) -> None:
    dpo = composed("stage=dpo", "dpo.batch_size=16", f"dpo.epochs={epochs}").dpo
    used = used_pairs(dpo, 103, steps, seed=5)
    wanted = list(global_batches(103, 16, epochs, 5))[:steps]
    assert set(np.flatnonzero(used)) == {row for batch in wanted for row in batch}


@pytest.mark.parametrize("world", [1, 3])
def test_results_are_those_of_all_rows_with_nan_elsewhere(
    monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    """Micro-batches stay as they are: each result depends on its whole micro-batch here."""
    draw = np.random.default_rng(3)
    lengths = draw.integers(1, 50, size=50).tolist()

    def run(used: np.ndarray | None) -> tuple[torch.Tensor, list[Sequence[int]]]:
        called: list[Sequence[int]] = []

        def work(rows: Sequence[int]) -> torch.Tensor:
            called.append(rows)
            return torch.tensor([[row, sum(rows)] for row in rows], dtype=torch.float64)

        parts: list[torch.Tensor] = []
        monkeypatch.setattr(batches.collectives, "world_size", lambda: world)
        for rank in range(world):  # each rank in turn; the last one sees what all have gathered
            monkeypatch.setattr(batches.collectives, "rank", lambda rank=rank: rank)

            def gather(part: torch.Tensor) -> torch.Tensor:
                parts.append(part)
                return torch.cat(parts + [part] * (world - len(parts)))

            monkeypatch.setattr(batches.collectives, "all_gather_rows", gather)
            result = map_across_ranks(lengths, 4, work, used)
        assert len({len(part) for part in parts}) == 1, "as many rows on every rank"
        return result, called

    everything, all_calls = run(None)
    assert not everything.isnan().any() and everything[:, 0].tolist() == list(range(50))
    used = np.zeros(50, dtype=bool)
    used[[7, 30]] = True
    some, calls = run(used)
    assert torch.equal(some[used], everything[used])
    computed = ~some.isnan().any(1)
    assert torch.equal(some[computed], everything[computed])
    assert all(call in all_calls for call in calls) and len(calls) <= 2 * world


def test_without_a_terminal_a_long_computation_logs_lines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("rlhf"), "propagate", True)
    now = [0.0]  # seconds
    monkeypatch.setattr(time, "time", lambda: now[0])
    with caplog.at_level(logging.INFO, "rlhf"):
        for _ in batches.with_progress(range(100)):
            now[0] += 4.0
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "3 of 100 micro-batches, 388 s left" and len(lines) == 33
