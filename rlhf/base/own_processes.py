"""How a process of this project is started: from this source tree, whatever the user's directory
holds; and that it ends with the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[2]


def python_module(name: str, *options: str) -> list[str]:
    """The command that runs a module with the interpreter's options.

    -P: python would look for modules in the current directory first, so that a file datasets.py of
    the user would stand for the library.
    """
    return [sys.executable, "-P", *options, "-m", name]


def own_source() -> dict[str, str]:
    """PYTHONPATH with this source tree first: another one may be installed, or named there.

    Empty entries, which stand for the current directory, are dropped.
    """
    others = [one for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]
    paths = [str(SOURCE), *(one for one in others if one != str(SOURCE))]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def end_with_parent() -> None:
    """Ask the system to end this new process when its parent ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
