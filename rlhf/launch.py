"""Starts, watches and stops the worker processes of one run. No torch here."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rlhf.config import Config, Device


def run_workers(run_dir: Path, cfg: Config) -> None:
    """Run `python -m rlhf.worker run_dir` in `deploy.gpus` processes until all are done.

    When one fails the others are stopped. Ctrl-C and SIGTERM stop all; should this process be killed, its workers die with it.

    Raises: ValueError when there are fewer GPUs than wanted; RuntimeError with the first failed worker's rank, cause and log.
    """
    check_gpus(cfg)
    world = cfg.deploy.gpus
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = []
    with terminate_as_interrupt():
        try:
            for rank in range(world):
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                env = os.environ | {name: str(value) for name, value in place.items()}
                # a session of its own: Ctrl-C reaches this process only, which then stops the workers
                command = [sys.executable, "-m", "rlhf.worker", str(run_dir)]
                workers.append(subprocess.Popen(command, env=env, start_new_session=True, stdin=subprocess.DEVNULL))
            while any(worker.poll() is None for worker in workers) and not any(worker.poll() for worker in workers):
                time.sleep(0.05)
        finally:
            stop(workers)
    failed = next((rank for rank, worker in enumerate(workers) if worker.returncode > 0), None)
    if failed is None:  # only then look at those ended by a signal: a failure stops the others by one
        failed = next((rank for rank, worker in enumerate(workers) if worker.returncode), None)
    if failed is not None:
        cause = run_dir / f"error-rank{failed}.txt"
        code = workers[failed].returncode
        ending = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        line = (
            cause.read_text() if cause.exists() else f"rank {failed}: {ending}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
        )
        raise RuntimeError(f"{cfg.stage.name} failed, {line}; more in {run_dir / 'train.log'}")


def stop(workers: list[subprocess.Popen[bytes]]) -> None:
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
def terminate_as_interrupt() -> Iterator[None]:
    """Within this context SIGTERM ends the work as Ctrl-C does, so that workers are stopped."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_gpus(cfg: Config) -> None:
    """Refuse a deployment on GPUs that are not there. Asks the driver's device files, not torch."""
    if cfg.deploy.device == Device.cpu:
        return
    there = count_gpus()
    if there < cfg.deploy.gpus:
        raise ValueError(
            f"deploy.gpus={cfg.deploy.gpus}, but this machine shows {there} NVIDIA GPU(s): use deploy=cpu, or fewer deploy.gpus"
        )


def count_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    return len([path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])
