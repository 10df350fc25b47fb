"""The processors that this process may use, which may be fewer than the machine has."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")


def processors() -> list[int]:
    """Numbers of the processors that this process may use: SLURM and taskset leave it some."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@functools.cache
def usable_cores() -> int:
    """How many threads can work at a time: one on each of `processors()`, and no more than the
    control group has time for (docker run --cpus=2, a limit of Kubernetes)."""
    with contextlib.suppress(OSError):  # no Linux
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8")
        return max(1, math.ceil(min(len(processors()), time_limit(groups))))
    return len(processors())


def default_threads(processes: int = 1) -> int:
    """Threads of each of so many processes: OMP_NUM_THREADS, as torch and the launchers of clusters
    have it, else the usable cores divided among them."""
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # "4,2": of nested regions
    if given.isdecimal() and int(given):
        return int(given)
    return max(1, usable_cores() // processes)


def time_limit(groups: str, mounted: Path = CONTROL_GROUPS) -> float:
    """The seconds of work per second that control groups allow; infinite without a limit.

    Args:
        groups: lines of /proc/self/cgroup, NUMBER:CONTROLLERS:PATH; version 2 has no controllers.
        mounted: where the groups' files are.
    Source: the kernel's admin-guide/cgroup-v2 (cpu.max) and scheduler/sched-bwc (cpu.cfs_quota_us).
    """
    limits = [math.inf]
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = mounted / controllers / path.strip("/")
        # a group has no more than the ones that it is in; in a container the path may be the host's
        for folder in [group, *group.parents]:
            with contextlib.suppress(OSError, ValueError):  # no such file; "max", no limit
                limits.append(limit_of(folder))
    return min(limits)


def limit_of(group: Path) -> float:
    """As `time_limit`, of one group. Raises: OSError, ValueError where it has none."""
    if (group / "cpu.max").exists():
        quota, period = map(int, (group / "cpu.max").read_text(encoding="utf-8").split())
    else:
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        quota, period = (int((group / name).read_text(encoding="utf-8")) for name in names)
    return quota / period if quota > 0 else math.inf
