"""Skips these tests where they cannot run, and starts DeepSpeed on their device."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gpu_device import DEVICE, ON_GPU, skip_reason

from rlhf.runs.environment import free_port

HERE = Path(__file__).parent
if DEVICE:  # DeepSpeed looks once in the life of a process
    os.environ["DS_ACCELERATOR"] = DEVICE


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip before any fixture is made. A test may say that it needs more than one GPU."""
    for item in items:
        if item.path.parent == HERE:
            marker = item.get_closest_marker("gpu")
            assert marker is not None, f"{item.nodeid}: mark it with gpu"
            if reason := skip_reason(marker.kwargs.get("count", 1)):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """As tests/conftest.py's, but on the device of these tests."""
    from rlhf.distributed.engine import init_distributed

    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in place.items():
            patch.setenv(name, value)
        if not torch.distributed.is_initialized():
            patch.setenv("MASTER_PORT", str(free_port()))
            assert init_distributed().type == DEVICE
        yield


@pytest.fixture(autouse=True, scope="module")
def memory_of_the_gpu() -> Iterator[None]:
    """Give it back after each file: other processes compute on the same GPU."""
    yield
    if ON_GPU:
        gc.collect()
        torch.cuda.empty_cache()
