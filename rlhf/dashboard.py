"""python -m rlhf.dashboard: a W&B workspace with the panels of each stage.

The code is rlhf/reporting/wandb_dashboard.py.
"""

import contextlib
import os
import sys

if __name__ == "__main__":  # -m would take modules from the current directory first
    with contextlib.suppress(FileNotFoundError):  # it was deleted: run_interruptible says so
        sys.path[:] = [path for path in sys.path if path not in ("", os.getcwd())]

from rlhf.base.interrupts import end_at_interrupt, run_interruptible

if __name__ == "__main__":
    end_at_interrupt()
    from rlhf.reporting.wandb_dashboard import main

    sys.exit(run_interruptible(main))
