"""Ctrl-C ends a command with one line, also while its modules are imported. No torch here."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from rlhf.base.streams import cannot_write, drop_unwritten, prepare_streams

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130  # exit codes
_heard: list[int] = []  # signals that raised KeyboardInterrupt


def end_at_interrupt() -> None:
    """From now on Ctrl-C ends the process at once: nothing has been started yet.

    A program calls this before its other imports: in the middle of an import KeyboardInterrupt
    would have a traceback, a library would catch it, or torch would abort the process.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup: ignored
        signal.signal(signal.SIGINT, _end)


def _end(*_: object) -> None:
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"Interrupted: nothing was done.\n")
    os._exit(INTERRUPTED)


def raise_at_interrupt() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, after `end_at_interrupt`.

    Raises: KeyboardInterrupt that a library has swallowed before.
    """
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, _raise)
    if interrupted():
        raise KeyboardInterrupt


def _raise(number: int, _: object) -> None:
    _heard.append(number)
    raise KeyboardInterrupt


def interrupted() -> bool:
    """Whether KeyboardInterrupt was raised. An exception after it is not what stopped the process:
    a library that cleans up (OmegaConf) may raise its own instead."""
    return bool(_heard)


def run_interruptible(main: Callable[[], int]) -> int:
    """Run the main function of a program; it calls `raise_at_interrupt` when there is something to
    end.

    Returns: its exit code, or INTERRUPTED; the message of the KeyboardInterrupt is printed. FAILED
        with a line where standard output cannot be written, as on a full disk. WRONG with a line
        where the current folder is gone.
    """
    prepare_streams()
    try:
        os.getcwd()
    except FileNotFoundError:
        print("error: the current folder was deleted: cd to another one", file=sys.stderr)
        return WRONG
    try:
        code = main()
        return FAILED if cannot_write() else code
    except OSError:
        if not cannot_write("\n"):
            raise
        return FAILED
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # again: the process ends anyway
        from rlhf.base.log import say  # not before: it imports much

        say(str(interrupt) or "Interrupted.")
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        drop_unwritten()
