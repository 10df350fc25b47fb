"""A server for tests, as a program: a remote reward model and a judge that fail as they are told.

python reward_server.py PORT LOG BEHAVIOUR ...: request number i gets behaviour number i, and the
last one again and again. Port 0 = any free one. The first line of the output is the port; every
request is a line of JSON in the file LOG. The reward of a text is its length; the judge's grade is
the number of its exclamation marks; of two responses it prefers the one with more of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SLOW = 2.0  # seconds
STATUS = {"401": 401, "404": 404, "429": 429, "500": 500}


def reply(content: str) -> dict[str, Any]:
    """What a chat server answers."""
    return {"choices": [{"message": {"role": "assistant", "content": content}}]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    log: Path
    behaviours: list[str]
    lock = threading.Lock()
    number = 0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            behaviour = self.behaviours[min(self.number, len(self.behaviours) - 1)]
            type(self).number += 1
            entry = {"path": self.path, "body": body, "key": self.headers.get("Authorization")}
            with self.log.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        if behaviour == "die":
            os._exit(1)
        if behaviour == "slow":
            time.sleep(SLOW)
        if behaviour == "half":  # the connection ends within the answer
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
            self.close_connection = True
            return
        answer = self.judge(body) if self.path.endswith("/chat/completions") else self.reward(body)
        self.answer(STATUS.get(behaviour, 200), self.changed(answer, behaviour))

    def reward(self, body: dict[str, Any]) -> dict[str, Any]:
        rewards = [float(len(query)) for query in body["query"]]
        return {"rewards": rewards, "scores": [0.0] * len(rewards), "extra_logs": {}}

    def judge(self, body: dict[str, Any]) -> dict[str, Any]:
        text = body["messages"][0]["content"]
        if "[Response B]" in text:
            first, second = (part.count("!") for part in text.split("[Response B]"))
            verdict = "A" if first > second else "B" if first < second else "C"
            return reply(f"They have {first} and {second} marks. [[{verdict}]]")
        marks = text.count("!")
        content = f"It has {marks} marks.\nScore: {marks}" if marks else "I would rather not say."
        return reply(content)

    def changed(self, answer: dict[str, Any], behaviour: str) -> str:
        """The answer as a text, spoilt by the behaviour."""
        match behaviour:
            case "short":
                return json.dumps({"rewards": answer["rewards"][1:]})
            case "nan":
                return json.dumps({"rewards": [float("nan"), *answer["rewards"][1:]]})
            case "words":
                return json.dumps({"rewards": ["good", *answer["rewards"][1:]]})
            case "null":
                return json.dumps({"rewards": [None, *answer["rewards"][1:]]})
            case "first":
                return json.dumps(reply("The response that I read first: [[A]]"))
            case "silent":
                return json.dumps(reply("I would rather not say."))
            case "other":
                return json.dumps({"results": answer.get("rewards", [])})
            case "text":
                return "<html>Bad\nGateway</html>"
            case "401":  # some servers repeat the key
                return f"wrong key {self.headers.get('Authorization')}"
            case "404" | "429" | "500":
                return "no such thing"
        return json.dumps(answer)

    def answer(self, status: int, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client has gone
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Requests are in the file."""


@dataclass
class Running:
    """A server in another process."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/get_reward"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def requests(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@contextlib.contextmanager
def running(folder: Path, *behaviours: str, port: int = 0) -> Iterator[Running]:
    """A server within this context. Args: folder: for its log."""
    log = folder / "requests.jsonl"
    log.touch()
    command = [sys.executable, __file__, str(port), str(log), *behaviours]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield Running(process, int(process.stdout.readline()), log)
    finally:
        process.kill()
        process.wait()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """A client that went away."""


def main() -> None:
    Handler.log, Handler.behaviours = Path(sys.argv[2]), sys.argv[3:] or ["fine"]
    with Server(("127.0.0.1", int(sys.argv[1])), Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever(0.02)


if __name__ == "__main__":
    main()
