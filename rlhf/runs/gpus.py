"""The GPUs of this machine, and which run uses which. No torch here."""

from __future__ import annotations

import contextlib
import os
import random
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rlhf.base.errors import UserError
from rlhf.base.files import private_folder
from rlhf.base.log import plural, say
from rlhf.config.choices import Device
from rlhf.config.schema import Config
from rlhf.runs.directory import output_of
from rlhf.runs.locks import try_lock

# names the file in which the jobs of a sweep, which may be other processes, report how they ended
SWEEP_BEGAN = "RLHF_SWEEP_BEGAN"  # the time when a sweep began, s
SWEEP_LOG = "RLHF_SWEEP_LOG"
WSL2 = Path("/dev/dxg")  # its one file for all GPUs
VISIBLE = "CUDA_VISIBLE_DEVICES"
REPORT_EVERY = 30.0  # s
MEMORY_DIFFERS = 0.05  # share of deploy.gpu_memory_gb; drivers keep a little


def visible_gpus() -> list[str]:
    """The NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get(VISIBLE)
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return [name for name in names if name not in ("", "-1")]
    files = [path.name for path in Path("/dev").glob("nvidia*")]
    count = sum(bool(re.fullmatch(r"nvidia\d+", name)) for name in files)
    if not count and WSL2.exists():
        count = len(re.findall("^GPU ", output_of("nvidia-smi", "-L"), re.MULTILINE))
    return [str(number) for number in range(count)]


def check_gpus(cfg: Config) -> None:
    """Refuse a deployment on GPUs that are not there.

    Raises: UserError that names the key.
    """
    wanted, visible = cfg.deploy.processes_per_node, visible_gpus()
    if len(visible) < wanted:
        raise UserError(
            f"deploy.processes_per_node={wanted}, but this machine shows "
            f"{plural(len(visible), 'NVIDIA GPU')}: use deploy=cpu, or fewer "
            "deploy.processes_per_node"
        )
    if wanted > 1 and has_instances():
        raise UserError(
            f"deploy.processes_per_node={wanted}: a GPU of this machine is divided into instances "
            "(MIG), which NCCL cannot connect: use deploy.processes_per_node=1"
        )


def has_instances() -> bool:
    """Whether the GPUs that this process may use are instances of one that is divided (MIG)."""
    if os.environ.get(VISIBLE):
        return any(name.startswith("MIG-") for name in visible_gpus())
    return bool(re.search(r"^\s+MIG ", output_of("nvidia-smi", "-L"), re.MULTILINE))


def memory_mismatch(cfg: Config) -> str:
    """A line where the GPUs have another memory than deploy.gpu_memory_gb says; else ""."""
    sizes = output_of("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
    mebibytes = [float(size) for size in sizes.split() if size.isdigit()]
    if not mebibytes:
        return ""
    expected, found = cfg.deploy.gpu_memory_gb, min(mebibytes) / 1024
    if abs(found - expected) <= MEMORY_DIFFERS * expected:
        return ""
    return (
        f"deploy.gpu_memory_gb={expected:g}, but the smallest GPU of this machine has {found:.1f} "
        f"GiB: the plan needs the right number, deploy.gpu_memory_gb={int(found)}"
    )


@contextlib.contextmanager
def claim_gpus(cfg: Config) -> Iterator[list[str]]:
    """Within this context a run has GPUs that no other run of this user uses.

    Runs side by side take different GPUs, and wait until enough are free. Where the user has set
    CUDA_VISIBLE_DEVICES for a run by itself, it does not wait but shares these GPUs. No effect on
    CPU, with a hostfile, and under SLURM, which gives each job its own GPUs.

    Returns: their names, which CUDA_VISIBLE_DEVICES has where they are not the first ones.
    """
    deploy = cfg.deploy
    if deploy.device == Device.cpu or deploy.hostfile or "SLURM_JOB_ID" in os.environ:
        yield []
        return
    visible, wanted = visible_gpus(), deploy.processes_per_node
    chosen_by_hand = VISIBLE in os.environ and SWEEP_LOG not in os.environ
    folder = folder_of_locks()
    next_report = time.monotonic()
    while True:
        with contextlib.ExitStack() as locks:
            free: list[str] = []
            for gpu in visible:
                if len(free) < wanted and locks.enter_context(try_lock(lock_of(folder, gpu))):
                    free.append(gpu)
            if len(free) < wanted and chosen_by_hand:
                shared = [gpu for gpu in visible if gpu not in free][: wanted - len(free)]
                say(f"another run uses GPU {', '.join(shared)}, too ({VISIBLE} names it)")
                free += shared
            if len(free) >= wanted:
                with only_visible(free, visible):
                    yield free
                return
        if time.monotonic() >= next_report:
            line = f"waiting: other runs use {plural(len(visible) - len(free), 'GPU')} of "
            line += str(len(visible))
            if SWEEP_LOG not in os.environ:
                line += f"; {VISIBLE}={','.join(visible[:wanted])} shares with them"
            say(line)
            next_report = time.monotonic() + REPORT_EVERY
        # at random: two jobs that each hold half of what they need must not meet for ever
        time.sleep(random.uniform(0.5, 1.5))


def unclaimed_gpu() -> str | None:
    """The first GPU that no run of this user has claimed now; None where there is none.

    Raises: UserError.
    """
    for gpu in visible_gpus():
        with try_lock(lock_of(folder_of_locks(), gpu), shared=True) as is_free:
            if is_free:
                return gpu
    return None


def folder_of_locks() -> Path:
    """Where the locks of this user's runs are. Raises: UserError."""
    try:
        return private_folder(Path(tempfile.gettempdir()) / f"rlhf-gpus-{os.getuid()}")
    except OSError as error:
        raise UserError(f"no folder for the locks of GPUs: {error}") from None


def lock_of(folder: Path, gpu: str) -> Path:
    """The file that is locked for a GPU; old names of MIG instances have slashes."""
    return folder / gpu.replace("/", "_")


@contextlib.contextmanager
def only_visible(chosen: list[str], visible: list[str]) -> Iterator[None]:
    """Let workers started within this context see the chosen GPUs only.

    The first of those visible they take by themselves: then nothing is set, so that workers that
    were started before can be used (runs/early.py).
    """
    if chosen == visible[: len(chosen)]:
        yield
        return
    before = os.environ.get(VISIBLE)
    os.environ[VISIBLE] = ",".join(chosen)
    try:
        yield
    finally:
        os.environ.pop(VISIBLE)
        if before is not None:
            os.environ[VISIBLE] = before
