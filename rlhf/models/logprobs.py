"""Log-probabilities from hidden states without ever holding the logits of all tokens: memory does not grow with tokens x vocabulary.

A chunk of tokens at a time goes through the output layer.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.config.constants import (
    CHUNK_LOGITS,
    KEPT_PROBABILITIES,
    MAX_CHUNK_TOKENS,
    MIN_CHUNK_TOKENS,
)

LARGE = 2**20  # elements of a weight


def attach_chunked_logprobs(head: nn.Module) -> None:
    """Let an output layer, called with targets, give their log-probabilities instead of logits. It is called as the module that it is, so
    that whoever partitions its weights (ZeRO-3) sees it at work."""

    def forward(
        self: Any, hidden: Tensor, targets: Tensor | None = None, temperature: float = 1.0
    ) -> Any:
        if targets is None:
            return F.linear(hidden, self.weight, self.bias)
        return target_logp(hidden, self.weight, self.bias, targets, temperature)

    head.forward = types.MethodType(forward, head)


def target_logp(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """log softmax(hidden weight^T + bias)[target] of each token, and more of the same distribution.

    Args: hidden (N, d).  weight (V, d), bias (V,).  targets (N,) token ids.  temperature: divides the logits, in float32.
    Returns: log-probability and entropy, float32, nats, both with gradient; and 1 where the target is the likeliest token. All (N,).
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = (
            hidden.to(dtype),
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
        )
    with torch.autocast(hidden.device.type, enabled=False):
        return TargetLogp.apply(hidden, weight, bias, targets, temperature)


class TargetLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
    ) -> Any:
        logp, entropy, correct = (torch.empty(len(hidden), device=hidden.device) for _ in range(3))
        keep, kept = any(ctx.needs_input_grad[:3]), []
        size = min(MAX_CHUNK_TOKENS, max(MIN_CHUNK_TOKENS, CHUNK_LOGITS // len(weight)))
        room = KEPT_PROBABILITIES // len(weight)
        for start in range(0, len(hidden), size):
            s = slice(start, start + size)
            logits = logits_of(hidden[s], weight, bias, temperature)
            top = logits.amax(1, keepdim=True)
            logits -= top  # nothing is lost to rounding where all of them are large
            p = logits.softmax(-1)
            log_sum = -p.amax(1).log()  # of the exponentials; the likeliest one's is 1
            of_target = logits.gather(1, targets[s, None])[:, 0]
            logp[s] = of_target - log_sum
            correct[s] = (of_target == 0).float()
            entropy[s] = log_sum - logits.mul_(p).sum(1)
            if keep and s.stop <= room:
                kept.append(p)
            del logits, p  # before the next chunk's
        ctx.save_for_backward(hidden, weight, bias, targets, entropy)
        ctx.temperature, ctx.size, ctx.kept = temperature, size, kept
        ctx.mark_non_differentiable(correct)
        ctx.set_materialize_grads(False)
        return logp, entropy, correct

    @staticmethod
    def backward(ctx: Any, of_logp: Tensor | None, of_entropy: Tensor | None, _: Any) -> Any:
        hidden, weight, bias, targets, entropy = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = (
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            if ctx.needs_input_grad[1]
            else None
        )
        to_bias = (
            torch.zeros(len(weight), dtype=torch.float32, device=weight.device)
            if ctx.needs_input_grad[2]
            else None
        )
        for i, start in enumerate(range(0, len(hidden), ctx.size)):
            s = slice(start, start + ctx.size)
            if i < len(ctx.kept):
                p, ctx.kept[i] = ctx.kept[i], None
            else:
                p = logits_of(hidden[s], weight, bias, ctx.temperature).softmax(-1)
            # d log p_y / d logits = onehot_y - p;  d H / d logits = -p (log p + H)
            slope = torch.zeros_like(p[:, :1]) if of_logp is None else -of_logp[s, None]
            if of_entropy is None:
                p.mul_(slope)
            else:
                p.mul_(slope - of_entropy[s, None] * (p.clamp(min=1e-38).log() + entropy[s, None]))
            if of_logp is not None:
                p.scatter_add_(1, targets[s, None], of_logp[s, None])
            if ctx.temperature != 1:
                p /= ctx.temperature
            to_logits = p.to(weight.dtype)
            if to_hidden is not None:
                to_hidden[s] = to_logits @ weight
            if to_weight is not None and weight.dtype == torch.float32:
                to_weight.addmm_(to_logits.t(), hidden[s])
            elif to_weight is not None:
                to_weight += to_logits.t() @ hidden[s]
            if to_bias is not None:
                to_bias += p.sum(0)
            del p, to_logits
        if to_weight is not None:
            to_weight = to_weight.to(weight.dtype)
        return to_hidden, to_weight, None if to_bias is None else to_bias.to(bias.dtype), None, None


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """(tokens, V), float32, the temperature applied."""
    multiply = matmul_rows if uses_onednn(weight) else F.linear
    logits = multiply(hidden, weight, bias).float()
    return logits.div_(temperature) if temperature != 1 else logits


def uses_onednn(weight: Tensor) -> bool:
    """Whether oneDNN multiplies faster by a weight than what torch calls for it (MKL): in float32 on CPU, where it is not small."""
    return (
        weight.is_cpu
        and weight.dtype == torch.float32
        and weight.numel() >= LARGE
        and torch.backends.mkldnn.is_available()
    )


def matmul_rows(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows weight^T + bias by oneDNN, without gradient."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of the target tokens, and the entropy of the whole distribution at each position.

    Args: logits (B, R, V).  targets (B, R) token ids.  temperature: divides the logits, in float32 whatever they come in.
    Returns: logp (B, R) and entropy (B, R), float32, nats.
    """
    logits = logits.float() / temperature
    logp_all = logits.log_softmax(-1)
    entropy = -(logp_all.exp() * logp_all).sum(-1)
    return logp_all.gather(-1, targets[..., None])[..., 0], entropy
