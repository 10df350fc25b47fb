"""Waits for an idle machine, and tells which samples no other program disturbed."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

FOREIGN = 0.12  # processors that others may use during a sample
OWN = 0.85  # processors that a contestant must have had
WARM_UP = 6  # samples; until then the memory of a process still grows


def clocks() -> tuple[float, float, float]:
    """Seconds of the clock, of all processors' work, and of the work of this process and the
    processes that it has started."""
    import psutil  # type: ignore[import-untyped]

    ticks = [
        int(x) for x in Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
    ]
    worked = sum(ticks[i] for i in (0, 1, 2, 5, 6, 7))  # user, nice, system, irq, softirq, steal
    busy = worked / os.sysconf("SC_CLK_TCK")
    own = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it has ended
            own += sum(process.cpu_times()[:4])  # children that have ended are in their parent's
    return time.perf_counter(), busy, own


def used_since(before: tuple[float, float, float]) -> dict[str, float]:
    """Processors used since `before`, by this benchmark (`own`) and by other programs (`foreign`).

    The clocks' ticks cannot resolve 20 ms, which `foreign` leaves out.
    """
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
    """Numbers of the samples that count, without the first of a turn of several.

    A contestant always computes. One that had less than a processor was held up by the host of this
    machine, which /proc/stat may not show.
    """
    samples = contestant["samples"]
    return [
        i
        for i in range(WARM_UP, len(samples))
        if samples[i]["counts"] and samples[i]["foreign"] < FOREIGN and samples[i]["own"] > OWN
    ]
