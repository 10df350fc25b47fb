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

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.config import DpoLoss, KlEstimator, LossOver, Optim, Schedule


def token_logp(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of the target tokens, and the entropy of the whole distribution at each position.

    Args: logits (B, R, V).  targets (B, R) token ids.  temperature: divides the logits, in float32 whatever they come in.
    Returns: logp (B, R) and entropy (B, R), float32, nats.
    """
    logits = logits.float() / temperature
    logp_all = logits.log_softmax(-1)
    entropy = -(logp_all.exp() * logp_all).sum(-1)
    return logp_all.gather(-1, targets[..., None])[..., 0], entropy


def pairwise_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Sum over pairs of -log sigmoid(r_chosen - r_rejected): Bradley-Terry (Ouyang 2022, arXiv:2203.02155, eq. 1).

    Args: chosen, rejected (B,) scores. Returns: scalar, float32.
    """
    return -F.logsigmoid(chosen.float() - rejected.float()).sum()


def pairwise_loss_per_token(chosen: Tensor, rejected: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """DeepSpeed-Chat's loss of the reward model (dschat/utils/model/reward_model.py), for comparison: the sum over pairs of the mean
    over positions starts <= t < ends of -log sigmoid(r_chosen,t - r_rejected,t).

    Args: chosen, rejected (B, T) scores at all tokens of the right-padded rows.  starts, ends (B,): the first position where the two
        differ, and behind the last token of the longer one; a pair that does not differ has its last position.
    Returns: scalar, float32.
    """
    place = torch.arange(chosen.shape[1], device=chosen.device)
    compared = ((place >= starts[:, None]) & (place < ends[:, None])).float()
    losses = -F.logsigmoid(chosen.float() - rejected.float()) * compared
    return (losses.sum(1) / compared.sum(1)).sum()


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
    return 0.5 * d**2 if estimator == KlEstimator.k2 else torch.exp((-d).clamp(max=20)) - 1 + d  # e^20 keeps float32 finite


def token_rewards(score: Tensor, penalty: Tensor, mask: Tensor) -> Tensor:
    """Reward of each response token: minus its penalty, and the score on the last one (Ziegler 2019, arXiv:1909.08593, eq. 2).

    Args: score (B,).  penalty (B, R), score units: beta times an estimate of the KL of the policy that sampled.  mask (B, R).
    Returns: (B, R), zero outside the mask. A row without any response token gets no reward.
    """
    length = mask.sum(1).long()
    last = torch.zeros_like(mask).scatter_(1, (length - 1).clamp(min=0)[:, None], 1.0) * mask
    return score[:, None] * last - penalty * mask


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


def preference_loss(chosen: Tensor, rejected: Tensor, beta: float, loss: DpoLoss, label_smoothing: float) -> Tensor:
    """Loss of each pair, with h = log pi/ref (chosen) - log pi/ref (rejected):

    sigmoid  -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)   DPO (Rafailov 2023, arXiv:2305.18290, eq. 7), with label smoothing e
             the conservative one (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3)
    ipo      (h - 1 / (2 beta))^2                                    IPO (Azar 2023, arXiv:2310.12036, eq. 17)

    Args: chosen, rejected (B,): log pi - log ref of the whole answers, sums over their tokens, nats.  beta: per nat.
    Returns: (B,); at the start, where pi = ref, ln 2 or 1 / (4 beta^2).
    """
    h = chosen - rejected
    if loss == DpoLoss.ipo:
        return (h - 1 / (2 * beta)) ** 2
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)


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


def token_weights(mask: Tensor, over: LossOver, tokens: float, sequences: int, longest: int) -> Tensor:
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
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate objective, negated (Schulman 2017, arXiv:1707.06347, eq. 7); with a higher upper clip as in DAPO.

    Args: logp (with gradient), old_logp, advantages, mask (B, R).  clip_low, clip_high: the ratio counts from 1 - clip_low to
        1 + clip_high.
    Returns: the loss of each token (B, R), zero outside the mask; and sums over tokens for the log: `clipfrac_low`, `clipfrac_high`
        (tokens whose clipped term is the active one, by the side), `approxkl` (0.5 (log pi - log pi_old)^2), `ratio`, `ratio_sq`;
        `ratio_max` is a maximum.
    """
    log_ratio = (logp - old_logp) * mask
    ratio = log_ratio.clamp(-20, 20).exp()  # keeps float32 finite; a policy that is e^20 away learns nothing there
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


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """Clipped value loss of each token, 0.5 max((V - G)^2, (clip(V, V_old +- eps) - G)^2) (OpenAI baselines ppo2; Stiennon 2020,
    arXiv:2009.01325). Never negative.

    Args: values (with gradient), old_values, returns, mask (B, R).  clip: score units; None: 0.5 (V - G)^2.
    Returns: the loss (B, R), zero outside the mask, and the number of tokens whose clipped term is the active one.
    """
    error = (values - returns) ** 2
    if clip is None:
        return 0.5 * error * mask, mask.new_zeros(())
    clipped = values.clamp(old_values - clip, old_values + clip)  # exactly V where the clip does not act
    clipped_error = (clipped - returns) ** 2
    return 0.5 * torch.maximum(error, clipped_error) * mask, ((clipped_error > error) * mask).sum().detach()


def repetition(ids: list[int], n: int = 3) -> float:
    """Share of an answer's n-grams that stood in it before: 0 where all differ, near 1 for a loop (Welleck 2020, arXiv:1908.04319,
    seq-rep-n). 0 for fewer than n tokens."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def best_of_n(scores: Tensor, values: Tensor, n: int) -> float:
    """The expected value of the answer with the highest score among n, without bias from N >= n answers: the i-th lowest of them is the
    highest of n with probability C(i - 1, n - 1) / C(N, n) (Nakano 2021, arXiv:2112.09332, appendix I).

    Args: scores, values (P, N): N answers to each of P prompts.  Returns: mean over the prompts.
    """
    total = scores.shape[1]
    chances = torch.tensor([math.comb(i, n - 1) / math.comb(total, n) for i in range(total)], dtype=torch.float64)
    return float((values.double().gather(1, scores.argsort(dim=1, stable=True)) * chances).sum(1).mean())


def wilson(wins: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of which `wins` of `n` were seen (ties as halves), within [0, 1] (Wilson 1927)."""
    z, p = 1.959964, wins / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(G - V) / Var(G) over the masked tokens; 0 for a constant value, negative when worse than that. NaN if Var(G) = 0."""
    error = returns - values
    residual = masked_mean((error - masked_mean(error, mask)) ** 2, mask)
    total = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    return float(1 - residual / total) if float(total) > 0 else math.nan


def learning_rate(step: int, total: int, optim: Optim) -> float:
    """Learning rate of optimizer step `step` (0-based) of `total` (PPO: of a rollout): linear warm-up, then constant, linear or
    cosine decay to `final_lr` * lr, which the last step has where the warm-up leaves it room."""
    warmup = math.ceil(optim.warmup_ratio * total) if optim.warmup_steps is None else optim.warmup_steps
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    if optim.schedule == Schedule.constant:
        return optim.lr
    decay = 1 - progress if optim.schedule == Schedule.linear else 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return optim.lr * (optim.final_lr + (1 - optim.final_lr) * decay)
