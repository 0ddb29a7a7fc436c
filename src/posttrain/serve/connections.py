"""Connections before a request is there: how many at once, and how long one may take to send its headers."""

from __future__ import annotations

import asyncio

import h11
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from posttrain.serve.faults import ApiRefusal
from posttrain.serve.options import ServeOptions

_CROWDED_S = 1.0
"""For a request that is one too many to come, and to be told so."""


def protocol_of(options: ServeOptions) -> type[H11Protocol]:
    """What uvicorn speaks with each connection. It is h11 wherever the server runs: the limit on headers is h11's."""

    class LimitedProtocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - as uvicorn has it
            super().connection_made(transport)
            self._headers_s = options.stall_s
            if len(self.connections) > options.max_connections:
                self._headers_s = min(options.stall_s, _CROWDED_S)
                self.app = _Crowded(options.max_connections)
            self._deadline: asyncio.TimerHandle | None = self._headers_due()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget_deadline()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._forget_deadline()
            elif self._deadline is None:  # the next request of a connection that is kept begins
                self._deadline = self._headers_due()

        def _headers_due(self) -> asyncio.TimerHandle:
            # Not `timeout_keep_alive`, which ends with the first byte.
            return self.loop.call_later(self._headers_s, self.transport.close)

        def _forget_deadline(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return LimitedProtocol


class _Crowded:
    """An ASGI application that lets in nobody."""

    def __init__(self, most: int) -> None:
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = ApiRefusal(
            429, f"{self._most} connections are open already; ask again later", code="too_many_connections", retry_after_s=1
        )  # fmt: skip
        headers = dict(refusal.headers) | {"Connection": "close"}
        await JSONResponse(refusal.body, refusal.status, headers)(scope, receive, send)
