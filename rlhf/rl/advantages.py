"""From scores to advantages, as pure functions. Shapes: B sequences, R response tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def token_rewards(score: Tensor, penalty: Tensor, mask: Tensor) -> Tensor:
    """Reward of each response token: minus its penalty, and the score on the last one (Ziegler 2019, arXiv:1909.08593, eq. 2).

    Args: score (B,).  penalty (B, R), score units: beta times an estimate of the KL of the policy that sampled.  mask (B, R).
    Returns: (B, R), zero outside the mask. A row without any response token gets no reward.
    """
    length = mask.sum(1).long()
    last = torch.zeros_like(mask).scatter_(1, (length - 1).clamp(min=0)[:, None], 1.0) * mask
    return score[:, None] * last - penalty * mask


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns (Schulman 2016, arXiv:1506.02438, eq. 16).

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  the value beyond the last token is 0.

    Args: rewards, values, mask (B, R).
    Returns: advantages (B, R), not whitened, and returns = advantages + values (B, R); both zero outside the mask.
    """
    advantages = torch.zeros_like(rewards)
    next_advantage = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = next_advantage
    return advantages, (advantages + values) * mask


def leave_one_out(rewards: Tensor) -> Tensor:
    """Advantage of each answer: its reward minus the mean of those of the other answers to its prompt, which does not depend on it, so
    that the policy gradient stays unbiased (RLOO: Kool 2019; Ahmadian 2024, arXiv:2402.14740, section 3.1).

    Args: rewards (N, k): N prompts, k >= 2 answers each, score units, the KL penalty taken off.  Returns: (N, k).
    """
    k = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdim=True)) * k / (k - 1)


def group_relative(rewards: Tensor, normalize_std: bool) -> Tensor:
    """Advantage of each answer: its reward minus the mean of those of all answers to its prompt, divided by their standard deviation
    (k - 1 in the denominator, + 1e-4, as in TRL) where that is wanted (GRPO: Shao 2024, arXiv:2402.03300, section 4.1.2; without:
    Dr. GRPO, arXiv:2503.20783).

    Args: rewards (N, k): N prompts, k >= 2 answers each, score units.  Returns: (N, k); score units, or standard deviations.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + 1e-4) if normalize_std else centred


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens where mask is 1; 0 when there are none. Shapes (B, R); returns a scalar."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over the masked tokens of the whole batch; biased variance, as
    OpenAI's 2019 code (tf.nn.moments). Shapes (B, R); zero outside the mask.

    Args: shift_mean: False leaves the mean where it is, as for rewards, whose mean matters (N+ policy detail 9).
    """
    mean = masked_mean(x, mask)
    white = (x - mean) * torch.rsqrt(masked_mean((x - mean) ** 2, mask) + 1e-8)
    return (white if shift_mean else white + mean) * mask
