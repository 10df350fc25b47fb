"""Locks on files (flock). A lock ends with its process, however that ends. No torch here."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rlhf.base.errors import UserError, machine_problem
from rlhf.base.log import say

LOCK_FILE = ".owner"  # in a run directory; it names the process that holds the lock
GRACE = 0.3  # s; `is_locked` of another process holds a lock that long at most
REPORT_EVERY = 30.0  # s


@contextlib.contextmanager
def try_lock(path: Path, shared: bool = False) -> Iterator[bool]:
    """Lock a file within this context, without waiting. Gives whether the lock was free."""
    with open(path, "a+", encoding="utf-8") as file:
        yield lock_open_file(file, shared)


def lock_open_file(file: IO[str] | int, shared: bool = False) -> bool:
    """Lock a file until it is closed. Returns: False where another process holds the lock."""
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def open_folder(directory: Path) -> Iterator[int]:
    """The descriptor of a directory."""
    folder = os.open(directory, os.O_RDONLY)
    try:
        yield folder
    finally:
        os.close(folder)


def lock_both(file: IO[str], folder: int) -> bool:
    """Lock the lock file of a run and its directory; the file alone can be deleted meanwhile.

    Returns: False where another process holds one of them.
    """
    try:
        if not lock_open_file(file):
            return False
    except OSError as error:
        raise UserError(
            f"{file.name}: this file system has no locks ({error.strerror}), so two commands could "
            "train one run: set root= to a folder of another one (Lustre: mount it with -o flock)"
        ) from None
    try:
        return lock_open_file(folder)
    except OSError:  # NFS locks no directories
        return True


def open_lock(directory: Path) -> IO[str]:
    """Make a run directory and open its lock file. Raises: UserError where something is in the way;
    OSError where the machine has run out of something."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return open(directory / LOCK_FILE, "a+", encoding="utf-8")
    except OSError as error:
        if machine_problem(error):
            raise
        raise UserError(
            f"no run can be in {directory} ({error.strerror}: {error.filename}): remove what is "
            "there, or choose another folder with root=DIR"
        ) from None


@contextlib.contextmanager
def lock_run(directory: Path, wait: bool = False) -> Iterator[None]:
    """Lock a run directory for this process, so that no other process trains the same run.

    Args: wait: wait for another process that holds the lock, with a line every 30 s.
    Raises: UserError that names the other process, without `wait`.
    """
    with open_lock(directory) as file, open_folder(directory) as folder:
        wait_for_lock(file, folder, directory, wait)
        file.seek(0)
        file.truncate()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"pid {os.getpid()} on {socket.gethostname()} since {since}")
        file.flush()
        yield


def wait_for_lock(file: IO[str], folder: int, directory: Path, wait: bool) -> None:
    """Lock the open lock file of a run and its directory. Args and raises: as `lock_run`."""
    start = next_report = time.monotonic()
    while not lock_both(file, folder):
        file.seek(0)
        holder = file.read(200).strip() or f"its file {LOCK_FILE} was deleted"
        owner = f"{directory} is being trained by another process ({holder})"
        now = time.monotonic()
        if not wait and now > start + GRACE:
            raise UserError(f"{owner}: wait until it ends, or stop it")
        if wait and now >= next_report:
            say(f"waiting for {now - start:.0f} s: {owner}")
            next_report = now + REPORT_EVERY
        time.sleep(0.1)


def is_locked(directory: Path) -> bool:
    """Whether a process holds the lock of a run directory."""
    with (
        contextlib.suppress(FileNotFoundError),
        open(directory / LOCK_FILE, encoding="utf-8") as file,
    ):
        if is_held(file):
            return True
    with open_folder(directory) as folder:
        return is_held(folder)


def is_held(file: IO[str] | int) -> bool:
    """Whether a process holds the lock of an open file or directory."""
    try:
        return not lock_open_file(file, shared=True)
    except OSError:  # a file system without such locks
        return False
