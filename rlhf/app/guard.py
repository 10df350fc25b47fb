"""Who may use the app: checks of every request, before gradio sees it."""

from __future__ import annotations

import secrets
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf.base.server import is_loopback

# Nothing is loaded from another host, whatever slips into the page.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)
NO_TOKEN = "Open the address that python -m rlhf.app has printed: it ends with ?token=...\n"
OTHER_SITE = "A page of another site may not use this one.\n"


class Guard:
    """Lets requests through that come from this page itself.

    A request of another site, which any page in the same browser could send, is refused by its
    Origin, and one to another name of this server (DNS rebinding) by its Host. With a token, the
    first request has it in its address; a cookie has it from then on.

    Args:
        token: of the address; "" where the server listens to this machine only.
    """

    def __init__(self, app: ASGIApp, token: str):
        self.app, self.token = app, token
        self.cookie = f"rlhf-{secrets.token_hex(4)}"  # servers on other ports share the cookies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Args: as of ASGI."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if self.is_foreign(headers):
            await self.refuse(OTHER_SITE, scope, receive, send)
        elif not self.token or self.matches(self.cookie_of(headers)):
            await self.app(scope, receive, with_policy(send))
        elif scope["type"] == "http" and self.matches(given):
            answer = RedirectResponse(scope["path"] or "/", 303)  # an address without the token
            answer.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
            await answer(scope, receive, send)
        else:
            await self.refuse(NO_TOKEN, scope, receive, send)

    def is_foreign(self, headers: Headers) -> bool:
        """Whether another site sends a request, or it is sent to a foreign name."""
        host = headers.get("host", "")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return True
        return not self.token and not is_loopback(urlsplit(f"//{host}").hostname or "")

    def cookie_of(self, headers: Headers) -> str:
        """The token that the browser has."""
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return ""
        return found.value if found else ""

    def matches(self, given: str) -> bool:
        """Whether this is the token."""
        return secrets.compare_digest(given.encode(), self.token.encode())

    async def refuse(self, why: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403; a websocket is closed."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await PlainTextResponse(why, 403)(scope, receive, send)


def with_policy(send: Send) -> Send:
    """Add POLICY to answers that have none of their own."""

    async def send_with_policy(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.setdefault("Content-Security-Policy", POLICY)
            headers.setdefault("Referrer-Policy", "no-referrer")
        await send(message)

    return send_with_policy
