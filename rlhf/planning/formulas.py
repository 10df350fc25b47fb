"""Bytes of model states, activations, logits and KV cache, as formulas of a model's shape.

Counted are the tensors that DeepSpeed and the training loops hold at once. Model states are exact
(tests compare them with measured tensors); activations are what transformers' blocks save for the
backward pass, measured per family (`ACTIVATIONS`); the rest of a GPU (context, workspaces of
kernels, fragmentation) is the flat `LIBRARIES`. No torch, weights or network.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.base.constants import LOGPROB_CHUNKS
from rlhf.config.choices import Device, Precision
from rlhf.config.deployment import BYTES, built_stage, world_size
from rlhf.config.schema import Arch, Config
from rlhf.planning.shapes import ACTIVATIONS

GIB = 2**30
# CUDA context, cuBLAS and NCCL; on CPU the imported libraries (450 MiB)
LIBRARIES = {Device.gpu: 1.5 * GIB, Device.cpu: 0.5 * GIB}
# weights that DeepSpeed holds gathered at stage 3, at most (its stage3_max_live_parameters)
MAX_LIVE = 10**9
SUB_GROUP = 10**9  # weights that it updates at a time at stage 3 (its sub_group_size)
PADDED = ("bloom",)  # families whose attention needs padding


@dataclass
class Role:
    """One model in one process. All but the two counts are bytes."""

    name: str
    model: str
    parameters: int  # weights
    trained: int  # of these, trained
    weights: float
    gradients: float
    optimizer: float
    host: float  # of these bytes, in host memory

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer - self.host


def role_memory(cfg: Config, name: str, model: str, count: int, trained: int) -> Role:
    """States of one model, as DeepSpeed holds them.

    Weights are in the training precision; gradients, Adam's two moments and a copy of the weights
    in fp32 (no copy at stage 0). Stage 1 partitions the optimizer, 2 the gradients, 3 the weights.
    Source: Rajbhandari 2020, arXiv:1910.02054, section 3.

    Args:
        name: of the role ("actor").  model: its short name, for the table.
        count: number of weights.  trained: how many of them are trained.
    """
    deploy, size, world = cfg.deploy, BYTES[cfg.deploy.precision], world_size(cfg)
    zero, offload = built_stage(deploy), deploy.offload
    if not trained:
        weights = size * count / (world if zero == 3 or offload.frozen else 1)
        return Role(name, model, count, 0, weights, 0, 0, weights if offload.frozen else 0)
    weights = size * count / (world if zero == 3 else 1)
    gradients = 4 * trained / (world if zero >= 2 else 1)
    copies = 8 if zero == 0 else 12
    optimizer = copies * trained / (world if zero >= 1 else 1)
    host = (optimizer if offload.optimizer else 0) + (weights if offload.parameters else 0)
    return Role(name, model, count, trained, weights, gradients, optimizer, host)


def activations(arch: Arch, cfg: Config, rows: int, tokens: int) -> float:
    """Bytes that the blocks keep for the backward pass of `rows` sequences of `tokens` tokens.

    With gradient checkpointing: the input of each block, and all of one block.
    """
    size = 4 if cfg.deploy.precision == Precision.fp32 else 2
    of_ffn, fp32, bf16 = ACTIVATIONS[arch.family]
    per_token = of_ffn * arch.ffn + (fp32 if size == 4 else bf16) * arch.hidden
    per_token += tokens * (arch.heads * (1 if size == 4 else 3) if arch.family == "bloom" else 1)
    block = size * rows * tokens * per_token
    if cfg.deploy.activation_checkpointing:
        return arch.layers * size * rows * tokens * arch.hidden + block
    return arch.layers * block


def logits(arch: Arch, cfg: Config, rows: int, positions: int, trained: bool) -> float:
    """Bytes of the logits of (rows, positions) and of their probabilities, in fp32.

    Only one chunk exists at a time, and in training the probabilities that are kept
    (rlhf/models/logprobs.py). For the families that need padding: all tokens, and the logits in
    the training precision too.
    """
    tokens = rows * positions
    if arch.family in PADDED:
        return tokens * arch.vocab * (8 + (4 if cfg.deploy.precision == Precision.fp32 else 2))
    sizes = LOGPROB_CHUNKS[cfg.deploy.device.name]
    chunk = min(tokens, sizes.max_tokens, max(sizes.min_tokens, sizes.max_logits // arch.vocab))
    kept = min(4 * sizes.kept_probabilities, 4 * tokens * arch.vocab) if trained else 0
    return 8 * chunk * arch.vocab + kept


def kv_cache(arch: Arch, cfg: Config, rows: int, tokens: int) -> float:
    """Bytes of the keys and values of `rows` sequences of `tokens` tokens."""
    size = 4 if cfg.deploy.precision == Precision.fp32 or cfg.deploy.device == Device.cpu else 2
    return 2 * arch.layers * arch.kv_heads * arch.head_dim * rows * tokens * size
