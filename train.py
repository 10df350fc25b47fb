"""The one entry point: python train.py [GROUP=OPTION ...] [KEY=VALUE ...]; -m sweeps. See README.md."""

import sys

from rlhf.cli import main

if __name__ == "__main__":
    sys.exit(main())
