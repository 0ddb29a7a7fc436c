"""JSON over HTTP to a server of this machine: a deadline on every call, many calls at once, and who stops waiting hangs up.

Each call has a connection of its own, so that hanging up ends one call alone. All of it happens in the caller's thread.
Knows no engine.
"""

from __future__ import annotations

import http.client
import io
import json
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast

from posttrain.errors import EngineError, EngineGoneError

_PIECE = 1 << 20
_MAX_REASON_CHARS = 500


class RefusedError(EngineError):
    """The server answered with an error; `status` is HTTP's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type[RefusedError], tuple[str, int]]:
        """It goes from one rank to the others."""
        return type(self), (str(self), self.status)


class LateError(EngineGoneError):
    """The server did not answer in time."""


@dataclass(frozen=True)
class Address:
    """Where a server listens: a port of this machine, or a Unix socket (`path`)."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        return self.path or f"{self.host}:{self.port}"

    def connect(self, timeout_s: float) -> socket.socket:
        """Raises: OSError."""
        if not self.path:
            return socket.create_connection((self.host, self.port), timeout_s)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout_s)
            connection.connect(self.path)
        except OSError:
            connection.close()
            raise
        return connection


class Client:
    """Calls of one server. `token` goes with each as a bearer token; `timeout_s` bounds those that name no other bound.

    Raises, from each call: EngineGoneError where nobody answers in time, RefusedError where the answer is an error.
    """

    def __init__(self, address: Address, token: str = "", timeout_s: float = 30.0) -> None:
        self.address, self.timeout_s = address, timeout_s
        self.token = token

    def call(self, method: str, path: str, body: Any = None, timeout_s: float | None = None) -> Any:
        """The answer's JSON, or its text where it says that it is none; None where it is empty."""
        with closing(self._open(method, path, body, timeout_s or self.timeout_s)) as exchange:
            with selectors.DefaultSelector() as selector:
                exchange.watch(selector)
                while not exchange.is_whole:
                    if not selector.select(exchange.left_s()):
                        raise exchange.late()
                    exchange.advance(selector)
            return exchange.answer()

    def calls(
        self, path: str, bodies: Sequence[Any], *, at_once: int, timeout_s: float, beat: Callable[[], None], every_s: float
    ) -> Generator[tuple[int, Any]]:  # fmt: skip
        """POST each; (place, answer) as they end. `beat` is called every `every_s` seconds of waiting, and may raise.

        Who closes the iterator hangs up on those that have not ended.
        """
        waiting, running = deque(enumerate(bodies)), dict[int, _Exchange]()
        beaten = time.monotonic()
        with selectors.DefaultSelector() as selector:
            try:
                while waiting or running:
                    while waiting and len(running) < at_once:
                        place, body = waiting.popleft()
                        running[place] = self._open("POST", path, body, timeout_s)
                        running[place].watch(selector, place)
                    for key, _ in selector.select(every_s):
                        place = cast(int, key.data)
                        running[place].advance(selector)
                        if running[place].is_whole:
                            with closing(running.pop(place)) as exchange:
                                answer = exchange.answer()
                            yield place, answer
                    if time.monotonic() - beaten >= every_s:
                        beat()
                        beaten = time.monotonic()
                        for exchange in running.values():
                            if exchange.left_s() == 0:
                                raise exchange.late()
            finally:
                for exchange in running.values():
                    exchange.close()

    def _open(self, method: str, path: str, body: Any, timeout_s: float) -> _Exchange:
        content = b"" if body is None else json.dumps(body).encode()
        headers = {
            "Host": "localhost", "Connection": "close", "Accept": "application/json",
            "Content-Type": "application/json", "Content-Length": str(len(content)),
        } | ({"Authorization": f"Bearer {self.token}"} if self.token else {})  # fmt: skip
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        request = f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + content
        return _Exchange(self.address, (method, path), request, timeout_s)


class _Exchange:
    """One request and its answer."""

    def __init__(self, address: Address, what: tuple[str, str], request: bytes, timeout_s: float) -> None:
        self._address, self._what = address, what
        self._timeout_s, self._deadline = timeout_s, time.monotonic() + timeout_s
        self._out, self._in = memoryview(request), bytearray()
        self.is_whole = False
        try:
            self._socket = address.connect(timeout_s)
        except OSError as error:
            raise self._gone(f"cannot be reached ({error})") from error
        self._socket.setblocking(False)

    def watch(self, selector: selectors.BaseSelector, place: int = 0) -> None:
        selector.register(self._socket, selectors.EVENT_WRITE, place)

    def advance(self, selector: selectors.BaseSelector) -> None:
        """Send or take what is ready to be. The answer is whole when the server hangs up."""
        try:
            if self._out:
                self._out = self._out[self._socket.send(self._out) :]
                if not self._out:
                    selector.modify(self._socket, selectors.EVENT_READ, selector.get_key(self._socket).data)
                return
            data = self._socket.recv(_PIECE)
        except BlockingIOError:
            return
        except OSError as error:
            raise self._gone(f"hung up ({error})") from error
        self._in += data
        if not data:
            selector.unregister(self._socket)
            self.is_whole = True

    def answer(self) -> Any:
        try:
            response = http.client.HTTPResponse(cast(socket.socket, _Received(bytes(self._in))), method=self._what[0])
            response.begin()
            content = response.read()
        except http.client.HTTPException as error:
            raise self._gone(f"hung up in the middle of its answer ({type(error).__name__})") from error
        found = self._read(content, response.getheader("Content-Type", ""))
        if response.status >= 400:
            raise RefusedError(self._said(f"answered {response.status}: {_reason(found)}"), response.status)
        return found

    def _read(self, content: bytes, kind: str) -> Any:
        if not content or not kind.startswith("application/json"):
            return content.decode("utf-8", "replace") or None
        try:
            return json.loads(content)
        except ValueError as error:
            raise EngineError(self._said(f"answered with what is no JSON ({error})")) from error

    def left_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def late(self) -> LateError:
        return LateError(self._said(f"did not answer within {self._timeout_s:g} s"))

    def close(self) -> None:
        self._socket.close()

    def _gone(self, what: str) -> EngineGoneError:
        return EngineGoneError(self._said(what))

    def _said(self, what: str) -> str:
        return f"{' '.join(self._what)}: the server at {self._address} {what}"


class _Received:
    """Bytes in a form that `http.client` reads an answer from."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def _reason(answer: Any) -> str:
    """What an error's body says, in one line."""
    found = answer
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and name in found:
            found = cast("dict[str, Any]", found)[name]
    return " ".join(str(found).split())[:_MAX_REASON_CHARS]
