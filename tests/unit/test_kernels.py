"""Our kernels for CPUs against float64 and by hand, and what happens where they cannot be built."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.sampling.cpu import kernels
from rlhf.sampling.cpu.attention import is_single_token_decode

pytestmark = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "c++")),
    reason="no C++ compiler: torch's kernels are used",
)


@pytest.fixture(autouse=True, scope="module")
def built() -> None:
    assert kernels.load(), "there is a compiler, and it does not take kernels.cpp"


def test_by_hand() -> None:
    """A product of two rows, and attention to two tokens.

    Their scores are 0 and ln 3, so their values count a quarter and three quarters.
    """
    x, w = (
        torch.tensor([[1.0, 2.0], [0.0, -1.0]]),
        torch.tensor([[3.0, 4.0], [5.0, 6.0], [0.5, 0.0]]),
    )
    assert kernels.linear(x, w, torch.tensor([10.0, 20.0, 30.0])).tolist() == [
        [21.0, 37.0, 30.5],
        [6.0, 14.0, 30.0],
    ]
    q, k, v = torch.tensor([2.0]), torch.tensor([0.0, 1.0, 9.0]), torch.tensor([4.0, 8.0, 1e6])
    mask = torch.tensor([0.0, 0.0, -torch.inf])
    found = kernels.attend(
        q.view(1, 1, 1, 1),
        k.view(1, 1, 3, 1),
        v.view(1, 1, 3, 1),
        mask.view(1, 1, 1, 3),
        torch.tensor(3.0).log().item() / 2,
    )
    assert found.shape == (1, 1, 1, 1) and found.item() == pytest.approx(7.0, abs=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [
        (1, 1, 1),
        (1, 64, 48),
        (8, 257, 5),
        (16, 256, 1000),
        (17, 33, 7),
        (64, 250, 77),
        (5, 1024, 1024),
    ],
)
def test_linear_is_exact(rows: int, inputs: int, outputs: int, bias: bool) -> None:
    """The error is at most that of adding the products one by one, on every processor.

    Torch's own error is no bound: it is smaller where vectors are longer. Some shapes fill vectors,
    blocks of columns and partial sums; others do not.
    """
    torch.manual_seed(0)
    x, w, b = (
        torch.randn(rows, inputs),
        torch.randn(outputs, inputs),
        torch.randn(outputs) if bias else None,
    )
    exact = F.linear(x.double(), w.double(), None if b is None else b.double())
    one_by_one = torch.zeros(rows, outputs)
    for i in range(inputs):
        one_by_one += x[:, i : i + 1] * w[:, i]
    one_by_one += 0 if b is None else b
    found = kernels.linear(x, w, b)
    error, bound = ((y - exact).square().mean().sqrt() for y in (found, one_by_one))
    assert found.dtype == torch.float32
    assert error <= 1.2 * bound + 1e-7 * float(exact.abs().mean())
    assert torch.equal(kernels.linear(x.view(rows, 1, inputs), w, b), found.view(rows, 1, outputs))
    assert torch.equal(kernels.linear(x.t().contiguous().t(), w, b), found), (
        "rows that do not lie one behind the other"
    )


def test_a_row_does_not_depend_on_where_it_is_computed() -> None:
    """No bit depends on the batch's other rows, the threads or the address of the weights.

    A resumed run therefore repeats.
    """
    torch.manual_seed(0)
    x, w = torch.randn(19, 300), torch.randn(500, 300)
    expected = kernels.linear(x, w, None)
    memory = torch.empty(w.numel() + 1)
    memory[1:] = w.flatten()
    assert torch.equal(kernels.linear(x, memory[1:].view_as(w), None), expected)
    q, k, v, mask = (
        torch.randn(19, 4, 1, 24),
        torch.randn(19, 2, 50, 24),
        torch.randn(19, 2, 50, 24),
        torch.zeros(19, 1, 1, 50),
    )
    answers = kernels.attend(q, k, v, mask, 0.2)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(kernels.linear(x, w, None), expected)
            for i in (0, 7, 18):
                assert torch.equal(kernels.linear(x[i : i + 1], w, None)[0], expected[i])
                alone = kernels.attend(
                    q[i : i + 1], k[i : i + 1], v[i : i + 1], mask[i : i + 1], 0.2
                )
                assert torch.equal(alone[0], answers[i])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("batch", "heads", "groups", "tokens", "size"),
    [
        (1, 1, 1, 1, 1),
        (16, 4, 4, 128, 64),
        (2, 9, 3, 100, 64),
        (3, 4, 4, 33, 20),
        (3, 4, 1, 77, 136),
        (1, 2, 2, 2000, 96),
        (2, 2, 2, 9, 32),
    ],
)
def test_attention_is_exact(batch: int, heads: int, groups: int, tokens: int, size: int) -> None:
    """With padding on the left, with heads that share keys, in a cache that has room for more."""
    torch.manual_seed(0)
    k, v = torch.randn(2, batch, groups, tokens + 5, size)[:, :, :, :tokens]
    q, mask = torch.randn(batch, heads, 1, size), torch.zeros(batch, 1, 1, tokens)
    mask[0, ..., : tokens // 3] = -torch.inf
    mask[-1, ..., tokens // 2 :] -= 3 * torch.rand(tokens - tokens // 2)
    long_k, long_v = (x.double().repeat_interleave(heads // groups, 1) for x in (k, v))
    scores = torch.einsum("bhqd,bhkd->bhqk", q.double(), long_k) * 0.3 + mask
    exact = torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), long_v)
    assert torch.allclose(kernels.attend(q, k, v, mask, 0.3).double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("distance", [1.0, 80.0, 500.0])
def test_attention_of_distant_scores(distance: float) -> None:
    """Weights of 1 and of e^-distance: neither overflows, and what is below float32 is nothing."""
    k = torch.tensor([0.0, -distance, 300.0]).view(1, 1, 3, 1)
    v = torch.tensor([0.0, 1.0, 5.0]).view(1, 1, 3, 1)
    mask = torch.tensor([0.0, 0.0, -torch.inf]).view(1, 1, 1, 3)
    found = kernels.attend(torch.ones(1, 1, 1, 1), k, v, mask, 1.0).item()
    expected = torch.tensor([0.0, -distance], dtype=torch.float64).softmax(0)[1].item()
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-38)


def test_what_the_attention_kernel_is_asked_for() -> None:
    """One token to a float32 cache without gradients, and nothing else."""
    q, k, mask = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8), torch.zeros(2, 1, 1, 5)

    def asked(q: Tensor = q, k: Tensor = k, v: Tensor = k, mask: Tensor = mask) -> bool:
        return is_single_token_decode(q, k, v, mask)

    assert not asked(), "gradients are on"
    with torch.no_grad():
        assert asked()
        assert (
            not asked(q=torch.randn(2, 4, 2, 8))
            and not asked(k=k.bfloat16(), v=k.bfloat16())
            and not asked(v=torch.randn(2, 2, 5, 6))
        )
        assert (
            not asked(mask=mask > 0)
            and not asked(mask=mask[:, 0])
            and not asked(mask=mask.repeat(1, 4, 1, 1))
        )
        assert (
            not asked(mask=mask[:1])
            and not asked(mask=mask[..., :4])
            and not asked(mask=torch.zeros(2, 1, 1, 10)[..., ::2])
        )
        assert not asked(k=k.transpose(2, 3).contiguous().transpose(2, 3))


def test_what_does_not_fit_is_refused() -> None:
    x, w, q, k, mask = (
        torch.ones(4, 32),
        torch.ones(48, 32),
        torch.ones(2, 4, 1, 8),
        torch.ones(2, 2, 5, 8),
        torch.zeros(2, 1, 1, 5),
    )
    for wrong in (
        (x[:, :31], w, None),
        (x, w[:, :16], None),
        (x.bfloat16(), w, None),
        (x, w.bfloat16(), None),
        (x, w, w[0]),
    ):
        with pytest.raises(RuntimeError):
            kernels.linear(*wrong)
    for odd in (
        (q[:, :3], k, k, mask),
        (q, k, k[:, :, :4], mask),
        (q, k, k, mask[:1]),
        (q, k, k, mask > 0),
        (q, k.double(), k, mask),
    ):
        with pytest.raises(RuntimeError):
            kernels.attend(*odd, 1.0)
    with pytest.raises(RuntimeError):
        kernels.attend(q, k[:, :, :0], k[:, :, :0], mask[..., :0], 1.0)
    assert kernels.linear(torch.empty(0, 32), w, None).shape == (0, 48)


def failure(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, **env: str) -> str:
    """What a process says that finds nothing compiled and, in this environment, cannot do so."""
    monkeypatch.setattr(kernels, "loaded", None)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    caplog.clear()
    with caplog.at_level("INFO", logger="rlhf"):
        assert not kernels.load() and not kernels.load() and kernels.loaded is False
    line = caplog.messages[-1]
    assert line.startswith("sampling uses torch's kernels for CPU, which are slower than ours: ")
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("compiler", "says"),
    [
        (None, "there is no C++ compiler ("),
        (
            "echo 'kernels.cpp:3: error: no such header' >&2; exit 1",
            "kernels.cpp:3: error: no such header",
        ),
        ("exit 0", "No such file or directory"),
        ('while [ "$1" != -o ]; do shift; done; echo broken > "$2"', "file too short"),
    ],
    ids=["none", "refuses", "makes nothing", "makes something else"],
)
def test_without_kernels_it_says_so_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    compiler: str | None,
    says: str,
) -> None:
    cxx = tmp_path / "cxx"
    if compiler:
        cxx.write_text(f"#!/bin/sh\n{compiler}\n")
        cxx.chmod(0o755)
    assert says in failure(monkeypatch, caplog, CXX=f"{cxx} -v", XDG_CACHE_HOME=str(tmp_path))


def test_a_cache_folder_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    failure(monkeypatch, caplog, XDG_CACHE_HOME=str(tmp_path / "file"))
    open_to_all = tmp_path / "rlhf"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    line = failure(monkeypatch, caplog, XDG_CACHE_HOME=str(tmp_path))
    assert f"{open_to_all}: it must be a folder that only you can write to" in line


def test_a_torch_that_is_too_old(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "loaded", None)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with caplog.at_level("INFO", logger="rlhf"):
        assert not kernels.load()
    assert "ours need torch 2.10, this is 2.9.1+cpu" in caplog.text
