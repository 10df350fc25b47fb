"""What precision, ZeRO stage and micro-batches change in a model's first five optimizer steps.

    python bench/precision.py [--processes 2] [--device cuda]

An SFT policy of the tiny size. Its weights start as numbers that bf16 has, so that all cases
compute the same function. One batch of 16 sequences is trained on for five steps, in micro-batches
of 1 to 16, with ZeRO 0 to 3, in fp32, bf16, autocast and (one process) fp16, with and without LoRA.
--cases takes the first letters of some precisions. Each case is compared with fp32 at ZeRO 0 in one
micro-batch:

- first update: mean length over all trained weights, in learning rates;
- its difference: the share of that length by which it differs, on weights with a clear gradient;
- gradient: of the first step, its difference from fp32's, relative to fp32's norm;
- summed: the same, from that of the same precision with ZeRO 2 in one micro-batch;
- norms: of the five steps' gradients, the largest relative difference.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.runs.environment import free_port

ROWS, TOKENS, STEPS = 16, 24, 5
LR = 1e-3
PRECISIONS = ("fp32", "bf16", "autocast", "fp16")
MICRO_BATCHES = (1, 4, 16)
LORA_RANKS = (0, 4)
SHARES = ("its difference", "gradient", "summed", "norms")


@dataclass(frozen=True)
class Case:
    precision: str = "fp32"
    zero: int = 0
    micro_batch: int = ROWS
    lora: int = 0  # rank
    overlap: bool = False  # deploy.overlap_comm


@dataclass
class CaseResult:
    """What training a case gave. Tensors are by the name of the weight, in float32."""

    gradient: dict[str, Tensor] = field(default_factory=dict)  # of the first step
    update: dict[str, Tensor] = field(default_factory=dict)  # the first one, in learning rates
    norms: list[float] = field(default_factory=list)
    early_steps: int = 0  # that Adam has counted before the first one

    def difference(self, other: CaseResult) -> dict[str, float]:
        """How another case differs from this one; see the top of this file."""
        names = self.gradient.keys()
        gradient = torch.cat([self.gradient[name].flatten() for name in names])
        error = torch.cat([other.gradient[name].flatten() for name in names]) - gradient
        update, changed = (
            torch.cat([one.update[name].flatten() for name in names]) for one in (self, other)
        )
        clear = gradient.abs() > gradient.abs().mean()  # rounding cannot turn its sign
        return {
            "first update": float(changed.abs().mean()),
            "its difference": float((changed - update)[clear].abs().mean() / update.abs().mean()),
            "gradient": float(error.norm() / gradient.norm()),
            "norms": max(abs(a / b - 1) for a, b in zip(other.norms, self.norms)),
        }


def train_case(case: Case, folder: Path) -> CaseResult:
    """Five optimizer steps of one case, by the engine and the step that all stages use."""
    from deepspeed.utils import safe_get_full_grad

    from rlhf.distributed import collectives
    from rlhf.training.optimizer_step import optimizer_step

    engine = build_case_engine(case, folder)
    ids = torch.randint(5, 400, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    rank, world = collectives.rank(), collectives.world_size()
    mine = torch.arange(ROWS // world * rank, ROWS // world * (rank + 1))
    micro_batches = mine.split(min(case.micro_batch, len(mine)))

    def loss_of(rows: Tensor) -> Tensor:
        wanted = torch.ones_like(ids[rows], dtype=torch.bool)
        wanted[:, 0] = False
        mask = torch.ones_like(ids[rows])
        return -engine(ids[rows], mask, wanted)[0].sum() / (ROWS * (TOKENS - 1))

    result = CaseResult(early_steps=counted_steps(engine.optimizer))
    step = engine.step

    def observed_step() -> None:
        if not result.gradient:
            scale = engine.optimizer.loss_scale if engine.fp16_enabled() else 1
            for name, weight in engine.module.named_parameters():
                if weight.requires_grad:
                    result.gradient[name] = safe_get_full_grad(weight).float() / scale
        step()

    engine.step = observed_step
    before = trained_weights(engine)
    for i in range(STEPS):
        losses = [partial(loss_of, rows) for rows in micro_batches]
        result.norms.append(optimizer_step(engine, losses, LR))
        if not i:
            after = trained_weights(engine)
            result.update = {name: (after[name] - before[name]) / LR for name in before}
    engine.destroy()
    return result


def build_case_engine(case: Case, folder: Path) -> Any:
    """The engine of a policy whose weights are numbers that bf16 has."""
    from deepspeed.accelerator import get_accelerator

    from rlhf import compose
    from rlhf.config.choices import Device, Precision
    from rlhf.distributed.engine import build_engine
    from rlhf.models.loading import DTYPES, load_policy, load_tokenizer

    overrides = [
        "stage=sft",
        f"deploy.precision={case.precision}",
        f"deploy.zero_stage={case.zero}",
        f"deploy.overlap_comm={str(case.overlap).lower()}",
        f"deploy.device={'cpu' if get_accelerator().device_name() == 'cpu' else 'gpu'}",
        "deploy.bucket_mb=1",
        f"actor.lora.rank={case.lora}",
    ]
    cfg = compose.typed_config(compose.compose_alone(overrides, []))
    tokenizer = load_tokenizer("builtin:tiny")

    def load() -> Any:
        torch.manual_seed(1)
        policy = load_policy("builtin:tiny", tokenizer, Precision.fp32, adapter=cfg.actor.lora)
        for name, weight in policy.named_parameters():
            if ".lora_B." in name:  # zero at the start of a training: the other half learns nothing
                weight.data.normal_(0, 0.02)
            weight.data = weight.data.bfloat16().to(DTYPES[cfg.deploy.precision])
        return policy

    if cfg.deploy.device == Device.cpu:
        # DeepSpeed refuses fp16 on CPU, though torch computes it there
        get_accelerator().is_fp16_supported = lambda: True  # type: ignore[method-assign]
    engine = build_engine(load, cfg, "actor", folder)
    engine.train()
    return engine


def trained_weights(engine: Any) -> dict[str, Tensor]:
    """The optimizer's weights, in float32."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, weight in engine.module.named_parameters():
        if weight.requires_grad:
            whole = safe_get_full_fp32_param(weight)  # None without ZeRO
            found[name] = (weight.data if whole is None else whole).float().clone()
    return found


def counted_steps(optimizer: Any) -> int:
    """The steps that Adam has counted. Args: optimizer: DeepSpeed's, around torch's, or torch's."""
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def all_cases(processes: int) -> list[Case]:
    """Every combination, each on its own line of the table."""
    cases = [
        Case(precision, zero, micro, lora)
        for precision, zero, micro, lora in itertools.product(
            PRECISIONS, range(4), MICRO_BATCHES, LORA_RANKS
        )
        if precision != "fp16" or processes == 1
    ]
    return cases + [Case("bf16", zero, 4, 0, overlap=True) for zero in (1, 2, 3)]


def measure(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """The difference of each case from fp32 at ZeRO 0 in one micro-batch, in this process group."""
    from rlhf import compose

    compose.register()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        learned_by = functools.cache(lambda case: train_case(case, Path(folder)))
        for case in cases:
            learned = learned_by(case)
            found = learned_by(Case(lora=case.lora)).difference(learned)
            whole = learned_by(Case(case.precision, 2, lora=case.lora))
            found |= {"summed": whole.difference(learned)["gradient"]}
            rows.append(vars(case) | found | {"early_steps": learned.early_steps})
    return rows


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    columns = ["precision", "ZeRO", "micro-batch", "LoRA", "overlap", "first update", *SHARES]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        place = [row["precision"], row["zero"], row["micro_batch"], row["lora"] or "no"]
        place.append("yes" if row["overlap"] else "no")
        parts = [f"{row[name]:.2%}" for name in SHARES]
        print("| " + " | ".join([*map(str, place), f"{row['first update']:.3f}", *parts]) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cases", help="first letters of the precisions; default: all", default="")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)  # of a worker of this script
    args = parser.parse_args()
    if args.rank is None:
        place = {"WORLD_SIZE": str(args.processes), "MASTER_ADDR": "127.0.0.1"}
        place |= {
            "MASTER_PORT": str(free_port()),
            "DS_ACCELERATOR": args.device,
            "OMP_NUM_THREADS": "1",
        }
        workers = [
            subprocess.Popen(
                [sys.executable, *sys.argv, "--rank", str(rank)],
                env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(args.processes)
        ]
        sys.exit(max(worker.wait() for worker in workers))
    from rlhf.distributed import collectives
    from rlhf.distributed.engine import init_distributed

    init_distributed()
    cases = [case for case in all_cases(args.processes) if case.precision.startswith(args.cases)]
    rows = measure(cases)
    if collectives.rank() == 0:
        print_table(rows)


if __name__ == "__main__":
    main()
