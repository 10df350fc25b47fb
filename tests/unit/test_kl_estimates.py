"""The estimates k1, k2 and k3 of the KL divergence, as a penalty and as a loss."""

from __future__ import annotations

import math

import pytest
import torch
from formulas import F64, SEEDS, normal, shape_of, t
from torch import Tensor

from rlhf.config.choices import KlEstimator
from rlhf.rl.losses import kl_estimate


def kl_by_token(p: float, q: float) -> dict[KlEstimator, float]:
    """All estimates from one token of probability p under the policy and q under the reference."""
    log = math.log(q / p)
    return {KlEstimator.k1: -log, KlEstimator.k2: 0.5 * log * log, KlEstimator.k3: q / p - 1 - log}


def policy_and_reference(seed: int) -> tuple[Tensor, Tensor]:
    """Logits of a policy, with gradient, and a reference's log-probabilities; 2 to 7 tokens."""
    generator = torch.Generator().manual_seed(seed)
    return normal(generator, 2 + seed).requires_grad_(), normal(generator, 2 + seed).log_softmax(0)


def expected_gradient(logits: Tensor, ref: Tensor, estimator: KlEstimator) -> Tensor:
    """The sum over all tokens of p times the gradient of the estimate.

    This is the expectation of the gradient from sampled tokens.
    """
    logp = logits.log_softmax(0)
    return torch.autograd.grad(
        (logp.exp().detach() * kl_estimate(logp, ref, estimator)).sum(), logits
    )[0]


@pytest.mark.parametrize("estimator", KlEstimator)
@pytest.mark.parametrize("seed", SEEDS)
def test_kl_estimates_equal_loops(seed: int, estimator: KlEstimator) -> None:
    generator, b, r = shape_of(seed)
    logp, ref = normal(generator, b, r), normal(generator, b, r)
    estimate = kl_estimate(logp, ref, estimator)
    for i in range(b):
        for j in range(r):
            expected = kl_by_token(math.exp(logp[i, j].item()), math.exp(ref[i, j].item()))[
                estimator
            ]
            assert estimate[i, j].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert (kl_estimate(logp, logp, estimator) == 0).all()


def test_kl_estimates_by_hand() -> None:
    # p = 1/2, 1/4, 1/4 and q = 1/4, 1/2, 1/4: d = log 2, -log 2, 0
    # k2 = (log 2)^2 / 2;  k3 = q/p - 1 + d
    logp, ref = t([0.5, 0.25, 0.25]).log(), t([0.25, 0.5, 0.25]).log()
    assert kl_estimate(logp, ref, KlEstimator.k1)[0].tolist() == pytest.approx(
        [0.693147, -0.693147, 0.0], abs=1e-6
    )
    assert kl_estimate(logp, ref, KlEstimator.k2)[0].tolist() == pytest.approx(
        [0.240227, 0.240227, 0.0], abs=1e-6
    )
    assert kl_estimate(logp, ref, KlEstimator.k3)[0].tolist() == pytest.approx(
        [0.193147, 0.306853, 0.0], abs=1e-6
    )


def test_k3_has_no_gradient_where_a_policy_is_hopelessly_far_away() -> None:
    """At 20 nats below the reference the estimate stops growing; its gradient never turns round."""
    logp = torch.tensor([[-20.1, -19.9, -0.5, 20.1]], requires_grad=True)
    kl_estimate(logp, torch.zeros(1, 4), KlEstimator.k3).sum().backward()
    assert logp.grad is not None
    far, near, close, above = logp.grad[0].tolist()
    assert far == 0 and near == pytest.approx(1 - math.exp(19.9), rel=1e-5)
    assert close == pytest.approx(1 - math.exp(0.5)) and above == pytest.approx(1)


def test_k2_and_k3_are_never_negative_and_k1_has_both_signs() -> None:
    logp, ref = (normal(torch.Generator().manual_seed(seed), 50, 50, scale=2) for seed in (1, 2))
    k1, k2, k3 = (
        kl_estimate(logp, ref, estimator)
        for estimator in (KlEstimator.k1, KlEstimator.k2, KlEstimator.k3)
    )
    assert (k2 >= 0).all() and (k3 >= 0).all()
    assert (k1 > 0).any() and (k1 < 0).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_k1_and_k3_are_unbiased_and_k2_is_not(seed: int) -> None:
    logits, ref = policy_and_reference(seed)
    logp = logits.detach().log_softmax(0)
    exact = sum(math.exp(a) * (a - b) for a, b in zip(logp.tolist(), ref.tolist()))
    mean = {
        estimator: (logp.exp() * kl_estimate(logp, ref, estimator)).sum().item()
        for estimator in KlEstimator
    }
    assert mean[KlEstimator.k1] == pytest.approx(exact, abs=1e-12)
    assert mean[KlEstimator.k3] == pytest.approx(exact, abs=1e-12)
    assert abs(mean[KlEstimator.k2] - exact) > 1e-4


@pytest.mark.parametrize("estimator", [KlEstimator.k1, KlEstimator.k3])
def test_the_mean_of_many_samples_is_the_kl(estimator: KlEstimator) -> None:
    p, q = (
        torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=F64),
        torch.tensor([0.25, 0.25, 0.25, 0.25], dtype=F64),
    )
    exact = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist()))
    draws = torch.multinomial(
        p, 100_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    estimate = kl_estimate(p.log()[draws], q.log()[draws], estimator)
    assert abs(estimate.mean().item() - exact) < 4 * estimate.std().item() / math.sqrt(len(draws))


@pytest.mark.parametrize("seed", SEEDS)
def test_as_a_loss_k1_does_nothing_k2_lowers_the_kl_and_k3_the_reverse_kl(seed: int) -> None:
    logits, ref = policy_and_reference(seed)
    logp = logits.log_softmax(0)
    of_kl = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)[
        0
    ]  # KL(p || q)
    of_reverse = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), logits)[0]  # KL(q || p)
    assert torch.allclose(
        expected_gradient(logits, ref, KlEstimator.k1), torch.zeros_like(logits), atol=1e-12
    )
    assert torch.allclose(expected_gradient(logits, ref, KlEstimator.k2), of_kl, atol=1e-12)
    assert torch.allclose(expected_gradient(logits, ref, KlEstimator.k3), of_reverse, atol=1e-12)
    assert not torch.allclose(of_kl, of_reverse, atol=1e-3)


@pytest.mark.parametrize("estimator", KlEstimator)
def test_the_gradient_of_a_kl_estimate_is_the_numerical_one(estimator: KlEstimator) -> None:
    generator = torch.Generator().manual_seed(6)
    logp, ref = normal(generator, 3, 4).requires_grad_(), normal(generator, 3, 4)
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, ref, estimator), (logp,))
