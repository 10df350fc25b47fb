"""Waits for an idle machine, and tells which samples nobody disturbed."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

FOREIGN = 0.12  # processors that others may use during a sample
OWN = 0.85  # processors that a contestant must have had
WARM_UP = 2  # samples


def clocks() -> tuple[float, float, float]:
    """Seconds now; of processors that this machine has worked; and that this process and all that it has started have."""
    import psutil  # type: ignore[import-untyped]

    ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    busy = sum(ticks[i] for i in (0, 1, 2, 5, 6, 7)) / os.sysconf(
        "SC_CLK_TCK"
    )  # user, nice, system, irq, softirq, steal
    own = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it has ended
            own += sum(process.cpu_times()[:4])  # children that have ended are in their parent's
    return time.perf_counter(), busy, own


def used_since(before: tuple[float, float, float]) -> dict[str, float]:
    """Processors used since then, by us (`own`) and by others (`foreign`; what the clocks' ticks cannot tell, 20 ms, is left out)."""
    wall, busy, own = (now - then for now, then in zip(clocks(), before))
    return {"own": own / max(wall, 1e-9), "foreign": max(0.0, busy - own - 0.02) / max(wall, 1e-9)}


def wait_for_quiet(at_most: float) -> None:
    end = time.monotonic() + at_most
    while time.monotonic() < end:
        before = clocks()
        time.sleep(0.4)
        if used_since(before)["foreign"] < FOREIGN / 2:
            return


def quiet_samples(contestant: dict[str, Any]) -> list[int]:
    """Numbers of the samples that count. A contestant always computes: one that had less than a processor was kept from it, by a host
    beneath this machine that /proc/stat may know nothing of."""
    samples = contestant["samples"]
    return [
        i
        for i in range(WARM_UP, len(samples))
        if samples[i]["foreign"] < FOREIGN and samples[i]["own"] > OWN
    ]
