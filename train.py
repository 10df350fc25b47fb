"""The entry point: python train.py [GROUP=OPTION ...] [KEY=VALUE ...]; -m sweeps."""

import sys
from pathlib import Path

from rlhf.base.interrupts import end_at_interrupt, run_interruptible

ROOT = Path(__file__).resolve().parent

if __name__ == "__main__":
    end_at_interrupt()
    try:
        from rlhf.cli import main
    except ModuleNotFoundError as missing:
        if str(missing.name).startswith("rlhf"):
            raise
        sys.exit(f"error: {missing}: run make setup, then  source {ROOT}/.venv/bin/activate")
    sys.exit(run_interruptible(main))
