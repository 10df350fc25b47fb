"""python -m rlhf.dashboard: a W&B workspace with the panels of each stage.

The code is rlhf/reporting/wandb_dashboard.py.
"""

import sys

from rlhf.base.interrupts import end_at_interrupt, run_interruptible

if __name__ == "__main__":
    end_at_interrupt()
    from rlhf.reporting.wandb_dashboard import main

    sys.exit(run_interruptible(main))
