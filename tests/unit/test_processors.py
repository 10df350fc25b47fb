"""The processors that a process may use: its affinity, and the limits of its control groups."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import REPO

from rlhf.base.processors import CONTROL_GROUPS, time_limit

COUNT = """
import os, sys
os.sched_setaffinity(0, set(list(os.sched_getaffinity(0))[:int(sys.argv[1])]))
if sys.argv[2]:
    open(sys.argv[2] + "/cgroup.procs", "w").write(str(os.getpid()))
from rlhf.base.processors import usable_cores
from rlhf.config.deployment import threads_per_process
sys.path.append("tests")
from helpers import composed
print(usable_cores(), threads_per_process(composed()))
"""


def count(affinity: int, group: Path | str = "", given: str = "") -> list[int]:
    """usable_cores() and the threads of a run in a process that has these processors.

    Args: given: OMP_NUM_THREADS.
    """
    done = subprocess.run(
        [sys.executable, "-c", COUNT, str(affinity), str(group)],
        cwd=REPO,
        env=os.environ | {"OMP_NUM_THREADS": given},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_a_run_has_a_thread_for_each_processor_that_it_may_use() -> None:
    assert count(1) == [1, 1]


@pytest.mark.parametrize("given, threads", [("3", 3), ("3,2", 3), ("0", 1), ("many", 1)])
def test_the_environment_may_say_how_many_threads(given: str, threads: int) -> None:
    assert count(1, given=given) == [1, threads]


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group, which only root can make."""
    folder = CONTROL_GROUPS / "cpu" / f"test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "cpu.cfs_quota_us").write_text("150000")
    except OSError as error:
        pytest.skip(f"cannot make a control group: {error}")
    yield folder
    folder.rmdir()


def test_a_run_has_no_more_threads_than_its_control_group_has_time_for(group: Path) -> None:
    everything = len(os.sched_getaffinity(0))
    assert count(everything, group) == [min(2, everything)] * 2, "1.5 processors"
    (group / "cpu.cfs_quota_us").write_text("50000")
    assert count(everything, group) == [1, 1]


def test_version_1(tmp_path: Path) -> None:
    for name, quota in (("", -1), ("docker", 400_000), ("docker/abc", -1)):
        folder = tmp_path / "cpu,cpuacct" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")
    groups = "5:memory:/docker/abc\n4:cpu,cpuacct:{}\n1:name=systemd:/docker/abc\n"
    assert time_limit(groups.format("/docker/abc"), tmp_path) == 4
    assert time_limit(groups.format("/docker"), tmp_path) == 4
    assert time_limit(groups.format("/"), tmp_path) == math.inf


@pytest.mark.parametrize(
    "path, limit",
    [("/", 3), ("/user/run", 0.5), ("/user", 1.5), ("/other", 3), ("/gone/of/the/host", 3)],
)
def test_version_2(tmp_path: Path, path: str, limit: float) -> None:
    for name, text in (
        ("", "300000 100000"),
        ("user", "150000 100000"),
        ("user/run", "25000 50000"),
        ("other", "max 100000"),
    ):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "cpu.max").write_text(f"{text}\n")
    assert time_limit(f"0::{path}\n", tmp_path) == limit


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert time_limit("0::/\n1:cpu:/\n", tmp_path) == math.inf
    assert time_limit("", tmp_path) == math.inf
