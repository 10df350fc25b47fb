"""Requests to reward servers: what messages hide, waits, redirects, proxies and certificates."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import time
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from rlhf.base import server as requests
from rlhf.base.errors import UserError
from rlhf.base.server import Server, retry_after
from rlhf.base.urls import shown_url
from rlhf.rewards.judge import judge
from rlhf.rewards.remote import remote

VARIABLE, KEY = "TEST_KEY", "sk-+/secret=5f0c"
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key, no proxy, and no waits."""
    monkeypatch.setenv(VARIABLE, KEY)
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(requests, "WAITS", (0.0,))


@contextlib.contextmanager
def answering(*answers: tuple[int, str, dict[str, str], str]) -> Iterator[str]:
    """A server that gives these answers, the last one again and again: status, reason, headers,
    body. Its address."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, reason, headers, body = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status, reason)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            """Nothing on the terminal."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def post(url: str, **settings: Any) -> Any:
    async def ask() -> Any:
        async with Server(url, 5.0, **settings).open() as server:
            return await server.post({})

    return asyncio.run(ask())


def refused(url: str, **settings: Any) -> str:
    with pytest.raises(UserError) as raised:
        post(url, **settings)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# --- what is hidden


@pytest.mark.parametrize(
    "url, shown",
    [
        ("http://host:5000/path", "http://host:5000/path"),
        ("http://me:secret@host:5000/path", "http://host:5000/path"),
        ("http://secret@host/path", "http://host/path"),
        ("http://me:sec/ret?@host/path", "http://host/path"),
        ("http://me:sec@ret@host", "http://host"),
        ("me:secret@host:5000/path", "host:5000/path"),
        ("http://host/p?key=secret&n=1#a", "http://host/p?key=***&n=***#a"),
        ("http://host/p?key=sec=ret?", "http://host/p?key=***"),
        ("http://host/p?secret", "http://host/p?***"),
        ("http://host/p?key=", "http://host/p?key="),
        ("http://host:5000/users/a@b", "http://host:5000/users/a@b"),
        ("url=http://me:secret@host/p: no answer", "url=http://host/p: no answer"),
        ("localhost:5000", "localhost:5000"),
        ("", ""),
    ],
)
def test_what_a_url_shows(url: str, shown: str) -> None:
    assert shown_url(url) == shown


def test_a_wrong_url_shows_no_password() -> None:
    for url in (
        "me:secret@host:5000/x",
        "http://me:sec/secret@host",
        "http://a:secret@h:x/?k=secret",
    ):
        assert "secret" not in refused(url) and "not a URL" in refused(url)


@pytest.mark.parametrize("form", [KEY, quote(KEY, safe=""), quote(KEY), json.dumps(KEY)])
def test_no_form_of_the_key_is_shown(form: str) -> None:
    for answer in [
        (400, f"wrong {form}", {}, f"key {form}"),
        (200, "OK", {}, f"{form} is no JSON"),
    ]:
        with answering(answer) as address:
            line = refused(f"{address}/x?key={quote(KEY)}&n=5", key_variable=VARIABLE)
            assert "***" in line and "secret" not in line and "5f0c" not in line
            assert line.startswith(f"{address}/x?key=***&n=***: ")
            assert "5f0c" not in refused(f"{address}/x?key={quote(KEY, safe='')}")


def test_httpx_logs_no_url(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with answering((200, "OK", {}, "{}")) as address:
        post(f"{address}/x?key=secret")
    assert "secret" not in caplog.text


def test_a_reply_with_the_key_is_not_shown_or_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "rubric").write_text("{completion}")
    settings = {"model": "m", "api_key_env": VARIABLE, "cache": str(tmp_path / "kept")}
    for text in (f"Score: 7, {KEY}", f"My key is {KEY}"):
        body = json.dumps({"choices": [{"message": {"content": text}}]})
        with answering((200, "OK", {}, body)) as address:
            asked = judge(
                ["?"], ["a"], str(tmp_path / "rubric"), endpoint=f"{address}/v1", **settings
            )
            assert asyncio.run(asked) == [0.7 if "7" in text else None]
    [file] = (tmp_path / "kept").rglob("*.json")
    assert json.loads(file.read_text())["reply"] == "Score: 7, ***"
    assert caplog.messages[-1].endswith("one ends in 'My key is ***'")


def test_what_a_remote_server_repeats_is_hidden() -> None:
    for body in ('{"secret-key": 1}', '{"rewards": ["secret-key"]}'):
        with answering((200, "OK", {}, body)) as address:
            with pytest.raises(UserError) as raised:
                asyncio.run(remote(["?"], ["a"], f"{address}/x?k=secret-key"))
            assert "secret" not in str(raised.value) and "***" in str(raised.value)


# --- waits and redirects


@pytest.mark.parametrize(
    "status, given, seconds",
    [
        (429, "7", 7),
        (503, "7", 7),
        (500, "7", 0),
        (429, "3600", 60),
        (429, "soon", 0),
        (429, "-1", 0),
        (429, "", 0),
    ],
)
def test_how_long_a_server_asks_to_wait(status: int, given: str, seconds: float) -> None:
    assert retry_after(httpx.Response(status, headers={"Retry-After": given})) == seconds


@pytest.mark.parametrize("later, seconds", [(30, 30), (3600, 60), (-30, 0)])
def test_a_server_may_give_the_time(later: float, seconds: float) -> None:
    given = formatdate(time() + later, usegmt=True)
    response = httpx.Response(429, headers={"Retry-After": given})
    assert retry_after(response) == pytest.approx(seconds, abs=10 if later == 30 else 0)


def test_the_wait_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(requests, "WAITS", (0.5, 1.0, 2.0))
    busy, broken = (429, "Busy", {"Retry-After": "9"}, ""), (500, "Broken", {}, "")
    with answering(busy, broken, (503, "Busy", {}, ""), (200, "OK", {}, "{}")) as address:
        assert post(address) == {}
    assert waits == [0.0, 9.0, 1.0, 2.0]


def test_a_redirect_names_the_address() -> None:
    target = {"Location": "/v2/x?key=secret"}
    with answering((307, "Temporary Redirect", target, "")) as address:
        assert refused(f"{address}/x") == (
            f"{address}/x: HTTP 307 Temporary Redirect: the server redirects to "
            f"{address}/v2/x?key=***: use that address"
        )


# --- the environment


def test_this_machine_is_reached_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for proxy in ("http://127.0.0.1:9", "nonsense://x"):
        for name in ("HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy)
        with answering((200, "OK", {}, "{}")) as address:
            assert post(address) == {}
            assert post(address.replace("127.0.0.1", "localhost")) == {}


def test_a_proxy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://me:secret@127.0.0.1:9")
    line = refused("http://judge.invalid/x")
    assert line.startswith(
        "http://judge.invalid/x (through the proxy http://127.0.0.1:9, which the environment "
        "names): no answer after 2 tries: ConnectError"
    )


def test_variables_that_cannot_be_used_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "nonsense://me:secret@x:1")
    line = refused("http://judge.invalid/x")
    assert line.startswith("cannot use the proxy (HTTPS_PROXY=nonsense://x:1): ")
    assert "secret" not in line
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such.pem")
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    assert refused("https://judge.invalid/x").startswith(
        "cannot read the certificates (SSL_CERT_FILE=/no/such.pem): [Errno 2] No such file"
    )
