"""The sampling loop: one token at a time for all prompts of a batch, over any causal language model of transformers with a cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rlhf import comm, unpadded
from rlhf.models import model_inputs

PREPACKED = 2**20  # elements of a weight from which on oneDNN's own layout of it is faster than any plain product
FEW = 64  # rows


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Only the first is for training: the others change the distribution that the log-probabilities are of."""

    temperature: float = 1.0  # divides the logits, > 0
    top_p: float = 1.0  # from the likeliest tokens that together have this probability
    top_k: int = 0  # from so many of the likeliest; 0 = all
    greedy: bool = False  # the likeliest
    beams: int = 1  # more: the likeliest answer that a beam search of this width finds


Answers = tuple[Tensor, Tensor, Tensor]  # ids (B, R), EOS behind the end; mask (B, R) float, 1 up to and including EOS; log-probabilities


@torch.no_grad()
def sample(
    policy: Any, prompt_ids: Tensor, prompt_mask: Tensor, draws: Tensor, eos_id: int, sampling: Sampling, synced: bool = False
) -> Answers:
    """Sample answers, by inverting the cumulative sum of the distribution at given random numbers.

    Args:
        policy: models.Policy.  prompt_ids, prompt_mask (B, P), left-padded.
        draws: (B, R) uniform in [0, 1), one per token that may be sampled.
        synced: every process takes as many forwards as the slowest: DeepSpeed talks to all of them in a forward of ZeRO-3, where
            weights are fetched, and where it compares its notes even if nothing is to be fetched.
    Returns: answers, and the log-probabilities (B, R) of the sampled tokens under the full distribution at this temperature.
    """
    hf, device = policy.hf, prompt_ids.device
    n, width = draws.shape
    ids = torch.full((n, width), eos_id, device=device)
    mask, logp = (torch.zeros((n, width), device=device) for _ in range(2))
    alive = torch.arange(n, device=device)
    draws = draws.to(device)
    cache = new_cache(hf, prompt_ids.shape[1] + width)
    plain = policy.is_plain() and isinstance(cache.layers[0], Reserved)
    seen = prompt_mask > 0  # (B, P + t) where there is a token
    last = prompt_mask.sum(1, keepdim=True) - 1  # the position of the newest token
    done = False
    with fast_products(hf):
        logits = read_prompts(hf, prompt_ids, prompt_mask, cache, plain)
        for t in range(width):
            probabilities = (logits.float() / sampling.temperature).softmax(-1)
            token = choose(probabilities, draws[alive, t : t + 1], sampling)
            if not done:
                ids[alive, t], mask[alive, t] = token[:, 0], 1.0
                logp[alive, t] = probabilities.gather(1, token)[:, 0].log()
            going = (token[:, 0] != eos_id) & (not done)
            done = not going.any()
            if t == width - 1 or (comm.all_max(float(not done), device) == 0 if synced else done):
                break
            if not going.all():  # finished rows cost nothing more; a process that only waits for others keeps one
                keep = going.nonzero()[:, 0] if not done else torch.zeros(1, dtype=torch.long, device=device)
                alive, token, seen, last = alive[keep], token[keep], seen[keep], last[keep]
                cache.batch_select_indices(keep)
            seen = torch.cat([seen, seen.new_ones(len(token), 1)], 1)
            last = last + 1
            # a mask of four dimensions is used as it is; other models make their own, and their own positions, of the plain one
            inputs = {"attention_mask": seen[:, None, None] if plain else seen.long()}
            if plain or "position_ids" in model_inputs(hf, token, seen.long()):
                inputs["position_ids"] = last
            logits = hf(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs).logits[:, -1]
    return ids, mask, logp


def read_prompts(hf: Any, ids: Tensor, mask: Tensor, cache: Any, plain: bool) -> Tensor:
    """Fill the cache with the prompts (B, P), left-padded; returns the logits of what follows them, (B, V). A prompt that is there
    several times, or begins as another one, is read once where the model takes that."""
    if not plain:
        return hf(**model_inputs(hf, ids, mask), past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    layout = unpadded.lay_out(ids, mask)
    for layer in cache.layers:
        layer.layout = layout.place
    inputs = unpadded.inputs_of(layout, hf.dtype)
    states = hf.base_model(**inputs, past_key_values=cache, use_cache=True).last_hidden_state[0]
    for layer in cache.layers:
        layer.layout = None
    return hf.get_output_embeddings()(states[layout.place[:, -1]])


def choose(probabilities: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """One token (B, 1) from each row of probabilities (B, V), by a number in [0, 1) each, draws (B, 1)."""
    last: Any = probabilities.shape[1] - 1  # which rounding must not lead past
    if sampling.greedy:
        return probabilities.argmax(-1, keepdim=True)
    if sampling.top_k or sampling.top_p < 1:
        falling, order = probabilities.double().sort(descending=True, stable=True)
        kept = falling.cumsum(-1) - falling < sampling.top_p * falling.sum(-1, keepdim=True)  # the one that reaches top_p is in
        if sampling.top_k:
            kept &= torch.arange(kept.shape[1], device=kept.device) < sampling.top_k
        probabilities = torch.zeros_like(falling).scatter(1, order, falling * kept)
        last = (probabilities > 0).cumsum(-1).argmax(-1, keepdim=True)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True).clamp(max=last)


# ------------------------------------------------------------------------------------------------------------------- transformers


@torch.no_grad()
def generate(
    policy: Any, prompt_ids: Tensor, prompt_mask: Tensor, draws: Tensor, eos_id: int, sampling: Sampling, synced: bool = False
) -> Answers:
    """As `sample`, through transformers' `generate`: rollout.engine=hf, and beam search, of which log-probabilities are zero."""
    from transformers import GenerationConfig

    hf, start, (n, width) = policy.hf, prompt_ids.shape[1], draws.shape
    logp = torch.zeros((n, width), device=prompt_ids.device)
    draws = draws.to(prompt_ids.device)

    def chosen(ids: Tensor, logits: Tensor) -> Tensor:
        """Leaves one token to choose from, the one that `sample` would choose."""
        t = ids.shape[1] - start
        probabilities = (logits.float() / sampling.temperature).softmax(-1)
        token = choose(probabilities, draws[:, t : t + 1], sampling)
        logp[:, t] = probabilities.gather(1, token)[:, 0].log()
        return torch.full_like(logits, -torch.inf).scatter(1, token, 0.0)

    settings = GenerationConfig(max_new_tokens=width, num_beams=sampling.beams, do_sample=False, eos_token_id=eos_id, pad_token_id=eos_id)
    own, hf.generation_config = hf.generation_config, settings  # else a model's own penalties would be mixed in
    try:
        by_draws = {} if sampling.beams > 1 else {"logits_processor": [chosen]}
        found = hf.generate(prompt_ids, attention_mask=prompt_mask, synced_gpus=synced, **by_draws)[:, start:]
    finally:
        hf.generation_config = own
    ids = F.pad(found, (0, width - found.shape[1]), value=eos_id)
    ended_before = ((ids == eos_id).cumsum(1) - (ids == eos_id).long()) > 0
    here = torch.arange(width, device=ids.device) < found.shape[1]
    mask = (~ended_before & here).float()
    return ids, mask, logp * mask


# ----------------------------------------------------------------------------------------------------------------- cache, products


class Reserved(DynamicLayer):
    """Keys and values of one layer, in memory that is taken once. On CPU in float32 whatever the model is in: attention of one token to
    many is several times as fast as in bf16 there (rlhf/unpadded.py reads it so)."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.used = capacity, 0
        self.layout: Tensor | None = None  # (B, P) while prompts without padding are read: where each of their tokens is in the row
        self.memory: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new, start = (key_states, value_states), self.used
        if self.layout is not None:
            spread = [x[0].transpose(0, 1)[self.layout].transpose(1, 2) for x in new]  # (1, heads, N, d) -> (B, heads, P, d)
            new = spread[0], spread[1]
        if not self.memory:
            b, heads, _, d = new[0].shape
            dtype = torch.float32 if new[0].device.type == "cpu" else new[0].dtype
            self.memory = [x.new_empty(b, heads, self.capacity, x.shape[3], dtype=dtype) for x in new]
            self.is_initialized = True
        self.used = start + new[0].shape[2]
        for memory, x in zip(self.memory, new):
            memory[:, :, start : self.used] = x
        self.keys, self.values = (memory[:, :, : self.used] for memory in self.memory)
        return (key_states, value_states) if self.layout is not None else (self.keys, self.values)

    def get_seq_length(self) -> int:
        return self.used

    def batch_select_indices(self, indices: Tensor) -> None:
        kept = [torch.empty_like(memory[: len(indices)]) for memory in self.memory]
        for memory, old in zip(kept, (self.keys, self.values)):
            memory[:, :, : self.used] = old[indices]
        self.memory = kept
        self.keys, self.values = (memory[:, :, : self.used] for memory in kept)


def new_cache(hf: Any, capacity: int) -> Any:
    """A cache for `capacity` tokens per row; of models that keep something else than all keys and values, transformers' own."""
    cache = DynamicCache(config=hf.config)
    if hf.config._attn_implementation == unpadded.ATTENTION and all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.layers = [Reserved(capacity) for _ in cache.layers]
    return cache


@contextlib.contextmanager
def fast_products(hf: Any) -> Iterator[None]:
    """Within this context the linear layers of a float32 model on CPU multiply a few rows at a time faster: weights do not change."""
    layers: list[Any] = [
        m for m in hf.modules() if type(m) is nn.Linear and m.weight.is_cpu and m.weight.dtype == torch.float32 and m.weight.numel()
    ]
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = product(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())
    try:
        yield
    finally:
        for layer, own in zip(layers, before):
            if own is None:
                del layer.forward
            else:
                layer.forward = own


def product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x W^T + b. Large weights are laid out anew for oneDNN. With small ones W x^T is up to twice as fast as x W^T for a few rows x."""
    if weight.numel() >= PREPACKED and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    column = weight.new_zeros(()) if bias is None else bias[:, None]

    def multiply(x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        if len(rows) > FEW:
            return F.linear(x, weight, bias)
        # contiguous: else attention would take its slow path
        return torch.addmm(column, weight, rows.t()).t().contiguous().view(*x.shape[:-1], len(weight))

    return multiply
