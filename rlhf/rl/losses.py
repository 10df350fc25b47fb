"""The mathematics, as pure functions of tensors.

| symbol  | meaning                                              | name in code                       |
|---------|------------------------------------------------------|------------------------------------|
| B       | sequences                                            |                                    |
| R       | response tokens, right-padded                        |                                    |
| V       | vocabulary                                           |                                    |
| m       | 1 on response tokens up to and including EOS, else 0 | `mask` (B, R)                      |
| log pi  | log-probability of the sampled token                 | `logp`, `old_logp`, `ref_logp`     |
| V(s_t)  | value of the state before token t is chosen          | `values` (B, R)                    |
| r(x, y) | score of the whole answer, normalised units          | `score` (B,)                       |
| beta    | weight of the KL penalty                             | `kl_coef`                          |

No function here sees a prompt: everything is sliced to the response where it is made (rlhf/rollout.py). Losses are given per token
and not averaged: `token_weights` says what each token counts in the whole optimizer step, so neither micro-batches nor processes
change the result. Times are optimizer steps (PPO: rollouts), log-probabilities nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.config.schema import KlEstimator, LossOver


def kl_estimate(logp: Tensor, ref_logp: Tensor, estimator: KlEstimator) -> Tensor:
    """Per-token estimate of KL(pi || ref) from tokens that pi sampled, with d = log pi - log ref (Schulman 2020, "Approximating KL
    divergence", joschu.net/blog/kl-approx.html):

    k1 = d           unbiased, of both signs
    k2 = d^2 / 2     biased, never negative; as a loss its gradient is that of the KL, in expectation under pi
    k3 = e^-d - 1 + d  unbiased, never negative; as a loss its gradient is that of KL(ref || pi) instead

    As a loss k1 has gradient zero in expectation, and is refused in the configuration. Shapes (B, R); nats.
    """
    d = logp - ref_logp
    if estimator == KlEstimator.k1:
        return d
    return (
        0.5 * d**2 if estimator == KlEstimator.k2 else torch.exp((-d).clamp(max=20)) - 1 + d
    )  # e^20 keeps float32 finite


def token_weights(
    mask: Tensor, over: LossOver, tokens: float, sequences: int, longest: int
) -> Tensor:
    """What each token counts in a loss, so that the sum of weight x loss over all micro-batches and processes is

    token     the mean over all tokens (DAPO, arXiv:2503.14476, section 3.3)
    sequence  the mean over answers of the means over their tokens (GRPO, arXiv:2402.03300, eq. 3)
    constant  the sum over all tokens / (answers x longest), so that no length is favoured (Dr. GRPO, arXiv:2503.20783)

    Args: mask (B, R) of some of the answers.  tokens, sequences: of the whole optimizer step, over all processes.  longest: tokens
        that an answer may have.
    Returns: (B, R), zero outside the mask.
    """
    if over == LossOver.token:
        return mask / max(tokens, 1.0)
    if over == LossOver.constant:
        return mask / (sequences * longest)
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / sequences


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate objective, negated (Schulman 2017, arXiv:1707.06347, eq. 7); with a higher upper clip as in DAPO.

    Args: logp (with gradient), old_logp, advantages, mask (B, R).  clip_low, clip_high: the ratio counts from 1 - clip_low to
        1 + clip_high.
    Returns: the loss of each token (B, R), zero outside the mask; and sums over tokens for the log: `clipfrac_low`, `clipfrac_high`
        (tokens whose clipped term is the active one, by the side), `approxkl` (0.5 (log pi - log pi_old)^2), `ratio`, `ratio_sq`;
        `ratio_max` is a maximum.
    """
    log_ratio = (logp - old_logp) * mask
    ratio = log_ratio.clamp(
        -20, 20
    ).exp()  # keeps float32 finite; a policy that is e^20 away learns nothing there
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(unclipped, clipped) * mask
    with torch.no_grad():
        active = (clipped > unclipped) * mask
        sums = {
            "clipfrac_low": (active * (ratio < 1)).sum(),
            "clipfrac_high": (active * (ratio > 1)).sum(),
            "approxkl": 0.5 * (log_ratio**2).sum(),
            "ratio": (ratio * mask).sum(),
            "ratio_sq": (ratio**2 * mask).sum(),
            "ratio_max": (ratio * mask).max(),
        }
    return loss, sums


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Clipped value loss of each token, 0.5 max((V - G)^2, (clip(V, V_old +- eps) - G)^2) (OpenAI baselines ppo2; Stiennon 2020,
    arXiv:2009.01325). Never negative.

    Args: values (with gradient), old_values, returns, mask (B, R).  clip: score units; None: 0.5 (V - G)^2.
    Returns: the loss (B, R), zero outside the mask, and the number of tokens whose clipped term is the active one.
    """
    error = (values - returns) ** 2
    if clip is None:
        return 0.5 * error * mask, mask.new_zeros(())
    clipped = values.clamp(
        old_values - clip, old_values + clip
    )  # exactly V where the clip does not act
    clipped_error = (clipped - returns) ** 2
    return 0.5 * torch.maximum(error, clipped_error) * mask, (
        (clipped_error > error) * mask
    ).sum().detach()
