"""Losses on preference pairs, as pure functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.config.choices import DpoLoss


def pairwise_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Sum over pairs of -log sigmoid(r_chosen - r_rejected): Bradley-Terry (Ouyang 2022, arXiv:2203.02155, eq. 1).

    Args: chosen, rejected (B,) scores. Returns: scalar, float32.
    """
    return -F.logsigmoid(chosen.float() - rejected.float()).sum()


def pairwise_loss_per_token(
    chosen: Tensor, rejected: Tensor, starts: Tensor, ends: Tensor
) -> Tensor:
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


def preference_loss(
    chosen: Tensor, rejected: Tensor, beta: float, loss: DpoLoss, label_smoothing: float
) -> Tensor:
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
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(
        -beta * h
    )
