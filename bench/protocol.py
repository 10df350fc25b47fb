"""How a contestant reports to bench/run.py, and what all contestants share."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Spec = dict[str, Any]
Turn = Callable[[Callable[[], dict[str, Any]]], None]
MiB = 2**20


def say(spec: Spec, **what: Any) -> None:
    spec["voice"].write(json.dumps(what) + "\n")


def turns(spec: Spec, peer: str) -> Turn:
    """Call it after the imports and before a model is loaded.

    Returns: what a contestant calls at the end of each sample. It reports (the first time: ready)
        and waits. Its argument returns the counts, and is not timed.
    """
    on_gpu = spec["device"] == "cuda"  # then the peak is that of its tensors
    begin, state = memory("VmRSS"), {"started": 0.0}

    def turn(counted: Callable[[], dict[str, Any]]) -> None:
        if on_gpu:
            wait_for_gpu()
        seconds = time.perf_counter() - state["started"]
        counts = counted()  # also at the start: some counters continue from there
        if state["started"]:
            say(spec, seconds=seconds, **counts)
        else:
            say(spec, ready=peer)
        if sys.stdin.readline().strip() != "go":
            peak = gpu_peak() if on_gpu else memory("VmHWM") - begin
            say(spec, peak_mib=peak / MiB, imports_mib=begin / MiB)
            os._exit(0)
        state["started"] = time.perf_counter()

    return turn


def wait_for_gpu() -> None:
    import torch

    torch.cuda.synchronize()


def gpu_peak() -> int:
    """Most bytes of tensors on the GPU so far."""
    import torch

    return torch.cuda.max_memory_allocated()


def memory(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def read_batches(spec: Spec) -> list[list[Any]]:
    return json.loads(Path(spec["batches"]).read_text(encoding="utf-8"))


def forced_lengths(number: int, rows: int, longest: int) -> np.ndarray:
    """Tokens of the responses of PPO's iteration `number`, EOS included.

    Uniform from 8 to `longest`, and the same for all contestants.
    """
    return np.random.default_rng([number]).integers(min(8, longest), longest + 1, rows)
