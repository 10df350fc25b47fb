"""The process that reward functions run in: one for each rank, started once.

A function that hangs can be ended there, and what it imports cannot disturb training. Parent and
child exchange lines of JSON: the functions; then batches, and for each function a line when it
starts and one with its scores. What functions print goes to stderr.

    python -m rlhf.rewards.process        (started by RewardProcess)
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from rlhf.base import watchdog
from rlhf.base.errors import UserError
from rlhf.base.log import log
from rlhf.base.own_processes import own_source, python_module
from rlhf.rewards.batch import Batch, last_text
from rlhf.rewards.functions import (
    SEARCH_SECONDS,
    CallError,
    RewardFunction,
    call_async,
    call_function,
    event_loop,
    find_row,
    load_function,
    too_late,
)
from rlhf.verifiers import Scores

LOADING_SECONDS = 120.0  # to import the modules of all functions
GRACE_SECONDS = 2.0  # beyond the timeout, for a function that is `async def` to report it itself


ENDLESS = 1e6  # seconds for a call that limits each of its requests to a server itself


@dataclass
class Spec:
    """A function as the configuration names it."""

    key: str  # begins the messages
    function: str  # "module:name" or "FILE.py:name"
    kwargs: dict[str, Any] = field(default_factory=dict)
    timeout: float = 60.0  # seconds of a call
    skip: bool = False  # errors are scores of None


@dataclass
class Result:
    """What a function returned for a batch."""

    scores: Scores
    failed: list[bool]  # rows whose None is an error of the function


# ------------------------------------------------------------------------------------- parent


class RewardProcess:
    """The functions of a run, by their names, in a process of their own."""

    def __init__(self, specs: dict[str, Spec]):
        """Start the process and import the functions. Raises: UserError naming the key."""
        self.specs = specs
        self.signatures: dict[str, dict[str, Any]] = {}  # what each asks for, by its name
        self.columns: set[str] = set()  # of the data, for make_batch: see trial.column_names
        self._warned: set[str] = set()
        self._process: subprocess.Popen[str] | None = None
        self._start()

    def score(self, batch: Batch) -> dict[str, Result]:
        """The scores of all functions for a batch.

        Raises: UserError with key, row and completion for a function that raises, hangs, or
            returns something else than a number or None for each row; with `skip` the scores of
            these rows are None instead, and the first error is a warning.
        """
        results: dict[str, Result] = {}
        while waiting := [name for name in self.specs if name not in results]:
            if not self._process:
                self._start()
            self._send({"batch": asdict(batch), "names": waiting})
            self._collect(batch, waiting, results)
        return results

    def close(self) -> None:
        """End the process with whatever the functions have started."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):  # what was not read yet cannot be sent
                    if stream:
                        stream.close()
            self._process = None

    def _start(self) -> None:
        self._process = subprocess.Popen(
            python_module("rlhf.rewards.process", "-W", "ignore"),
            env=os.environ | own_source(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C reaches the parent only, which then ends this one
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        arguments = self._process.stdout, self._lines
        threading.Thread(target=read_lines, args=arguments, daemon=True).start()
        self._send({name: asdict(spec) for name, spec in self.specs.items()})
        answer, name = self._receive(LOADING_SECONDS), ""
        while answer and "loading" in answer:
            name = answer["loading"]
            answer = self._receive(LOADING_SECONDS)
        if answer is None:
            code = self._process.poll()
            self.close()
            key = (
                self.specs[name].key if name else ", ".join(one.key for one in self.specs.values())
            )
            how = f"took longer than {LOADING_SECONDS:g} s" if code is None else ended(code)
            raise UserError(f"{key}: importing the function {how}")
        if "error" in answer:
            self.close()
            raise UserError(answer["error"])
        self.signatures = answer["loaded"]

    def _collect(self, batch: Batch, waiting: Sequence[str], results: dict[str, Result]) -> None:
        """Read the answers about a batch, until all are there or the process had to be ended."""
        running, seconds, problem = list(waiting), LOADING_SECONDS, None
        while True:
            answer = self._receive(seconds)
            if answer is None:
                assert self._process is not None
                code = self._process.poll()
                self.close()
                limit = max(self.specs[name].timeout for name in running)
                how = too_late(limit, len(batch)) if code is None else ended(code)
                what = problem or how
                for name in running:
                    results[name] = self._failed(name, batch, what, None)
                return
            if "done" in answer:
                return
            if "started" in answer:
                running, seconds = answer["started"], answer["seconds"] + GRACE_SECONDS
                problem = answer.get("problem")  # known already: its row is looked for
                continue
            name = answer["name"]
            running = [one for one in running if one != name]
            if "error" in answer and not self.specs[name].skip:
                self._failed(name, batch, answer["error"], answer["row"])
            elif "error" in answer:
                self._warn(name, answer["error"])
            results[name] = Result(answer["scores"], answer["failed"])

    def _failed(self, name: str, batch: Batch, what: str, row: int | None) -> Result:
        """All scores None where errors are skipped. Raises: UserError where they are not."""
        spec = self.specs[name]
        if spec.skip:
            self._warn(name, what)
            return Result([None] * len(batch), [True] * len(batch))
        first = "" if row is not None else "first "
        prompt = last_text(batch.prompts[row or 0])[-80:]
        raise UserError(f"{spec.key}: {first}prompt {prompt!r}: the function {what}")

    def _warn(self, name: str, what: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            log.warning(f"{self.specs[name].key}: the function {what}; skipped (on_error=skip)")

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer, which is handled
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _receive(self, seconds: float) -> dict[str, Any] | None:
        """The next message; None after so many seconds, or where the process has ended."""
        assert self._process is not None
        while True:
            try:
                line = self._lines.get(timeout=seconds)
            except queue.Empty:
                return None
            if line is None:
                self._process.wait()
                return None
            with contextlib.suppress(ValueError):  # written into our channel by a function
                message: dict[str, Any] = json.loads(line)
                watchdog.progress()
                return message


def read_lines(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    """Put the lines of a stream into a queue, and None at its end."""
    with contextlib.suppress(ValueError, OSError):  # closed while it is read
        for line in stream:
            lines.put(line)
    lines.put(None)


def ended(code: int) -> str:
    """What a function did that ended its process."""
    how = f"exit code {code}"
    if code < 0:
        names = {one.value: one.name for one in signal.Signals}
        how = f"signal {names.get(-code, -code)}"
    return f"ended the process that it runs in ({how})"


# -------------------------------------------------------------------------------------- child


def main() -> None:
    """Load the functions that the first line names; score each batch of the lines after it."""
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    requests, answers = take_channels()
    sys.path.append(os.getcwd())  # for the functions' modules and what they import
    specs = {name: Spec(**spec) for name, spec in json.loads(requests.readline()).items()}
    functions: dict[str, RewardFunction] = {}
    try:
        for name, spec in specs.items():
            send(answers, {"loading": name})
            functions[name] = load_function(spec.function, spec.kwargs, spec.key)
    except UserError as error:
        send(answers, {"error": str(error)})
        return
    signatures = {
        name: {
            "columns": sorted(one.columns),
            "parameters": sorted(one.parameters),
            "all": one.takes_all,
            "verl": one.is_verl,
        }
        for name, one in functions.items()
    }
    send(answers, {"loaded": signatures})
    for line in requests:
        request = json.loads(line)
        batch = Batch(**request["batch"])
        called = {name: functions[name] for name in request["names"]}
        score_batch(called, specs, batch, answers)
        send(answers, {"done": True})


def take_channels() -> tuple[IO[str], IO[str]]:
    """stdin and stdout for this module alone: what functions print goes to stderr."""
    requests, answers = (
        os.fdopen(os.dup(0), encoding="utf-8"),
        os.fdopen(os.dup(1), "w", encoding="utf-8"),
    )
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    # or it would be seen when 8 KiB have come together
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return requests, answers


def send(answers: IO[str], message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def score_batch(
    functions: dict[str, RewardFunction], specs: dict[str, Spec], batch: Batch, answers: IO[str]
) -> None:
    """Call all functions: those that are `async def` at the same time, then one after another.

    Those that limit each request themselves come after the others, whose time is limited.
    """
    asynchronous = {name: one for name, one in functions.items() if one.is_async}
    for is_endless in (False, True):
        waiting = {
            name: one
            for name, one in asynchronous.items()
            if (specs[name].timeout >= ENDLESS) == is_endless
        }
        if not waiting:
            continue
        seconds = max(specs[name].timeout for name in waiting)
        send(answers, {"started": list(waiting), "seconds": seconds})
        outcomes = event_loop().run(call_together(waiting, specs, batch))
        for name, function in waiting.items():
            report(name, function, specs[name], batch, outcomes[name], answers)
    for name, function in functions.items():
        if function.is_async:
            continue
        send(answers, {"started": [name], "seconds": specs[name].timeout})
        try:
            outcome: Scores | CallError = call_function(function, batch)
        except CallError as error:
            outcome = error
        report(name, function, specs[name], batch, outcome, answers)


async def call_together(
    functions: dict[str, RewardFunction], specs: dict[str, Spec], batch: Batch
) -> dict[str, Scores | CallError]:
    """The scores of several functions that are `async def`, or what each did wrong."""
    calls = [call_async(one, batch, specs[name].timeout) for name, one in functions.items()]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, CallError):
            raise outcome
    return dict(zip(functions, outcomes))  # type: ignore[arg-type]


def report(
    name: str,
    function: RewardFunction,
    spec: Spec,
    batch: Batch,
    outcome: Scores | CallError,
    answers: IO[str],
) -> None:
    """Send the scores of a function; after an error with `skip` those of the prompts on whose
    responses alone it works."""
    if not isinstance(outcome, CallError):
        send(answers, {"name": name, "scores": outcome, "failed": [False] * len(batch)})
        return
    if not spec.skip:
        found = outcome
        if outcome.row is None and outcome.error and not outcome.is_whole:
            looking = {"started": [name], "seconds": 2 * SEARCH_SECONDS, "problem": str(outcome)}
            send(answers, looking)
            found = find_row(function, batch, outcome)
        nothing = {"scores": [None] * len(batch), "failed": [True] * len(batch)}
        send(answers, {"name": name, "error": str(found), "row": found.row} | nothing)
        return
    scores: Scores = [None] * len(batch)
    failed = [True] * len(batch)
    for rows in [] if outcome.is_whole else batch.groups():
        send(answers, {"started": [name], "seconds": spec.timeout})
        part = batch.rows(rows)
        try:
            if function.is_async:
                found_here = event_loop().run(call_async(function, part, spec.timeout))
            else:
                found_here = call_function(function, part)
        except CallError as error:
            if error.is_whole:  # the others would wait as long
                break
        else:
            place = slice(rows.start, rows.stop)
            scores[place], failed[place] = found_here, [False] * len(part)
    first = {"error": str(outcome), "row": outcome.row}
    send(answers, {"name": name, "scores": scores, "failed": failed} | first)


if __name__ == "__main__":
    main()
