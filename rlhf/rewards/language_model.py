"""A language model behind an OpenAI-compatible server: it is asked, and its replies are kept.

A reply is a small file, named by a hash of endpoint, model and message, so that the same question
is not asked, or paid for, again. No torch here.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.base.errors import UserError
from rlhf.base.files import atomic_path
from rlhf.base.log import log
from rlhf.base.server import Server


@dataclass(frozen=True)
class LanguageModel:
    """Where a language model is, and how it is asked."""

    endpoint: str  # up to and including /v1
    model: str  # its name there
    api_key_env: str | None = None  # environment variable with the API key; None: no key is sent
    timeout: float = 60.0  # seconds for one request
    concurrency: int = 8  # largest number of requests at the same time
    max_tokens: int | None = None  # of a reply; None: as the server decides
    cache: str | None = None  # folder of the replies; None: rlhf/judge in the user's cache folder

    @property
    def server(self) -> Server:
        """The URL that questions are posted to."""
        base, mark, query = self.endpoint.partition("?")
        url = f"{base.rstrip('/')}/chat/completions{mark}{query}"
        return Server(url, self.timeout, self.api_key_env)

    async def ask_all(
        self, questions: Sequence[str], usable: Callable[[str], bool]
    ) -> dict[str, str]:
        """The reply to each question; the same question is asked once. Usable replies are kept.

        Raises: UserError of the first request that fails, which ends all others.
        """
        server, folder = self.server, cache_folder(self.cache)
        free = asyncio.Semaphore(self.concurrency)

        async def ask(question: str) -> str:
            body = self.request(question)
            file = reply_file(folder, server.address, body)
            if (reply := kept(file)) is not None and usable(reply):
                return reply
            async with free:
                reply = server.hide(content_of(await server.post(body), server.shown))
            if usable(reply):
                keep(file, {"model": self.model, "reply": reply})
            return reply

        tasks = {}
        try:
            async with server.open(), asyncio.TaskGroup() as group:
                for question in dict.fromkeys(questions):
                    tasks[question] = group.create_task(ask(question))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return {question: task.result() for question, task in tasks.items()}

    def request(self, question: str) -> dict[str, Any]:
        """The body of a request."""
        limit = {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        messages = [{"role": "user", "content": question}]
        return {"model": self.model, "temperature": 0, **limit, "messages": messages}


def content_of(reply: Any, url: str) -> str:
    """The text in an answer of /chat/completions. Raises: UserError where it has none."""
    try:
        content = reply["choices"][0]["message"]["content"]
        if isinstance(content, list):  # of parts, some of which are text
            content = "".join(part["text"] for part in content if part["type"] == "text")
    except (KeyError, IndexError, TypeError):
        raise UserError(f"{url}: the answer has no choices[0].message.content") from None
    return content if isinstance(content, str) else ""  # null: a reply without text


# ---------------------------------------------------------------------------------- replies on disk


def cache_folder(given: str | None) -> Path:
    """The folder of the replies, which is made. Raises: UserError where it cannot be."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    folder = (Path(given) if given else base / "rlhf" / "judge").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder of the judge's replies (cache={folder}): {error.strerror}: "
            "name another one"
        ) from None
    return folder


def reply_file(folder: Path, url: str, body: Mapping[str, Any]) -> Path:
    """Where the reply to a request is kept."""
    key = hashlib.sha256(json.dumps([url, body]).encode()).hexdigest()
    return folder / key[:2] / f"{key}.json"


def kept(file: Path) -> str | None:
    """A reply from the disk; None where there is none that can be read."""
    try:
        reply = json.loads(file.read_text(encoding="utf-8"))["reply"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return reply if isinstance(reply, str) else None


def keep(file: Path, reply: Mapping[str, str]) -> None:
    """Write a reply in one step. Other processes may write the same one. Where it cannot be
    written, there is a warning: the reply is there, and may have been paid for."""
    try:
        file.parent.mkdir(exist_ok=True)
        with atomic_path(file) as temporary:
            temporary.write_text(json.dumps(reply), encoding="utf-8")
    except OSError as error:
        log.warning(f"cannot keep a reply ({file}): {error.strerror}")
