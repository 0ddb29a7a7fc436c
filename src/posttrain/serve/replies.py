"""Answers onto the wire: JSON or server-sent events, for as long as the client is there and takes them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from contextlib import aclosing
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from posttrain.serve.faults import ApiRefusal
from posttrain.serve.service import Opened, Service
from posttrain.serve.wire import ChatAsked, CompletionAsked

_CLIENT_LEFT = 499
NOTE_HEADER = "x-posttrain-note"


class Reply(Response):
    """The answer to a request, made while it is sent. Who leaves, or takes nothing for `stall_s`, frees what it holds."""

    def __init__(self, service: Service, endpoint: str, asked: CompletionAsked | ChatAsked) -> None:
        super().__init__()
        self._service, self._endpoint, self._asked = service, endpoint, asked
        self._begun_s = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._answer(_Patient(send, self._service.options.stall_s)))
        leaving = asyncio.create_task(_left(receive))
        await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        status = _CLIENT_LEFT
        leaving.cancel()
        if not sending.done():
            sending.cancel()
        with contextlib.suppress(asyncio.CancelledError, TimeoutError):
            status = await sending
        self._service.meter.requests.labels(self._endpoint, str(status)).inc()

    async def _answer(self, send: _Patient) -> int:
        try:
            async with self._service.open(self._asked) as opened:
                if self._asked.stream:
                    await self._stream(opened, send)
                else:
                    await self._whole(opened, send)
                self._note(opened)
        except ApiRefusal as refusal:
            await send.refusal(refusal)
            return refusal.status
        return 200

    async def _whole(self, opened: Opened, send: _Patient) -> None:
        answering = opened.answering
        if answering.choices[0].row.ends.max_tokens == 0:  # the prompt alone, echoed
            for choice in answering.choices:
                choice.finish = "length"
        else:
            async with aclosing(answering.pieces()) as pieces:
                async for _ in pieces:
                    pass
        await send.json(opened.shape.whole(answering.choices, opened.usage), _headers(opened))

    async def _stream(self, opened: Opened, send: _Patient) -> None:
        answering, shape = opened.answering, opened.shape
        options = self._asked.stream_options
        counted = options is not None and options.include_usage
        async with aclosing(answering.pieces()) as pieces:
            async for choice, piece in pieces:
                if not send.is_begun:
                    await send.begin(_headers(opened))
                    for chunk in shape.opening(answering.choices):
                        await send.event(chunk)
                for entry in shape.deltas(choice, piece):
                    chunk = shape.chunk([entry])
                    await send.event({**chunk, "usage": None} if counted else chunk)
        if counted:
            await send.event(shape.chunk([], opened.usage))
        await send.end()

    def _note(self, opened: Opened) -> None:
        meter, answering = self._service.meter, opened.answering
        model = answering.lease.served.version.id
        meter.tokens.labels(model, "prompt").inc(opened.num_asked)
        meter.tokens.labels(model, "completion").inc(answering.num_sampled)
        for choice in answering.choices:
            meter.answers.labels(model, str(choice.finish)).inc()
        if answering.first_s is not None:
            meter.first_token_s.observe(answering.first_s - self._begun_s)
        meter.request_s.observe(time.monotonic() - self._begun_s)


class _Patient:
    """Sends, and gives up (TimeoutError) on who takes nothing for `stall_s`."""

    def __init__(self, send: Send, stall_s: float) -> None:
        self._send, self._stall_s = send, stall_s
        self.is_begun = False

    async def json(self, body: Any, headers: dict[str, str], status: int = 200) -> None:
        response = JSONResponse(body, status, headers)
        self.is_begun = True
        await self._message({"type": "http.response.start", "status": status, "headers": response.raw_headers})
        await self._message({"type": "http.response.body", "body": response.body})

    async def begin(self, headers: dict[str, str]) -> None:
        self.is_begun = True
        shown = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", **headers}
        raw = [(name.encode(), value.encode()) for name, value in shown.items()]
        await self._message({"type": "http.response.start", "status": 200, "headers": raw})

    async def event(self, data: Any) -> None:
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        await self._message({"type": "http.response.body", "body": _line(text), "more_body": True})

    async def end(self) -> None:
        await self._message({"type": "http.response.body", "body": _line("[DONE]"), "more_body": False})

    async def refusal(self, refusal: ApiRefusal) -> None:
        """In the middle of a stream it is an event, which clients raise as an error; no [DONE] follows."""
        if not self.is_begun:
            await self.json(refusal.body, dict(refusal.headers), refusal.status)
            return
        body = _line(json.dumps(refusal.body))
        await self._message({"type": "http.response.body", "body": body, "more_body": False})

    async def _message(self, message: Message) -> None:
        async with asyncio.timeout(self._stall_s):
            await self._send(message)


def _line(text: str) -> bytes:
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"


def _headers(opened: Opened) -> dict[str, str]:
    return {NOTE_HEADER: "; ".join(opened.notes)} if opened.notes else {}


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
