"""The sampling loop: one token at a time for all prompts of a batch, over any causal language model of transformers with a cache."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rlhf import comm, kernels, unpadded
from rlhf.models import model_inputs
from rlhf.track import first_line, log

FEW = 64  # rows; with more, torch's products are as fast as ours. A recorded step, made of few rows, uses ours for any number


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
    seen = prompt_mask  # (B, P + t) where there is a token
    if plain:  # a mask of four dimensions is used as it is, added to the scores
        seen = torch.where(prompt_mask > 0, 0.0, -torch.inf).to(torch.float32 if device.type == "cpu" else hf.dtype)
    one = seen.new_full((n, 1), 0 if plain else 1)
    last = prompt_mask.sum(1, keepdim=True) - 1  # the position of the newest token
    done = False
    # optimised after its first runs, a recording would round differently from then on: a resumed run would not repeat
    with fast_products(hf), torch.jit.optimized_execution(False):
        logits = read_prompts(hf, prompt_ids, prompt_mask, cache, plain)
        step = traced_step(policy) if plain else None
        for t in range(width):
            probabilities = tempered(logits, sampling).softmax(-1)
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
            seen = torch.cat([seen, one[: len(token)]], 1)
            last = last + 1
            if step:
                logits = hf.get_output_embeddings()(step(token, last, seen, cache))
                continue
            inputs = {"attention_mask": seen[:, None, None] if plain else seen}
            if plain or "position_ids" in model_inputs(hf, token, seen):
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


def tempered(logits: Tensor, sampling: Sampling) -> Tensor:
    return logits.float() if sampling.temperature == 1 else logits.float() / sampling.temperature


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
        probabilities = tempered(logits, sampling).softmax(-1)
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
        self.memory: list[Tensor] = []  # keys and values (B, heads, capacity, d)
        self.layout: Tensor | None = None  # (B, P) while prompts without padding are read: where each of their tokens is in the row
        self.at: tuple[Tensor, Tensor] | None = None  # within a trace: where a token is written, and up to where is read

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new = [key_states, value_states]
        if self.at is not None:
            place, end = self.at
            k, v = (memory.index_copy_(2, place, x.to(memory.dtype))[:, :, :end] for memory, x in zip(self.memory, new))
            return k, v
        if self.layout is not None:
            new = [x[0].transpose(0, 1)[self.layout].transpose(1, 2) for x in new]  # (1, heads, N, d) -> (B, heads, P, d)
        if not self.memory:
            b, heads, _, d = new[0].shape
            dtype = torch.float32 if new[0].device.type == "cpu" else new[0].dtype
            self.memory = [x.new_empty(b, heads, self.capacity, x.shape[3], dtype=dtype) for x in new]
            self.is_initialized = True
        start, self.used = self.used, self.used + new[0].shape[2]
        for memory, x in zip(self.memory, new):
            memory[:, :, start : self.used] = x
        k, v = (memory[:, :, : self.used] for memory in self.memory)
        return (key_states, value_states) if self.layout is not None else (k, v)

    def get_seq_length(self) -> int:
        return self.used

    def batch_select_indices(self, indices: Tensor) -> None:
        kept = [torch.empty_like(memory[: len(indices)]) for memory in self.memory]
        for memory, old in zip(kept, self.memory):
            memory[:, :, : self.used] = old[indices, :, : self.used]
        self.memory = kept


Step = Callable[[Tensor, Tensor, Tensor, Any], Tensor]  # tokens, positions (B, 1), seen (B, T), cache -> hidden states (B, d)


def traced_step(policy: Any) -> Step | None:
    """One token of every row through the model, recorded once and then run without python, which for a small model is most of the time.
    None on GPUs, where weights are partitioned, and for a model that recorded differs from itself."""
    weights = [tensors[name].detach() for tensors, name in places_of(policy.hf.base_model)]
    if any(not p.is_cpu for p in weights) or any(hasattr(p, "ds_id") for p in policy.hf.parameters()):
        return None
    if policy.recorded is None:
        policy.recorded = record(policy.hf)
    recorded = policy.recorded

    def step(token: Tensor, last: Tensor, seen: Tensor, cache: Any) -> Tensor:
        end = seen.shape[1]
        for layer in cache.layers:
            layer.used = end
        memory = [x for layer in cache.layers for x in layer.memory]
        return recorded(token, last, seen[:, None, None], torch.tensor([end - 1]), torch.tensor(end), *memory, *weights)

    return step if recorded else None


def record(hf: Any) -> Callable[..., Tensor] | bool:
    """Tokens, positions, mask, place, end, then keys and values of every layer, then all weights -> hidden states (B, d). Called within
    fast_products. False where that fails.

    Weights are inputs: as constants of the recording, those that are equal when it is made would be taken for one.
    """
    cache, base = new_cache(hf, 8), hf.base_model
    places, n_memory = places_of(base), 2 * len(cache.layers)
    own = [tensors[name] for tensors, name in places]

    def step(token: Tensor, last: Tensor, mask: Tensor, place: Tensor, end: Tensor, *tensors: Tensor) -> Tensor:
        for i, layer in enumerate(cache.layers):
            layer.memory, layer.at, layer.used = [*tensors[2 * i : 2 * i + 2]], (place, end), 1
        inputs = {"input_ids": token, "attention_mask": mask, "position_ids": last, "past_key_values": cache, "use_cache": True}
        for (kept, name), weight in zip(places, tensors[n_memory:]):
            kept[name] = weight
        return base(**inputs).last_hidden_state[:, -1]

    def example(rows: int, used: int, capacity: int) -> list[Tensor]:
        random = torch.Generator().manual_seed(rows)
        token = torch.randint(hf.get_input_embeddings().num_embeddings, (rows, 1), generator=random)
        mask = torch.zeros(rows, 1, 1, used + 1)
        mask[0, ..., 0] = -torch.inf
        memory = [torch.randn(rows, x.shape[1], capacity, x.shape[3], generator=random) for x in shapes]
        weights = [p + 0.01 * p.abs().mean() * torch.randn(p.shape, generator=random).to(p.dtype) for p in own]
        return [token, torch.full((rows, 1), used), mask, torch.tensor([used]), torch.tensor(used + 1), *memory, *weights]

    try:
        base(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
        shapes = [x for layer in cache.layers for x in layer.memory]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that sizes are taken for constants, which is looked at below
            recorded = torch.jit.trace(step, tuple(example(3, 5, 8)), check_trace=False)
        for rows, used, capacity in ((1, 9, 12), (4, 2, 5), (2, 6, 7)):  # other sizes, and other weights each time
            one, other = (f(*example(rows, used, capacity)) for f in (recorded, step))
            if not torch.allclose(one, other, rtol=0, atol=float(other.abs().max()) * 1e-5):
                return False
        return recorded
    except Exception as error:  # whatever a model's code does that cannot be recorded
        log.debug(f"the sampling loop runs in python: {first_line(error)}")
        return False
    finally:
        for (kept, name), weight in zip(places, own):
            kept[name] = weight


def places_of(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where a module keeps the weights that it computes with: the dictionary that holds each, and its name there."""
    kept: list[Any] = [owner._parameters for owner in module.modules()]
    return [(parameters, name) for parameters in kept for name in parameters if parameters[name] is not None]


def new_cache(hf: Any, capacity: int) -> Any:
    """A cache for `capacity` tokens per row; of models that keep something else than all keys and values, transformers' own."""
    cache = DynamicCache(config=hf.config)
    if hf.config._attn_implementation == unpadded.ATTENTION and all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.layers = [Reserved(capacity) for _ in cache.layers]
    return cache


@contextlib.contextmanager
def fast_products(hf: Any) -> Iterator[None]:
    """Within this context, in which there are no gradients, the linear layers of a float32 model on CPU are faster where rows are few."""
    linear: list[Any] = [m for m in hf.modules() if type(m) is nn.Linear]
    layers = [m for m in linear if m.weight.is_cpu and m.weight.dtype == torch.float32 and m.weight.is_contiguous()]
    if not layers or torch.is_autocast_enabled("cpu") or not kernels.load():  # autocast: another precision than the weights' is wanted
        layers = []
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = functools.partial(few_rows, layer)
    try:
        yield
    finally:
        for layer, own in zip(layers, before):
            if own is None:
                del layer.forward
            else:
                layer.forward = own


def few_rows(layer: Any, x: Tensor) -> Tensor:
    multiply = kernels.linear if x.numel() <= FEW * x.shape[-1] else F.linear
    return multiply(x, layer.weight, layer.bias)
