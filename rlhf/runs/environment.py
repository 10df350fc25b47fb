"""The environment of worker processes: their place among all, and settings of malloc and OpenMP.

No torch here: libgomp and glibc read these settings when a process starts or loads them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf.base.errors import UserError
from rlhf.base.processors import processors
from rlhf.config.choices import Device
from rlhf.config.deployment import threads_per_process, world_size
from rlhf.config.schema import Config

QUIET = {  # libraries say on the console what is wrong, no more
    "TOKENIZERS_PARALLELISM": "false",
    "DS_LOG_LEVEL": "error",
    "DEEPSPEED_LOG_LEVEL": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
# how long libgomp's threads spin before they sleep
SPIN_NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SPIN_IDLE = "5000"  # turns on an idle machine, about as fast as the default of 300,000
SPIN_BUSY = "300"  # turns on a busy machine, about as fast as no spinning at all
# settings of torch's allocator on GPUs, by their new and their old name
ALLOCATOR_NAMES = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
FREE_ENOUGH = 0.5  # processors that other work may use before the machine counts as busy


def worker_environments(cfg: Config) -> list[dict[str, str]]:
    """The environment of each process on this node."""
    settings = memory_settings() | library_settings(cfg)
    return [settings | place for place in places(cfg)]


def library_settings(cfg: Config, busy: Callable[[], float] | None = None) -> dict[str, str]:
    """What torch's and DeepSpeed's libraries read when they are imported.

    Args: busy: as in `thread_settings`.
    """
    settings = thread_settings(threads_per_process(cfg), cfg.deploy.processes_per_node, busy)
    if cfg.deploy.device == Device.cpu:
        return settings | {"DS_ACCELERATOR": "cpu"}  # also where there are GPUs
    settings["DS_ACCELERATOR"] = "cuda"  # DeepSpeed looks for other kinds first
    if not ALLOCATOR_NAMES & os.environ.keys():
        # rows of many lengths would leave gaps of memory that no tensor fits into
        settings["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return settings


def places(cfg: Config) -> list[dict[str, str]]:
    """What gives each process on this node its place among all."""
    deploy = cfg.deploy
    host, port = (
        deploy.master.rsplit(":", 1)
        if deploy.node_rank is not None and deploy.master
        else ("127.0.0.1", str(free_port()))
    )
    shared = {
        "WORLD_SIZE": str(world_size(cfg)),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
    }
    first = (deploy.node_rank or 0) * deploy.processes_per_node
    return [
        shared | {"RANK": str(first + local), "LOCAL_RANK": str(local)}
        for local in range(deploy.processes_per_node)
    ]


def free_port() -> int:
    """A TCP port of this machine that is free now.

    Raises: UserError where nothing can connect to this machine itself, as in a sandbox whose
        loopback device is down; torch would try for half an hour.
    """
    with socket.socket() as free, socket.socket() as other:
        free.bind(("127.0.0.1", 0))
        # nobody listens there: where loopback works the connection is refused
        answer = other.connect_ex(free.getsockname())
        if answer != errno.ECONNREFUSED:
            raise UserError(
                f"processes of this machine cannot meet at 127.0.0.1 ({os.strerror(answer)}): "
                "turn its loopback device on (ip link set lo up)"
            )
        return int(free.getsockname()[1])


def memory_settings() -> dict[str, str]:
    """Settings of glibc's malloc for a process that allocates large tensors again and again.

    It keeps freed memory instead of asking the system for zeroed pages each time, and uses huge
    pages (docs/performance.md). What the user has set stays.
    """
    wanted = {
        "MALLOC_MMAP_THRESHOLD_": str(2**30),  # bytes
        "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
    return {name: value for name, value in wanted.items() if name not in os.environ}


def thread_settings(
    threads: int, processes: int = 1, busy: Callable[[], float] | None = None
) -> dict[str, str]:
    """Settings of libgomp for `processes` new processes with `threads` OpenMP threads each.

    A thread that waits for another one first spins, then sleeps. Spinning saves the time to wake
    up. On a busy machine it takes the processor from the thread that it waits for, and a run takes
    many times as long (docs/performance.md). So threads spin for long only if the machine has a
    free processor for each of them when the processes start. Even then they spin for a shorter time
    than by default, because other work may start later. No result depends on it. What the user has
    set stays.

    Args: busy: gives the processors in use; default: `busy_processors`, which takes 0.5 s.
    """
    if threads < 2 or any(name in os.environ for name in SPIN_NAMES):
        return {}
    in_use = (busy or busy_processors)()
    too_many = in_use + threads * processes > len(processors()) + FREE_ENOUGH
    return {"GOMP_SPINCOUNT": SPIN_BUSY if too_many else SPIN_IDLE}


def busy_processors(seconds: float = 0.5) -> float:
    """How many of `processors()` are in use, measured while this process sleeps.

    0 if the system does not report it.
    """
    try:
        before, started = processor_seconds(), time.monotonic()
        time.sleep(seconds)
        return (processor_seconds() - before) / (time.monotonic() - started)
    except OSError:
        return 0.0


def processor_seconds() -> float:
    """Seconds of work that `processors()` have done since the system started. Raises: OSError."""
    names = {f"cpu{number}" for number in processors()}
    fields = [line.split() for line in Path("/proc/stat").read_text(encoding="utf-8").splitlines()]
    # user, nice, system and two kinds of interrupts; the other columns are idle time, waiting for
    # a disk, and time that the host gave to others
    ticks = [int(row[i]) for row in fields if row and row[0] in names for i in (1, 2, 3, 6, 7)]
    return sum(ticks) / os.sysconf("SC_CLK_TCK")


def work_of_others(own: Sequence[int]) -> float:
    """Seconds of work that `processors()` have done since the system started, without that of this
    process, its children that have ended, and those with the numbers `own`.

    0 if the system does not report it.
    """
    try:
        everything = processor_seconds()
    except OSError:
        return 0.0
    ticks = 0
    for number in own:
        with contextlib.suppress(OSError):  # it has ended
            # behind the name, which may have spaces: user and system time, also of its children
            fields = (
                Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            )
            ticks += sum(map(int, fields[11:15]))
    return everything - sum(os.times()[:4]) - ticks / os.sysconf("SC_CLK_TCK")
