"""A decoding step traced once and then run without Python (CPU only)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.runs.log import first_line, log
from rlhf.sampling.kv_cache import new_cache

Step = Callable[
    [Tensor, Tensor, Tensor, Any], Tensor
]  # tokens, positions (B, 1), seen (B, T), cache -> hidden states (B, d)


def traced_step(policy: Any) -> Step | None:
    """One token of every row through the model, recorded once and then run without python, which for a small model is most of the time.
    None on GPUs, where weights are partitioned, and for a model that recorded differs from itself."""
    weights = [tensors[name].detach() for tensors, name in parameter_slots(policy.hf.base_model)]
    if any(not p.is_cpu for p in weights) or any(
        hasattr(p, "ds_id") for p in policy.hf.parameters()
    ):
        return None
    if policy.recorded is None:
        policy.recorded = trace_decode_step(policy.hf)
    recorded = policy.recorded

    def step(token: Tensor, last: Tensor, seen: Tensor, cache: Any) -> Tensor:
        end = seen.shape[1]
        for layer in cache.layers:
            layer.used = end
        memory = [x for layer in cache.layers for x in layer.memory]
        return recorded(
            token,
            last,
            seen[:, None, None],
            torch.tensor([end - 1]),
            torch.tensor(end),
            *memory,
            *weights,
        )

    return step if recorded else None


def trace_decode_step(hf: Any) -> Callable[..., Tensor] | bool:
    """Tokens, positions, mask, place, end, then keys and values of every layer, then all weights -> hidden states (B, d). Called within
    fast_products. False where that fails.

    Weights are inputs: as constants of the recording, those that are equal when it is made would be taken for one.
    """
    cache, base = new_cache(hf, 8), hf.base_model
    places, n_memory = parameter_slots(base), 2 * len(cache.layers)
    own = [tensors[name] for tensors, name in places]

    def step(
        token: Tensor, last: Tensor, mask: Tensor, place: Tensor, end: Tensor, *tensors: Tensor
    ) -> Tensor:
        for i, layer in enumerate(cache.layers):
            layer.memory, layer.at, layer.used = [*tensors[2 * i : 2 * i + 2]], (place, end), 1
        inputs = {
            "input_ids": token,
            "attention_mask": mask,
            "position_ids": last,
            "past_key_values": cache,
            "use_cache": True,
        }
        for (kept, name), weight in zip(places, tensors[n_memory:]):
            kept[name] = weight
        return base(**inputs).last_hidden_state[:, -1]

    def example(rows: int, used: int, capacity: int) -> list[Tensor]:
        random = torch.Generator().manual_seed(rows)
        token = torch.randint(hf.get_input_embeddings().num_embeddings, (rows, 1), generator=random)
        mask = torch.zeros(rows, 1, 1, used + 1)
        mask[0, ..., 0] = -torch.inf
        memory = [
            torch.randn(rows, x.shape[1], capacity, x.shape[3], generator=random) for x in shapes
        ]
        weights = [
            p + 0.01 * p.abs().mean() * torch.randn(p.shape, generator=random).to(p.dtype)
            for p in own
        ]
        return [
            token,
            torch.full((rows, 1), used),
            mask,
            torch.tensor([used]),
            torch.tensor(used + 1),
            *memory,
            *weights,
        ]

    try:
        base(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
        shapes = [x for layer in cache.layers for x in layer.memory]
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # that sizes are taken for constants, which is looked at below
            recorded = torch.jit.trace(step, tuple(example(3, 5, 8)), check_trace=False)
        for rows, used, capacity in (
            (1, 9, 12),
            (4, 2, 5),
            (2, 6, 7),
        ):  # other sizes, and other weights each time
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


def parameter_slots(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where a module keeps the weights that it computes with: the dictionary that holds each, and its name there."""
    kept: list[Any] = [owner._parameters for owner in module.modules()]
    return [
        (parameters, name)
        for parameters in kept
        for name in parameters
        if parameters[name] is not None
    ]
