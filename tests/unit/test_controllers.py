"""What PPO remembers between rollouts, against the papers' formulas by hand or with numpy."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import composed
from torch import Tensor, nn

from rlhf.config.choices import KlController
from rlhf.rl.controllers import KlCoefficient, MovingAverage, RunningScale

SEEDS = range(6)


# ------------------------------------------------------------------------------------ KlCoefficient


def coefficient(controller: str, steps: int = 10, coef: float = 0.1, **kl: float) -> KlCoefficient:
    return KlCoefficient(
        dataclasses.replace(
            composed("stage=ppo").rl.kl,
            coef=coef,
            controller=KlController[controller],
            **({"target": 6.0, "horizon": 1000.0, "final_coef": 0.0} | kl),
        ),
        steps,
    )


def betas(beta: KlCoefficient, kls: list[float], answers: int = 100) -> list[float]:
    """beta of the first rollout, and of the rollout after each of those whose KL is given."""
    found = [beta.value]
    for kl in kls:
        beta.update(kl, answers)
        found.append(beta.value)
    return found


def test_a_fixed_coefficient_never_moves() -> None:
    assert betas(coefficient("fixed"), [0.0, 100.0, -3.0]) == [0.1] * 4


def test_a_linear_coefficient_by_hand() -> None:
    # five rollouts, four steps of a quarter; what the KL is does not matter
    assert betas(coefficient("linear", 5), [1.0, 99.0, 0.0, -2.0]) == pytest.approx(
        [0.1, 0.075, 0.05, 0.025, 0.0], abs=1e-15
    )
    assert betas(coefficient("linear", 3, final_coef=0.5), [1.0, 1.0]) == pytest.approx(
        [0.1, 0.3, 0.5]
    )


@pytest.mark.parametrize("steps", [2, 3, 7, 10, 100, 1000])
@pytest.mark.parametrize(
    "coef, final", [(0.1, 0.0), (0.05, 0.0), (0.0, 0.25), (0.5, 0.125), (0.2, 0.2)]
)
def test_a_linear_coefficient_is_the_final_one_exactly_at_the_last_rollout(
    steps: int, coef: float, final: float
) -> None:
    found = betas(coefficient("linear", steps, coef, final_coef=final), [1.0] * (steps - 1))
    assert (found[0], found[-1]) == (coef, final)
    assert coef == final or found.index(final) == steps - 1  # and not a rollout earlier
    assert (
        betas(coefficient("linear", steps, coef, final_coef=final), [1.0] * (steps + 5))[-1]
        == final
    )  # nor beyond it


def test_a_run_of_one_rollout_has_the_first_linear_coefficient() -> None:
    assert betas(coefficient("linear", 1), [1.0])[0] == 0.1


def test_an_adaptive_coefficient_is_zieglers_by_hand() -> None:
    # 100 responses, a horizon of 1000. KL / 6 - 1 = 0.1, -0.1 and 0;
    # then 1, -1 and -1.5, which are clipped to 0.2, -0.2 and -0.2.
    factors = [1.01, 0.99, 1.0, 1.02, 0.98, 0.98]
    expected = list(itertools.accumulate(factors, lambda a, b: a * b, initial=0.1))
    assert betas(coefficient("adaptive"), [6.6, 5.4, 6.0, 12.0, 0.0, -3.0]) == pytest.approx(
        expected, rel=1e-12
    )
    assert expected[:3] == pytest.approx([0.1, 0.101, 0.09999])


def test_over_a_horizon_a_kl_far_off_changes_beta_by_a_fifth() -> None:
    assert betas(coefficient("adaptive"), [1e6], answers=1000)[-1] == pytest.approx(0.12)
    assert betas(coefficient("adaptive"), [7.2], answers=1000)[-1] == pytest.approx(
        0.12
    )  # the clip begins where KL is a fifth off
    assert betas(coefficient("adaptive"), [7.19], answers=1000)[-1] < 0.12
    assert betas(coefficient("adaptive"), [4.8], answers=1000)[-1] == pytest.approx(0.08)
    assert betas(coefficient("adaptive"), [-1e6], answers=1000)[-1] == pytest.approx(0.08)


@pytest.mark.parametrize("start", [0.005, 0.1, 5.0])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_an_adaptive_coefficient_holds_the_kl_of_a_policy_that_answers_to_it(
    start: float, noise: float
) -> None:
    # a policy whose KL is 0.6 / beta: 120, 6 or 0.12 nats at first; each rollout sees it with noise
    generator, beta = random.Random(0), coefficient("adaptive", coef=start)
    kls = []
    for _ in range(400):
        kls.append(0.6 / beta.value)
        beta.update(kls[-1] * (1 + generator.uniform(-noise, noise)), 100)
    assert all(abs(kl / 6 - 1) < 0.2 for kl in kls[300:])
    assert beta.value == pytest.approx(0.1, rel=0.2)


@pytest.mark.parametrize("controller", ["fixed", "linear", "adaptive"])
def test_a_coefficient_goes_on_from_its_state(controller: str) -> None:
    kls = [random.Random(1).uniform(0, 12) for _ in range(9)]
    whole = betas(coefficient(controller), kls)
    first, second = coefficient(controller), coefficient(controller)
    betas(first, kls[:4])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert betas(second, kls[4:]) == whole[4:]


# ------------------------------------------------------------------------------------- RunningScale


def ragged_batches(seed: int, offset: float = 3.0) -> list[Tensor]:
    """Scores that drift and widen, from rollouts of unequal size; one has a single response."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [1 + seed, 1, 5, 17, 3, 64]
    return [
        torch.randn(n, generator=generator, dtype=torch.float64) * (1 + k) + offset + k
        for k, n in enumerate(sizes)
    ]


@pytest.mark.parametrize("offset", [0.0, 3.0, -1e5])
@pytest.mark.parametrize("seed", SEEDS)
def test_running_scale_equals_numpy_over_all_scores_so_far(seed: int, offset: float) -> None:
    scale, seen = RunningScale(), np.empty(0)
    for batch in ragged_batches(seed, offset):
        scaled = scale(batch)
        seen = np.concatenate([seen, batch.numpy()])
        assert scale.count == len(seen)
        assert scale.mean == pytest.approx(seen.mean(), rel=1e-9, abs=1e-9)
        assert scale.std == pytest.approx(seen.std(), rel=1e-6)
        assert scaled.tolist() == pytest.approx(
            (batch.numpy() / (seen.std() or 1.0)).tolist(), rel=1e-6
        )


def test_running_scale_by_hand() -> None:
    scale = RunningScale()
    assert scale(torch.tensor([1.0, 3.0])).tolist() == [1.0, 3.0]  # mean 2, deviation 1
    # 1, 3, 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5; the mean of the scores stays where it is
    assert scale(torch.tensor([5.0, 7.0])).tolist() == pytest.approx([5 / 5**0.5, 7 / 5**0.5])
    assert (scale.count, scale.mean, scale.std) == (4, 4.0, pytest.approx(5**0.5))


def test_the_mean_is_not_subtracted_and_the_order_is_kept() -> None:
    score = torch.randn(50, generator=torch.Generator().manual_seed(1)) + 10
    scaled = RunningScale()(score)
    assert scaled.dtype == score.dtype
    assert scaled.std(correction=0).item() == pytest.approx(1.0, rel=1e-5)
    assert scaled.mean().item() == pytest.approx(
        (score.mean() / score.std(correction=0)).item(), rel=1e-5
    )
    assert torch.equal(scaled.argsort(), score.argsort())


def test_scores_without_any_spread_stay_as_they_are() -> None:
    scale = RunningScale()
    assert scale.std == 0.0
    for n in (
        1,
        7,
        100,
    ):  # one answer; and the same score for all, as a python function may give at first
        score = torch.full((n,), 0.1)
        assert torch.equal(scale(score), score) and scale.std == 0.0
    assert torch.isfinite(scale(torch.tensor([0.1, 5.0]))).all() and scale.std > 0


def test_the_scores_given_are_not_changed() -> None:
    score = torch.tensor([1.0, 2.0, 6.0])
    RunningScale()(score)
    assert score.tolist() == [1.0, 2.0, 6.0]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_scale_goes_on_from_its_state(seed: int) -> None:
    batches, whole, first, second = (
        ragged_batches(seed),
        RunningScale(),
        RunningScale(),
        RunningScale(),
    )
    expected = [whole(batch) for batch in batches]
    for batch in batches[:3]:
        first(batch)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for batch, scaled in zip(batches[3:], expected[3:]):
        assert torch.equal(second(batch), scaled)
    assert second.state_dict() == whole.state_dict()


# ------------------------------------------------------------------------------------ MovingAverage


def small_engine(seed: int = 0, frozen: bool = False) -> Any:
    """What a MovingAverage sees of an engine: its module, here a small one in bf16."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).bfloat16()
    if frozen:
        module[0].requires_grad_(False)
    return SimpleNamespace(module=module)


def weights_of(engine: Any) -> list[Tensor]:
    return [p.detach().clone() for p in engine.module.parameters()]


@torch.no_grad()
def optimizer_step(engine: Any, generator: torch.Generator) -> None:
    """Moves every weight a little."""
    for p in engine.module.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=generator))


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether all tensors are equal bit by bit, and of one type."""
    return len(one) == len(other) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other)
    )


@pytest.mark.parametrize("n", [1, 10, 100])
def test_the_average_moves_by_steps_that_bf16_would_lose(n: int) -> None:
    engine = small_engine()
    start, goal, decay = 0.125, 0.125 * (1 + 2**-7), 0.992  # neighbours in bf16
    for p in engine.module.parameters():
        nn.init.constant_(p, start)
    ema, in_bf16 = MovingAverage(engine, decay), torch.tensor(start, dtype=torch.bfloat16)
    for p in engine.module.parameters():
        nn.init.constant_(p, goal)
    for _ in range(n):
        ema.update()
        in_bf16.lerp_(torch.tensor(goal, dtype=torch.bfloat16), 1 - decay)
    expected = goal + decay**n * (start - goal)
    for average in ema.average:
        assert average.dtype == torch.float32
        assert average.flatten().tolist() == pytest.approx([expected] * average.numel(), abs=1e-6)
    assert in_bf16.item() == start and abs(expected - start) > 5e-6


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.992])
def test_the_average_equals_the_sum_over_all_steps(decay: float) -> None:
    # ema_n = decay^n w_0 + (1 - decay) sum over k of decay^(n - k) w_k
    engine, generator, n = small_engine(), torch.Generator().manual_seed(1), 12
    ema, weights = MovingAverage(engine, decay), [weights_of(engine)]
    for _ in range(n):
        optimizer_step(engine, generator)
        ema.update()
        weights.append(weights_of(engine))
    for i, average in enumerate(ema.average):
        for place, found in enumerate(average.flatten().tolist()):
            w = [step[i].flatten()[place].item() for step in weights]
            expected = decay**n * w[0] + (1 - decay) * math.fsum(
                decay ** (n - k) * w[k] for k in range(1, n + 1)
            )
            assert found == pytest.approx(expected, abs=1e-6)


def test_the_average_starts_from_the_weights_and_follows_them_only_when_told() -> None:
    engine = small_engine()
    ema, start = MovingAverage(engine, 0.9), weights_of(engine)
    optimizer_step(engine, torch.Generator().manual_seed(1))
    assert same(ema.average, [w.float() for w in start])
    assert not any(average.requires_grad for average in ema.average)


def test_an_average_in_fp32_is_no_view_of_the_weights() -> None:
    engine = SimpleNamespace(module=nn.Linear(2, 2))  # float() of fp32 gives the same tensor
    ema, start = MovingAverage(engine, 0.9), weights_of(engine)
    optimizer_step(engine, torch.Generator().manual_seed(1))
    assert same(ema.average, start)


def test_only_trained_weights_are_averaged_and_swapped() -> None:
    engine = small_engine(frozen=True)
    ema, start = MovingAverage(engine, 0.9), weights_of(engine)
    assert len(start) == 6 and len(ema.average) == 4
    optimizer_step(engine, torch.Generator().manual_seed(1))
    moved = weights_of(engine)
    with ema.in_place():
        assert same(weights_of(engine), moved[:2] + start[2:])


def test_in_place_puts_the_average_where_the_weights_are_and_gives_them_back_bit_by_bit() -> None:
    engine, generator = small_engine(), torch.Generator().manual_seed(2)
    ema = MovingAverage(engine, 0.9)
    for _ in range(5):
        optimizer_step(engine, generator)
        ema.update()
    before, average, parameters = (
        weights_of(engine),
        [x.clone() for x in ema.average],
        list(engine.module.parameters()),
    )
    with ema.in_place():
        assert same(weights_of(engine), [x.bfloat16() for x in average])
        assert not same(weights_of(engine), before)
    assert same(weights_of(engine), before) and same(ema.average, average)
    assert all(
        a is b for a, b in zip(engine.module.parameters(), parameters)
    )  # what the optimizer holds is still what it trains


def test_the_weights_come_back_when_saving_the_average_fails() -> None:
    engine = small_engine()
    ema, before = MovingAverage(engine, 0.9), weights_of(engine)
    ema.average[0] += 1
    with pytest.raises(OSError), ema.in_place():
        assert not same(weights_of(engine), before)
        raise OSError("disk full")
    assert same(weights_of(engine), before)


def test_a_module_in_place_computes_with_the_average_and_trains_on_as_if_nothing_had_been() -> None:
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(5)).bfloat16()
    looked, plain = small_engine(), small_engine()
    one, other = MovingAverage(looked, 0.9), MovingAverage(plain, 0.9)
    for _ in range(4):
        for engine, ema, generator in zip((looked, plain), (one, other), generators):
            optimizer_step(engine, generator)
            ema.update()
        before = looked.module(x)
        with one.in_place():
            assert not torch.equal(looked.module(x), before)
        assert torch.equal(looked.module(x), before)
    assert same(weights_of(looked), weights_of(plain)) and same(one.average, other.average)


def test_an_average_goes_on_from_its_state() -> None:
    engine, generator = small_engine(), torch.Generator().manual_seed(4)
    ema = MovingAverage(engine, 0.9)
    for _ in range(3):
        optimizer_step(engine, generator)
        ema.update()
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    again = MovingAverage(engine, 0.9)  # starts from the weights of now
    assert not same(again.average, ema.average)
    again.load_state_dict(torch.load(file))
    assert same(again.average, ema.average)
    optimizer_step(engine, generator)
    ema.update(), again.update()
    assert same(again.average, ema.average)
