"""Ranks wait for rank 0 at a barrier for longer than for each other elsewhere."""

from __future__ import annotations

import subprocess

import pytest
from worker_runs import begin

CODE = """
import datetime, os, sys, time
import deepspeed
import torch
from rlhf.base import watchdog
from rlhf.distributed import collectives, engine

engine.COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=2)
device = engine.init_distributed()
group = deepspeed.utils.groups._get_data_parallel_group()
run_dir = __import__("pathlib").Path(sys.argv[1])
watchdog.start(run_dir, os.environ["RANK"], 3 / 60)
if collectives.rank() == 0:
    for _ in range(12):
        watchdog.progress(at_once=True)
        time.sleep(0.5)
collectives.barrier()
watchdog.stop()
empty = collectives.all_gather_rows(torch.zeros(2, 0))
assert empty.shape == (4, 0), empty.shape
if sys.argv[2] != "barrier" and collectives.rank() == 0:
    time.sleep(5)
if sys.argv[2] == "deepspeed":
    deepspeed.comm.all_reduce(torch.ones(1), group=group)
collectives.all_reduce_max(1.0, device)
os._exit(0)
"""


def run(tmp_path: object, what: str) -> list[tuple[int, str]]:
    workers = begin(["-c", CODE, tmp_path, what], 2, subprocess.PIPE)
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    return [(worker.returncode, error) for worker, error in zip(workers, errors)]


@pytest.mark.full
def test_a_slow_rank_0_is_waited_for_at_a_barrier_only(tmp_path: object) -> None:
    """It takes 6 s; the others wait 2 s elsewhere, and their watchdog 3 s."""
    assert [code for code, _ in run(tmp_path, "barrier")] == [0, 0]
    for collective in ("reduce", "deepspeed"):
        assert [code for code, _ in run(tmp_path, collective)][1] != 0, collective
