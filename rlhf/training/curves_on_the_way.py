"""Draws curves.png while a run trains, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path

from rlhf.base.own_processes import own_source, python_module
from rlhf.runs.stage_views import view_of

EVERY = 60.0  # s between two pictures
PATIENCE = 10.0  # s in which a picture is drawn on a busy machine


class CurvesOnTheWay:
    """Starts `python -m rlhf.reporting.curves RUN_DIR STAGE`, at most every minute.

    Training does not wait for it, and nothing of it reaches the training process: no time of its
    thread, no random number, no error. It runs with the lowest priority.
    """

    def __init__(self, run_dir: Path, stage: str):
        self.run_dir, self.stage = run_dir, stage
        self.process: subprocess.Popen[bytes] | None = None
        self.started = time.monotonic()

    def draw_when_due(self) -> None:
        """Start to draw where the last picture is a minute old, and done."""
        is_drawing = self.process is not None and self.process.poll() is None
        if is_drawing or time.monotonic() - self.started < EVERY or not view_of(self.stage).panels:
            return
        self.started = time.monotonic()
        with contextlib.suppress(OSError):  # no more processes: then there is no picture
            self.process = subprocess.Popen(
                [*python_module("rlhf.reporting.curves"), str(self.run_dir), self.stage],
                env=os.environ | own_source() | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def stop(self) -> None:
        """Wait for the picture that is being drawn: it must not replace that of the whole run."""
        if self.process is None:
            return
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
