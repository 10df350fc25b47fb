"""Truncated importance sampling between sampler and training: loops, hand numbers, the loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from rollouts import Engines, some_rollout

from rlhf.config.choices import CorrectionMode, RolloutEngine
from rlhf.config.schema import Config
from rlhf.rl.experience import correct_for_sampler
from rlhf.rl.guards import Guards
from rlhf.rl.losses import sampler_weights


@pytest.mark.parametrize("cap", [1.0, 1.3, 2.0])
@pytest.mark.parametrize("mode", ["token", "sequence"])
def test_weights_equal_loops(mode: str, cap: float) -> None:
    generator = torch.Generator().manual_seed(0)
    old, sampler = (torch.randn(5, 6, generator=generator).double() for _ in range(2))
    lengths = [6, 1, 3, 4, 2]
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).double()
    weights, ratio = sampler_weights(old, sampler, mask, CorrectionMode[mode], cap)
    for i, n in enumerate(lengths):
        gaps = [float(old[i, j] - sampler[i, j]) for j in range(n)]
        if mode == "sequence":
            gaps = [sum(gaps)] * n
        expected = [math.exp(gap) for gap in gaps] + [1.0] * (6 - n)
        assert ratio[i].tolist() == pytest.approx(expected)
        assert weights[i].tolist() == pytest.approx([min(x, cap) for x in expected])


def test_weights_by_hand() -> None:
    """Probabilities 0.6 and 0.5 in training, 0.2 and 0.8 for the sampler: ratios 3 and 0.625."""
    old, sampler = torch.tensor([[0.6, 0.5]]).log(), torch.tensor([[0.2, 0.8]]).log()
    mask = torch.ones(1, 2)
    weights, ratio = sampler_weights(old, sampler, mask, CorrectionMode.token, 2.0)
    torch.testing.assert_close(ratio, torch.tensor([[3.0, 0.625]]))
    torch.testing.assert_close(weights, torch.tensor([[2.0, 0.625]]))
    weights, ratio = sampler_weights(old, sampler, mask, CorrectionMode.sequence, 2.0)
    torch.testing.assert_close(weights, torch.tensor([[1.875, 1.875]]))


def test_an_expectation_over_the_sampler_is_that_over_the_policy() -> None:
    """Without a cap: sum of q (p / q) f = sum of p f."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    f = torch.tensor([1.0, -2.0, 5.0])
    mask = torch.ones(1, 3)
    weights, _ = sampler_weights(p.log()[None], q.log()[None], mask, CorrectionMode.token, 1e9)
    assert float((q * weights[0] * f).sum()) == pytest.approx(float((p * f).sum()))


def measured(m: Engines) -> Any:
    prompts, _, draws = some_rollout(m)
    return m.experience(prompts, draws)


def test_only_a_foreign_sampler_is_corrected_unless_it_is_asked_for(
    models_of_ppo: Engines, cfg: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    e = measured(models_of_ppo)
    e.sampler_logprobs = e.old_logprobs - math.log(3.0) * e.response_mask
    assert correct_for_sampler(cfg, e) == {} and not len(e.sampler_weights)
    monkeypatch.setattr(cfg.rollout, "engine", RolloutEngine.continuous)
    metrics = correct_for_sampler(cfg, e)
    assert metrics == {
        "sampler/ratio_mean": pytest.approx(3.0),
        "sampler/ratio_max": pytest.approx(3.0),
        "sampler/capped": 1.0,
    }
    inside = e.response_mask > 0
    assert torch.equal(e.sampler_weights[inside], torch.full_like(e.sampler_weights[inside], 2.0))
    monkeypatch.setattr(cfg.rl.importance_correction, "mode", CorrectionMode.none)
    assert correct_for_sampler(cfg, e) == {}


def test_beyond_the_limit_a_foreign_sampler_stops_the_run(
    models_of_ppo: Engines, cfg: Config
) -> None:
    e = measured(models_of_ppo)
    guards = Guards(cfg.deploy.precision, cfg.rl.dschat, foreign_sampler=True)
    e.sampler_logprobs = e.old_logprobs + 0.1 * e.response_mask
    guards.check_rollout(e, models_of_ppo.tokenizer.eos_token_id)
    e.sampler_logprobs = e.old_logprobs + 0.3 * e.response_mask
    for first in (True, False):
        with pytest.raises(RuntimeError, match="guard sampler"):
            guards.check_rollout(e, models_of_ppo.tokenizer.eos_token_id, first)
