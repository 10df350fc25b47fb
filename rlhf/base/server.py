"""JSON over HTTP: repeated requests, errors of one line, a key nobody sees. No torch here."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from rlhf.base import watchdog
from rlhf.base.errors import UserError
from rlhf.base.log import first_line
from rlhf.base.urls import shown_url

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each further try
LONGEST_WAIT = 60.0  # seconds, where a server asks for more by Retry-After
SHOWN = 200  # characters of a server's answer in a message
SHORTEST_SECRET = 6  # characters of what is hidden in a server's texts because it is in the URL
logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs each URL, with its keys


@dataclass
class Server:
    """One URL that JSON is posted to, within `async with server.open()`.

    A request is repeated after a failed connection and after HTTP 429 and 5xx. Whatever else is
    wrong is a UserError of one line with the URL. A proxy in the environment is used, but not for
    this machine itself.
    """

    url: str
    timeout: float | None  # seconds for one request; None: no limit
    key_variable: str | None = None  # the environment variable with the API key
    waits: Sequence[float] | None = None  # before each further try; None: WAITS
    secret: str = field(default="", repr=False)
    proxy: str = ""  # in words, where there is one
    client: httpx.AsyncClient | None = field(default=None, repr=False)

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Server]:
        """Keep connections within this context. Raises: UserError for a wrong URL or key."""
        try:
            parts = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            detail = "" if "@" in self.url or "?" in self.url else f": {error}"
            raise UserError(f"{self.shown}: not a URL{detail}") from None
        if parts.scheme not in ("http", "https") or not parts.host:
            raise UserError(f"{self.shown}: not a URL; it begins with http:// or https://")
        headers = {"Content-Type": "application/json"}
        if self.key_variable:
            self.secret = self.read_key(self.key_variable)
            headers["Authorization"] = f"Bearer {self.secret}"
        self.proxy = proxy_for(parts)
        async with make_client(headers, direct=is_local(parts.host)) as self.client:
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
        """The URL as messages show it: see `shown_url`."""
        return shown_url(self.url)

    @property
    def address(self) -> str:
        """The URL without user and password: the same server for everyone."""
        return str(httpx.URL(self.url).copy_with(username=None, password=None))

    @property
    def where(self) -> str:
        """The URL, and the proxy that it is reached through."""
        return f"{self.shown}{self.proxy}"

    async def post(self, body: Mapping[str, Any]) -> Any:
        """Post JSON; the JSON that is answered. Raises: UserError as the class says."""
        # all characters beyond ASCII are escaped, so that no text can break the request
        content = json.dumps(body).encode()
        problem, asked = "", 0.0
        waits = WAITS if self.waits is None else self.waits
        for wait in (0.0, *waits):
            await asyncio.sleep(max(wait, asked))
            asked = 0.0
            try:
                response = await self.send(content)
            except (httpx.LocalProtocolError, httpx.DecodingError) as error:
                raise UserError(f"{self.where}: {type(error).__name__}") from None
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {self.safe(first_line(error))}"
                continue
            if response.status_code != 429 and response.status_code < 500:
                watchdog.progress()
                return self.read(response)
            problem, asked = self.status(response), retry_after(response)
        tries = "1 try" if not waits else f"{len(waits) + 1} tries"
        raise UserError(f"{self.where}: no answer after {tries}: {problem}: check the server")

    async def send(self, content: bytes) -> httpx.Response:
        """One request. Raises: UserError when it takes too long."""
        assert self.client is not None
        try:
            async with asyncio.timeout(self.timeout):
                return await self.client.post(self.url, content=content)
        except TimeoutError:
            raise UserError(
                f"{self.where}: no answer within {self.timeout:g} s (timeout={self.timeout:g}): "
                "raise it, or send less at once"
            ) from None

    def read(self, response: httpx.Response) -> Any:
        """The JSON of a response. Raises: UserError for another status than 2xx, or no JSON."""
        if not response.is_success:
            problem = f"{self.where}: {self.status(response)}"
            if response.next_request is not None:
                target = shown_url(str(response.next_request.url))
                problem += f": the server redirects to {target}: use that address"
            if response.status_code in (401, 403):
                variable = self.key_variable
                problem += ": check the API key" + (f" in {variable}" if variable else "")
            raise UserError(problem)
        try:
            return json.loads(response.content)
        except (ValueError, RecursionError):
            raise UserError(
                f"{self.where}: the answer is not JSON: {self.safe(response.text)!r}"
            ) from None

    def status(self, response: httpx.Response) -> str:
        """`HTTP 500 Internal Server Error: ...` with the beginning of what the server says."""
        said = self.safe(response.text)
        reason = f"HTTP {response.status_code} {self.safe(response.reason_phrase)}".strip()
        return f"{reason}: {said}" if said else reason

    def safe(self, text: str) -> str:
        """The beginning of a server's text in one line, without the key."""
        return " ".join(self.hide(text).split())[:SHOWN]

    def hide(self, text: str) -> str:
        """A text without the key, and without what `shown_url` hides in the URL."""
        for secret in sorted(self.secrets(), key=len, reverse=True):
            for form in {secret, secret.replace("/", r"\/"), json.dumps(secret)[1:-1]}:
                text = text.replace(form, "***")
        return text

    def secrets(self) -> set[str]:
        """The key and those of the URL, as they are and percent-encoded."""
        before, _, rest = self.url.partition("?")
        user = before.partition("//")[2].partition("/")[0].rpartition("@")[0]
        query = rest.partition("#")[0].split("&")
        values = [value.partition("=")[2] or value for value in query]
        of_url = [user, user.partition(":")[2], *values]
        of_url += [urllib.parse.unquote_plus(one) for one in of_url]
        raw = {self.secret, *(one for one in of_url if len(one) >= SHORTEST_SECRET)} - {""}
        encoded = {urllib.parse.quote(one, safe="") for one in raw}
        return raw | encoded | {urllib.parse.quote(one) for one in raw}


def retry_after(response: httpx.Response) -> float:
    """Seconds that a server asks to wait, at most LONGEST_WAIT; 0 where it does not."""
    given = response.headers.get("Retry-After", "").strip()
    if response.status_code not in (429, 503) or not given:
        return 0.0
    if given.isascii() and given.isdigit():
        return min(float(given), LONGEST_WAIT)
    try:
        seconds = parsedate_to_datetime(given).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT)


# ---------------------------------------------------------------------------------- the environment


def make_client(headers: Mapping[str, str], direct: bool) -> httpx.AsyncClient:
    """A client with the proxies and certificates that the environment names.

    Args: direct: without proxies.
    Raises: UserError naming the variable that cannot be used.
    """
    try:
        certificates = httpx.create_ssl_context()
    except OSError as error:
        variables = in_environment("SSL_CERT_FILE", "SSL_CERT_DIR")
        raise UserError(
            f"cannot read the certificates ({variables}): {first_line(error)}: correct or unset it"
        ) from None
    try:
        return httpx.AsyncClient(
            headers=headers,
            timeout=None,
            limits=httpx.Limits(max_connections=None),  # the callers have limits of their own
            verify=certificates,
            trust_env=not direct,
        )
    except (ValueError, httpx.InvalidURL, ImportError) as error:
        names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
        variables = in_environment(*names, *(name.lower() for name in names))
        raise UserError(
            f"cannot use the proxy ({variables}): {shown_url(first_line(error))}: correct or unset "
            "it"
        ) from None


def in_environment(*names: str) -> str:
    """`NAME=value` of the variables that are set, for a message."""
    return ", ".join(
        f"{name}={shown_url(os.environ[name])}" for name in names if name in os.environ
    )


def is_local(host: str) -> bool:
    """Whether a host is this machine."""
    return is_loopback(host) or host in ("0.0.0.0", "::")


def is_loopback(host: str) -> bool:
    """Whether a host is reached from this machine only."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def proxy_for(url: httpx.URL) -> str:
    """` (through the proxy URL)` as the environment names it; empty where there is none."""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or is_local(url.host) or urllib.request.proxy_bypass(url.host):
        return ""
    return f" (through the proxy {shown_url(proxy)}, which the environment names)"
