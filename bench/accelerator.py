"""What only a GPU can measure, in small functions. Each also runs on a CPU, so that its callers do.

bench/gpu.py and tests/gpu/ use them.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NO_GPU = "no NVIDIA GPU"
# what torch warns of with torch.cuda.set_sync_debug_mode("warn")
SYNC_WARNING = "called a synchronizing CUDA operation"
# on a CPU, what would wait for a GPU and can be seen there: .item(), float(), if, nonzero
READS = ("_local_scalar_dense", "nonzero", "masked_select")


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """From now on `peak_bytes` measures."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Most bytes that tensors took since `reset_peak`; 0 on a CPU, where torch does not count."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def seconds_of(device: torch.device, work: Callable[[], Any], repeats: int = 3) -> float:
    """Median seconds of some work, after one run that does not count."""
    taken = []
    for _ in range(1 + repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product: what a model can reach."""
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds_of(device, lambda: a @ b)


@contextlib.contextmanager
def synchronisations(device: torch.device) -> Iterator[list[str]]:
    """Where the host waits for the device in the block: a source line, or an operation, for each.

    The list is filled at the end of the block. On a GPU torch reports them; its documentation says
    that it may miss some. On a CPU only reads of single numbers and `nonzero` are seen.
    """
    found: list[str] = []
    if device.type != "cuda":
        with _Reads(found):
            yield found
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [
        f"{Path(warning.filename).name}:{warning.lineno}"
        for warning in caught
        if SYNC_WARNING in str(warning.message)
    ]


class _Reads(TorchDispatchMode):
    """Notes the operations in READS."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in READS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def kernel_names(device: torch.device, work: Callable[[], Any]) -> set[str]:
    """Names of the kernels that some work launches on a GPU; on a CPU of torch's operations."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiled:
        work()
        synchronize(device)
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    return {event.name for event in profiled.events() if event.device_type == wanted}


def has_flash_kernel(names: set[str]) -> bool:
    """Whether attention ran in a kernel that never writes its scores to memory.

    cuDNN has one too, which torch may prefer. That of CUTLASS ("fmha"), which takes a mask, is
    slower and does not count.
    """
    lower = [name.lower() for name in names]
    return any("flash" in name or ("cudnn" in name and "sdpa" in name) for name in lower)
