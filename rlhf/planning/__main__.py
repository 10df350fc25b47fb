"""What fits on one GPU: python -m rlhf.planning --gpu-memory-gb 24.

A table of the models in conf/model, each trained in full and with LoRA, by the plan of memory
(rlhf/planning/memory.py) with settings that take little: bf16, one sequence per forward pass,
activation checkpointing. Reward model and critic are as large as the policy. No torch here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from rlhf.base.interrupts import DONE, end_at_interrupt, run_interruptible

if __name__ == "__main__":
    end_at_interrupt()  # it only prints, so that there is nothing else to end

from rlhf import compose
from rlhf.base.errors import UserError
from rlhf.planning.formulas import GIB
from rlhf.planning.memory import make_plan

STAGES = ("sft", "rm", "dpo", "grpo", "ppo")
RANKS = {"full": 0, "LoRA": 16}
NOT_FOR_A_GPU = ("custom", "tiny")  # of conf/model: without a shape, and for tests
WIDE = 200  # columns: in a narrow terminal lines wrap, and no number is cut
FRUGAL = "deploy=small_gpu"


def models() -> list[str]:
    """The options of conf/model that have a shape."""
    names = sorted(file.stem for file in (compose.CONF / "model").glob("*.yaml"))
    return [name for name in names if name not in NOT_FOR_A_GPU]


def peaks(model: str, memory: float) -> Iterator[tuple[str, str, float, bool]]:
    """Stage, kind of training, peak in GiB, and whether it fits into so many GiB."""
    for kind, rank in RANKS.items():
        for stage in STAGES:
            typed = [f"stage={stage}", f"actor={model}", f"reward={model}", FRUGAL]
            typed += [f"actor.lora.rank={rank}", f"reward.lora.rank={rank}"]
            typed += [f"deploy.gpu_memory_gb={memory}"]
            plan = make_plan(compose.typed_config(compose.compose_alone(typed, [])), stage)
            yield stage, kind, plan.peak / GIB, plan.fits


def rows_of(names: Sequence[str], memory: float) -> Iterator[list[str]]:
    """A row of the table per model: the peak of each stage, and - where it does not fit."""
    for name in names:
        found = {(stage, kind): (peak, fits) for stage, kind, peak, fits in peaks(name, memory)}
        cells = (found[stage, kind] for stage in STAGES for kind in RANKS)
        yield [name, *(f"{peak:.1f}" if fits else "-" for peak, fits in cells)]


def main() -> int:
    """The command line; returns the exit code."""
    from rich import box
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m rlhf.planning", description=__doc__)
    parser.add_argument("--gpu-memory-gb", type=float, default=80, help="of the GPU; default 80")
    parser.add_argument("--models", nargs="+", choices=models(), default=models(), metavar="MODEL")
    args = parser.parse_args()
    if args.gpu_memory_gb <= 0:
        parser.error(f"--gpu-memory-gb {args.gpu_memory_gb}: must be above 0")
    compose.register()
    table = Table(
        title=f"GiB of {args.gpu_memory_gb:g} on one GPU, by stage",
        box=box.SIMPLE,
        padding=(0, 1),
        pad_edge=False,
    )
    table.add_column("model", no_wrap=True)
    for stage in STAGES:
        for kind in RANKS:
            table.add_column(f"{stage}\n{kind}", justify="right")
    try:
        rows = rows_of(args.models, args.gpu_memory_gb)
        for row in track(rows, "planning", len(args.models), transient=True):
            table.add_row(*row)
    except UserError as error:
        parser.error(str(error))
    Console(width=WIDE).print(table)
    print(
        f"-: does not fit. With {FRUGAL}; LoRA of rank {RANKS['LoRA']}; reward model as the actor."
    )
    return DONE


if __name__ == "__main__":
    sys.exit(run_interruptible(main))
