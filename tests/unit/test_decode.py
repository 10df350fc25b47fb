"""The sampling loop against transformers' generate, for every architecture; tests/test_rollout.py has what it samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import EOS, FAMILIES, PAD
from torch import Tensor, nn

from rlhf.config.choices import Precision
from rlhf.data.batches import pad_left, uniforms
from rlhf.models.loading import load_policy
from rlhf.models.wrappers import Policy
from rlhf.sampling.cpu import fast_path, kernels
from rlhf.sampling.cpu.fast_linear import MAX_KERNEL_ROWS, fast_linear_layers
from rlhf.sampling.hf_generate import hf_generate
from rlhf.sampling.kv_cache import PreallocatedCacheLayer, new_cache
from rlhf.sampling.sampler import sample
from rlhf.sampling.token_choice import Sampling

CPU = torch.device("cpu")
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


def load(
    base: Any, tokenizer: Any, family: str, precision: Precision = Precision.fp32, ends: bool = True
) -> Policy:
    """A random policy that likes to end: the output layer gets a bias for EOS."""
    policy = load_policy(base(family), tokenizer, precision).eval()
    head = policy.hf.get_output_embeddings()
    head.bias = nn.Parameter(torch.zeros(head.weight.shape[0], dtype=head.weight.dtype))
    head.bias.data[EOS] = 3.0 if ends else -1e4
    return policy


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_generate_token_by_token(
    base: Any, tokenizer: Any, family: str
) -> None:
    policy = load(base, tokenizer, family)
    ids, mask = pad_left(PROMPTS, PAD, CPU)
    answers, here, _ = sample(policy, ids, mask, torch.zeros(len(PROMPTS), NEW), EOS, GREEDY)
    expected = policy.hf.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    expected = expected[:, ids.shape[1] :]
    assert torch.equal(answers[:, : expected.shape[1]], expected)
    assert torch.equal(
        here[:, : expected.shape[1]],
        ((expected == EOS).cumsum(1) - (expected == EOS).long() == 0).float(),
    )
    assert expected.shape[1] == NEW or (expected == EOS).any(1).all()


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(0.7), Sampling(1.2, top_p=0.9), Sampling(top_k=20), GREEDY],
    ids=str,
)
@pytest.mark.parametrize(
    "family",
    ["opt", "llama", "bloom", *[pytest.param(f, marks=pytest.mark.full) for f in FAMILIES]],
)
def test_both_engines_sample_the_same_answers(
    base: Any, tokenizer: Any, family: str, sampling: Sampling
) -> None:
    policy = load(base, tokenizer, family)
    ids, mask = pad_left(PROMPTS, PAD, CPU)
    draws = uniforms("test", range(len(PROMPTS)), 0, 0, NEW)
    settings = policy.hf.generation_config
    native, hf = (f(policy, ids, mask, draws, EOS, sampling) for f in (sample, hf_generate))
    assert torch.equal(native[0], hf[0]) and torch.equal(native[1], hf[1])
    assert torch.allclose(native[2], hf[2], atol=1e-5)
    assert policy.hf.generation_config is settings


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_prompt_that_is_there_several_times_is_read_once(
    base: Any, tokenizer: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_path, "traced_step", lambda _: None)  # a recorded step calls no hook
    policy = load(base, tokenizer, family, ends=False)
    assert policy.supports_packing()
    read: list[int] = []
    policy.hf.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: read.append(inputs[0].numel())
    )
    prompts = [PROMPTS[0]] * 4 + [PROMPTS[2]] * 4
    ids, mask = pad_left(prompts, PAD, CPU)
    draws = uniforms("test", range(8), 0, 0, 5)
    answers, *_ = sample(policy, ids, mask, draws, EOS, Sampling())
    assert read == [len(PROMPTS[0]) + 1, 8, 8, 8, 8]  # the second prompt begins as the first
    for i in range(8):
        alone, *_ = sample(
            policy, *pad_left([prompts[i]], PAD, CPU), draws[i : i + 1], EOS, Sampling()
        )
        assert torch.equal(alone[0], answers[i])


@pytest.mark.parametrize("family", ["opt", "llama", "bloom"])
def test_finished_rows_cost_nothing(
    base: Any, tokenizer: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_path, "traced_step", lambda _: None)
    policy = load(base, tokenizer, family)
    rows: list[int] = []
    policy.hf.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: rows.append(inputs[0].shape[0])
    )
    policy.supports_packing()
    rows.clear()
    ids, mask = pad_left(PROMPTS * 4, PAD, CPU)
    _, here, _ = sample(
        policy, ids, mask, uniforms("test", range(len(ids)), 0, 3, NEW), EOS, Sampling()
    )
    going = [int(n) for n in here.sum(0)]  # answers that have a token here
    assert rows[1:] == [n for n in going[1:] if n] and len(set(rows[1:])) > 3


RECORDED = ["opt", "gpt2", "gpt_neox", "llama", "qwen2"]


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16], ids=lambda p: p.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_recorded_step_is_the_model_whatever_its_weights_become(
    base: Any, tokenizer: Any, family: str, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that change in place, as an optimizer does it, and weights that are put elsewhere."""
    policy = load(base, tokenizer, family, precision)
    ids, mask = pad_left(PROMPTS, PAD, CPU)
    draws = uniforms("test", range(len(PROMPTS)), 0, 0, NEW)
    with torch.no_grad():
        for p in policy.parameters():  # norms of ones and biases of zeros, which are alike at first
            if p.dim() == 1:
                p.copy_(
                    torch.ones_like(p)
                    if float(p.detach().float().mean()) > 0.5
                    else torch.zeros_like(p)
                )
    for change in (
        lambda p: p,
        lambda p: p.add_(0.05 * torch.randn_like(p)),
        lambda p: setattr(p, "data", p.data + 0.02),
    ):
        with torch.no_grad():
            for p in policy.parameters():
                change(p)
        recorded = sample(policy, ids, mask, draws, EOS, Sampling())
        assert bool(policy.recorded) == (family in RECORDED)
        with monkeypatch.context() as without:
            without.setattr(fast_path, "traced_step", lambda _: None)
            plain = sample(policy, ids, mask, draws, EOS, Sampling())
        if precision is Precision.fp32:
            assert torch.equal(recorded[0], plain[0]) and torch.allclose(
                recorded[2], plain[2], atol=1e-5
            )
        else:  # its sums are rounded at other places, and then other tokens drawn
            assert torch.allclose(recorded[2][:, 0], plain[2][:, 0], atol=0.1)


def test_what_cannot_be_recorded_runs_in_python(
    base: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model's code may ask for what a recording does not know, or do something else the next time."""
    ids, mask = pad_left(PROMPTS, PAD, CPU)
    draws = uniforms("test", range(len(PROMPTS)), 0, 0, NEW)
    expected = sample(load(base, tokenizer, "llama"), ids, mask, draws, EOS, Sampling())
    for odd in ("fails", "differs"):
        policy = load(base, tokenizer, "llama")
        layer = policy.hf.base_model.layers[0].mlp
        inner = layer.forward

        def forward(x: Tensor, odd: str = odd, inner: Any = inner) -> Tensor:
            if torch.jit.is_tracing():
                if odd == "fails":
                    raise NotImplementedError("not while it is recorded")
                return inner(x) * 1.01
            return inner(x)

        layer.forward = forward
        found = sample(policy, ids, mask, draws, EOS, Sampling())
        assert policy.recorded is False and torch.equal(found[0], expected[0])


def test_in_bf16_the_cache_is_in_float32_and_answers_are_those_of_the_model(
    base: Any, tokenizer: Any
) -> None:
    policy = load(base, tokenizer, "llama", Precision.bf16, ends=False)
    ids, mask = pad_left(PROMPTS, PAD, CPU)
    answers, here, logp = sample(
        policy, ids, mask, uniforms("test", range(len(PROMPTS)), 0, 0, NEW), EOS, Sampling()
    )
    assert policy.can_pack
    full, seen = torch.cat([ids, answers], 1), torch.cat([mask, here.long()], 1)
    again = policy(full, seen, torch.cat([torch.zeros_like(mask), here], 1) > 0)[0][
        :, ids.shape[1] :
    ]
    assert float((again - logp).detach().abs().mean()) < 0.02
    cache = new_cache(policy.hf, 8)
    k = torch.randn(2, 1, 3, 16, dtype=torch.bfloat16)
    assert cache.update(k, k, 0)[0].dtype == torch.float32


@pytest.mark.parametrize("rows", [1, 16, MAX_KERNEL_ROWS, MAX_KERNEL_ROWS + 1])
@pytest.mark.parametrize("bias", [False, True])
def test_products_equal_those_of_a_linear_layer(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, bias=bias)
    own = layer.forward
    with torch.no_grad(), fast_linear_layers(nn.Sequential(layer)):
        assert (layer.forward != own) == kernels.load()
        for shape in ((rows, 64), (rows, 1, 64), (1, rows, 64)):
            x = torch.randn(shape)
            found = layer(x)
            assert found.shape == (*shape[:-1], 48)
            assert torch.allclose(found, F.linear(x, layer.weight, layer.bias), atol=1e-5)
    assert layer.forward == own and "forward" not in vars(layer)


@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_autocast_is_what_the_products_are_in(base: Any, tokenizer: Any, family: str) -> None:
    """Weights in float32 that are to be multiplied in bf16 are no case for our kernels, which are for float32."""
    policy = load(base, tokenizer, family)
    ids, mask = pad_left(PROMPTS[1:4], PAD, CPU)
    draws = uniforms("test", range(3), 0, 0, NEW)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with fast_linear_layers(policy.hf):
            assert policy.hf.base_model.get_input_embeddings().weight.dtype == torch.float32
            layer = next(m for m in policy.hf.base_model.modules() if type(m) is nn.Linear)
            assert layer(torch.randn(2, layer.in_features)).dtype == torch.bfloat16
        answers, here, logp = sample(policy, ids, mask, draws, EOS, Sampling())
    exact, *_ = sample(policy, ids, mask, draws, EOS, Sampling())
    assert bool(here[:, 0].all()) and logp.isfinite().all() and answers.shape == exact.shape


def test_without_a_compiler_answers_are_the_same(
    base: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, mask = pad_left(PROMPTS, PAD, CPU)
    draws = uniforms("test", range(len(PROMPTS)), 0, 0, NEW)
    with_ours = sample(load(base, tokenizer, "llama"), ids, mask, draws, EOS, Sampling())
    monkeypatch.setattr(kernels, "load", lambda: False)
    policy = load(base, tokenizer, "llama")
    with fast_linear_layers(policy.hf):
        assert not any(
            "forward" in vars(m)
            for m in policy.hf.modules()
            if type(m) is nn.Linear and m is not policy.hf.lm_head
        )
    without = sample(policy, ids, mask, draws, EOS, Sampling())
    assert torch.equal(with_ours[0], without[0]) and torch.allclose(
        with_ours[2], without[2], atol=1e-5
    )
    assert policy.recorded, "recorded all the same"


def test_products_leave_what_they_do_not_know(base: Any, tokenizer: Any) -> None:
    """An output layer that gives log-probabilities does so again afterwards, also when sampling fails."""
    policy = load_policy(base("opt"), tokenizer, Precision.fp32)
    head = policy.hf.get_output_embeddings()
    before = head.forward
    with pytest.raises(RuntimeError, match="stop"), fast_linear_layers(policy.hf):
        assert (head.forward != before) == kernels.load()
        raise RuntimeError("stop")
    assert head.forward == before
    half = load_policy(base("opt"), tokenizer, Precision.bf16)
    with fast_linear_layers(half.hf):
        assert not any(
            "forward" in vars(m)
            for m in half.hf.modules()
            if type(m) is nn.Linear and m is not half.hf.get_output_embeddings()
        )


def test_a_cache_keeps_what_it_was_given() -> None:
    """Rows of a batch that are taken out, and prompts without padding that are spread over it."""
    layer = PreallocatedCacheLayer(9)
    random = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    flat = some(1, 2, 5, 3)
    layer.layout = torch.tensor([[0, 0, 1], [2, 3, 4], [0, 0, 0]])
    k, _ = layer.update(flat, flat + 1)
    assert k is flat and layer.get_seq_length() == 3
    layer.layout = None
    expected = torch.stack([flat[0][:, row] for row in ([0, 0, 1], [2, 3, 4], [0, 0, 0])])
    new = some(3, 2, 1, 3)
    k, v = layer.update(new, new - 1)
    assert torch.equal(k, torch.cat([expected, new], 2)) and torch.equal(
        v, torch.cat([expected + 1, new - 1], 2)
    )
    layer.batch_select_indices(torch.tensor([2, 0]))
    last = some(2, 2, 1, 3)
    k, v = layer.update(last, last)
    assert (
        torch.equal(k, torch.cat([torch.cat([expected, new], 2)[[2, 0]], last], 2))
        and layer.get_seq_length() == 5
    )
