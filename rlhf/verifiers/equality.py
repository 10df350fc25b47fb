r"""Whether answers are mathematically equal to references, with a time limit for each.

The library math-verify compares by SymPy, which may compute for hours (9^(9^9), \int_0^1 e^{x^2}
\sin(x^3) dx) and then heeds no exception. So the answers are compared in a process that the kernel
ends:

    this process            sends rows, and reads an answer for each
      python -m rlhf.verifiers.equality   imports math-verify once, forks for each request
        its child           compares row by row; one that takes too long ends it, and the next child
                            begins with the next row
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO, Any

from rlhf.base.log import log
from rlhf.base.own_processes import own_source, python_module
from rlhf.verifiers.final_answers import as_formula

SECONDS = 2.0  # of CPU time for an answer; usually it takes a few milliseconds
MOST_LATE = 10  # answers of a request that may take so long; after them it is a tenth of it
MEMORY = 2 << 30  # bytes for all answers of a request
SCORES: dict[str, float | None] = {
    "1": 1.0,
    "0": 0.0,
    "none": None,
    "late": 0.0,
}  # by line of the answer

_process: subprocess.Popen[str] | None = None
_lock = threading.Lock()  # of one request
_warned = False


# ------------------------------------------------------------------------------------- parent


def are_equal(references: Sequence[list[str]], texts: Sequence[str]) -> list[float | None]:
    """1 where the answer in a text is equal to any of its references, else 0.

    Returns: None for a row whose references have no formula. 0 also for an answer that cannot be
        checked in SECONDS; the first one is a warning.
    """
    rows = [(tuple(some), text) for some, text in zip(references, texts)]
    asked = [*dict.fromkeys(row for row in rows if row[0])]  # the same row once
    found = dict(zip(asked, ask(asked))) if asked else {}
    for (_, text), line in found.items():
        if line == "late":
            warn(text)
    return [SCORES[found.get(row, "none")] for row in rows]


def warn(text: str) -> None:
    """Say once that an answer is too hard to check."""
    global _warned
    if not _warned:
        _warned = True
        log.warning(
            f"math: cannot check within {SECONDS:g} s whether an answer is right: it counts as "
            f"wrong, and so do others like it; the response ends in {text.strip()[-80:]!r}"
        )


def ask(rows: Sequence[tuple[tuple[str, ...], str]]) -> list[str]:
    """The answer to each row, one of SCORES. Raises: RuntimeError where the process ends."""
    global _process
    with _lock:
        try:
            if _process is None or _process.poll() is not None:
                close()
                _process = start()
            assert _process.stdin is not None and _process.stdout is not None
            _process.stdin.write(json.dumps({"seconds": SECONDS, "rows": rows}) + "\n")
            _process.stdin.flush()
            lines = [_process.stdout.readline().strip() for _ in rows]
            if "" in lines:
                raise RuntimeError(
                    f"the process that compares formulas ended (exit code {_process.wait()})"
                )
            return lines
        except BaseException:  # also Ctrl-C: what is still to come belongs to these rows
            close()
            raise


def start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        python_module("rlhf.verifiers.equality", "-W", "ignore"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=os.environ | own_source(),
    )


@atexit.register
def close() -> None:
    """End the process. Its child ends by itself, when its time is over or nobody reads it."""
    global _process
    if _process is not None:
        _process.kill()
        _process.wait()
        for stream in (_process.stdin, _process.stdout):
            with contextlib.suppress(OSError):  # what was not sent yet
                if stream:
                    stream.close()
        _process = None


# -------------------------------------------------------------------------------------- child


def main() -> None:
    """Answer requests, a line of JSON each, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever is printed
    for truth, text in (("1/2", "$0.5$"), ("(x+1)^2", "$x^2+2x+1$"), (r"\{1\}", r"$\sqrt{2}$")):
        compare([truth], text)  # imports what SymPy needs, before the clock runs
    for line in sys.stdin:
        request = json.loads(line)
        answer(request["rows"], request["seconds"], answers)


def answer(rows: Sequence[Any], seconds: float, answers: IO[str]) -> None:
    """Write a line for each row as soon as it is known."""
    done = late = 0
    while done < len(rows):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            limit = seconds if late < MOST_LATE else seconds / 10
            compare_all(rows[done:], limit, writing)
        os.close(writing)
        with open(reading, encoding="utf-8") as lines:
            for line in lines:
                print(line, end="", file=answers, flush=True)
                done += 1
        os.waitpid(child, 0)
        if done < len(rows):  # it was ended by this row
            print("late", file=answers, flush=True)
            done, late = done + 1, late + 1


def compare_all(rows: Sequence[Any], limit: float, writing: int) -> None:
    """Compare row by row, and end this process; by SIGPROF where a row takes too long."""
    try:
        with contextlib.suppress(ValueError):  # where less is allowed already
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, hard))
        for references, text in rows:
            # CPU time, so that a busy machine does not change a score. The signal has no handler:
            # the kernel ends the process whatever it is in
            signal.setitimer(signal.ITIMER_PROF, limit)
            line = compare(references, text)
            os.write(writing, f"{line}\n".encode())
    finally:
        os._exit(0)


def compare(references: Sequence[str], text: str) -> str:
    """The answer for a row: "1", "0", or "none" where the references have no formula."""
    from math_verify import verify

    truths = [truth for reference in references if (truth := parsed(as_formula(reference)))]
    if not truths:
        return "none"
    try:
        found = parsed(text)
        return str(int(any(verify(truth, found, timeout_seconds=None) for truth in truths)))
    except Exception:  # RecursionError and MemoryError among them
        return "0"


@functools.lru_cache(maxsize=8)  # the responses to a prompt have the same references
def parsed(text: str) -> Any:
    """The formulas that math-verify finds in a text."""
    from math_verify import parse

    # it warns that it has no time limit; its own are signals, whose exceptions SymPy may swallow
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return parse(text, parsing_timeout=None)


if __name__ == "__main__":
    main()
