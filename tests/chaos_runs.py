"""What the tests of faults share: the runs that they damage, and how often."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from worker_runs import FIVE_STEPS

SEED = os.environ.get("CHAOS_SEED", "1")
KILLS = int(os.environ.get("CHAOS_KILLS", "6"))
# runs of seconds with a checkpoint after each step; deterministic, and everything is logged
SHORT = [
    *(one for one in FIVE_STEPS if not one.startswith("wandb.")),
    "deterministic=true",
    "checkpoint.every_steps=1",
    "checkpoint.keep=2",
    "rollout.log_responses=2",
]


def copy_of(folder: Path, target: Path) -> Path:
    """A folder with runs, at another place."""
    return shutil.copytree(folder, target, symlinks=True)
