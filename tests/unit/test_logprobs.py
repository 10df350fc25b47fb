"""Log-probabilities in chunks, against the whole logits in float64."""

from __future__ import annotations

import weakref
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from helpers import some
from torch import Tensor, nn

from rlhf.base.constants import LOGPROB_CHUNKS
from rlhf.models import logprobs
from rlhf.models.logprobs import target_logp


def whole(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from all logits at once, in float64."""
    logits = (
        F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
        / temperature
    )
    logp = logits.log_softmax(-1)
    return (
        logp.gather(1, targets[:, None])[:, 0],
        -(logp.exp() * logp).sum(-1),
        (logits.argmax(-1) == targets).double(),
    )


def random(
    n: int, d: int, vocabulary: int, bias: bool, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(seed)
    weight, offset = (
        torch.randn(vocabulary, d, requires_grad=True),
        torch.randn(vocabulary, requires_grad=True) if bias else None,
    )
    return torch.randn(n, d, requires_grad=True), weight, offset, torch.randint(0, vocabulary, (n,))


CASES = [*product([(7, 11), (1200, 300), (300, 30_000)], [False, True], [1.0, 0.7], [False, True])]


@pytest.mark.parametrize(("size", "bias", "temperature", "of_entropy"), some(CASES, every=3))
def test_values_and_gradients_equal_those_of_the_whole_logits(
    size: tuple[int, int],
    bias: bool,
    temperature: float,
    of_entropy: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sizes: one chunk; several chunks; several, not all of them kept for the backward pass."""
    small = replace(LOGPROB_CHUNKS["cpu"], kept_probabilities=2**21)
    monkeypatch.setitem(LOGPROB_CHUNKS, "cpu", small)
    hidden, weight, offset, targets = random(size[0], 12, size[1], bias)
    a, b = torch.randn(2, size[0])
    found, expected = (
        target_logp(hidden, weight, offset, targets, temperature),
        whole(hidden, weight, offset, targets, temperature),
    )
    for one, other, atol in zip(found, expected, (5e-5, 5e-5, 0.0)):
        assert one.dtype == torch.float32 and torch.allclose(one.double(), other, atol=atol)
    trained = [x for x in (hidden, weight, offset) if x is not None]
    one, other = (
        torch.autograd.grad((a * x[0]).sum() + of_entropy * (b * x[1]).sum(), trained)
        for x in (found, expected)
    )
    for g, exact in zip(one, other):
        assert float((g - exact).norm()) < 3e-5 * float(exact.norm())


def test_by_hand() -> None:
    """Two tokens with logits 0 and ln 3: log-probabilities of a quarter and three quarters."""
    logp, entropy, correct = target_logp(
        torch.ones(2, 1), torch.tensor([[0.0], [1.0986123]]), None, torch.tensor([0, 1])
    )
    assert logp.tolist() == pytest.approx(
        [-1.3862944, -0.2876821]
    ) and entropy.tolist() == pytest.approx([0.5623351] * 2)
    assert correct.tolist() == [0, 1]


def test_only_the_entropy_may_be_asked_for() -> None:
    hidden, weight, _, targets = random(40, 8, 50, False)
    one, other = (
        torch.autograd.grad(f(hidden, weight, None, targets, 1.0)[1].sum(), (hidden, weight))
        for f in (target_logp, whole)
    )
    assert all(torch.allclose(a, b.float(), atol=1e-4) for a, b in zip(one, other))


def test_a_frozen_output_layer_gets_no_gradient() -> None:
    hidden, weight, _, targets = random(20, 8, 50, False)
    weight.requires_grad_(False)
    target_logp(hidden, weight, None, targets)[0].sum().backward()
    assert weight.grad is None and hidden.grad is not None


@pytest.mark.parametrize("trains", [False, True])
def test_without_a_backward_pass_no_probabilities_are_kept(
    trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, _, targets = random(1200, 8, 300, False)
    probabilities: list[weakref.ref[Tensor]] = []
    softmax = Tensor.softmax

    def recorded(logits: Tensor, dim: int) -> Tensor:
        p = softmax(logits, dim)
        probabilities.append(weakref.ref(p))
        return p

    monkeypatch.setattr(Tensor, "softmax", recorded)
    with torch.set_grad_enabled(trains):
        _ = target_logp(hidden, weight, None, targets)
    kept = [p for p in probabilities if p() is not None]
    assert len(probabilities) > 1 and len(kept) == len(probabilities) * trains


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bf16_sums_are_in_float32(autocast: bool) -> None:
    """As exact as bf16 logits allow, because their softmax is taken in float32.

    A weight gradient that summed 1,200 tokens in bf16 would have a larger error.
    """
    hidden, weight, _, targets = random(1200, 16, 300, False)
    given = [x.detach() if autocast else x.detach().bfloat16() for x in (hidden, weight)]
    h, w = (x.requires_grad_() for x in given)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logp, *_ = target_logp(h, w, None, targets)
    expected = whole(
        h.detach().bfloat16().requires_grad_(),
        w.detach().bfloat16().requires_grad_(),
        None,
        targets,
        1.0,
    )[0]
    assert logp.dtype == torch.float32 and float((logp - expected).detach().abs().mean()) < 0.02
    logp.sum().backward()
    exact = torch.autograd.grad(whole(hidden, weight, None, targets, 1.0)[0].sum(), weight)[0]
    assert w.grad is not None and w.grad.dtype == w.dtype
    assert float((w.grad.float() - exact).norm()) < 0.02 * float(exact.norm())


def test_an_output_layer_still_gives_logits() -> None:
    layer = nn.Linear(8, 50)
    hidden, targets = torch.randn(5, 8), torch.arange(5)
    before = layer(hidden)
    logprobs.attach_chunked_logprobs(layer)
    assert torch.equal(layer(hidden), before)
    assert torch.allclose(
        layer(hidden, targets, 2.0)[0],
        (before / 2).log_softmax(-1).gather(1, targets[:, None])[:, 0],
        atol=1e-6,
    )
