"""Starts, watches and stops the worker processes of one run. No torch here."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from rlhf.base.errors import UserError
from rlhf.base.log import plural, say
from rlhf.base.own_processes import end_with_parent, own_source, python_module
from rlhf.base.streams import drop_output
from rlhf.config.choices import Device
from rlhf.config.schema import Config
from rlhf.runs import early
from rlhf.runs.directory import find_checkpoints
from rlhf.runs.environment import free_port, worker_environments
from rlhf.runs.failures import WorkerError, read_failures, take_stacks
from rlhf.runs.gpus import check_gpus, claim_gpus, memory_mismatch

WORKER = "rlhf.worker"
# exit code of a worker that was asked to stop and has saved (EX_TEMPFAIL: try again later)
STOPPED = 75
Workers = dict[str, "subprocess.Popen[bytes]"]  # by "rank N"


def run_workers(run_dir: Path, cfg: Config, next_stage: str | None = None) -> bool:
    """Run `python -m rlhf.worker run_dir` in all processes of the deployment, until all are done.

    With deploy.hostfile DeepSpeed's launcher starts them on all nodes; otherwise this process
    starts those of its own node. When one fails, the others are stopped. At Ctrl-C, SIGTERM or
    SIGHUP they save a checkpoint and end; at a second one they are stopped at once. When this
    process is killed, its workers die with it.

    Args: next_stage: the one that this command runs after it; its workers import meanwhile.
    Returns: whether a stop was requested, but the run was done by then.
    Raises: UserError of a worker, with the last good checkpoint; WorkerError with rank, cause and
        log of a failure that is none of the user's; KeyboardInterrupt after a stop.
    """
    workers: Workers = {}
    with claim_gpus(cfg), graceful_shutdown() as signals:
        try:
            start_workers(workers, run_dir, cfg)
            if next_stage:
                early.prepare(cfg, next_stage, is_next=False)
            failed = wait_for_workers(workers, run_dir, cfg, signals)
        finally:
            stop_workers(list(workers.values()))
    codes = [worker.returncode for worker in workers.values()]
    if was_stopped(codes, cfg, stop_requested=bool(signals)):
        raise KeyboardInterrupt
    if failed:
        raise_failure(failed, run_dir, cfg)
    # DeepSpeed's launcher hides some failures
    if not cfg.deploy.node_rank and not (run_dir / "result.json").exists():
        log_file = run_dir / "train.log"
        raise WorkerError(f"{cfg.stage.name} ended without a result; look into {log_file}")
    return bool(signals)


def start_workers(workers: Workers, run_dir: Path, cfg: Config) -> None:
    """Start the workers of this node, or DeepSpeed's launcher, and add them to `workers`.

    Workers that have been prepared for this stage are taken instead.
    """
    workers |= early.take(run_dir, cfg)
    if workers:
        return
    commands: dict[str, tuple[list[str], dict[str, str]]]
    if cfg.deploy.hostfile:
        commands = {f"on {cfg.deploy.hostfile}": (launcher_command(run_dir, cfg), {})}
    else:
        command = [*python_module(WORKER), str(run_dir)]
        commands = {f"rank {env['RANK']}": (command, env) for env in worker_environments(cfg)}
    for name, (command, env) in commands.items():
        # a session of its own: Ctrl-C reaches this process only, which then stops the workers
        workers[name] = subprocess.Popen(
            command,
            env=os.environ | own_source() | env,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            preexec_fn=end_with_parent,
        )


def wait_for_workers(
    workers: Workers, run_dir: Path, cfg: Config, signals: Sequence[int]
) -> dict[str, int]:
    """Wait until all workers have ended or one has failed; pass a first signal on to them.

    Args: signals: filled by `graceful_shutdown`.
    Returns: exit codes of those that failed.
    """
    failed: dict[str, int] = {}
    notified = False
    while not failed and any(worker.poll() is None for worker in workers.values()):
        time.sleep(0.05)
        if signals and not notified:
            notified = True
            request_stop(workers, run_dir, cfg)  # first: nobody may read the line (| tee)
            text = "stopping (once training has begun: after this step, with a checkpoint); "
            say(text + "repeat it to stop at once")
        failed = {
            name: worker.returncode
            for name, worker in workers.items()
            if worker.poll() and worker.returncode != STOPPED
        }
    return failed


def request_stop(workers: Workers, run_dir: Path, cfg: Config) -> None:
    """Ask the workers to save a checkpoint and end."""
    if cfg.deploy.hostfile:
        # DeepSpeed's launcher would give the workers 30 s; they look for this file themselves
        (run_dir / "stop").touch()
        return
    for worker in workers.values():
        worker.terminate()


def was_stopped(codes: Sequence[int], cfg: Config, stop_requested: bool) -> bool:
    """Whether the workers ended because a stop was requested, on this node or another one."""
    failure = any(code > 0 and code != STOPPED for code in codes)
    killed = any(code < 0 for code in codes)
    if failure and not killed and not cfg.deploy.hostfile:
        return False
    return STOPPED in codes or (stop_requested and any(codes))


def raise_failure(failed: dict[str, int], run_dir: Path, cfg: Config) -> NoReturn:
    """Raise the first failure with the last good checkpoint.

    Args: failed: exit codes by "rank N".
    Raises: UserError, or WorkerError, which says where the log is.
    """
    take_stacks(run_dir, cfg.deploy.watchdog_minutes)
    intact, _ = find_checkpoints(run_dir)
    checkpoint = f"; the last good checkpoint is {intact[0][0]}" if intact else ""
    if intact and cfg.fresh:
        checkpoint += ", from which the command continues without fresh=true"
    failures = [] if any(code < 0 for code in failed.values()) else read_failures(run_dir)
    if failures and failures[0].is_user_error:
        raise UserError(f"{cfg.stage.name}: {failures[0].message}{checkpoint}")
    where = f"the traceback is in {run_dir / 'train.log'}"
    if not failures:
        where = f"the log is {run_dir / 'train.log'}"
    raise WorkerError(
        f"{cfg.stage.name} failed, {first_failure(failed, run_dir)}; {where}{checkpoint}"
    )


def launcher_command(run_dir: Path, cfg: Config) -> list[str]:
    """DeepSpeed's launcher, which reaches the nodes of a hostfile by pdsh and ssh."""
    deploy = cfg.deploy
    command = [
        *python_module("deepspeed.launcher.runner"),
        "--log_level",
        "error",
        "--force_multi",
        "--hostfile",
        str(Path(str(deploy.hostfile)).expanduser()),
    ]
    command += ["--num_nodes", str(deploy.nodes), "--num_gpus", str(deploy.processes_per_node)]
    if deploy.master:
        host, port = deploy.master.rsplit(":", 1)
        command += ["--master_addr", host, "--master_port", port]
    else:  # DeepSpeed takes the address of the first host, and 29500 for every run
        command += ["--master_port", str(free_port())]
    return [*command, "--no_local_rank", "--module", WORKER, str(run_dir)]


def first_failure(failed: dict[str, int], run_dir: Path) -> str:
    """Rank and cause of the first failure.

    That is a worker that was killed, since this makes others fail; else the oldest message.

    Args: failed: exit codes by "rank N"; minus the signal where a signal ended the worker.
    """
    for name, code in failed.items():
        if code < 0:
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            return f"{name}: killed by {signal.Signals(-code).name}{hint}"
    for failure in read_failures(run_dir):
        return f"rank {failure.rank}: {failure.cause}"
    name, code = next(iter(failed.items()))
    return f"{name}: exit code {code}"


def stop_workers(workers: list[subprocess.Popen[bytes]]) -> None:
    """End the workers that still run: SIGTERM, and SIGKILL after 5 s."""
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
    """Within this context a first Ctrl-C, SIGTERM or SIGHUP is only added to the list it gives.

    A second one raises KeyboardInterrupt. SIGHUP is what a terminal sends when it is closed; under
    nohup it stays ignored.
    """
    signals: list[int] = []

    def note(number: int, _: object) -> None:
        if number == signal.SIGHUP:
            drop_output(1, 2)  # the terminal is gone
        if signals:
            raise KeyboardInterrupt
        signals.append(number)

    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_machines(cfg: Config) -> None:
    """Refuse a deployment on missing nodes and GPUs. Looks at the driver's files, not at torch.

    Raises: UserError that names the key.
    """
    deploy = cfg.deploy
    if deploy.hostfile:
        check_hostfile(Path(deploy.hostfile).expanduser(), cfg)
        return
    if deploy.nodes > 1 and deploy.node_rank is None:
        raise UserError(
            f"deploy.nodes={deploy.nodes}: how are they reached? Give deploy.hostfile=FILE, or "
            "start the command on each of them with deploy.node_rank=N deploy.master=HOST:PORT "
            "(docs/deployment.md)"
        )
    if deploy.device == Device.cpu:
        return
    check_gpus(cfg)
    if line := memory_mismatch(cfg):
        say(line)


def check_hostfile(path: Path, cfg: Config) -> None:
    """Raises: UserError where the hostfile lacks nodes or slots, or pdsh is not installed."""
    deploy = cfg.deploy
    if not path.is_file():
        raise UserError(
            f"deploy.hostfile={path}: no such file; it needs a line per node: "
            f"HOST slots={deploy.processes_per_node}"
        )
    hosts = re.findall(
        r"^\s*([^#\s]\S*)\s+slots=(\d+)", path.read_text(encoding="utf-8"), re.MULTILINE
    )
    enough = [host for host, slots in hosts if int(slots) >= deploy.processes_per_node]
    if len(hosts) < deploy.nodes or len(enough) < len(hosts):
        raise UserError(
            f"deploy.hostfile={path}: {plural(len(hosts), 'node')}, {len(enough)} with enough "
            f"slots, for deploy.nodes={deploy.nodes} of "
            f"deploy.processes_per_node={deploy.processes_per_node}"
        )
    if shutil.which("pdsh") is None:
        raise UserError(
            "deploy.hostfile: DeepSpeed reaches the nodes by pdsh, which is not installed; "
            "install it, or use deploy.node_rank"
        )
