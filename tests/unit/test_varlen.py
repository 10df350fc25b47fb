"""What GPUs get in place of buckets. Their kernel is not here: its definition is, as plain code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf.models import packing, varlen


def varlen_by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fresh: Tensor,
    whole: Tensor,
    most_fresh: int,
    most: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """varlen_attn: each sequence alone, its last query at its last key."""
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa == (groups > 1) and fresh.dtype == whole.dtype == torch.int32
    assert most_fresh == int(fresh.diff().max()) and most == int(whole.diff().max())
    outputs = []
    for (a, b), (c, d) in zip(zip(fresh, fresh[1:]), zip(whole, whole[1:])):
        q, k, v = query[a:b], key[c:d], value[c:d]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
        at = torch.arange(len(q))[:, None] + len(k) - len(q)
        seen = torch.arange(len(k)) <= at + window_size[1]
        if window_size[0] >= 0:
            seen &= torch.arange(len(k)) >= at - window_size[0]
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


# lengths of sequences, and of the prefix that all of them share
CASES = {
    "one": ([7], 0),
    "alike": ([9, 9, 9], 0),
    "other lengths": ([40, 3, 17, 1], 0),
    "a shared prefix": ([30, 25, 41], 20),
    "twice the same": ([16, 16, 12], 16),
}


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("case", CASES)
def test_varlen_attention_is_that_of_buckets(
    case: str, kv_heads: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, shared = CASES[case]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 500, (len(lengths), max(lengths)), generator=generator)
    ids[:, :shared] = ids[:1, :shared]
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    packed = packing.pack(ids, mask)
    n = packed.ids.shape[1]
    assert (n < sum(lengths)) == (shared > 0)
    heads = (4, kv_heads, kv_heads)
    qkv = tuple(torch.randn(1, h, n, 8, generator=generator).requires_grad_() for h in heads)
    expected = packing.packed_attention(qkv, packed, 0.0, 0.3, window)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_by_definition)
    found = varlen.varlen_attention(qkv, packed.varlen, 0.3, window)
    assert found.shape == expected.shape == (1, n, 4, 8)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    out = torch.randn(found.shape, generator=generator)
    for one, other in zip(
        torch.autograd.grad((found * out).sum(), qkv),
        torch.autograd.grad((expected * out).sum(), qkv),
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_only_gpus_have_the_kernel() -> None:
    q = torch.ones(1, 2, 4, 8, dtype=torch.bfloat16)
    assert not varlen.supports_varlen_attention(q, q, q)


def test_soft_capping_is_refused() -> None:
    ids = torch.ones(1, 4, dtype=torch.long)
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="soft-capping"):
        packing.attention(
            torch.nn.Module(), q, q, q, None, packed=packing.pack(ids, ids), softcap=30.0
        )
