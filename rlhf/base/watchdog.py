"""Ends a worker that hangs: one that makes no progress for deploy.watchdog_minutes. It leaves the
stacks of all its threads.

Progress is a forward pass of a model, a sampled token, an answer of a reward function, and each
byte that is read or written while files are loaded or saved. The clock is that of `faulthandler`:
a thread in C, which also ends a process whose Python code cannot run any more. No torch here.
"""

from __future__ import annotations

import contextlib
import faulthandler
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

EVERY = 5.0  # seconds between two looks at what is read and written
ENOUGH = 4096  # bytes between two looks; a look itself reads some 100
IO_COUNTERS = Path("/proc/self/io")  # Linux
# of this process: seconds, the file for the stacks, and when the clock was last set back
_seconds = 0.0
_file: IO[str] | None = None
_set_back = 0.0


def stacks_file(run_dir: Path, rank: str) -> Path:
    """Where a stalled worker leaves its stacks; runs/failures.py reads it."""
    return run_dir / f"stacks-rank{rank}.txt"


def start(run_dir: Path, rank: str, minutes: float | None) -> None:
    """Start the clock. Args: minutes: without progress; None: no limit."""
    global _seconds, _file
    if minutes is not None:
        _seconds = 60 * minutes
        _file = open(stacks_file(run_dir, rank), "w", encoding="utf-8")  # noqa: SIM115  open until the end
        progress(at_once=True)


def progress(at_once: bool = False) -> None:
    """Set the clock back; at most ten times in its period, as this starts a thread.

    Without effect before `start`. Args: at_once: also where it was just set back.
    """
    global _set_back
    now = time.monotonic()
    if _file and (at_once or now - _set_back > _seconds / 10):
        _set_back = now
        faulthandler.dump_traceback_later(_seconds * 1.1, exit=True, file=_file)


def stop() -> None:
    """Stop the clock of a worker that has done its work."""
    global _file
    if _file:
        faulthandler.cancel_dump_traceback_later()
        _file.close()
        Path(_file.name).unlink(missing_ok=True)
        _file = None


@contextlib.contextmanager
def while_waiting() -> Iterator[None]:
    """Pause the watchdog while this process waits for another, which has its own."""
    if _file:
        faulthandler.cancel_dump_traceback_later()
    try:
        yield
    finally:
        progress(at_once=True)


@contextlib.contextmanager
def while_files_move() -> Iterator[None]:
    """Within this context each byte that the process reads or writes counts as progress.

    Where the system does not count them, the clock is set back all the time.
    """
    if not _file:
        yield
        return
    done = threading.Event()

    def look() -> None:
        before = bytes_moved()
        while not done.wait(min(EVERY, _seconds / 10)):
            now = bytes_moved()
            if now is None or before is None or now - before > ENOUGH:
                progress()
            before = now

    progress(at_once=True)
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        progress(at_once=True)


def bytes_moved() -> int | None:
    """How many bytes the process has read and written; None where the system does not count."""
    try:
        counters = dict(
            line.split(": ") for line in IO_COUNTERS.read_text(encoding="utf-8").splitlines()
        )
        return int(counters["rchar"]) + int(counters["wchar"])
    except (OSError, ValueError, KeyError):
        return None
