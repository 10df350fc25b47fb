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

No function here sees a prompt: everything is sliced to the response where it is made (rlhf/rollout.py). Losses are sums, not
means: the caller divides by the count of the whole optimizer step, so neither micro-batches nor processes change the result.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def token_logp(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of the target tokens, and the entropy of the whole distribution at each position.

    Args: logits (B, R, V), already divided by the temperature.  targets (B, R) token ids.
    Returns: logp (B, R) and entropy (B, R), float32, nats.
    """
    logits = logits.float()
    logp_all = logits.log_softmax(-1)
    entropy = -(logp_all.exp() * logp_all).sum(-1)
    return logp_all.gather(-1, targets[..., None])[..., 0], entropy


def pairwise_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Sum over pairs of -log sigmoid(r_chosen - r_rejected): Bradley-Terry (Ouyang 2022, arXiv:2203.02155, eq. 1).

    Args: chosen, rejected (B,) scores. Returns: scalar, float32.
    """
    return -F.logsigmoid(chosen.float() - rejected.float()).sum()


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Per-token estimate of KL(pi || ref) that is unbiased and never negative: exp(-d) - 1 + d with d = log pi - log ref
    (Schulman 2020, "Approximating KL divergence"). Shapes (B, R); nats."""
    d = logp - ref_logp
    return torch.exp(-d) - 1 + d


def token_rewards(score: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Reward of each response token: -beta * (log pi - log ref), and the score on the last one (Ziegler 2019,
    arXiv:1909.08593, eq. 2; k1 estimator, with the log-probabilities of the policy that sampled).

    Args: score (B,), logp, ref_logp, mask (B, R), kl_coef in score units per nat.
    Returns: (B, R), zero outside the mask. A row without any response token gets no reward.
    """
    rewards = -kl_coef * (logp - ref_logp) * mask
    length = mask.sum(1).long()
    last = torch.zeros_like(mask).scatter_(1, (length - 1).clamp(min=0)[:, None], 1.0) * mask
    return rewards + score[:, None] * last


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
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


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens where mask is 1; 0 when there are none. Shapes (B, R); returns a scalar."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over the masked tokens of the whole batch; biased variance, as
    OpenAI's 2019 code (tf.nn.moments). Shapes (B, R); zero outside the mask."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate objective, negated (Schulman 2017, arXiv:1707.06347, eq. 7), summed over response tokens.

    Args: logp (with gradient), old_logp, advantages, mask (B, R).  clip: epsilon.
    Returns: the sum, and sums over tokens for the log: `clipfrac` (tokens whose clipped term is the active one), `approxkl`
        (0.5 (log pi - log pi_old)^2), `ratio`, `ratio_sq`; `ratio_max` is a maximum.
    """
    log_ratio = (logp - old_logp) * mask
    ratio = log_ratio.clamp(-20, 20).exp()  # beyond e^20 the clip decides anyway; keeps float32 finite
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = (torch.maximum(unclipped, clipped) * mask).sum()
    with torch.no_grad():
        sums = {
            "clipfrac": ((clipped > unclipped) * mask).sum(),
            "approxkl": 0.5 * (log_ratio**2).sum(),
            "ratio": (ratio * mask).sum(),
            "ratio_sq": (ratio**2 * mask).sum(),
            "ratio_max": (ratio * mask).max(),
        }
    return loss, sums


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Clipped value loss, 0.5 max((V - G)^2, (clip(V, V_old +- eps) - G)^2), summed over response tokens
    (OpenAI baselines ppo2; Stiennon 2020, arXiv:2009.01325). Never negative.

    Args: values (with gradient), old_values, returns, mask (B, R).  clip: in units of the normalised score.
    Returns: the sum, and the number of tokens whose clipped term is the active one.
    """
    clipped = values.clamp(old_values - clip, old_values + clip)  # exactly V where the clip does not act
    plain_error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * (torch.maximum(plain_error, clipped_error) * mask).sum()
    return loss, ((clipped_error > plain_error) * mask).sum().detach()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(G - V) / Var(G) over the masked tokens; 0 for a constant value, negative when worse than that. NaN if Var(G) = 0."""
    error = returns - values
    residual = masked_mean((error - masked_mean(error, mask)) ** 2, mask)
    total = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    return float(1 - residual / total) if float(total) > 0 else math.nan


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float, schedule: str, final: float) -> float:
    """Learning rate of optimizer step `step` (0-based) of `total`: linear warm-up, then constant, linear or cosine decay to
    `final` * peak, which the last step has."""
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    if schedule == "constant":
        return peak
    decay = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * (final + (1 - final) * decay)
