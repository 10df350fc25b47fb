"""The process that holds the models of the page, as the page uses it. No torch here.

It starts with the first request, serves all tabs and browsers, and ends when nothing was asked for
ten minutes, or when the page ends, however that ends. What it does is in model_process.py.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from rlhf.base.errors import UserError
from rlhf.base.own_processes import own_source, python_module
from rlhf.chat.advice import Start
from rlhf.chat.policy import Params
from rlhf.config.choices import Template
from rlhf.data.records import Turn
from rlhf.runs.environment import QUIET, thread_settings
from rlhf.runs.gpus import VISIBLE, unclaimed_gpu

IDLE = 600.0  # seconds without a request, after which models are freed
AUTO = "auto"  # as a reference: the SFT policy that the run was trained from


@dataclass
class Answer:
    """A finished response, with what was measured of it."""

    text: str
    finished: bool  # by EOS or by the mark of a user's turn; else it was truncated
    stopped: bool  # by the user
    rewards: list[tuple[str, float]] = field(default_factory=list)  # (name of the model, score)
    # text and log pi - log pi_ref, in nats, of each token; empty without a reference
    tokens: list[tuple[str, float]] = field(default_factory=list)
    reference: str = ""  # its name
    notes: list[str] = field(default_factory=list)  # what could not be measured, and why


class Models:
    """The process of the models; any thread may use it.

    Args: device: auto (a GPU that no run of this user has claimed, else the CPU), cpu or cuda.
        threads: of the process.  idle: seconds.
    """

    def __init__(self, device: str = "auto", threads: int = 1, idle: float = IDLE):
        self.device, self.threads, self.idle = device, threads, idle
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._process: subprocess.Popen[str] | None = None
        self._inboxes: dict[int, queue.Queue[dict[str, Any]]] = {}  # of the requests that wait
        self._used = 0.0  # when the last request ended

    def answer(
        self,
        policy: str,
        turns: Sequence[Turn],
        params: Params,
        rewards: Sequence[str] = (),
        reference: str = "",
    ) -> Request:
        """Let a policy respond.

        Args: policy, rewards: runs, directories or hub ids.  turns: with the system turn.
            reference: as policy, or AUTO; "": none.
        """
        question = {"policy": policy, "turns": [(turn.role, turn.text) for turn in turns]}
        measured = {"rewards": list(rewards), "reference": reference}
        return Request(self, {"do": "answer", **question, "params": asdict(params), **measured})

    def held_out(self, run: str) -> list[list[Turn]]:
        """The held-out prompts of the data that a run was trained on. Raises: UserError."""
        reply = Request(self, {"do": "held_out", "run": run}).result()
        return [[Turn(role, text) for role, text in prompt] for prompt in reply["prompts"]]

    def start_of(self, policy: str) -> Start:
        """Path and template of a policy, for a command that trains it. Raises: UserError."""
        reply = Request(self, {"do": "start", "policy": policy}).result()
        return Start(reply["path"], Template[reply["template"]])

    def loaded(self) -> list[str]:
        """The models in the process; does not start it."""
        if not self.pid:
            return []
        loaded: list[str] = Request(self, {"do": "loaded"}).result()["loaded"]
        return loaded

    @property
    def pid(self) -> int | None:
        """Of the process, while it runs."""
        process = self._process
        return process.pid if process and process.poll() is None else None

    def close(self) -> None:
        """End the process; the next request starts another one."""
        with self._lock:
            self._close()

    # ------------------------------------------------------------------------- for Request

    def send(self, message: dict[str, Any]) -> tuple[int, queue.Queue[dict[str, Any]]]:
        """Send a request. Returns: its number, and where its replies arrive."""
        with self._lock:
            if not self._process or self._process.poll() is not None:
                self._start()
            number, inbox = next(self._numbers), queue.Queue[dict[str, Any]]()
            self._inboxes[number] = inbox
            self._write({"id": number} | message)
            return number, inbox

    def end(self, number: int, is_done: bool) -> None:
        """Forget a request. Args: is_done: else the process is asked to stop it."""
        if not is_done:
            self.stop(number)
        with self._lock:
            self._inboxes.pop(number, None)
            self._used = time.monotonic()

    def stop(self, number: int) -> None:
        """Stop a request; a response ends with what is there of it."""
        with self._lock:
            self._write({"stop": number})

    # ------------------------------------------------------------------------- the process

    def _start(self) -> None:
        self._close()
        gpu = unclaimed_gpu() if self.device == "auto" else None
        use_cpu = self.device == "cpu" or (self.device == "auto" and gpu is None)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        environment = os.environ | own_source() | QUIET | thread_settings(self.threads) | threads
        if gpu is not None:
            environment[VISIBLE] = gpu
        self._process = subprocess.Popen(
            python_module("rlhf.app.model_process", "-W", "ignore"),
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C reaches the page only, which then ends this one
        )
        self._used = time.monotonic()
        device = "cpu" if use_cpu else "cuda"
        self._write({"device": device, "threads": self.threads, "idle": self.idle})
        for work in (self._read, self._end_when_idle):
            threading.Thread(target=work, args=(self._process,), daemon=True).start()

    def _write(self, message: dict[str, Any]) -> None:
        if self._process and self._process.stdin:
            with contextlib.suppress(OSError, ValueError):  # it has ended: _read reports that
                self._process.stdin.write(json.dumps(message) + "\n")
                self._process.stdin.flush()

    def _read(self, process: subprocess.Popen[str]) -> None:
        """Hand out the replies of a process, until it ends."""
        assert process.stdout is not None
        for message in read_messages(process.stdout):
            inbox = self._inboxes.get(message["id"])
            if inbox:
                inbox.put(message)
        code = process.wait()
        with self._lock:
            if self._process is process:
                for inbox in self._inboxes.values():
                    inbox.put({"error": f"the process of the models has ended ({ended(code)})"})

    def _end_when_idle(self, process: subprocess.Popen[str]) -> None:
        """End a process that nobody has used for `idle` seconds."""
        while process.poll() is None:
            time.sleep(min(self.idle / 4, 5.0))
            with self._lock:
                is_idle = not self._inboxes and time.monotonic() - self._used > self.idle
                if self._process is process and is_idle:
                    self._close()

    def _close(self) -> None:
        process, self._process = self._process, None
        for inbox in self._inboxes.values():
            inbox.put({"error": "the process of the models was ended"})
        if process:
            process.kill()
            process.wait()
            if process.stdin:
                with contextlib.suppress(OSError):  # what was not read yet cannot be sent
                    process.stdin.close()


class Request:
    """What the process of the models was asked. Iterate over it once.

    Yields ("note", what is being done) and ("piece", the next piece of a response).
    Raises: UserError with the reason why it cannot be done.
    """

    def __init__(self, models: Models, message: dict[str, Any]):
        self._models = models
        self._number, self._inbox = models.send(message)
        self._result: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[tuple[str, str]]:
        try:
            while True:
                message = self._inbox.get()
                if "error" in message:
                    raise UserError(message["error"])
                if "done" in message:
                    self._result = message
                    return
                if "note" in message:
                    yield "note", message["note"]
                else:
                    yield "piece", message["piece"] + self._waiting_pieces()
        finally:
            self._models.end(self._number, self._result is not None)

    def _waiting_pieces(self) -> str:
        """The pieces that came meanwhile: a slow reader gets fewer, longer ones."""
        pieces = []
        with self._inbox.mutex:
            while self._inbox.queue and "piece" in self._inbox.queue[0]:
                pieces.append(self._inbox.queue.popleft()["piece"])
        return "".join(pieces)

    def stop(self) -> None:
        """Stop a response in the middle. It ends with what is there, also measured."""
        self._models.stop(self._number)

    def result(self) -> dict[str, Any]:
        """The last message; waits for it. Raises: UserError."""
        if self._result is None:
            for _ in self:
                pass
        assert self._result is not None
        return self._result

    @property
    def answer(self) -> Answer:
        """The response; waits for it. Raises: UserError."""
        values = dict(self.result()["answer"])
        for name in ("rewards", "tokens"):
            values[name] = [(text, number) for text, number in values[name]]
        return Answer(**values)


def read_messages(stream: IO[str]) -> Iterator[dict[str, Any]]:
    """The lines of JSON of a stream, until it ends."""
    with contextlib.suppress(ValueError, OSError):  # closed while it is read
        for line in stream:
            yield json.loads(line)


def ended(code: int) -> str:
    """How a process ended."""
    if code >= 0:
        return f"exit code {code}"
    names = {one.value: one.name for one in signal.Signals}
    out_of_memory = ": was the memory full?" if code == -signal.SIGKILL else ""
    return f"signal {names.get(-code, -code)}{out_of_memory}"


SHARED = Models()  # that of the page; its device and threads are set before it starts
