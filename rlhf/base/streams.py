"""Standard input, output and error where they are closed, full or lack characters. No torch."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, TextIO


def prepare_streams() -> None:
    """Open the null device for a standard stream that is closed, and print a question mark for a
    character that the terminal's encoding lacks (LC_ALL=C)."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened would be this stream
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):  # a test may have put another one
            reconfigure(errors="replace")


_said: list[str] = []  # why standard output cannot be written, once that was said


def cannot_write(end: str = "") -> bool:
    """Whether standard output cannot be written; then a line says so, and the rest is dropped.

    Args: end: written to it, where nothing may be left to write.
    """
    if _said:
        return True
    try:
        sys.stdout.write(end)
        sys.stdout.flush()
    except OSError as error:
        _said.append(str(error))
        with contextlib.suppress(OSError):
            line = f"error: cannot write to standard output: {error.strerror}"
            print(line, file=sys.stderr, flush=True)
        drop_output(1)
        return True
    return False


def drop_unwritten() -> None:
    """Drop what standard output and error cannot write: a full disk, a pipe that nobody reads. Else
    the interpreter tries again when it ends, and makes the exit code 120."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            drop_output(number)


def drop_output(*numbers: int) -> None:
    """From now on nothing is written to these standard streams."""
    null = os.open(os.devnull, os.O_WRONLY)
    for number in numbers:
        os.dup2(null, number)
    os.close(null)


class StderrThatMayClose:
    """Standard error for work that continues when its terminal is closed: what cannot be written is
    dropped, instead of an error in the middle of a step."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            drop_output(2)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            drop_output(2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
