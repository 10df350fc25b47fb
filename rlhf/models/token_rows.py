"""Trained rows: of the embedding and the output layer, only the rows of some tokens are trained.

This is peft's trainable_token_indices, and an adapter with such rows is saved in peft's format. The
computation is our own: peft's copies the whole matrix in each forward pass, leaves out the bias of
an output layer, and needs CUDA under ZeRO-3. Here the rows are a parameter of the layer itself, so
that ZeRO-3 gathers them with its weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.distributed.engine import gather_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = "trained_rows"  # the parameter's name, (k, d)


class LayerWithRows(nn.Module):
    """The type of an embedding or an output layer that has trained rows."""

    weight: nn.Parameter  # (V, d)
    bias: nn.Parameter | None
    trained_ids: Tensor  # (k,)
    trained_rows: nn.Parameter  # (k, d)
    uses_trained_rows: bool


def output_layer(hf: PreTrainedModel) -> nn.Module | None:
    """The layer that makes logits; a scorer has none."""
    return hf.get_output_embeddings() if hasattr(hf, "get_output_embeddings") else None


def train_rows(hf: PreTrainedModel, token_ids: list[int]) -> None:
    """Train the rows of some tokens in the frozen matrices; they start at their present values.

    The embedding and the output layer have rows of their own, or share them where they are tied. A
    scorer has an embedding only. A matrix that is trained in full is left alone.
    """
    embeddings, output = hf.get_input_embeddings(), output_layer(hf)
    shared: dict[int, nn.Parameter] = {}  # by the id of the matrix
    for module in (embeddings, output):
        layer = cast(LayerWithRows, module)
        if module is None or layer.weight.requires_grad:
            continue
        with gather_parameters([layer.weight]):
            ids = torch.tensor(token_ids, device=layer.weight.device)
            rows = nn.Parameter(layer.weight.detach()[ids].clone())
        layer.register_parameter(ROWS, shared.setdefault(id(layer.weight), rows))
        layer.register_buffer("trained_ids", ids, persistent=False)
        layer.register_forward_hook(replace_logits if module is output else replace_embeddings)
        layer.uses_trained_rows = True


def layers_with_rows(hf: PreTrainedModel) -> Iterator[tuple[str, LayerWithRows]]:
    """The layers that have trained rows, with their names."""
    return (
        (name, cast(LayerWithRows, module))
        for name, module in hf.named_modules()
        if ROWS in module._parameters
    )


def active_rows(layer: nn.Module) -> tuple[Tensor, Tensor] | tuple[()]:
    """Token ids (k,) and rows (k, d) that replace those of a layer's weight; or nothing."""
    if not getattr(layer, "uses_trained_rows", False):
        return ()
    layer = cast(LayerWithRows, layer)
    return layer.trained_ids, layer.trained_rows


def replace_embeddings(layer: LayerWithRows, args: tuple[Tensor], output: Tensor) -> Tensor:
    """Forward hook of an embedding: the trained rows in place of the frozen ones."""
    if not layer.uses_trained_rows:
        return output
    matches: Tensor = args[0][..., None] == layer.trained_ids  # (..., k)
    rows = F.embedding(matches.int().argmax(-1), layer.trained_rows)
    scale = torch.as_tensor(getattr(layer, "embed_scale", 1.0))  # Gemma 3 scales in this layer
    rows = rows * scale.to(rows.dtype)
    return torch.where(matches.any(-1, keepdim=True), rows.to(output.dtype), output)


def replace_logits(
    layer: LayerWithRows, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]
) -> Tensor | tuple[Tensor, ...]:
    """Forward hook of an output layer: the logits of the trained rows in place of the frozen ones.

    Log-probabilities of targets are left alone: logprobs.target_logp has used the rows already.
    """
    if not layer.uses_trained_rows or isinstance(output, tuple):
        return output
    ids = layer.trained_ids
    bias = None if layer.bias is None else layer.bias[ids]
    logits = F.linear(args[0], layer.trained_rows, bias)
    return output.index_copy_(-1, ids, logits.to(output.dtype))


def merge_rows(weight: Tensor, token_ids: Tensor, rows: Tensor) -> Tensor:
    """A copy of a matrix (V, d) with the rows (k, d) of some tokens (k,) replaced."""
    return weight.index_copy(0, token_ids, rows.to(weight.dtype))


def near_zero_rows(weight: Tensor, token_ids: Iterable[int]) -> list[int]:
    """The tokens whose rows of a matrix (V, d) are shorter than 1 % of its median row.

    Reserved tokens of some base models have such rows: no text of the pretraining had them.
    """
    with gather_parameters([weight]):
        lengths = torch.linalg.vector_norm(weight.detach(), dim=1, dtype=torch.float32)
        bound = 0.01 * lengths.median()
        return [token for token in token_ids if lengths[token] < bound]
