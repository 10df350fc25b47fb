"""A worker that hangs is ended, with one line and the stacks of its threads: real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from helpers import SLOW, lines, running, train

from rlhf.runs.history import run_status

PROGRESS = """
import re, sys, time
from pathlib import Path
from rlhf.base import watchdog

def hang():
    re.match("(a+)+$", "a" * 60 + "b")  # never lets another thread of Python run

run_dir = Path(sys.argv[1])
watchdog.progress()
watchdog.start(run_dir, "3", 0.02)
for _ in range(30):
    time.sleep(0.1)
    watchdog.progress()
with watchdog.while_files_move(), open(run_dir / "large", "wb", buffering=0) as file:
    for _ in range(30):
        time.sleep(0.1)
        file.write(bytes(9000))
    print("alive", flush=True)
    if sys.argv[2] == "stop":
        watchdog.stop()
        time.sleep(2)
    elif sys.argv[2] == "sleep":
        time.sleep(100)
    else:
        hang()
"""


@pytest.mark.parametrize("end", [pytest.param("sleep", marks=pytest.mark.full), "hang", "stop"])
def test_progress_sets_the_clock_back(tmp_path: Path, end: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRESS, str(tmp_path), end],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout == "alive\n", done.stderr
    stacks = tmp_path / "stacks-rank3.txt"
    if end == "stop":
        assert done.returncode == 0 and not stacks.exists()
    else:
        assert done.returncode == 1 and stacks.read_text().startswith("Timeout")
        assert ("in hang" in stacks.read_text()) == (end == "hang")


@pytest.mark.full
def test_a_stalled_run_ends_with_one_line_and_the_stacks(tmp_path: Path) -> None:
    slow = [*SLOW, "deploy.processes_per_node=2", "sft.max_steps=120"]
    parent, run = running(*slow, "deploy.watchdog_minutes=0.1", cwd=tmp_path, until=3)
    workers = [p for p in psutil.Process(parent.pid).children() if "rlhf.worker" in p.cmdline()]
    stopped = next(p for p in workers if p.environ()["RANK"] == "1")
    os.kill(stopped.pid, signal.SIGSTOP)  # the other one waits for it in the next step
    said = parent.communicate(timeout=60)[1]
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert parent.returncode == 1
    assert "rank 0: Stalled: no progress for 0.1 minutes (deploy.watchdog_minutes: raise it" in line
    log = (run / "train.log").read_text()
    assert "Timeout" in log and "optimizer_step" in log, log[-3000:]
    assert "Stalled" in run_status(run) and not list(run.glob("stacks-rank*"))
    assert not any(p.is_running() for p in workers)
    steps = lines(run / "metrics.jsonl")
    done = train(*slow, "sft.max_steps=120", "deploy.watchdog_minutes=null", cwd=tmp_path)
    assert done.returncode == 0 and "resuming after step" in done.stderr, done.stderr
    assert lines(run / "metrics.jsonl") == 120 > steps
