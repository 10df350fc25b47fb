"""How a contestant talks with bench/run.py, and what all of them share."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Spec = dict[str, Any]
Turn = Callable[[Callable[[], dict[str, Any]]], None]
MiB = 2**20


def say(spec: Spec, **what: Any) -> None:
    spec["voice"].write(json.dumps(what) + "\n")


def turns(spec: Spec, peer: str) -> Turn:
    """To be called after the imports and before any model. Returns what a contestant calls at the end of each piece of work: it reports
    (the first time that it is ready), and waits. Its argument says what was counted, and is not timed."""
    begin, state = memory("VmRSS"), {"started": 0.0}

    def turn(counted: Callable[[], dict[str, Any]]) -> None:
        seconds = time.perf_counter() - state["started"]
        found = counted()  # also that of getting ready: some count on from there
        say(spec, seconds=seconds, **found) if state["started"] else say(spec, ready=peer)
        if sys.stdin.readline().strip() != "go":
            say(spec, peak_mib=(memory("VmHWM") - begin) / MiB, imports_mib=begin / MiB)
            os._exit(0)
        state["started"] = time.perf_counter()

    return turn


def memory(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def read_batches(spec: Spec) -> list[list[Any]]:
    return json.loads(Path(spec["batches"]).read_text())


def forced_lengths(number: int, rows: int, longest: int) -> np.ndarray:
    """Tokens of the answers of PPO's iteration `number`, EOS included, uniform from 8 to `longest`; the same for all contestants."""
    return np.random.default_rng([number]).integers(min(8, longest), longest + 1, rows)
