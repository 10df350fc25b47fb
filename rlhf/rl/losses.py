"""The losses of online RL, as pure functions of tensors.

| symbol  | meaning                                     | name in code                    |
|---------|---------------------------------------------|---------------------------------|
| B       | responses                                   |                                 |
| R       | response tokens, right-padded               |                                 |
| m       | 1 on the tokens in the loss, else 0         | `mask` (B, R)                   |
| log pi  | log-prob of the sampled token, nats         | `logprobs`, `old_logprobs`, ... |
| V(s_t)  | value of the state before token t is chosen | `values` (B, R)                 |
| G_t     | return from token t on                      | `returns` (B, R)                |

No function here sees a prompt: Experience is sliced to the response where it is made. Losses are
per token and not averaged: `token_weights` gives the weight of each token in the optimizer step, so
that neither micro-batches nor ranks change the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.config.choices import CorrectionMode, Importance, KlEstimator, LossAggregation, PolicyLoss
from rlhf.config.stage_nodes import Rl

MAX_LOG_RATIO = 20.0  # e^20 keeps float32 finite; a policy that far away gets no gradient


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: KlEstimator) -> Tensor:
    """Per-token estimate of KL(pi || ref) from tokens that pi sampled, d = log pi - log ref.

    k1 = d           unbiased, of both signs
    k2 = d^2 / 2     biased, never negative; as a loss its gradient is that of the KL, in
                     expectation under pi
    k3 = e^-d - 1 + d  unbiased, never negative; as a loss its gradient is that of KL(ref || pi)

    As a loss k1 has gradient zero in expectation; the configuration refuses it. Source: Schulman
    2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html. Shapes (B, R); nats.
    """
    d = logprobs - ref_logprobs
    if estimator == KlEstimator.k1:
        return d
    if estimator == KlEstimator.k2:
        return 0.5 * d**2
    if estimator == KlEstimator.k3:
        d = d.clamp(min=-MAX_LOG_RATIO)  # both terms, else the gradient changes its sign there
        return torch.exp(-d) - 1 + d
    raise NotImplementedError(f"rl.kl.estimator={estimator.name}")


def token_weights(
    mask: Tensor, aggregation: LossAggregation, tokens: float, sequences: int, longest: int
) -> Tensor:
    """Weight of each token, so that the sum of weight x loss over micro-batches and ranks is

    token     the mean over all tokens (DAPO, arXiv:2503.14476, section 3.3)
    sequence  the mean over responses of the means over their tokens (GRPO, arXiv:2402.03300, eq. 3)
    constant  the sum over all tokens / (responses x longest), so that no length is favoured (Dr.
              GRPO, arXiv:2503.20783)

    Args:
        mask (B, R): tokens in the loss of some of the responses.
        tokens, sequences: number of tokens in the loss, and of responses with such tokens, in the
            whole optimizer step, over all ranks.
        longest: tokens that a response may have.
    Returns: (B, R), zero outside the mask.
    """
    if aggregation == LossAggregation.token:
        return mask / max(tokens, 1.0)
    if aggregation == LossAggregation.constant:
        return mask / (max(sequences, 1) * longest)
    if aggregation == LossAggregation.sequence:
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / max(sequences, 1)
    raise NotImplementedError(f"rl.loss_aggregation={aggregation.name}")


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, rl: Rl
) -> tuple[Tensor, dict[str, Tensor]]:
    """The surrogate objective of each token, negated.

    clip   max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) (Schulman 2017, arXiv:1707.06347, eq.
           7; a higher upper clip as in DAPO). With dual_clip = c, where A < 0, at most -A c (Ye
           2019, arXiv:1912.09729): a token that has become much likelier gets no gradient
    cispo  -clip(r, ...) A log pi, the clipped ratio without gradient, so that clipped tokens still
           get one (MiniMax-M1, arXiv:2506.13585, eq. 4)

    Args:
        logprobs (B, R) with gradient; old_logprobs, advantages, mask (B, R).
        rl: policy_loss, importance, clip_low, clip_high, dual_clip.
    Returns: the loss (B, R), zero outside the mask; and sums over tokens for the log: clipfrac_low
        and clipfrac_high (tokens whose clip is active, by the side), approxkl (0.5 (log pi - log
        pi_old)^2), ratio, ratio_sq; ratio_max is a maximum.
    """
    log_ratio = (logprobs - old_logprobs) * mask
    ratio = importance_ratio(log_ratio, mask, rl.importance)
    bounded = ratio.clamp(1 - rl.clip_low, 1 + rl.clip_high)
    if rl.policy_loss == PolicyLoss.cispo:
        loss = -bounded.detach() * advantages * logprobs * mask
        active = (bounded != ratio) * mask
    elif rl.policy_loss == PolicyLoss.clip:
        unclipped, clipped = -advantages * ratio, -advantages * bounded
        loss = torch.maximum(unclipped, clipped) * mask
        active = (clipped > unclipped) * mask
        if rl.dual_clip is not None:
            limit = -advantages * rl.dual_clip
            beyond = (advantages < 0) & (loss > limit)
            loss = torch.where(beyond, limit, loss)
            active = torch.maximum(active, beyond * mask)
    else:
        raise NotImplementedError(f"rl.policy_loss={rl.policy_loss.name}")
    with torch.no_grad():
        sums = {
            "clipfrac_low": (active * (ratio < 1)).sum(),
            "clipfrac_high": (active * (ratio > 1)).sum(),
            "approxkl": 0.5 * (log_ratio**2).sum(),
            "ratio": (ratio * mask).sum(),
            "ratio_sq": (ratio**2 * mask).sum(),
            "ratio_max": (ratio * mask).max(),
        }
    return loss, sums


def sampler_weights(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor,
    mode: CorrectionMode,
    cap: float,
) -> tuple[Tensor, Tensor]:
    """Weights of the policy loss for responses that another program has sampled, which computes
    log pi a little differently: min(pi / pi_sampler, cap), truncated importance sampling (Ionides
    2008; for sampling engines Yao 2025, "Your efficient RL framework secretly brings you off-policy
    RL training").

    Args: old_logprobs, sampler_logprobs, mask (B, R): log pi by the training forward pass, and by
        the sampler.  mode: token, or sequence: the ratio of the whole response for all its tokens.
    Returns: weights (B, R), and the ratios before the cap; 1 outside the mask.
    """
    log_ratio = (old_logprobs - sampler_logprobs) * mask
    if mode == CorrectionMode.sequence:
        log_ratio = log_ratio.sum(1, keepdim=True) * mask
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return ratio.clamp(max=cap), ratio


def importance_ratio(log_ratio: Tensor, mask: Tensor, importance: Importance) -> Tensor:
    """pi / pi_old of each token, or the same of a whole response for all its tokens.

    sequence: the geometric mean over the response's tokens (GSPO, arXiv:2507.18071, eq. 7); the
    gradient reaches every token with weight 1 / length.

    Args: log_ratio, mask (B, R); log_ratio is zero outside the mask.  Returns: (B, R).
    """
    if importance == Importance.sequence:
        mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = mean.expand_as(log_ratio)
    elif importance != Importance.token:
        raise NotImplementedError(f"rl.importance={importance.name}")
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Clipped value loss of each token, 0.5 max((V - G)^2, (clip(V, V_old +- clip) - G)^2).

    Source: OpenAI baselines ppo2; Stiennon 2020, arXiv:2009.01325.

    Args:
        values (B, R) with gradient; old_values, returns, mask (B, R).
        clip: rl.critic.value_clip, score units; None: 0.5 (V - G)^2.
    Returns: the loss (B, R), zero outside the mask, and the number of tokens whose clipped term is
        the active one.
    """
    error = (values - returns) ** 2
    if clip is None:
        return 0.5 * error * mask, mask.new_zeros(())
    clipped = values.clamp(old_values - clip, old_values + clip)  # exactly V where it does not act
    clipped_error = (clipped - returns) ** 2
    active = ((clipped_error > error) * mask).sum().detach()
    return 0.5 * torch.maximum(error, clipped_error) * mask, active
