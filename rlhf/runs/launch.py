"""Starts, watches and stops the worker processes of one run. No torch here."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.config.choices import Device
from rlhf.config.deployment import world_size
from rlhf.config.schema import Config

WORKER = "rlhf.worker"
SWEEP_LOG = "RLHF_SWEEP_LOG"  # names the file where the jobs of a sweep, which may be processes of their own, say how they ended
class WorkerError(RuntimeError):
    """A worker failed; the message names rank, cause and log."""


STOPPED = (
    75  # exit code of a worker that was asked to stop, and has saved (EX_TEMPFAIL: try again later)
)


def run_workers(run_dir: Path, cfg: Config) -> bool:
    """Run `python -m rlhf.worker run_dir` in `deploy.processes_per_node` processes on each of `deploy.nodes` nodes, until all are done.

    With deploy.hostfile DeepSpeed's launcher starts them, on all nodes; else this process starts those of its own node. When one fails
    the others are stopped. At Ctrl-C or SIGTERM they save a checkpoint and end; at a second one they are stopped at once. Should this
    process be killed, its workers die with it. Returns: whether it was asked to stop, but the run was done by then.

    Raises: RuntimeError with the first failed worker's rank, cause and log; KeyboardInterrupt when asked to stop.
    """
    commands: dict[str, tuple[list[str], dict[str, str]]]
    if cfg.deploy.hostfile:
        commands = {f"on {cfg.deploy.hostfile}": (launcher_command(run_dir, cfg), {})}
    else:
        commands = {
            f"rank {env['RANK']}": ([sys.executable, "-m", WORKER, str(run_dir)], env)
            for env in worker_environments(cfg)
        }
    started: dict[str, subprocess.Popen[bytes]] = {}
    failed: dict[str, int] = {}
    with claim_gpus(cfg), graceful_shutdown() as asked:
        try:
            for name, (command, env) in commands.items():
                # a session of its own: Ctrl-C reaches this process only, which then stops the workers
                options: dict[str, Any] = {
                    "start_new_session": True,
                    "stdin": subprocess.DEVNULL,
                    "preexec_fn": end_with_parent,
                }
                started[name] = subprocess.Popen(command, env=os.environ | env, **options)
            told = False
            while not failed and any(worker.poll() is None for worker in started.values()):
                time.sleep(0.05)
                if asked and not told:
                    told = True
                    print(
                        "stopping after this step, with a checkpoint; once more to stop at once",
                        file=sys.stderr,
                        flush=True,
                    )
                    if cfg.deploy.hostfile:  # DeepSpeed's launcher would give the workers 30 s; they see this file on their own
                        (run_dir / "stop").touch()
                    else:
                        for worker in started.values():
                            worker.terminate()
                failed = {
                    name: worker.returncode
                    for name, worker in started.items()
                    if worker.poll() and worker.returncode != STOPPED
                }
        finally:
            stop_workers(list(started.values()))
    codes = [worker.returncode for worker in started.values()]
    broken = (
        any(code > 0 and code != STOPPED for code in codes)
        and not cfg.deploy.hostfile
        and not any(code < 0 for code in codes)
    )
    if not broken and (
        STOPPED in codes or (asked and any(codes))
    ):  # asked for on this node, or on another one
        raise KeyboardInterrupt
    if failed:
        raise WorkerError(
            f"{cfg.stage.name} failed, {first_failure(failed, run_dir)}; more in {run_dir / 'train.log'}"
        )
    if (
        not cfg.deploy.node_rank and not (run_dir / "result.json").exists()
    ):  # DeepSpeed's launcher hides some failures
        raise WorkerError(
            f"{cfg.stage.name} ended without a result; look into {run_dir / 'train.log'}"
        )
    return bool(asked)


@contextlib.contextmanager
def claim_gpus(cfg: Config) -> Iterator[None]:
    """Within this context a job of a sweep has GPUs for itself: jobs side by side take different ones, and wait until enough are free.
    The locks end with their process, however that ends."""
    alone = (
        SWEEP_LOG not in os.environ or "SLURM_JOB_ID" in os.environ
    )  # SLURM has given this job its own
    if alone or cfg.deploy.device == Device.cpu or cfg.deploy.hostfile:
        yield
        return
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = before.split(",") if before else [str(i) for i in range(count_gpus())]
    folder = Path(tempfile.gettempdir()) / f"rlhf-gpus-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    while True:
        with contextlib.ExitStack() as held:
            mine = []
            for gpu in visible:
                lock = held.enter_context(open(folder / gpu, "w"))
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    mine.append(gpu)
                if len(mine) == cfg.deploy.processes_per_node:
                    break
            if len(mine) == cfg.deploy.processes_per_node:
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
                try:
                    yield
                finally:
                    os.environ.pop("CUDA_VISIBLE_DEVICES") if before is None else os.environ.update(
                        CUDA_VISIBLE_DEVICES=before
                    )
                return
        time.sleep(
            random.uniform(0.5, 1.5)
        )  # two that each hold half of what they need must not meet for ever


def end_with_parent() -> None:
    """Ask the system to end this new process when its parent is gone, however it went."""
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def memory_settings() -> dict[str, str]:
    """Settings of glibc's malloc for a process that allocates large tensors again and again: keep what was freed instead of asking the
    system for zeroed pages each time, and let pages be huge ones (docs/performance.md). What the user has set stays."""
    wanted = {
        "MALLOC_MMAP_THRESHOLD_": str(2**30),  # bytes
        "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
    return {name: value for name, value in wanted.items() if name not in os.environ}


def worker_environments(cfg: Config) -> list[dict[str, str]]:
    """The environment that gives each process on this node its place among all."""
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
        **memory_settings(),
    }
    if deploy.device == Device.cpu:
        shared["DS_ACCELERATOR"] = "cpu"  # also where there are GPUs
    first = (deploy.node_rank or 0) * deploy.processes_per_node
    return [
        shared | {"RANK": str(first + local), "LOCAL_RANK": str(local)}
        for local in range(deploy.processes_per_node)
    ]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launcher_command(run_dir: Path, cfg: Config) -> list[str]:
    """DeepSpeed's launcher, which reaches the nodes of a hostfile by pdsh and ssh."""
    deploy = cfg.deploy
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--log_level",
        "error",
        "--force_multi",
        "--hostfile",
        str(deploy.hostfile),
    ]
    command += ["--num_nodes", str(deploy.nodes), "--num_gpus", str(deploy.processes_per_node)]
    if deploy.master:  # else DeepSpeed asks the first host for its address, and takes port 29500
        host, port = deploy.master.rsplit(":", 1)
        command += ["--master_addr", host, "--master_port", port]
    return [*command, "--no_local_rank", "--module", WORKER, str(run_dir)]


def first_failure(failed: dict[str, int], run_dir: Path) -> str:
    """Rank and cause of the first failure: who was killed first, since that makes others fail; else the oldest message left.

    Args: failed: exit codes by "rank N"; minus the signal where one ended it.  A worker leaves its message, and below it the
    traceback, in error-rankN.txt.
    """
    for name, code in failed.items():
        if code < 0:
            return f"{name}: killed by {signal.Signals(-code).name}" + (
                " (out of memory?)" if code == -signal.SIGKILL else ""
            )
    messages = sorted(run_dir.glob("error-rank*.txt"), key=lambda path: path.stat().st_mtime_ns)
    if messages:
        return messages[0].read_text().splitlines()[0]
    name, code = next(iter(failed.items()))
    return f"{name}: exit code {code}"


def stop_workers(workers: list[subprocess.Popen[bytes]]) -> None:
    """End what still runs: politely, and after 5 s for good."""
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    deadline = time.time() + 5
    for worker in workers:
        try:
            worker.wait(max(0.1, deadline - time.time()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


@contextlib.contextmanager
def graceful_shutdown() -> Iterator[list[int]]:
    """Within this context a first Ctrl-C or SIGTERM is noted in the list that it gives, and a second one ends the work."""
    asked: list[int] = []

    def note(number: int, _: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_machines(cfg: Config) -> None:
    """Refuse a deployment on nodes and GPUs that are not there. Asks the driver's device files, not torch.

    Raises: ValueError naming the key.
    """
    deploy = cfg.deploy
    if deploy.hostfile:
        check_hostfile(Path(deploy.hostfile).expanduser(), cfg)
        return
    if deploy.nodes > 1 and deploy.node_rank is None:
        raise ValueError(
            f"deploy.nodes={deploy.nodes}: how are they reached? Give deploy.hostfile=FILE, or start the command on each of them "
            "with deploy.node_rank=N deploy.master=HOST:PORT (docs/deployment.md)"
        )
    if deploy.device == Device.cpu:
        return
    there = count_gpus()
    if there < deploy.processes_per_node:
        raise ValueError(
            f"deploy.processes_per_node={deploy.processes_per_node}, but this machine shows {there} NVIDIA GPU(s): use deploy=cpu, or fewer deploy.processes_per_node"
        )


def check_hostfile(path: Path, cfg: Config) -> None:
    if not path.is_file():
        raise ValueError(
            f"deploy.hostfile={path}: no such file; it has a line for each node: HOST slots={cfg.deploy.processes_per_node}"
        )
    hosts = re.findall(r"^\s*([^#\s]\S*)\s+slots=(\d+)", path.read_text(), re.MULTILINE)
    enough = [host for host, slots in hosts if int(slots) >= cfg.deploy.processes_per_node]
    if len(hosts) < cfg.deploy.nodes or len(enough) < len(hosts):
        wanted = f"deploy.nodes={cfg.deploy.nodes} of deploy.processes_per_node={cfg.deploy.processes_per_node}"
        raise ValueError(
            f"deploy.hostfile={path}: {len(hosts)} node(s), {len(enough)} with enough slots, for {wanted}"
        )
    if shutil.which("pdsh") is None:
        raise ValueError(
            "deploy.hostfile: DeepSpeed reaches the nodes by pdsh, which is not installed; or use deploy.node_rank"
        )


def count_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    return len(
        [path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    )
