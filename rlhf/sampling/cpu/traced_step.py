"""A decoding step that is traced once and then runs without Python (CPU only).

torch 2.13 deprecates torch.jit.trace, but its replacements are slower here. Milliseconds per step
with 16 / 3 rows, one thread, medians of alternating runs on a busy machine: of the tiny model (0.4M
parameters) 8.6 / 14.9 eager, 5.3 / 4.0 torch.jit.trace, 6.3 / 8.1 make_fx, 9.7 / 14.3 torch.export;
of an OPT of 5.5M parameters 60 / 43, 40 / 24, 51 / 30, 65 / 38. Tracing takes 0.2 and 0.8 s with
torch.jit.trace, 4 and 10 with make_fx, 4 and 15 with torch.export. All give equal bits.
TorchInductor was not tried: it compiles C++ first, and fused operations round differently.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.base.log import first_line, log
from rlhf.models.lora import lora_layers
from rlhf.models.wrappers import Policy
from rlhf.sampling.decode_state import DecodeState, DecodeStep
from rlhf.sampling.kv_cache import new_cache

TracedFunction = Callable[..., Tensor]  # the arguments and the result of `StepProgram.run`
# By policy, and whether its adapter takes part; None where tracing failed.
traced_functions: WeakKeyDictionary[Policy, dict[bool, TracedFunction | None]] = WeakKeyDictionary()


def traced_step(policy: Policy) -> DecodeStep | None:
    """A step of a packed policy, traced at the first call; Python is most of a small model's time.

    Call it inside `fast_linear_layers` and `single_token_attention`: it traces our kernels.

    Returns: None on GPUs, where ZeRO-3 partitions the weights, and where tracing fails.
    """
    hf = policy.hf
    weights = [parameters[name].detach() for parameters, name in parameter_slots(hf.base_model)]
    partitioned = any(hasattr(p, "ds_id") for p in hf.parameters())
    if partitioned or not all(weight.is_cpu for weight in weights):
        return None
    of_policy = traced_functions.setdefault(policy, {})
    adapter_on = any(not layer.disable_adapters for _, layer in lora_layers(hf))
    if adapter_on not in of_policy:
        of_policy[adapter_on] = trace_decode_step(hf)
    traced = of_policy[adapter_on]
    if traced is None:
        return None

    def step(token: Tensor, state: DecodeState) -> Tensor:
        end = state.attention_mask.shape[1]
        for layer in state.cache.layers:
            layer.used = end
        hidden = traced(
            token,
            state.positions,
            state.attention_mask[:, None, None],
            torch.tensor([end - 1]),
            torch.tensor(end),
            *(keys_or_values for layer in state.cache.layers for keys_or_values in layer.memory),
            *weights,
        )
        return hf.get_output_embeddings()(hidden)

    return step


def trace_decode_step(hf: PreTrainedModel) -> TracedFunction | None:
    """Trace one step of the model without its output layer.

    Returns: a function as `StepProgram.run`; None if the model cannot be traced, or if the traced
        function differs from the model by more than rounding.
    """
    program = StepProgram(hf)
    try:
        program.read_first_token()
        with warnings.catch_warnings():
            # Deprecation of torch.jit.trace (see above); sizes taken as constants (checked below).
            warnings.simplefilter("ignore")
            inputs = program.example_inputs(3, 5, 8)
            traced: TracedFunction = torch.jit.trace(program.run, inputs, check_trace=False)
        for rows, used, capacity in ((1, 9, 12), (4, 2, 5), (2, 6, 7)):
            inputs = program.example_inputs(rows, used, capacity)
            actual, expected = traced(*inputs), program.run(*inputs)
            tolerance = float(expected.abs().max()) * 1e-5
            if not torch.allclose(actual, expected, rtol=0, atol=tolerance):
                return None
        return traced
    except Exception as error:  # a model's code may do anything that cannot be traced
        log.debug(f"the sampling loop runs in Python: {first_line(error)}")
        return None
    finally:
        program.restore_weights()


class StepProgram:
    """A decoding step as a function of tensors alone, which is what can be traced."""

    def __init__(self, hf: PreTrainedModel):
        self.base, self.cache = hf.base_model, new_cache(hf, capacity=8)
        self.vocabulary = hf.get_input_embeddings().num_embeddings
        self.slots = parameter_slots(self.base)
        self.weights = [parameters[name] for parameters, name in self.slots]

    def run(
        self,
        token: Tensor,
        positions: Tensor,
        mask: Tensor,
        index: Tensor,
        end: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        """One new token of each row -> its hidden states (B, d).

        Weights are inputs: a trace stores constants, and those with equal values only once.

        Args:
            token, positions: (B, 1).
            mask: (B, 1, 1, T), added to the scores.
            index, end: (1,) where the cache stores the token, = T - 1; () = T.
            tensors: keys and values of every layer, (B, heads, capacity, d), then all weights.
        """
        n_memory = 2 * len(self.cache.layers)
        for i, layer in enumerate(self.cache.layers):
            layer.memory, layer.traced_range = [*tensors[2 * i : 2 * i + 2]], (index, end)
            layer.used = 1
        for (parameters, name), weight in zip(self.slots, tensors[n_memory:]):
            parameters[name] = weight
        output = self.base(
            input_ids=token,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]

    def read_first_token(self) -> None:
        """Run the model once, so that the cache knows the shapes of keys and values."""
        ids = torch.zeros(1, 1, dtype=torch.long)
        self.base(input_ids=ids, past_key_values=self.cache, use_cache=True)
        self.memory_shapes = [x.shape for layer in self.cache.layers for x in layer.memory]

    def example_inputs(self, rows: int, used: int, capacity: int) -> tuple[Tensor, ...]:
        """Random arguments of `run`, also other weights than the model's.

        Args:
            used, capacity: tokens that are in the cache, and that fit.
        """
        random = torch.Generator().manual_seed(rows)
        token = torch.randint(self.vocabulary, (rows, 1), generator=random)
        mask = torch.zeros(rows, 1, 1, used + 1)
        mask[0, ..., 0] = -torch.inf
        memory = [
            torch.randn(rows, heads, capacity, d, generator=random)
            for _, heads, _, d in self.memory_shapes
        ]
        weights = [
            p + 0.01 * p.abs().mean() * torch.randn(p.shape, generator=random).to(p.dtype)
            for p in self.weights
        ]
        positions, index = torch.full((rows, 1), used), torch.tensor([used])
        return token, positions, mask, index, torch.tensor(used + 1), *memory, *weights

    def restore_weights(self) -> None:
        """Put the model's own weights back, which `run` replaces."""
        for (parameters, name), weight in zip(self.slots, self.weights):
            parameters[name] = weight


def parameter_slots(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where a module keeps its weights: for each the dictionary that holds it, and its name."""
    return [
        (owner._parameters, name)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None
    ]
