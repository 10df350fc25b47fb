"""The sampling loop against transformers' generate, for every architecture.

tests/unit/test_sampler.py checks what it samples.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import EOS, FAMILIES, PAD
from helpers import some
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.config.choices import Precision
from rlhf.data.batches import pad_left, uniforms
from rlhf.models.loading import load_policy
from rlhf.models.wrappers import Policy
from rlhf.sampling.batches import PromptBatch
from rlhf.sampling.cpu import fast_path, kernels
from rlhf.sampling.cpu.fast_linear import MAX_KERNEL_ROWS, fast_linear_layers
from rlhf.sampling.cpu.traced_step import traced_functions
from rlhf.sampling.hf_generate import hf_generate
from rlhf.sampling.kv_cache import PreallocatedCacheLayer, new_cache
from rlhf.sampling.sampler import sample
from rlhf.sampling.token_choice import Sampling

BEGINNING = list(range(20, 32))
PROMPTS = [
    [*BEGINNING, 40, 41],
    [8],
    [*BEGINNING, 300],
    [9, 10, 11, 12],
    [*BEGINNING, 40, 41],
    [30, 31, 32, 33, 34, 35, 36, 37, 38],
]
NEW = 20
GREEDY = Sampling(greedy=True)


def batch_of(prompts: list[list[int]]) -> PromptBatch:
    return PromptBatch(*pad_left(prompts, PAD))


def noise_for(prompts: list[list[int]], step: int = 0, n: int = NEW) -> Tensor:
    return uniforms("test", range(len(prompts)), 0, step, n)


def load(
    base: Any,
    tokenizer: PreTrainedTokenizerBase,
    family: str,
    precision: Precision = Precision.fp32,
    ends: bool = True,
) -> Policy:
    """A random policy that often samples EOS: the output layer gets a bias for it."""
    policy = load_policy(base(family), tokenizer, precision).eval()
    head = policy.hf.get_output_embeddings()
    head.bias = nn.Parameter(torch.zeros(head.weight.shape[0], dtype=head.weight.dtype))
    head.bias.data[EOS] = 3.0 if ends else -1e4
    return policy


def without_tracing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fast_path, "traced_step", lambda _: None)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_responses_equal_those_of_generate_token_by_token(
    base: Any, tokenizer: PreTrainedTokenizerBase, family: str
) -> None:
    policy, prompts = load(base, tokenizer, family), batch_of(PROMPTS)
    responses = sample(policy, prompts, torch.zeros(len(PROMPTS), NEW), EOS, GREEDY)
    expected = policy.hf.generate(
        prompts.ids,
        attention_mask=prompts.mask,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    expected = expected[:, prompts.ids.shape[1] :]
    n, is_eos = expected.shape[1], expected == EOS
    assert torch.equal(responses.ids[:, :n], expected)
    assert torch.equal(responses.mask[:, :n], (is_eos.cumsum(1) - is_eos.long() == 0).float())
    assert n == NEW or is_eos.any(1).all()


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(0.7), Sampling(1.2, top_p=0.9), Sampling(top_k=20), GREEDY],
    ids=str,
)
@pytest.mark.parametrize(
    "family",
    ["opt", "llama", "bloom", *[pytest.param(f, marks=pytest.mark.full) for f in FAMILIES]],
)
def test_both_engines_sample_the_same_responses(
    base: Any, tokenizer: PreTrainedTokenizerBase, family: str, sampling: Sampling
) -> None:
    policy = load(base, tokenizer, family)
    settings = policy.hf.generation_config
    native, hf = (
        engine(policy, batch_of(PROMPTS), noise_for(PROMPTS), EOS, sampling)
        for engine in (sample, hf_generate)
    )
    assert torch.equal(native.ids, hf.ids) and torch.equal(native.mask, hf.mask)
    assert torch.allclose(native.logprobs, hf.logprobs, atol=1e-5)
    assert policy.hf.generation_config is settings


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_identical_prompts_and_shared_beginnings_are_read_once(
    base: Any,
    tokenizer: PreTrainedTokenizerBase,
    family: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_tracing(monkeypatch)  # a traced step calls no hook
    policy = load(base, tokenizer, family, ends=False)
    assert policy.supports_packing()
    n_tokens: list[int] = []
    policy.hf.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: n_tokens.append(inputs[0].numel())
    )
    prompts = [PROMPTS[0]] * 4 + [PROMPTS[2]] * 4
    noise = noise_for(prompts, n=5)
    together = sample(policy, batch_of(prompts), noise, EOS, Sampling())
    # the second prompt shares all but its last token with the first
    assert n_tokens == [len(PROMPTS[0]) + 1, 8, 8, 8, 8]
    for i in range(8):
        alone = sample(policy, batch_of([prompts[i]]), noise[i : i + 1], EOS, Sampling())
        assert torch.equal(alone.ids[0], together.ids[i])


@pytest.mark.parametrize("family", ["opt", "llama", "bloom"])
def test_finished_rows_cost_no_forward(
    base: Any,
    tokenizer: PreTrainedTokenizerBase,
    family: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_tracing(monkeypatch)
    policy = load(base, tokenizer, family)
    n_rows: list[int] = []
    policy.hf.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: n_rows.append(inputs[0].shape[0])
    )
    policy.supports_packing()
    n_rows.clear()
    prompts = PROMPTS * 4
    responses = sample(policy, batch_of(prompts), noise_for(prompts, 3), EOS, Sampling())
    unfinished = [int(n) for n in responses.mask.sum(0)]  # responses with a token at each place
    assert n_rows[1:] == [n for n in unfinished[1:] if n] and len(set(n_rows[1:])) > 3


TRACEABLE = ["opt", "gpt2", "gpt_neox", "llama", "qwen2"]


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16], ids=lambda p: p.name)
@pytest.mark.parametrize("family", some(FAMILIES, every=3))
def test_a_traced_step_follows_the_model_when_its_weights_change(
    base: Any,
    tokenizer: PreTrainedTokenizerBase,
    family: str,
    precision: Precision,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights that change in place, as by an optimizer, and weights that move to other memory."""
    policy, noise = load(base, tokenizer, family, precision), noise_for(PROMPTS)
    with torch.no_grad():
        # norms of ones and biases of zeros: equal values while the step is traced
        for p in policy.parameters():
            if p.dim() == 1:
                is_norm = float(p.detach().float().mean()) > 0.5
                p.copy_(torch.ones_like(p) if is_norm else torch.zeros_like(p))
    for change in (
        lambda p: p,
        lambda p: p.add_(0.05 * torch.randn_like(p)),
        lambda p: setattr(p, "data", p.data + 0.02),
    ):
        with torch.no_grad():
            for p in policy.parameters():
                change(p)
        traced = sample(policy, batch_of(PROMPTS), noise, EOS, Sampling())
        step = traced_functions.get(policy, {}).get(False)
        assert (step is not None) == (family in TRACEABLE)
        with monkeypatch.context() as patch:
            without_tracing(patch)
            eager = sample(policy, batch_of(PROMPTS), noise, EOS, Sampling())
        if precision is Precision.fp32:
            assert torch.equal(traced.ids, eager.ids)
            assert torch.allclose(traced.logprobs, eager.logprobs, atol=1e-5)
        else:  # the two round differently, and then other tokens are sampled
            first, expected = traced.logprobs[:, 0], eager.logprobs[:, 0]
            assert torch.allclose(first, expected, atol=0.1)


@pytest.mark.parametrize("obstacle", ["fails", "differs"])
def test_a_model_that_cannot_be_traced_runs_eagerly(
    base: Any, tokenizer: PreTrainedTokenizerBase, obstacle: str
) -> None:
    """A model's code may use what a trace does not support, or compute something else in it."""
    prompts, noise = batch_of(PROMPTS), noise_for(PROMPTS)
    expected = sample(load(base, tokenizer, "llama"), prompts, noise, EOS, Sampling())
    policy = load(base, tokenizer, "llama")
    layer = policy.hf.base_model.layers[0].mlp
    original = layer.forward

    def forward(x: Tensor) -> Tensor:
        if not torch.jit.is_tracing():
            return original(x)
        if obstacle == "fails":
            raise NotImplementedError("not while it is traced")
        return original(x) * 1.01

    layer.forward = forward
    responses = sample(policy, prompts, noise, EOS, Sampling())
    assert traced_functions[policy] == {False: None}
    assert torch.equal(responses.ids, expected.ids)


def test_in_bf16_the_cache_is_float32_and_log_probabilities_are_those_of_the_model(
    base: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    policy = load(base, tokenizer, "llama", Precision.bf16, ends=False)
    prompts = batch_of(PROMPTS)
    responses = sample(policy, prompts, noise_for(PROMPTS), EOS, Sampling())
    assert policy.supports_packing()
    ids = torch.cat([prompts.ids, responses.ids], 1)
    mask = torch.cat([prompts.mask, responses.mask.long()], 1)
    target_mask = torch.cat([torch.zeros_like(prompts.mask), responses.mask], 1) > 0
    logprobs = policy(ids, mask, target_mask)[0][:, prompts.ids.shape[1] :]
    assert float((logprobs - responses.logprobs).detach().abs().mean()) < 0.02
    cache = new_cache(policy.hf, 8)
    k = torch.randn(2, 1, 3, 16, dtype=torch.bfloat16)
    assert cache.update(k, k, 0)[0].dtype == torch.float32


@pytest.mark.parametrize("rows", [1, 16, MAX_KERNEL_ROWS, MAX_KERNEL_ROWS + 1])
@pytest.mark.parametrize("bias", [False, True])
def test_fast_linear_layers_equal_torchs(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, bias=bias)
    original = layer.forward
    with torch.no_grad(), fast_linear_layers(nn.Sequential(layer)):
        assert (layer.forward != original) == kernels.load()
        for shape in ((rows, 64), (rows, 1, 64), (1, rows, 64)):
            x = torch.randn(shape)
            y = layer(x)
            assert y.shape == (*shape[:-1], 48)
            assert torch.allclose(y, F.linear(x, layer.weight, layer.bias), atol=1e-5)
    assert layer.forward == original and "forward" not in vars(layer)


@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_under_autocast_linear_layers_compute_in_its_precision(
    base: Any, tokenizer: PreTrainedTokenizerBase, family: str
) -> None:
    """Our kernels are for float32; autocast multiplies float32 weights in bf16."""
    policy, prompts, noise = load(base, tokenizer, family), PROMPTS[1:4], noise_for(PROMPTS[1:4])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with fast_linear_layers(policy.hf):
            assert policy.hf.base_model.get_input_embeddings().weight.dtype == torch.float32
            layer = next(m for m in policy.hf.base_model.modules() if type(m) is nn.Linear)
            assert layer(torch.randn(2, layer.in_features)).dtype == torch.bfloat16
        responses = sample(policy, batch_of(prompts), noise, EOS, Sampling())
    in_float32 = sample(policy, batch_of(prompts), noise, EOS, Sampling())
    assert bool(responses.mask[:, 0].all()) and responses.logprobs.isfinite().all()
    assert responses.ids.shape == in_float32.ids.shape


def replaced_layers(policy: Policy) -> list[nn.Module]:
    """Linear layers with a forward of their own, except the output layer, which has one anyway."""
    head = policy.hf.get_output_embeddings()
    linear = [m for m in policy.hf.modules() if type(m) is nn.Linear and m is not head]
    return [layer for layer in linear if "forward" in vars(layer)]


def test_without_a_compiler_responses_are_the_same(
    base: Any, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, noise = batch_of(PROMPTS), noise_for(PROMPTS)
    with_kernels = sample(load(base, tokenizer, "llama"), prompts, noise, EOS, Sampling())
    monkeypatch.setattr(kernels, "load", lambda: False)
    policy = load(base, tokenizer, "llama")
    with fast_linear_layers(policy.hf):
        assert not replaced_layers(policy)
    without = sample(policy, prompts, noise, EOS, Sampling())
    assert torch.equal(with_kernels.ids, without.ids)
    assert torch.allclose(with_kernels.logprobs, without.logprobs, atol=1e-5)
    assert traced_functions[policy][False] is not None, "the step is traced all the same"


def test_fast_linear_layers_restore_what_they_replace(
    base: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The output layer computes log-probabilities again afterwards, also when sampling fails."""
    policy = load_policy(base("opt"), tokenizer, Precision.fp32)
    head = policy.hf.get_output_embeddings()
    before = head.forward
    with pytest.raises(RuntimeError, match="stop"), fast_linear_layers(policy.hf):
        assert (head.forward != before) == kernels.load()
        raise RuntimeError("stop")
    assert head.forward == before
    half = load_policy(base("opt"), tokenizer, Precision.bf16)
    with fast_linear_layers(half.hf):
        assert not replaced_layers(half)


def test_the_cache_returns_what_was_stored() -> None:
    """With rows that are dropped, and with packed prompts that are spread over its rows."""
    layer = PreallocatedCacheLayer(9)
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    packed = normal(1, 2, 5, 3)
    layer.gather_index = torch.tensor([[0, 0, 1], [2, 3, 4], [0, 0, 0]])
    k, _ = layer.update(packed, packed + 1)
    assert k is packed and layer.get_seq_length() == 3
    expected = torch.stack([packed[0][:, row] for row in layer.gather_index])
    layer.gather_index = None
    new = normal(3, 2, 1, 3)
    k, v = layer.update(new, new - 1)
    assert torch.equal(k, torch.cat([expected, new], 2))
    assert torch.equal(v, torch.cat([expected + 1, new - 1], 2))
    layer.batch_select_indices(torch.tensor([2, 0]))
    last = normal(2, 2, 1, 3)
    k, v = layer.update(last, last)
    assert torch.equal(k, torch.cat([torch.cat([expected, new], 2)[[2, 0]], last], 2))
    assert layer.get_seq_length() == 5
