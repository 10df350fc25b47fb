"""The device of tests/gpu/, what runs on it are given, and what only a GPU can do.

RLHF_TEST_DEVICE is "cuda" in `make test-gpu`. All other tests compute on the CPU, whatever the
machine has, and a process that has started DeepSpeed on one device cannot change to the other; so
without the variable tests/gpu/ is skipped. With "cpu" its bodies run on the CPU, with tiny sizes:
what only a GPU has (memory counted by torch, CUDA's kernels, NCCL, TF32) is then not checked.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

DEVICE = os.environ.get("RLHF_TEST_DEVICE", "")
ON_GPU = DEVICE == "cuda"
TORCH_DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
# a CPU shows that the tests' code runs; tests/integration has each stage on it
ZERO_STAGES = range(4) if ON_GPU else (3,)
GIB = 2**30
# of log-probabilities and losses: the rounding of fp32, and what a few steps of Adam make of it
CLOSE = {"rel": 1e-4, "abs": 1e-4}
# The gradient of a key's bias is rounding only; Adam blows it up unless its epsilon is above that.
STEADY = ["sft.adam_eps=1e-5", "rm.adam_eps=1e-5", "rl.max_steps=1", "rollout.log_responses=-1"]


def skip_reason(gpus: int = 1) -> str:
    """Why a test that needs so many GPUs is skipped; "" where it runs."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if DEVICE == "cpu":
        return ""
    if not found:
        return "no NVIDIA GPU"
    if not ON_GPU:
        return "only make test-gpu computes on the GPU"
    return "" if found >= gpus else f"needs {gpus} NVIDIA GPUs"


def placed(precision: str = "bf16", processes: int = 1) -> list[str]:
    """The deployment of a run on the device, as overrides."""
    deploy = "single_gpu" if processes == 1 else "single_node"
    return [
        f"deploy={deploy if ON_GPU else 'cpu'}",
        f"deploy.processes_per_node={processes}",
        f"deploy.precision={precision}",
    ]


def without_tf32() -> dict[str, str]:
    """Environment of a command whose matrix products in fp32 have all their digits."""
    assert torch.get_float32_matmul_precision() == "highest"  # torch's default, which we keep
    return {"NVIDIA_TF32_OVERRIDE": "0"}


def free_gpu_bytes() -> float:
    """Of the GPU's memory; a CPU has enough for the tiny sizes."""
    return torch.cuda.mem_get_info()[0] if ON_GPU else math.inf


@contextlib.contextmanager
def little_memory(on_gpu: float, on_cpu: float) -> Iterator[None]:
    """Commands that start in the block get so many GiB: of the GPU's memory, or of addresses."""
    if not ON_GPU:
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (int(on_cpu * GIB), before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
        return
    torch.cuda.empty_cache()
    size = max(0, int(free_gpu_bytes() - on_gpu * GIB))
    held = torch.empty(size, dtype=torch.uint8, device=TORCH_DEVICE)
    try:
        yield
    finally:
        del held
        torch.cuda.empty_cache()


def responses(run: Path) -> list[dict]:
    """All that a PPO run has logged of its responses."""
    return [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]


def error_line(stderr: str) -> str:
    """The one line that says why a command failed; no traceback is with it."""
    (line,) = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert "Traceback" not in stderr, stderr
    print(line)
    return line
