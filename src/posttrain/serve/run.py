"""A server from its options to its end: models first, then the port; on SIGTERM no new work, then the answers, then out."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Generic, Protocol, TypeVar

import uvicorn
from starlette.types import ASGIApp

from posttrain.errors import ConfigError
from posttrain.serve.app import make_app
from posttrain.serve.connections import protocol_of
from posttrain.serve.options import ServeOptions
from posttrain.serve.router import Router
from posttrain.serve.service import Service

log = logging.getLogger(__name__)

_SEND_BUFFER = 1 << 17
"""Bytes per connection."""


class Drains(Protocol):
    """What answers requests, as its server's end sees it."""

    @property
    def num_open(self) -> int: ...

    async def drain(self, within_s: float) -> None: ...


DrainsT = TypeVar("DrainsT", bound=Drains)


@dataclass(frozen=True)
class Serving(Generic[DrainsT]):
    """A server whose port is open. `stop` is for other threads, and is what a first signal does."""

    address: str
    service: DrainsT
    stop: Callable[[], object]


def run_server(
    options: ServeOptions, make_router: Callable[[], Router], ready: Callable[[Serving[Service]], None]
) -> None:
    """Until a signal; `ready` is called before the first request is taken. Raises: PosttrainError before that."""
    options.check()
    asyncio.run(_serve(options, make_router, ready))


async def _serve(
    options: ServeOptions, make_router: Callable[[], Router], ready: Callable[[Serving[Service]], None]
) -> None:
    with open_port(options) as listening:  # one that is taken is found before a model is loaded
        router = make_router()
        try:
            await router.start()
            service = Service(options, router)
            await serve_until_stopped(options, listening, make_app(service), service, ready)
        finally:
            await router.close()


async def serve_until_stopped(
    options: ServeOptions, listening: socket.socket, app: ASGIApp, service: DrainsT, ready: Callable[[Serving[DrainsT]], None]
) -> None:  # fmt: skip
    """On the first signal no new work, then the answers, then out."""
    config = uvicorn.Config(
        app, http=protocol_of(options), ws="none", log_config=None, access_log=False, lifespan="off", server_header=False,
        timeout_keep_alive=30, h11_max_incomplete_event_size=1 << 16, timeout_graceful_shutdown=5,
    )  # fmt: skip
    server = _DrainingServer(config, service, options.drain_s)
    listening.listen(256)  # who comes from here on waits for the server instead of being refused
    loop = asyncio.get_running_loop()

    def stop() -> None:
        loop.call_soon_threadsafe(lambda: server.handle_exit(signal.SIGTERM, None))

    serving = Serving(f"http://{_shown_host(options)}:{listening.getsockname()[1]}", service, stop)
    server.when_started = lambda: ready(serving)
    await server.serve([listening])


class _DrainingServer(uvicorn.Server):
    """The first signal ends it when all answers are out, the second one now."""

    def __init__(self, config: uvicorn.Config, service: Drains, drain_s: float) -> None:
        super().__init__(config)
        self._service, self._drain_s = service, drain_s
        self._draining: asyncio.Task[None] | None = None
        self.when_started: Callable[[], None] = lambda: None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # Only here are signals caught: whoever was told before, and sends one, would kill it.
        await super().startup(sockets)
        self.when_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is not None or not self.started:
            self.should_exit = self.force_exit = True
            return
        log.warning("stopping: %d answers are under way", self._service.num_open)
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        await self._service.drain(self._drain_s)
        self.should_exit = True


def open_port(options: ServeOptions) -> socket.socket:
    """The port, where nobody is answered yet. Raises: ConfigError if it is not to be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, proto)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it: what a client does not take must not fill the kernel's memory, and is noticed.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        listening.bind(address)
    except OSError as error:
        raise ConfigError(
            f"{options.host}:{options.port} cannot be opened ({error.strerror or error}); choose another --port, or 0 for any free one"
        ) from error
    return listening


def _shown_host(options: ServeOptions) -> str:
    return f"[{options.host}]" if ":" in options.host else options.host
