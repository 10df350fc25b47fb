"""Results of reading files, kept until one of the files changes. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

Value = TypeVar("Value")
Stamp = tuple[int, int, int] | None

MOST = 2000  # results that are kept


def stamp(file: Path) -> Stamp:
    """What changes when a file is written: time, size, inode. None where there is no file."""
    try:
        about = file.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size, about.st_ino


@dataclass
class Newest(Generic[Value]):
    """What was read of each path, for programs that look at the same runs again and again."""

    known: dict[Path, tuple[list[Stamp], Value]] = field(default_factory=dict)

    def get(self, path: Path, files: Sequence[Path], read: Callable[[], Value]) -> Value:
        """What `read` returns; what it returned last time where no file has changed since.

        An exception of `read` is not kept. Callers share the result and do not change it.
        Args: path: whose result it is.  files: that it is read from.
        """
        stamps = [stamp(file) for file in files]  # first: what is written meanwhile is read again
        if path in self.known and self.known[path][0] == stamps:
            return self.known[path][1]
        value = read()
        if len(self.known) >= MOST:
            self.known.clear()
        self.known[path] = stamps, value
        return value
