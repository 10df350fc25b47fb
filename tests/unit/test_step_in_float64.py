"""Without rounding, a step has the same gradient however micro-batches and ranks cut it."""

from __future__ import annotations

import types
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from helpers import composed

from rlhf.config.choices import LossAggregation
from rlhf.data.batches import micro_batches
from rlhf.distributed import collectives
from rlhf.rl.losses import policy_loss, token_weights, value_loss
from rlhf.training.optimizer_step import optimizer_step


class OneOfMany:
    """What optimizer_step needs of an engine in one of many processes, in float64. The processes
    take turns: each adds its part of their average to the gradients of a shared module."""

    def __init__(self, module: torch.nn.Module, world: int):
        self.module, self.world = module, world
        self.gradient_notes: dict[str, list[torch.Tensor]] = {}
        self.optimizer = types.SimpleNamespace(param_groups=[], _global_grad_norm=0.0)

    def set_gradient_accumulation_boundary(self, last: bool) -> None: ...

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        (loss / self.world).backward()

    def step(self) -> None: ...

    def get_global_grad_norm(self) -> float:
        return 0.0


CUTS = [(1, 1), (1, 5), (2, 1), (2, 3), (3, 2), (4, 1), (4, 16)]


@pytest.mark.parametrize("over", LossAggregation)
@pytest.mark.parametrize(("world", "micro"), CUTS)
def test_in_float64_a_step_has_the_same_gradient_however_it_is_cut(
    monkeypatch: pytest.MonkeyPatch, over: LossAggregation, world: int, micro: int
) -> None:
    """Without rounding: micro-batches, weights of tokens and the factor of the world size."""
    generator = torch.Generator().manual_seed(0)
    n, r = 12, 6
    x = torch.randn(n, r, 4, generator=generator, dtype=torch.float64)
    given = torch.randn(3, n, r, generator=generator, dtype=torch.float64)
    lengths = torch.randint(0, r + 1, (n,), generator=generator).tolist()
    mask = (torch.arange(r) < torch.tensor(lengths)[:, None]).double()
    module = torch.nn.Linear(4, 2, dtype=torch.float64)
    rl = composed("stage=ppo").rl

    def loss_of(rows: Sequence[int]) -> torch.Tensor:
        longest = max(1, *(lengths[i] for i in rows))  # as Experience.rows cuts them
        old, advantages, returns = given[:, list(rows), :longest]
        here = mask[list(rows), :longest]
        logp, values = module(x[list(rows), :longest]).tanh().unbind(-1)
        policy = policy_loss(logp, old, advantages, here, rl)[0]
        value = value_loss(values, old, returns, here, 0.2)[0]
        return (token_weights(here, over, float(mask.sum()), n, r) * (policy + value)).sum()

    loss_of(range(n)).backward()
    expected = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    monkeypatch.setattr(collectives, "world_size", lambda: world)
    for rank in range(world):
        cut = micro_batches(range(n), lengths, micro, rank, world, r)
        optimizer_step(OneOfMany(module, world), [partial(loss_of, rows) for rows in cut], 0.0)
    for p, gradient in zip(module.parameters(), expected):
        assert torch.allclose(p.grad, gradient, rtol=1e-12, atol=1e-13)
