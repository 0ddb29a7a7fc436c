"""Who may ask, and how much a body may hold: before anything of a request is read."""

from __future__ import annotations

import asyncio
import hmac
import re

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from posttrain.serve.faults import ApiRefusal
from posttrain.serve.options import ServeOptions

_OPEN = frozenset({"/health"})
"""Asked by who has no token: load balancers."""
LOCAL_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?")
_SLOWEST = 1 << 10
"""Bytes of a body per second, below which a client only keeps a connection."""


class ServeGuard:
    """An ASGI middleware."""

    def __init__(self, app: ASGIApp, options: ServeOptions) -> None:
        self._app, self._options = app, options
        self._expected = options.token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check(scope["path"], headers)
            body = await self._body(receive, headers)
        except ApiRefusal as refusal:
            response = JSONResponse(refusal.body, refusal.status, dict(refusal.headers) | {"Connection": "close"})
            await response(scope, receive, send)
            return
        await self._app(scope, _after(body, receive), send)

    def _check(self, path: str, headers: Headers) -> None:
        if path in _OPEN:
            return
        if self._expected:
            kind, _, bearer = headers.get("authorization", "").partition(" ")
            # The SDK of Tinker sends the other one; a proxy may add one of its own.
            given = (bearer if kind.lower() == "bearer" else "", headers.get("x-api-key", ""))
            if not any(hmac.compare_digest(one.strip().encode(), self._expected) for one in given):
                raise ApiRefusal(
                    401,
                    "expected the header Authorization: Bearer TOKEN, with this server's token",
                    code="invalid_api_key",
                )
        elif not LOCAL_HOST.fullmatch(headers.get("host", "localhost")):
            # A page of any site may ask this machine under a name of its own.
            raise ApiRefusal(403, "this server has no token and answers requests to localhost only", code="not_local")

    async def _body(self, receive: Receive, headers: Headers) -> bytes:
        most = self._options.max_body_bytes
        said = headers.get("content-length", "0")
        if said.isdecimal() and int(said) > most:
            raise self._too_large()
        body, stall_s = bytearray(), self._options.stall_s
        begun_s = asyncio.get_running_loop().time()
        while True:
            left_s = begun_s + stall_s + len(body) / _SLOWEST - asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout(min(stall_s, left_s)):
                    message = await receive()
            except TimeoutError:
                raise ApiRefusal(
                    408, f"{len(body)} bytes of the body came, and too slowly; nothing may stall for {stall_s:g} s", code="timeout"
                ) from None  # fmt: skip
            body += message.get("body", b"")
            if len(body) > most:
                raise self._too_large()
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> ApiRefusal:
        return ApiRefusal(413, f"the body has more than {self._options.max_body_bytes:,} bytes", code="body_too_large")


def _after(body: bytes, receive: Receive) -> Receive:
    """What is read first is the body that was read already."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return waiting.pop() if waiting else await receive()

    return next_message
