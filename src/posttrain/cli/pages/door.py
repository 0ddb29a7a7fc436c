"""Who comes in with a browser: a token in the first address, then a cookie; no other site's page may ask or act."""

from __future__ import annotations

import hashlib
import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from posttrain.serve.guard import LOCAL_HOST
from posttrain.serve.options import ServeOptions

CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
REPORT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; sandbox; frame-ancestors 'none'"
"""Of a recorded report: whoever wrote it, no script of it runs."""
# With no-referrer a browser would send our own forms with the origin null.
_ALWAYS = {
    "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "same-origin", "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
}  # fmt: skip
_STRANGER = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><link rel="icon" href="data:,"><title>posttrain ui</title>
<main><h1>{title}</h1><p>{advice}</p></main></html>"""
_SAFE = frozenset({"GET", "HEAD"})


class PageDoor:
    """An ASGI middleware in front of `ServeGuard`, which reads the token from a header that no browser sends by itself."""

    def __init__(self, app: ASGIApp, options: ServeOptions) -> None:
        self._app, self._options = app, options
        self._token = options.token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        answer = self._answer(scope, headers)
        if answer is not None:
            await answer(scope, receive, _with_headers(send))
            return
        if "authorization" not in headers:
            scope = {**scope, "headers": [*scope["headers"], (b"authorization", b"Bearer " + self._token)]}
        await self._app(scope, receive, _with_headers(send))

    def _answer(self, scope: Scope, headers: Headers) -> Response | None:
        """What is said here; None to who may come in."""
        if self._options.is_local and not LOCAL_HOST.fullmatch(headers.get("host", "")):
            return _stranger(403, "Not this machine", "This server answers requests to localhost only.")
        if scope["path"] == "/health" or "authorization" in headers:
            return None  # the guard looks at the header; a page of another site cannot set it
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[-1]
        if given and scope["method"] in _SAFE:
            return self._let_in(scope["path"], given, headers)
        if not self._is_token(self._cookie(headers)):
            return _stranger(401, "No token", "Open the address that the terminal printed when posttrain ui was started: it holds the token.")  # fmt: skip
        if scope["method"] not in _SAFE and not _is_own_page(headers):
            return _stranger(403, "Another page's request", "What changes something is taken from this server's own pages only.")  # fmt: skip
        return None

    def _let_in(self, path: str, given: str, headers: Headers) -> Response:
        if not self._is_token(given):
            return _stranger(401, "Wrong token", "Open the address that the terminal printed when posttrain ui was started last.")  # fmt: skip
        answer = RedirectResponse("/" + path.lstrip("/\\"), 303)
        answer.set_cookie(_cookie_name(headers), given, httponly=True, samesite="strict")
        return answer

    def _cookie(self, headers: Headers) -> str:
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(_cookie_name(headers))
        except CookieError:
            return ""
        return found.value if found else ""

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self._token)


def form_token(token: str) -> str:
    """What each form of a page carries: another site knows neither it nor the cookie."""
    return hmac.new(token.encode(), b"posttrain ui form", hashlib.sha256).hexdigest()


def _cookie_name(headers: Headers) -> str:
    """Browsers do not keep the cookies of two ports apart."""
    return f"posttrain_ui_{headers.get('host', '').rpartition(':')[2]}".replace(".", "_").replace("]", "")


def _is_own_page(headers: Headers) -> bool:
    if origin := headers.get("origin"):
        return urlsplit(origin).netloc == headers.get("host", "")
    return headers.get("sec-fetch-site") == "same-origin"


def _stranger(status: int, title: str, advice: str) -> Response:
    return HTMLResponse(_STRANGER.format(title=title, advice=advice), status)


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in {"Content-Security-Policy": CONTENT_POLICY, **_ALWAYS}.items():
                headers.setdefault(name, value)
        await send(message)

    return sending
