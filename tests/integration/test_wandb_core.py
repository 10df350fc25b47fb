"""W&B's own process, wandb-core, is killed: one warning, and nothing else changes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import REPO, SLOW, lines, metrics, runs_in, summary, train

from rlhf.training import tracker

pytestmark = pytest.mark.full
MOMENTS = ["start", 5, 29]  # or rows of metrics


def cores_in(folder: Path) -> list[int]:
    """The processes wandb-core that work in a folder."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                command = (process / "cmdline").read_bytes()
                if b"wandb-core" in command and (process / "cwd").resolve() == folder.resolve():
                    found.append(int(process.name))
            except OSError:  # it has ended, or is another user's
                continue
    return found


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_run_goes_on_and_learns_the_same(moment: str | int, tmp_path: Path) -> None:
    said = disturb(tmp_path, moment, signal.SIGKILL)
    assert said.count("W&B: ") == 1 and "only in its own files" in said and "Traceback" not in said


def test_a_core_that_hangs_is_given_up(tmp_path: Path) -> None:
    """It is stopped, not ended: nothing answers any more."""
    said = disturb(tmp_path, 5, signal.SIGSTOP)
    assert f"W&B: no answer in {tracker.WANDB_SECONDS:g} s" in said and "Traceback" not in said


def disturb(tmp_path: Path, moment: str | int, number: signal.Signals) -> str:
    """Send a signal to W&B's process, and compare the run with one that nobody disturbs.

    Returns: what the command has printed.
    """
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    plain.mkdir()
    killed.mkdir()
    assert train(*SLOW, cwd=plain).returncode == 0
    command = [sys.executable, str(REPO / "train.py"), *SLOW, "wandb.mode=offline"]
    output = tmp_path / "output"  # a file: a process that is stopped would keep a pipe open
    with output.open("w") as file:
        process = subprocess.Popen(command, cwd=killed, stdout=file, stderr=file)
    deadline, done = time.time() + 120, False
    while not done and process.poll() is None:
        assert time.time() < deadline
        rows = sum(lines(file) for file in killed.glob("outputs/sft-*/metrics.jsonl"))
        if (cores := cores_in(killed)) and (moment == "start" or rows >= int(moment)):
            for core in cores:
                os.kill(core, number)
            done = True
        time.sleep(0.005)
    process.wait(timeout=240)
    for core in cores_in(killed):
        os.kill(core, signal.SIGKILL)
    said = output.read_text()
    assert done and process.returncode == 0, said
    [one], [other] = runs_in(plain)["sft"], runs_in(killed)["sft"]
    assert summary(one)["metrics"] == summary(other)["metrics"]
    losses = [[row["loss"] for row in metrics(run)] for run in (one, other)]
    assert losses[0] == losses[1] and len(losses[0]) == 30
    return said
