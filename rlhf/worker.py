"""One process of a run: python -m rlhf.worker RUN_DIR. Reads RUN_DIR/config.yaml, no Hydra.

train.py starts it, mostly before its turn and with - for RUN_DIR (rlhf/runs/early.py). Started by
hand it repeats the run of that directory, for a debugger.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import logging
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    import torch

    from rlhf.config.schema import Config

IMPORTING = "importing torch, transformers and DeepSpeed"
BEFORE_TORCH = ["datasets", "rlhf.config.loading"]  # they import neither torch nor DeepSpeed


def main(argument: str) -> None:
    """Run the stage of a run directory as one of its processes; the exit code says how it ended.

    Args: argument: the run directory, or - where it comes from the standard input.
    """
    # 1. the environment, which the libraries read when they are imported; and its turn
    run_dir = wait_for_turn() if argument == "-" else Path(argument)
    prepare_environment()
    from rlhf.base.log import announced, log

    with announced(IMPORTING), without_garbage_collection():
        import torch
        from transformers.utils import logging as transformers_logging

        from rlhf.base import watchdog
        from rlhf.config.loading import load_config
        from rlhf.distributed import collectives
        from rlhf.distributed.engine import init_distributed
        from rlhf.runs.failures import write_failure
        from rlhf.runs.launch import STOPPED
        from rlhf.training import checkpoint
        from rlhf.training.tracker import set_up_logging
        from rlhf.training.wandb_run import finish_wandb

    transformers_logging.disable_progress_bar()
    started = time.time()
    try:
        # 2. the process group: node 0 joins it when config.yaml is written
        device = init_distributed()
        set_up_logging(run_dir)
        same_run = "the run; start all nodes with the same command"
        collectives.assert_same_across_ranks(run_dir.name, same_run)
        # 3. the configuration, and what it says of torch
        cfg = load_config(run_dir / "config.yaml")
        check_device(cfg, device)
        configure_torch(cfg)
        watchdog.start(run_dir, os.environ["RANK"], cfg.deploy.watchdog_minutes)
        # 4. the stage
        metrics = run_stage(cfg, run_dir)
        if collectives.rank() == 0:
            write_result(cfg, run_dir, metrics, time.time() - started)
        # 5. all end together: the next workers of another node must not meet those of this stage
        collectives.barrier()
    except checkpoint.Stopped as stopped:
        watchdog.stop()
        log.info(str(stopped))
        finish_wandb()
        collectives.barrier()
        logging.shutdown()
        os._exit(STOPPED)
    except Exception as error:
        watchdog.stop()
        log.debug("failed", exc_info=True)  # the traceback is for train.log only
        write_failure(run_dir, os.environ["RANK"], error)
        logging.shutdown()
        # at once: leaving the process group would wait for the others, who wait for this process
        os._exit(1)
    watchdog.stop()
    torch.distributed.destroy_process_group()


def wait_for_turn() -> Path:
    """What a worker does that was started before its turn: import.

    Returns: its run directory. Where its turn does not come the process ends here.
    """
    # 1. what reads nothing of the environment that is not known yet
    keep_quiet()
    with without_garbage_collection():
        import_all(BEFORE_TORCH)
    # 2. torch, and the stage
    order = next_order()
    from rlhf.base.log import announced

    show = announced(IMPORTING) if order["announce"] else contextlib.nullcontext()
    with show, without_garbage_collection():
        import_all(order["modules"])
    # 3. the turn
    run_dir = Path(next_order()["run_dir"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    return run_dir


def next_order() -> dict[str, Any]:
    """A line of the process that has started this one; it sets what it says of the environment."""
    line = sys.stdin.readline()
    if not line:  # that process has ended
        os._exit(0)
    order: dict[str, Any] = json.loads(line)
    os.environ |= order["environment"]
    return order


def import_all(modules: Sequence[str]) -> None:
    """Import modules by name."""
    for module in modules:
        importlib.import_module(module)


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """For imports: they make a million objects that all stay. Python would look through them again
    and again, a fifth of the time; afterwards it leaves them out."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def check_device(cfg: Config, device: torch.device) -> None:
    """Raises: UserError where torch computes on another device than deploy.device."""
    from rlhf.base.errors import UserError
    from rlhf.config.choices import Device

    if cfg.deploy.device == Device.gpu and device.type == "cpu":
        raise UserError(
            "deploy.device=gpu, but torch finds no GPU: install a torch with CUDA that fits "
            "the driver"
        )
    if cfg.deploy.device == Device.cpu and device.type != "cpu":
        raise UserError("deploy.device=cpu, but this process is on a GPU: set DS_ACCELERATOR=cpu")


def configure_torch(cfg: Config) -> None:
    """Kernels, determinism, threads, and the seed."""
    import torch

    from rlhf.config.deployment import threads_per_process

    # cuDNN plans its attention anew for each shape, and sampling has another one at each token
    torch.backends.cuda.enable_cudnn_sdp(False)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True, warn_only=True)
        # with warn_only these add gradients in any order all the same
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.set_num_threads(threads_per_process(cfg))
    # the same on every process: it decides new weights; sampling has random streams of its own
    torch.manual_seed(cfg.seed)


def run_stage(cfg: Config, run_dir: Path) -> dict[str, float]:
    """Run the stage and return its final metrics. Imports the module of that stage only."""
    from rlhf.config.stage_graph import module_of

    metrics: dict[str, float] = importlib.import_module(module_of(cfg.stage.name)).run(cfg, run_dir)
    return metrics


def write_result(cfg: Config, run_dir: Path, metrics: dict[str, float], seconds: float) -> None:
    """result.json of a finished run, then its curves, without which it is finished too."""
    from rlhf.base.log import first_line, log
    from rlhf.reporting import curves
    from rlhf.runs.directory import write_json

    write_json(run_dir / "result.json", {"metrics": metrics, "seconds": round(seconds, 1)})
    try:
        curves.plot_run(run_dir, cfg.stage.name, metrics)
    except Exception as error:
        log.warning(f"the curves are not drawn: {type(error).__name__}: {first_line(error)}")


def prepare_environment() -> None:
    """End with the parent, be a group of one when started by hand, keep the libraries quiet."""
    from rlhf.base.streams import StderrThatMayClose

    keep_quiet()
    sys.stderr = cast(TextIO, StderrThatMayClose(sys.stderr))
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1" and "MASTER_PORT" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])


def keep_quiet() -> None:
    """No messages of libraries but those of errors."""
    from rlhf.runs.environment import QUIET

    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)


if __name__ == "__main__":
    main(sys.argv[1])
    # The run is finished. The libraries' own teardown is skipped: a thread of theirs can abort the
    # process in it, and the run would count as failed.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
