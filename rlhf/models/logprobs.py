"""Log-probabilities from hidden states without the logits of all tokens.

A chunk of tokens at a time goes through the output layer, so that memory does not grow with
tokens x vocabulary.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.base.constants import LOGPROB_CHUNKS
from rlhf.models.token_rows import active_rows

MIN_ONEDNN_WEIGHT = 2**20  # elements


def attach_chunked_logprobs(head: nn.Module) -> None:
    """Let an output layer, called with targets, return target_logp instead of logits.

    It is still called as a module, so that ZeRO-3 gathers its weights.
    """

    def forward(
        self: nn.Linear, hidden: Tensor, targets: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        if targets is None:
            return F.linear(hidden, self.weight, self.bias)
        rows = active_rows(self)
        return target_logp(hidden, self.weight, self.bias, targets, temperature, rows)

    head.forward = types.MethodType(forward, head)


def target_logp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float = 1.0,
    rows: tuple[Tensor, Tensor] | tuple[()] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """log softmax(hidden weight^T + bias)[target] of each token, and more of the distribution.

    Args:
        hidden: (N, d).
        weight, bias: (V, d) and (V,).
        targets: (N,) token ids.
        temperature: divides the logits, in float32.
        rows: token ids (k,), and rows (k, d) that replace those of the weight.
    Returns: log-probability and entropy, float32, nats, both with gradient; and 1 where the target
        is the likeliest token. (N,) each.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        rows = (rows[0], rows[1].to(dtype)) if rows else ()
    if not torch.is_grad_enabled():  # weights ask for a gradient all the same: nothing is kept
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
        rows = (rows[0], rows[1].detach()) if rows else ()
    with torch.autocast(hidden.device.type, enabled=False):
        return TargetLogp.apply(hidden, weight, bias, targets, temperature, *rows)


class TargetLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        *rows: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logp, entropy, is_argmax = (
            torch.empty(len(hidden), device=hidden.device) for _ in range(3)
        )
        needs_gradient = any(ctx.needs_input_grad)
        kept: list[Tensor | None] = []
        chunks = LOGPROB_CHUNKS["cpu" if hidden.is_cpu else "gpu"]
        size = min(chunks.max_tokens, max(chunks.min_tokens, chunks.max_logits // len(weight)))
        kept_tokens = chunks.kept_probabilities // len(weight)
        for start in range(0, len(hidden), size):
            s = slice(start, start + size)
            logits = logits_of(hidden[s], weight, bias, temperature, *rows)
            # with the largest at 0, nothing is lost to rounding where all of them are large
            logits -= logits.amax(1, keepdim=True)
            p = logits.softmax(-1)
            log_sum = -p.amax(1).log()  # of the exponentials, of which the largest is 1
            target_logits = logits.gather(1, targets[s, None])[:, 0]
            logp[s] = target_logits - log_sum
            is_argmax[s] = (target_logits == 0).float()
            entropy[s] = log_sum - logits.mul_(p).sum(1)
            if needs_gradient and s.stop <= kept_tokens:
                kept.append(p)
            del logits, p  # before those of the next chunk
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, *rows)
        ctx.temperature, ctx.size, ctx.kept = temperature, size, kept
        ctx.mark_non_differentiable(is_argmax)
        ctx.set_materialize_grads(False)
        return logp, entropy, is_argmax

    @staticmethod
    def backward(
        ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropy, *rows = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_rows = _float32_zeros(rows[1]) if rows else None
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = _float32_zeros(weight) if needs_weight else None
        grad_bias = _float32_zeros(weight[:, 0]) if needs_bias else None
        for i, start in enumerate(range(0, len(hidden), ctx.size)):
            s = slice(start, start + ctx.size)
            if i < len(ctx.kept):
                p, ctx.kept[i] = ctx.kept[i], None
            else:
                p = logits_of(hidden[s], weight, bias, ctx.temperature, *rows).softmax(-1)
            # d log p_y / d logits = onehot_y - p;  d H / d logits = -p (log p + H)
            slope = torch.zeros_like(p[:, :1]) if grad_logp is None else -grad_logp[s, None]
            if grad_entropy is None:
                p.mul_(slope)
            else:
                # no name for log p: it would stay in memory
                p.mul_(
                    slope - grad_entropy[s, None] * (p.clamp(min=1e-38).log() + entropy[s, None])
                )
            if grad_logp is not None:
                p.scatter_add_(1, targets[s, None], grad_logp[s, None])
            if ctx.temperature != 1:
                p /= ctx.temperature
            if grad_bias is not None:
                grad_bias += p.sum(0)
            grad_logits = p.to(weight.dtype)
            of_rows = grad_logits[:, rows[0]] if rows else None  # (N, k), a copy
            if of_rows is not None:
                grad_logits.index_fill_(1, rows[0], 0)
                grad_rows += of_rows.t() @ hidden[s]
            if grad_hidden is not None:
                grad_hidden[s] = grad_logits @ weight
                if of_rows is not None:
                    grad_hidden[s] += of_rows @ rows[1]
            if grad_weight is not None and weight.dtype == torch.float32:
                grad_weight.addmm_(grad_logits.t(), hidden[s])
            elif grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden[s]
            del p, grad_logits
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        of_token_rows = () if grad_rows is None else (None, grad_rows.to(rows[1].dtype))
        return grad_hidden, grad_weight, grad_bias, None, None, *of_token_rows


def _float32_zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=torch.float32, device=like.device)


def logits_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, *rows: Tensor
) -> Tensor:
    """Logits of tokens (N, V), float32, divided by the temperature. Args: rows: as target_logp."""
    if hidden.is_cuda and hidden.dtype != torch.float32:  # cuBLAS sums in float32 anyway
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        logits = logits if bias is None else logits.add_(bias)
    else:
        multiply = matmul_rows if uses_onednn(weight) else F.linear
        logits = multiply(hidden, weight, bias).float()
    if rows:
        ids, values = rows
        replaced = F.linear(hidden, values, None if bias is None else bias[ids])
        logits.index_copy_(1, ids, replaced.float())
    return logits.div_(temperature) if temperature != 1 else logits


def uses_onednn(weight: Tensor) -> bool:
    """Whether oneDNN multiplies by a weight faster than MKL, which torch calls by itself.

    It does with large weights in float32 on CPU.
    """
    return (
        weight.is_cpu
        and weight.dtype == torch.float32
        and weight.numel() >= MIN_ONEDNN_WEIGHT
        and torch.backends.mkldnn.is_available()
    )


def matmul_rows(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows weight^T + bias by oneDNN, without gradient. Shapes (N, d), (V, d), (V,)."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of the target tokens, and entropy of the distribution at each position.

    Args:
        logits: (..., V).
        targets: (...) token ids.
        temperature: divides the logits, in float32.
    Returns: two tensors (...), float32, nats: log-probability and entropy.
    """
    logits = logits.float() / temperature
    logp_all = logits.log_softmax(-1)
    entropy = -(logp_all.exp() * logp_all).sum(-1)
    return logp_all.gather(-1, targets[..., None])[..., 0], entropy
