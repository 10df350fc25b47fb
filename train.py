"""The entry point: python train.py [GROUP=OPTION ...] [KEY=VALUE ...]; -m sweeps."""

import sys

from rlhf.cli import main

if __name__ == "__main__":
    sys.exit(main())
