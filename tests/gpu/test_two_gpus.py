"""Two GPUs and NCCL: the numbers of one, and a rank that keeps the other one waiting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_device import CLOSE, DEVICE, STEADY, ZERO_STAGES, placed, responses, without_tf32
from helpers import REPO, SMALL, metrics, runs_in, train

from rlhf.runs.environment import free_port

pytestmark = pytest.mark.gpu(count=2)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny pipeline in one process."""
    return pipeline(tmp_path_factory.mktemp("one"), *placed("fp32"))


def pipeline(folder: Path, *overrides: str) -> dict[str, Path]:
    done = train(*SMALL, *STEADY, *overrides, cwd=folder, **without_tf32())
    assert done.returncode == 0, done.stderr
    return {stage: runs[0] for stage, runs in runs_in(folder).items()}


@pytest.mark.parametrize("zero", ZERO_STAGES)
def test_two_processes_compute_what_one_does(
    zero: int, one: dict[str, Path], tmp_path: Path
) -> None:
    two = pipeline(tmp_path, *placed("fp32", processes=2), f"deploy.zero_stage={zero}")
    for stage in ("sft", "rm"):
        for row, other in zip(metrics(one[stage]), metrics(two[stage]), strict=True):
            for name in ("loss", "grad_norm"):
                assert other[name] == pytest.approx(row[name], **CLOSE), (stage, name)
    tokens = [[row["tokens"] for row in responses(runs["ppo"])] for runs in (one, two)]
    assert tokens[0] == tokens[1] and len(tokens[0]) == 16


SLOW_RANK = """
import datetime, os, sys, time
from rlhf.distributed import collectives, engine
engine.COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=float(sys.argv[1]))
device = engine.init_distributed()
assert device.type == sys.argv[2]
collectives.barrier()
print("started", flush=True)
if collectives.rank() == 0 and sys.argv[3] == "barrier":
    time.sleep(14)  # it saves a model
collectives.barrier()
if collectives.rank() == 0 and sys.argv[3] == "reduce":
    time.sleep(14)
assert collectives.all_reduce_max(float(collectives.rank()), device) == 1
print("done", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("before, survives", [("barrier", True), ("reduce", False)])
def test_a_slow_rank_0_is_waited_for(before: str, survives: bool, tmp_path: Path) -> None:
    """Barriers wait for hours; other collectives wait COLLECTIVE_TIMEOUT, here 8 s."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    place |= {"DS_ACCELERATOR": DEVICE, "PYTHONPATH": str(REPO)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SLOW_RANK, "8", DEVICE, before],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert all(out.startswith("started\n") for out, _ in said), said
    finished = [out.endswith("done\n") for out, _ in said]
    assert all(finished) if survives else not all(finished), said
