"""The largest counts that a configuration may have: more is a slip of the keyboard, and would fill
the memory, or overflow, in the middle of a run."""

from __future__ import annotations

MOST_ROWS = 1_000_000  # of a built-in world, which is made in memory
MOST_EPOCHS = 100_000
MOST_BATCH = 1_000_000  # sequences
MOST_TOKENS = 2_000_000  # of a text; the longest contexts have a million
MOST_SAMPLES = 100_000  # responses to one prompt
MOST_PROCESSES = 1024  # on one machine
MOST_NODES = 10_000
MOST_WEIGHT = 1_000  # copies of each row
MOST_SECONDS = 1_000_000
MOST_MINUTES = 1_000_000
THREADS_PER_CORE = 4  # deploy.threads; more only wait for each other
# Any whole number that has no limit of its own. Libraries keep some of them in 32 bits.
MOST = 2**31 - 1
