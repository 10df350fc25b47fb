"""Runs without `train.py`: their directories, their processes, and whether two are identical."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from helpers import REPO, composed, metrics
from safetensors.torch import load_file

from rlhf.config.loading import save_config
from rlhf.config.validation import check_config
from rlhf.runs import environment
from rlhf.runs.directory import config_for_stage

FIVE_STEPS = [
    "data.sandbox.demonstrations=96",
    "data.sandbox.pairs=96",
    "data.eval_rows=9",  # two processes cannot share them evenly
    "sft.max_steps=5",
    "rm.max_steps=5",
    "rl.max_steps=2",
    "rl.epochs=2",
    "rl.minibatches=2",
    "rl.batch_size=16",
    "rollout.max_new_tokens=12",
    "wandb.mode=disabled",
    "deploy.threads=1",
    "deploy.bucket_mb=1",
    # the gradient of a key's bias is rounding, which Adam blows up unless its epsilon is above that
    "sft.adam_eps=1e-5",
    "rm.adam_eps=1e-5",
    # a token on the very edge of a clip is cut in one order of additions and not in another
    "rl.clip_low=5",
    "rl.critic.value_clip=5",
]


NOT_REPEATED = (
    "time",
    "responses_per_second",
    "timing_s/rollout",
    "timing_s/update",
    "timing_s/step",
)  # clocks


FILES = ("metrics.jsonl", "samples.jsonl", "rollouts.jsonl")


def prepare(
    root: Path,
    name: str,
    stage: str,
    inputs: dict[str, str],
    overrides: Sequence[str],
    **deploy: object,
) -> Path:
    """A run directory with its configuration, as train.py makes it."""
    other_data = any(override.startswith("data=") for override in overrides)
    steps = [one for one in FIVE_STEPS if not (other_data and "sandbox" in one)]
    cfg = composed(f"stage={stage}", *steps, *overrides)
    for key, value in deploy.items():
        target = cfg.deploy.offload if key in ("optimizer", "parameters", "frozen") else cfg.deploy
        assert hasattr(target, key), key
        setattr(target, key, value)
    assert check_config(cfg) == []
    run = root / f"{name}-{stage}"
    run.mkdir()
    save_config(config_for_stage(cfg, stage, inputs), run / "config.yaml")
    return run


def begin(
    command: Sequence[object], processes: int, stderr: int = subprocess.DEVNULL
) -> list[subprocess.Popen]:
    """Start a python command in so many processes that are to meet."""
    place = {
        "WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": environment.free_port(),
        "PYTHONPATH": REPO,
    }
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=os.environ
            | {
                k: str(v)
                for k, v in {
                    **place,
                    "DS_ACCELERATOR": "cpu",
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                }.items()
            },
            stderr=stderr,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(processes)
    ]


def work(runs: Sequence[Path | str], processes: int) -> None:
    """Do the runs, one after the other, in so many processes. Arguments as in several_runs.py."""
    workers = begin([REPO / "tests" / "several_runs.py", *runs], processes, subprocess.PIPE)
    errors = [worker.communicate(timeout=1500)[1] for worker in workers]
    assert not any(worker.returncode for worker in workers), errors[0][-3000:]


def kill_when(run: Path, processes: int, ready: Callable[[], bool]) -> None:
    """Start a run, and kill all its processes at that moment."""
    workers = begin(["-m", "rlhf.worker", run], processes)
    deadline = time.time() + 120
    while not ready():
        assert time.time() < deadline and all(worker.poll() is None for worker in workers), (
            "it ended before that"
        )
        time.sleep(0.005)
    for worker in workers:
        worker.kill()
        worker.wait()


def rows_of(run: Path, name: str) -> list[dict]:
    rows = (
        [json.loads(line) for line in (run / name).read_text().splitlines()]
        if (run / name).exists()
        else []
    )
    return [{key: value for key, value in row.items() if key not in NOT_REPEATED} for row in rows]


def same(one: Path, two: Path) -> None:
    """Identical: every logged number of every step, every sample, and every bit of all weights."""
    for name in FILES:
        assert rows_of(one, name) == rows_of(two, name), name
    assert [row["step"] for row in metrics(two)] == list(range(1, len(metrics(one)) + 1))
    final, also = (json.loads((run / "result.json").read_text())["metrics"] for run in (one, two))
    assert final == also
    for part in ("model", "critic", "model_ema", "model_best"):
        assert (one / part).exists() == (two / part).exists(), part
        if (one / part).exists():
            weights, others = (load_file(run / part / "model.safetensors") for run in (one, two))
            assert weights.keys() == others.keys() and all(
                torch.equal(weights[key], others[key]) for key in weights
            ), part
