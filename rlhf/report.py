"""python -m rlhf.report: tables and one HTML page of runs. The code is rlhf/reporting/tables.py."""

import sys

from rlhf.reporting.tables import main

if __name__ == "__main__":
    sys.exit(main())
