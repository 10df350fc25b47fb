"""One process of a run: python -m rlhf.worker RUN_DIR. Reads RUN_DIR/config.yaml, never imports Hydra.

train.py starts it; run by hand it repeats the run of that directory, for a debugger.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path


def main(run_dir: Path) -> None:
    prepare_environment()
    import torch
    from transformers.utils import logging as transformers_logging

    from rlhf.config.choices import Device
    from rlhf.config.deployment import threads_per_process
    from rlhf.config.loading import load_config
    from rlhf.config.stage_graph import is_rl
    from rlhf.distributed import collectives
    from rlhf.distributed.engine import init_distributed
    from rlhf.reporting import curves
    from rlhf.runs import launch
    from rlhf.runs.directory import write_json
    from rlhf.runs.log import first_line, log
    from rlhf.training import checkpoint
    from rlhf.training.tracker import finish_wandb, set_up_logging

    transformers_logging.disable_progress_bar()
    started = time.time()
    try:
        device = (
            init_distributed()
        )  # first: on another node this process may be here before node 0 has written config.yaml
        set_up_logging(run_dir)
        collectives.assert_same_across_ranks(
            run_dir.name, "the run; start all nodes with the same command"
        )
        cfg = load_config(run_dir / "config.yaml")
        stage = cfg.stage.name
        if cfg.deploy.device == Device.gpu and device.type == "cpu":
            raise RuntimeError(
                "deploy.device=gpu, but this torch finds none: it may be built without CUDA, or not fit the driver"
            )
        if cfg.deploy.device == Device.cpu and device.type != "cpu":
            raise RuntimeError(
                "deploy.device=cpu, but this process is on a GPU: set DS_ACCELERATOR=cpu"
            )
        if cfg.deterministic:
            os.environ.setdefault(
                "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
            )  # cuBLAS reads it when it starts
            torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_num_threads(threads_per_process(cfg))
        torch.manual_seed(
            cfg.seed
        )  # the same on every process: it decides weights; sampling has streams of its own
        file = "rl" if is_rl(stage) else {"eval": "evaluate"}.get(stage, stage)
        module = importlib.import_module(f"rlhf.stages.{file}")  # the others' libraries take time
        metrics = module.run(cfg, run_dir)
        if collectives.rank() == 0:
            if stage in curves.PANELS or is_rl(stage):
                curves.plot_curves(run_dir, stage)
            if is_rl(stage):
                curves.plot_frontier(run_dir, metrics)
            write_json(
                run_dir / "result.json",
                {"metrics": metrics, "seconds": round(time.time() - started, 1)},
            )
        collectives.barrier()  # all end together: another node's next workers must not find those of this stage
    except checkpoint.Stopped as asked:
        log.info(str(asked))
        finish_wandb()
        collectives.barrier()
        logging.shutdown()
        os._exit(launch.STOPPED)
    except Exception as error:
        log.debug(
            "failed", exc_info=True
        )  # the traceback is for the log and the file, their first line for the user
        text = f"rank {os.environ['RANK']}: {type(error).__name__}: {first_line(error)}\n\n{traceback.format_exc()}"
        with contextlib.suppress(OSError):  # on a node whose run directory is not that of node 0
            (run_dir / f"error-rank{os.environ['RANK']}.txt").write_text(text)
        logging.shutdown()
        os._exit(1)  # at once: leaving the group would wait for the others, who wait for this one
    torch.distributed.destroy_process_group()


def prepare_environment() -> None:
    """Die with the parent, be a group of one when started by hand, and keep the libraries quiet."""
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1" and "MASTER_PORT" not in os.environ:
        import socket

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    quiet = {
        "TOKENIZERS_PARALLELISM": "false",
        "DS_LOG_LEVEL": "error",
        "DEEPSPEED_LOG_LEVEL": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # what is left is the libraries' own teardown, in which a thread of theirs can abort the process: a finished run would be called failed
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)
