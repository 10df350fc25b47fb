"""JSON over HTTP, as rewards need it: repeated requests, errors of one line, a key nobody sees."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from rlhf.base.errors import UserError
from rlhf.base.log import first_line

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each further try
SHOWN = 200  # characters of a server's answer in a message


@dataclass
class Server:
    """One URL that JSON is posted to, within `async with server.open()`.

    A request is repeated after a failed connection and after HTTP 429 and 5xx. Whatever else is
    wrong is a UserError of one line with the URL.
    """

    url: str
    timeout: float  # seconds for one request
    key_variable: str | None = None  # the environment variable with the API key
    secret: str = field(default="", repr=False)
    client: httpx.AsyncClient | None = field(default=None, repr=False)

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Server]:
        """Keep connections within this context. Raises: UserError for a wrong URL or key."""
        try:
            parts = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise UserError(f"{self.url}: not a URL: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.host:
            raise UserError(f"{self.url}: not a URL; it begins with http:// or https://")
        headers = {"Content-Type": "application/json"}
        if self.key_variable:
            self.secret = self.read_key(self.key_variable)
            headers["Authorization"] = f"Bearer {self.secret}"
        async with httpx.AsyncClient(headers=headers, timeout=None) as self.client:
            yield self

    def read_key(self, variable: str) -> str:
        """The API key, which no message may show. Raises: UserError where it cannot be used."""
        key = os.environ.get(variable, "").strip()
        if key and key.isascii() and key.isprintable():
            return key
        wrong = "has characters that no key has" if key else "is not set"
        raise UserError(
            f"the environment variable {variable} {wrong} (api_key_env={variable}): set it to the "
            f"key for {self.shown}"
        )

    @property
    def shown(self) -> str:
        """The URL without user and password."""
        return str(httpx.URL(self.url).copy_with(username=None, password=None))

    async def post(self, body: Mapping[str, Any]) -> Any:
        """Post JSON; the JSON that is answered. Raises: UserError as the class says."""
        # all characters beyond ASCII are escaped, so that no text can break the request
        content = json.dumps(body).encode()
        problem = ""
        for wait in (0.0, *WAITS):
            await asyncio.sleep(wait)
            try:
                response = await self.send(content)
            except (httpx.LocalProtocolError, httpx.DecodingError) as error:
                raise UserError(f"{self.shown}: {type(error).__name__}") from None
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {first_line(error)}"
                continue
            if response.status_code != 429 and response.status_code < 500:
                return self.read(response)
            problem = self.status(response)
        raise UserError(
            f"{self.shown}: no answer after {len(WAITS) + 1} tries: {problem}: check the server"
        )

    async def send(self, content: bytes) -> httpx.Response:
        """One request. Raises: UserError when it takes too long."""
        assert self.client is not None
        try:
            async with asyncio.timeout(self.timeout):
                return await self.client.post(self.url, content=content)
        except TimeoutError:
            raise UserError(
                f"{self.shown}: no answer within {self.timeout:g} s (timeout={self.timeout:g}): "
                "raise it, or send less at once"
            ) from None

    def read(self, response: httpx.Response) -> Any:
        """The JSON of a response. Raises: UserError for another status than 2xx, or no JSON."""
        if not response.is_success:
            problem = f"{self.shown}: {self.status(response)}"
            if response.status_code in (401, 403):
                variable = self.key_variable
                problem += ": check the API key" + (f" in {variable}" if variable else "")
            raise UserError(problem)
        try:
            return json.loads(response.content)
        except (ValueError, RecursionError):
            raise UserError(
                f"{self.shown}: the answer is not JSON: {self.safe(response.text)!r}"
            ) from None

    def status(self, response: httpx.Response) -> str:
        """`HTTP 500 Internal Server Error: ...` with the beginning of what the server says."""
        said = self.safe(response.text)
        reason = f"HTTP {response.status_code} {response.reason_phrase}".strip()
        return f"{reason}: {said}" if said else reason

    def safe(self, text: str) -> str:
        """The beginning of a server's text in one line, without the key."""
        hidden = text.replace(self.secret, "***") if self.secret else text
        return " ".join(hidden.split())[:SHOWN]
