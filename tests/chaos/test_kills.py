"""Processes of a command are killed at random moments; the same command then ends with the same
bits. The processes: the command itself, a worker, W&B's own process, all of them."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from chaos_runs import KILLS, SEED, SHORT, copy_of
from helpers import REPO, runs_in, train
from worker_runs import same

pytestmark = pytest.mark.full

STAGES = ("sft", "rm", "ppo", "dpo", "grpo")
VICTIMS = ("command", "worker", "wandb-core", "all")
CASES = [*itertools.product(STAGES, (1, 2), (0, 2, 3))]  # stage, processes, ZeRO


class Kill(NamedTuple):
    """Whom to kill in which run, at which share of the time that the run takes."""

    stage: str
    processes: int
    zero: int
    victim: str
    moment: float

    def __str__(self) -> str:
        run = f"{self.stage}-{self.processes}x-zero{self.zero}"
        return f"{run}-{self.victim}-at-{self.moment:.2f}"


def draw_kills() -> list[Kill]:
    """The kills of this seed: every stage and every victim as often as the others."""
    moments = random.Random(SEED)
    by_stage = {stage: [c for c in CASES if c[0] == stage] for stage in STAGES}
    for cases in by_stage.values():
        moments.shuffle(cases)
    kills = []
    for i in range(KILLS):
        cases = by_stage[STAGES[i % len(STAGES)]]
        stage, processes, zero = cases[i // len(STAGES) % len(cases)]
        victim = VICTIMS[(i + i // len(VICTIMS)) % len(VICTIMS)]
        kills.append(Kill(stage, processes, zero, victim, moments.random()))
    return kills


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(REPO / "train.py"), *arguments],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes_of(command: psutil.Process) -> list[psutil.Process]:
    try:
        return [command, *command.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def is_core(process: psutil.Process) -> bool:
    try:
        return "wandb-core" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def is_worker(process: psutil.Process) -> bool:
    try:
        return "rlhf.worker" in process.cmdline()
    except psutil.Error:
        return False


def kill_one(process: subprocess.Popen[str], victim: str, seconds: float) -> list[psutil.Process]:
    """Kill the victim after so many seconds, or as soon as it is there.

    Returns: all processes of the command at that moment; none where it had ended.
    """
    command = psutil.Process(process.pid)
    time.sleep(seconds)
    while process.poll() is None:
        family = processes_of(command)
        victims = {
            "command": family[:1],
            "worker": [one for one in family if is_worker(one)][-1:],
            "wandb-core": [one for one in family if is_core(one)],
            "all": family,
        }[victim]
        for one in victims:
            os.kill(one.pid, signal.SIGKILL)
        if victims:
            return family
        time.sleep(0.01)
    return []


@pytest.mark.parametrize("kill", draw_kills(), ids=str)
def test_a_kill_costs_time_and_nothing_else(kill: Kill, parents: Path, tmp_path: Path) -> None:
    arguments = [
        *SHORT,
        f"stage={kill.stage}",
        f"deploy.processes_per_node={kill.processes}",
        f"deploy.zero_stage={kill.zero}",
        "deploy.micro_batch=3",
        "wandb.mode=offline",
    ]
    inputs = parents if kill.stage in ("ppo", "dpo", "grpo") else tmp_path / "nothing"
    inputs.mkdir(exist_ok=True)
    whole, killed = copy_of(inputs, tmp_path / "whole"), copy_of(inputs, tmp_path / "killed")
    started = time.monotonic()
    done = train(*arguments, cwd=whole)
    took = time.monotonic() - started
    assert done.returncode == 0, done.stderr

    moment, family = kill.moment, []
    while not family:  # where the run had ended before, earlier
        process = start([*arguments, "fresh=true"], killed)
        family = kill_one(process, kill.victim, moment * took)
        said = process.communicate(timeout=120)[1]
        moment /= 2
    _, left = psutil.wait_procs(family, timeout=60)
    assert not left, f"left behind: {left}"
    if kill.victim == "wandb-core":
        assert process.returncode == 0 and said.count("W&B: ") <= 1, said
    assert "Traceback" not in said

    done = train(*arguments, cwd=killed)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    [one], [other] = runs_in(whole)[kill.stage], runs_in(killed)[kill.stage]
    same(one, other)
