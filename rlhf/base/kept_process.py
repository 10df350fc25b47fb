"""Run a program that ends with the process that started it, however that ends. No torch here.

    python -m rlhf.base.kept_process PROGRAM ARGUMENTS...        (started by KeptProcess)

The program and all that it starts are a group of processes. This one between them waits for the end
of its stdin, which closes when the parent ends, and then ends the group.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf.base.own_processes import end_with_parent, own_source, python_module

GRACE = 10.0  # seconds for the program to end by itself
LEFT_SECONDS = 3.0  # for what it has started, once it has ended
NOT_STARTED = 127  # exit code of a program that cannot be started, as a shell gives it


class KeptProcess:
    """A program of another python environment: PYTHONPATH is not handed on.

    Args: environment: all of it.  output: the file that its output is added to.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], output: Path):
        keeper = python_module("rlhf.base.kept_process")
        with open(output, "ab") as file:
            self.keeper = subprocess.Popen(
                [*keeper, *command],
                env={**environment, **own_source()},
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the parent only, which then ends this one
            )

    def exit_code(self) -> int | None:
        """Of the program; None while it runs."""
        return self.keeper.poll()

    def close(self) -> None:
        """End the program and all that it has started."""
        if self.keeper.stdin:
            self.keeper.stdin.close()
        self.keeper.wait()


def main(command: Sequence[str]) -> int:
    """Run a command until it ends or stdin closes. Returns: its exit code."""
    os.environ.pop("PYTHONPATH", None)
    try:
        program = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=end_with_parent,  # where this process is killed
        )
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", flush=True)
        return NOT_STARTED
    signal.signal(signal.SIGTERM, lambda *_: program.terminate())
    threading.Thread(target=end_at_eof, args=(program,), daemon=True).start()
    code = program.wait()
    end_group(program.pid)
    return code if code >= 0 else 128 - code


def end_at_eof(program: subprocess.Popen[bytes]) -> None:
    """Wait for the end of stdin; then end the program."""
    while os.read(0, 1024):
        pass
    program.terminate()  # it ends what it has started, and what these have in shared memory
    try:
        program.wait(GRACE)
    except subprocess.TimeoutExpired:
        program.kill()


def end_group(group: int) -> None:
    """End what a program has left: after a moment to clean up, by force."""
    with contextlib.suppress(ProcessLookupError):  # nothing is left
        for _ in range(int(LEFT_SECONDS / 0.1)):
            os.killpg(group, 0)
            time.sleep(0.1)
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
