"""From scores to advantages. Shapes: B responses, R response tokens.

All are pure functions, except that `shape_scores` updates the running scale. A new estimator is a
member of config.choices.Advantage, in the sets below it, and a case of `estimate_advantages`.

A response without a score (NaN: no reward source applies to it) is left out: of baselines and
normalisation here, and of the loss by `loss_mask`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf.config.choices import PER_TOKEN, Normalize
from rlhf.config.stage_nodes import Rl
from rlhf.rl.controllers import RunningScale
from rlhf.rl.experience import Experience


def shape_scores(
    raw: Tensor, experience: Experience, rl: Rl, longest: int, scale: RunningScale
) -> Tensor:
    """Scores with the penalties for missing EOS and length, scaled and clipped as configured.

    Args:
        raw (B,): weighted sum of the sources; NaN where there is none.
        longest: tokens that a response may have.
        scale: knows the scores of earlier rollouts.
    Returns: (B,), score units; NaN where `raw` is.
    """
    missing_eos = 1 - experience.finished
    length = experience.response_mask.sum(1)
    score = raw - rl.missing_eos_penalty * missing_eos - rl.length_penalty * length
    if rl.overlong_penalty:
        score = score - soft_overlong(length, longest, rl.overlong_penalty)
    if rl.scale_score:
        score = scale(score)
    if rl.score_clip:
        score = score.clamp(-rl.score_clip, rl.score_clip)
    return score


def soft_overlong(length: Tensor, longest: int, buffer: int) -> Tensor:
    """Penalty of long responses: 0 up to `longest` - `buffer` tokens, from there linearly up to 1
    at `longest` tokens (DAPO, arXiv:2503.14476, eq. 13).

    Args: length (B,), longest, buffer: tokens.  Returns: (B,), to be subtracted from the score.
    """
    return ((length - (longest - buffer)) / buffer).clamp(0, 1)


def differ(raw: Tensor, responses_per_prompt: int) -> Tensor:
    """Which groups have different rewards, so that their advantages are not all 0.

    Args: raw (B,): weighted sum of the sources, without penalties; NaN where there is none.
        Responses to a prompt lie side by side.
    Returns: (prompts,) bool; False for a group with fewer than two scores.
    """
    groups = raw.view(-1, responses_per_prompt)
    scored = ~groups.isnan()
    highest = groups.masked_fill(~scored, -torch.inf).amax(1)
    lowest = groups.masked_fill(~scored, torch.inf).amin(1)
    equal = torch.isclose(highest, lowest, rtol=1e-5, atol=1e-6)  # a reward model's rounding
    return (scored.sum(1) > 1) & ~equal


def loss_mask(experience: Experience, raw: Tensor, mask_truncated: bool) -> Tensor:
    """Tokens in the loss, (B, R): none of a response without a score, and with mask_truncated none
    of one without EOS (overlong filtering: DAPO, arXiv:2503.14476, section 3.4).

    Args: raw (B,): weighted sum of the sources; NaN where there is none.
    """
    kept = ~raw.isnan()
    if mask_truncated:
        kept &= experience.finished > 0
    return experience.loss_mask * kept[:, None]


def token_rewards(score: Tensor, penalty: Tensor, mask: Tensor) -> Tensor:
    """Reward of each response token: minus its penalty, and the score on the last token.

    Source: Ziegler 2019, arXiv:1909.08593, eq. 2.

    Args:
        score (B,), score units.
        penalty (B, R), score units: KL coefficient times an estimate of the KL of the policy that
            sampled.
        mask (B, R): 1 on response tokens.
    Returns: (B, R), zero outside the mask. A row without any response token gets no reward.
    """
    length = mask.sum(1).long()
    last = torch.zeros_like(mask).scatter_(1, (length - 1).clamp(min=0)[:, None], 1.0) * mask
    return score[:, None] * last - penalty * mask


def estimate_advantages(
    rewards: Tensor, experience: Experience, rl: Rl
) -> tuple[Tensor, Tensor | None]:
    """Advantages of all response tokens, by rl.advantage and rl.normalize.

    Args:
        rewards (B, R): of each token; a row with NaN has no score.
        experience: responses to a prompt lie side by side.
    Returns: advantages (B, R), and with a critic the returns it is trained on (B, R), else None;
        both are zero where there is no score.
    """
    returns = None
    groups = rewards.sum(1).view(-1, rl.responses_per_prompt)  # of whole responses
    by_group = rl.normalize == Normalize.group
    rewards, mask = scored_rewards(rewards, experience.response_mask, rl)
    match rl.advantage.name:
        case "gae":
            advantages, returns = gae(rewards, experience.values, mask, rl.gamma, rl.gae_lambda)
        case "return":
            advantages = discounted_returns(rewards, mask, rl.gamma)
        case "leave_one_out":
            advantages = of_scored(groups, by_group, leave_one_out).view(-1, 1) * mask
        case "group":
            advantages = of_scored(groups, by_group, group_relative).view(-1, 1) * mask
        case other:
            raise NotImplementedError(f"rl.advantage={other}")
    if rl.normalize == Normalize.batch:
        advantages = whiten(advantages, mask)
    return advantages, returns


def scored_rewards(rewards: Tensor, mask: Tensor, rl: Rl) -> tuple[Tensor, Tensor]:
    """The rewards of the responses that have a score, whitened where that is configured.

    Args: rewards (B, R): of each token; a row with NaN has no score.  mask (B, R): response tokens.
    Returns: rewards and mask, (B, R), both zero in rows without a score.
    """
    missing = rewards.sum(1, keepdim=True).isnan()
    rewards, mask = rewards.masked_fill(missing, 0.0), mask.masked_fill(missing, 0.0)
    if rl.whiten_rewards and rl.advantage in PER_TOKEN:
        rewards = whiten(rewards, mask, shift_mean=False)
    return rewards, mask


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns (Schulman 2016, arXiv:1506.02438, eq. 16).

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1}; the value beyond the
    last token is 0.

    Args: rewards, values, mask (B, R).
    Returns: advantages (B, R), not whitened, and returns = advantages + values (B, R); both zero
        outside the mask.
    """
    advantages = torch.zeros_like(rewards)
    next_advantage = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * gae_lambda * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = next_advantage
    return advantages, (advantages + values) * mask


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Sum of the rewards from each token on, G_t = r_t + gamma G_{t+1} (REINFORCE, Williams 1992).

    Args: rewards, mask (B, R).  Returns: (B, R), zero outside the mask.
    """
    returns = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        following = (rewards[:, t] + gamma * following) * mask[:, t]
        returns[:, t] = following
    return returns


def of_scored(rewards: Tensor, by_group: bool, formula: Callable[[Tensor, bool], Tensor]) -> Tensor:
    """A formula that compares the responses to a prompt, of those that have a score.

    Args: rewards (N, k): NaN where there is none.  formula: leave_one_out or group_relative.
    Returns: (N, k); 0 without a score, and in a group with fewer than two.
    """
    scored = ~rewards.isnan()
    advantages = formula(rewards, by_group).masked_fill(~scored, 0.0)
    for row in (~scored).any(1).nonzero()[:, 0].tolist():
        there = scored[row]
        some = rewards[row, there][None]
        advantages[row, there] = formula(some, by_group)[0] if some.shape[1] > 1 else 0.0
    return advantages


def leave_one_out(rewards: Tensor, by_group: bool = False) -> Tensor:
    """Advantage of each response: its reward minus the mean of the other responses to its prompt.

    That baseline does not depend on the response, so the policy gradient stays unbiased (RLOO: Kool
    2019; Ahmadian 2024, arXiv:2402.14740, section 3.1).

    Args:
        rewards (N, k): N prompts, k >= 2 responses each, score units, KL penalty subtracted.
        by_group: divide by the standard deviation, as group_relative does.
    Returns: (N, k).
    """
    k = rewards.shape[1]
    advantages = centred(rewards) * k / (k - 1)
    return advantages / group_std(rewards) if by_group else advantages


def group_relative(rewards: Tensor, by_group: bool) -> Tensor:
    """Advantage of each response: its reward minus the mean of all responses to its prompt.

    Source: GRPO (Shao 2024, arXiv:2402.03300, section 4.1.2), which divides by their standard
    deviation; Dr. GRPO (arXiv:2503.20783) does not.

    Args: rewards (N, k): N prompts, k >= 2 responses each, score units.  by_group: divide.
    Returns: (N, k), score units or standard deviations.
    """
    advantages = centred(rewards)
    return advantages / group_std(rewards) if by_group else advantages


def centred(rewards: Tensor) -> Tensor:
    """Rewards minus their mean per prompt; exactly 0 where all are equal, (N, k).

    The mean of seven times 1000.1 is not 1000.1 in float32, and dividing by a standard deviation of
    1e-4 would make a gradient of the difference.
    """
    all_equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return (rewards - rewards.mean(1, keepdim=True)).masked_fill(all_equal, 0.0)


def group_std(rewards: Tensor) -> Tensor:
    """Unbiased standard deviation per prompt, + 1e-4 as in TRL: (N, k) -> (N, 1)."""
    return rewards.std(1, keepdim=True) + 1e-4


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens where mask is 1; 0 when there are none. Shapes (B, R); a scalar."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale, and by default shift, to mean 0 and variance 1 over the masked tokens.

    Biased variance, as in OpenAI's code of 2019 (tf.nn.moments). Shapes (B, R).

    Args: shift_mean: False keeps the mean, as for rewards, whose mean matters (N+ detail 9).
    Returns: (B, R), zero outside the mask.
    """
    mean = masked_mean(x, mask)
    tokens = x[mask > 0]
    if tokens.numel() and tokens.max() == tokens.min():  # what is left is rounding
        mean = tokens[0]
    white = (x - mean) * torch.rsqrt(masked_mean((x - mean) ** 2, mask) + 1e-8)
    return (white if shift_mean else white + mean) * mask
