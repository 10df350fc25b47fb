"""Log-probabilities and entropies of tokens, against plain loops and numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch
from formulas import SEEDS, normal, shape_of

from rlhf.models.logprobs import token_logprobs


@pytest.mark.parametrize("seed", SEEDS)
def test_token_logp_and_entropy_equal_loops(seed: int) -> None:
    generator, b, r = shape_of(seed)
    v = 2 + seed
    logits, targets = (
        normal(generator, b, r, v, scale=3),
        torch.randint(0, v, (b, r), generator=generator),
    )
    logp, entropy = token_logprobs(logits, targets)
    for i in range(b):
        for j in range(r):
            weights = [math.exp(x) for x in logits[i, j].tolist()]
            p = [w / sum(weights) for w in weights]
            assert logp[i, j].item() == pytest.approx(math.log(p[targets[i, j]]), abs=1e-5)
            assert entropy[i, j].item() == pytest.approx(-sum(x * math.log(x) for x in p), abs=1e-5)


def test_token_logp_by_hand() -> None:
    # weights 1, 2, 1 of 4: probabilities 1/4, 1/2, 1/4
    logp, entropy = token_logprobs(torch.tensor([[[0.0, math.log(2), 0.0]]]), torch.tensor([[1]]))
    assert logp.item() == pytest.approx(-0.693147, abs=1e-6)
    assert entropy.item() == pytest.approx(1.039721, abs=1e-6)  # 1.5 log 2
    _, uniform = token_logprobs(torch.zeros(1, 1, 8), torch.tensor([[3]]))
    assert uniform.item() == pytest.approx(math.log(8), abs=1e-6)


def test_token_logp_is_float32_and_finite_for_extreme_logits() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], dtype=torch.bfloat16)
    logp, entropy = token_logprobs(logits, torch.tensor([[0]]))
    assert logp.dtype == entropy.dtype == torch.float32
    assert logp.item() == 0.0 and entropy.item() == 0.0


def test_probabilities_of_all_targets_sum_to_one() -> None:
    logits = normal(torch.Generator().manual_seed(1), 1, 1, 11).expand(1, 11, 11)
    logp, _ = token_logprobs(logits, torch.arange(11)[None])
    assert logp.exp().sum().item() == pytest.approx(1.0, abs=1e-6)
