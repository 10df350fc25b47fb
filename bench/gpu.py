"""What a GPU does with this framework: one markdown table per work.

    python bench/gpu.py all
    python bench/gpu.py WORK... [--set KEY=VALUE] [--trl-ppo DIR] [--device cpu]

WORK is one of
    sampling          tokens per second, by engine and batch
    update            tokens per second, and the share of the GPU's peak in model-FLOPs
    chunks            log-probabilities of tokens, by the size of their chunks
    packing           padding-free batches against padded ones
    synchronisations  how often the host waits for the GPU, and where
    ppo               seconds of sampling, scoring and update; with --trl-ppo against TRL
    memory            the plan of the memory against the measured peak

Models have the shapes of OPT-1.3B (actor) and OPT-350M (reward model and critic) and random
weights; settings are those of `stage=ppo actor=opt1.3b deploy=single_gpu`. It needs no network, and
has not been run on a GPU yet. Every time depends on the GPU, its driver and the versions that are
printed first; below each table stands what else its numbers depend on.

--device cpu runs the same code with tiny sizes: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_works import Table
    from random_models import Bench

ROOT = Path(__file__).resolve().parents[1]
WORKS = {  # the module of each
    "sampling": "gpu_works",
    "update": "gpu_works",
    "chunks": "gpu_works",
    "packing": "gpu_works",
    "synchronisations": "gpu_ppo",
    "ppo": "gpu_ppo",
    "memory": "gpu_ppo",
}


def main() -> None:
    args = make_parser().parse_args()
    os.environ["DS_ACCELERATOR"] = args.device
    import torch
    from accelerator import NO_GPU, synchronize

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"{NO_GPU}: nothing is measured; --device cpu tries the code in tiny sizes"
        )
    from random_models import Bench, settings

    from rlhf.distributed.engine import init_distributed
    from rlhf.worker import prepare_environment

    prepare_environment()
    if args.device == "cpu":
        torch.set_num_threads(1)
    device = init_distributed()
    names = WORKS if "all" in args.work else args.work
    print("\n".join(describe(device)), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            torch.manual_seed(0)
            bench = Bench(settings(args.device, args.set), device, Path(folder))
            print(f"\n## {name}\n\n{work_of(name)(bench)}", flush=True)
            synchronize(device)
            free_memory()
        if args.trl_ppo and "ppo" in names:
            print(f"\n## ppo against TRL\n\n{against_trl(args, Path(folder))}", flush=True)
    torch.distributed.destroy_process_group()


def work_of(name: str) -> Callable[[Bench], Table]:
    """The function that measures."""
    work: Callable[[Bench], Table] = getattr(importlib.import_module(WORKS[name]), name)
    return work


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog="More at the head of this file."
    )
    parser.add_argument("work", nargs="+", choices=["all", *WORKS])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    setting = "a setting, as for train.py stage=ppo; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=setting)
    target = "a directory of `pip install --no-deps --target DIR trl==1.12.0`"
    parser.add_argument("--trl-ppo", type=Path, help=target)
    return parser


def describe(device: object) -> list[str]:
    """What the numbers depend on: GPU, versions, and the revision of the code."""
    import torch

    from rlhf.runs.directory import describe_environment

    about = describe_environment()
    name = "CPU, tiny sizes: the numbers mean nothing"
    if torch.cuda.is_available() and str(device) != "cpu":
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        name = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    packages = ("torch", "deepspeed", "transformers")
    versions = ", ".join(f"{one} {about['packages'][one]}" for one in packages)
    changes = ", with changes" if about["git_dirty"] else ""
    return [name, versions, f"revision {about['git'][:12]}{changes}"]


def free_memory() -> None:
    """Give the memory of the work before to the next one."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def against_trl(args: argparse.Namespace, folder: Path) -> str:
    """What bench/run.py says of a PPO iteration, ours and TRL's in turns."""
    from random_models import write_random_pairs

    write_random_pairs(folder / "pairs.jsonl", rows=2000)
    command = [sys.executable, str(ROOT / "bench" / "run.py"), "ppo", "--device", args.device]
    command += ["--pairs", str(folder / "pairs.jsonl"), "--trl-ppo", str(args.trl_ppo)]
    command += ["--out", str(folder / "trl"), "--wait", "0"]
    if args.device == "cpu":
        command += ["--samples", "1", "--batch", "4", "--prompt", "128", "--new", "8"]
        command += ["--threads", "1"]
    else:
        command += ["--shape", "large", "--precision", "bf16", "--batch", "64", "--prompt", "256"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment())
    if done.returncode:
        raise SystemExit(f"the comparison with TRL ended with {done.returncode}")
    return done.stdout


def environment() -> dict[str, str]:
    """This process's, without its place in a process group and its choice of device."""
    own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    return {name: value for name, value in os.environ.items() if name not in own}


if __name__ == "__main__":
    main()
