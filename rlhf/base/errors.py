"""Errors that are the user's to fix: of what was typed, and of the machine."""

from __future__ import annotations

import errno
import os
import re

# what a machine can run out of, or forbid, by the number of the system's error
MACHINE_PROBLEMS = {
    errno.ENOSPC: "the disk is full, or has no inodes left",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would be larger than is allowed here (ulimit -f)",
    errno.EROFS: "the file system is read-only",
    errno.EMFILE: "too many open files (ulimit -n)",
    errno.ENFILE: "too many open files on this machine",
    errno.ENOMEM: "the memory is used up (plan=true shows what is needed; deploy.micro_batch, "
    "deploy.eval_micro_batch and data.workers take less)",
    errno.EAGAIN: "no more processes or threads are allowed (ulimit -u)",
}
# how torch says that a GPU is full: its allocator, the driver, cuBLAS, NCCL (in its last line)
GPU_OUT_OF_MEMORY = re.compile(
    "CUDA out of memory|CUDA (driver )?error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"
    "|Cuda failure 2"
)
LESS_MEMORY = (
    "plan=true shows what is needed; use a smaller deploy.micro_batch or deploy.eval_micro_batch, "
    "or deploy.activation_checkpointing=true: the run continues"
)


class UserError(ValueError):
    """Something the user can fix: a value, a file, a machine that is not there.

    The message is one line, or a line per problem: what is wrong (key=value), then the fix. It is
    printed without a traceback, and the exit code is 2. Every other exception is a bug of ours and
    keeps its traceback.
    """


def machine_problem(error: BaseException | None) -> str | None:
    """What the machine has run out of, as one line; None where an error has another reason.

    The errors that led to this one are looked at too.
    """
    while error:
        lines = str(error).splitlines() or [""]
        if full := next(filter(GPU_OUT_OF_MEMORY.search, lines), None):
            return f"out of GPU memory: {full}; {LESS_MEMORY}"
        text = lines[0]
        number = error.errno if isinstance(error, OSError) else number_in(text)
        if isinstance(error, MemoryError):
            number = errno.ENOMEM
        if number in MACHINE_PROBLEMS:
            return f"{MACHINE_PROBLEMS[number]}: {text}; the same command continues"
        error = error.__cause__ or error.__context__
    return None


def number_in(message: str) -> int | None:
    """The number of the system's error that a library has put into its own message."""
    if "can't start new thread" in message:
        return errno.EAGAIN
    if re.search("unable to allocate|can't allocate memory", message, re.IGNORECASE):
        return errno.ENOMEM
    described = (n for n in MACHINE_PROBLEMS if n != errno.EAGAIN)  # its text fits networks as well
    return next((n for n in described if os.strerror(n).lower() in message.lower()), None)
