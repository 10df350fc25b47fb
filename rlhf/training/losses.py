"""Losses on preference pairs, as pure functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.config.choices import DpoLoss


def pairwise_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Sum over pairs of -log sigmoid(r_chosen - r_rejected).

    Bradley-Terry (Ouyang 2022, arXiv:2203.02155, eq. 1).

    Args: chosen, rejected (B,) scores. Returns: scalar, float32.
    """
    return -F.logsigmoid(chosen.float() - rejected.float()).sum()


def pairwise_loss_per_token(
    chosen: Tensor, rejected: Tensor, starts: Tensor, ends: Tensor
) -> Tensor:
    """DeepSpeed-Chat's loss of the reward model (dschat/utils/model/reward_model.py).

    The sum over pairs of the mean over positions starts <= t < ends of
    -log sigmoid(r_chosen,t - r_rejected,t). It is here for comparison.

    Args:
        chosen, rejected: (B, T) scores at all tokens of the right-padded rows.
        starts: (B,) first position where the two differ; the last one where they do not.
        ends: (B,) position behind the last token of the longer one.
    Returns: scalar, float32.
    """
    position = torch.arange(chosen.shape[1], device=chosen.device)
    compared = ((position >= starts[:, None]) & (position < ends[:, None])).float()
    losses = -F.logsigmoid(chosen.float() - rejected.float()) * compared
    return (losses.sum(1) / compared.sum(1)).sum()


def preference_loss(
    chosen: Tensor, rejected: Tensor, beta: float, loss: DpoLoss, label_smoothing: float
) -> Tensor:
    """Loss of each pair, with h = log pi/ref (chosen) - log pi/ref (rejected).

    sigmoid: DPO (Rafailov 2023, arXiv:2305.18290, eq. 7), with label smoothing e the conservative
        one (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3):
        -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)
    ipo: IPO (Azar 2023, arXiv:2310.12036, eq. 17): (h - 1 / (2 beta))^2

    Args:
        chosen, rejected: (B,) log pi - log ref of the responses, sums over their tokens, nats.
        beta: per nat.
    Returns: (B,); at the start, where pi = ref, ln 2 or 1 / (4 beta^2).
    """
    h = chosen - rejected
    if loss == DpoLoss.ipo:
        return (h - 1 / (2 * beta)) ** 2
    right, wrong = F.logsigmoid(beta * h), F.logsigmoid(-beta * h)
    return -(1 - label_smoothing) * right - label_smoothing * wrong
