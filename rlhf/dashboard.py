"""python -m rlhf.dashboard: a W&B workspace with the panels of each stage.

The code is rlhf/reporting/wandb_dashboard.py.
"""

import sys

from rlhf.reporting.wandb_dashboard import main

if __name__ == "__main__":
    sys.exit(main())
