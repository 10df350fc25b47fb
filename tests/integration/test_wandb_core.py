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

FULL = pytest.mark.full
MOMENTS = [pytest.param("start", marks=FULL), 5, pytest.param(29, marks=FULL)]  # or metrics' rows


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
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    plain.mkdir()
    killed.mkdir()
    assert train(*SLOW, cwd=plain).returncode == 0
    command = [sys.executable, str(REPO / "train.py"), *SLOW, "wandb.mode=offline"]
    process = subprocess.Popen(
        command, cwd=killed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline, done = time.time() + 120, False
    while not done and process.poll() is None:
        assert time.time() < deadline
        rows = sum(lines(file) for file in killed.glob("outputs/sft-*/metrics.jsonl"))
        if (cores := cores_in(killed)) and (moment == "start" or rows >= int(moment)):
            for core in cores:
                os.kill(core, signal.SIGKILL)
            done = True
        time.sleep(0.005)
    _, said = process.communicate(timeout=120)
    assert done and process.returncode == 0, said
    assert said.count("W&B: ") == 1 and "only in its own files" in said and "Traceback" not in said
    [one], [other] = runs_in(plain)["sft"], runs_in(killed)["sft"]
    assert summary(one)["metrics"] == summary(other)["metrics"]
    losses = [[row["loss"] for row in metrics(run)] for run in (one, other)]
    assert losses[0] == losses[1] and len(losses[0]) == 30
