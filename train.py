"""The entry point: python train.py [GROUP=OPTION ...] [KEY=VALUE ...]; -m sweeps."""

import sys

from rlhf.base.interrupts import end_at_interrupt, run_interruptible

if __name__ == "__main__":
    end_at_interrupt()
    from rlhf.cli import main

    sys.exit(run_interruptible(main))
