"""Checks of the pretended GPU. Run in a process of their own, as torch cannot forget a device.

Prints as JSON what each of them raised, null where it passed.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from device import COUNTS, Counts, DeviceTensor, move_module, pretended_gpu
from torch import nn


@contextmanager
def raises(kind: type[Exception], text: str) -> Iterator[None]:
    try:
        yield
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"no {kind.__name__}")


def counts_of(work: Callable[[], object]) -> Counts:
    before = COUNTS.copy()
    work()
    return COUNTS.since(before)


def waits(work: Callable[[], object]) -> int:
    return counts_of(work).synchronisations.total()


def check_results_are_those_of_the_cpu(device: torch.device) -> None:
    x = torch.arange(6.0).view(2, 3)
    y = (x.to(device) @ x.to(device).t()).softmax(-1)
    assert isinstance(y, DeviceTensor) and y.device == device
    assert torch.equal(y.cpu(), (x @ x.t()).softmax(-1))
    z = torch.zeros(3, device=device)
    z[1:] += 1  # in place, through a view
    assert z.tolist() == [0, 1, 1]


def check_gradients(device: torch.device) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    layer(x).square().sum().backward()
    expected = layer.weight.grad
    layer.zero_grad()
    layer.tied = nn.Linear(3, 2)
    layer.tied.weight = layer.weight
    move_module(layer)
    assert layer.tied.weight is layer.weight
    layer(x.to(device)).square().sum().backward()
    assert layer.weight.grad.device == device
    assert torch.allclose(layer.weight.grad.cpu(), expected)


def check_mixing_devices_raises(device: torch.device) -> None:
    here, there = torch.ones(2), torch.ones(2, device=device)
    for mix in (
        lambda: there + here,
        lambda: torch.cat([here, there]),
        lambda: torch.where(here > 0, there, there),
        lambda: there.index_select(0, torch.tensor([0])),
        lambda: here[torch.zeros(1, dtype=torch.long, device=device)],
    ):
        with raises(RuntimeError, "same device"):
            mix()
    assert (there + torch.tensor(1.0)).tolist() == [2, 2]  # a scalar may be anywhere
    assert there[torch.tensor([1])].tolist() == [1]  # so may an index


def check_there_is_no_numpy_array(device: torch.device) -> None:
    x = torch.ones(2, device=device)
    with raises(TypeError, "cpu()"):
        x.numpy()
    assert x.cpu().numpy().tolist() == [1, 1]


def check_what_makes_the_host_wait(device: torch.device) -> None:
    x, here = torch.tensor([0.0, 1.0, 2.0], device=device), torch.ones(3)
    for work in (
        lambda: x.sum().item(),
        lambda: float(x[0]),
        lambda: bool(x.any()),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x.nonzero(),
        lambda: x[x > 0],
        lambda: x[[0, 2]],
        lambda: here.to(device),
        lambda: here.to(device, non_blocking=True),  # not pinned
        lambda: torch.tensor([1, 2], device=device),
    ):
        assert waits(work) == 1
    for work in (
        lambda: x + 1,
        lambda: x[1:].sum(),
        lambda: x[torch.zeros(1, dtype=torch.long, device=device)],
        lambda: torch.where(x > 0, x, 0.0),
        lambda: torch.zeros(3, device=device),
        lambda: here.pin_memory().to(device, non_blocking=True),
        lambda: here.sum().item(),
    ):
        assert waits(work) == 0


def check_kernels(device: torch.device) -> None:
    x = torch.ones(2, 3, device=device)
    assert counts_of(lambda: x.t()[1:].view(-1, 2)).kernels.total() == 0
    assert counts_of(lambda: (x + 1).sum()).kernels.total() == 2
    q = torch.ones(1, 1, 2, 4, device=device)
    attend = nn.functional.scaled_dot_product_attention
    assert counts_of(lambda: attend(q, q, q, is_causal=True)).kernels.total() == 1


def check_sampling_gives_the_same_responses(device: torch.device) -> None:
    """A GPU looks every 16 tokens which rows are finished; they have padding from there on."""
    from rlhf.config.choices import Precision
    from rlhf.data.batches import pad_left, uniforms
    from rlhf.models.loading import load_policy, load_tokenizer
    from rlhf.sampling.batches import PromptBatch
    from rlhf.sampling.sampler import sample
    from rlhf.sampling.token_choice import Sampling

    torch.manual_seed(0)
    policy = load_policy("builtin:tiny", load_tokenizer("builtin:tiny"), Precision.fp32)
    policy.requires_grad_(False).eval()
    prompts = PromptBatch(*pad_left([[5, 6, 7], [8], [300, 301, 302, 303], [9, 9]], 0))
    noise, never = uniforms("test", range(4), 0, 0, 40), -1
    endless = sample(policy, prompts, noise, never, Sampling())
    eos = int(endless.ids[0, 20])  # the first row ends between two looks
    expected = sample(policy, prompts, noise, eos, Sampling())
    assert 0 < expected.mask.sum(1)[0] <= 21 < expected.mask.sum(1).max()
    move_module(policy)
    found = sample(policy, prompts, noise, eos, Sampling())
    assert torch.equal(found.ids.cpu(), expected.ids)
    assert torch.equal(found.mask.cpu(), expected.mask)
    assert torch.allclose(found.logprobs.cpu(), expected.logprobs, atol=1e-4)


def main() -> None:
    results = {}
    with pretended_gpu() as device:
        for name, check in list(globals().items()):
            if name.startswith("check_"):
                try:
                    check(device)
                    results[name] = None
                except Exception:
                    results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
