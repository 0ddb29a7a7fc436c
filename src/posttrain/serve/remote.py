"""Rows answered by a server elsewhere: each a stream of its own, asked anew of the one that comes after when it dies or hangs.

What it was answering then is lost, and told so; who asks meanwhile waits for the next one. All our rules of where an answer ends
stay here: of the server only tokens are wanted. Knows no engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx

from posttrain.errors import EngineError, EngineGoneError, ModelError
from posttrain.models.slots import Factors
from posttrain.rollout.decoding import DecodingRow, Likeliest
from posttrain.rollout.folder import OwnFolder
from posttrain.rollout.http import Address, Client
from posttrain.rollout.vllm.server import GivenServer, Server, await_ready
from posttrain.serve.faults import ApiRefusal, bad_request
from posttrain.serve.loop import News
from posttrain.serve.options import ServeOptions
from posttrain.uris import loopback

log = logging.getLogger(__name__)

_BEAT_S = 1.0
_BACKOFF_S = (0.0, 1.0, 5.0, 30.0)


@dataclass(eq=False)
class Connection:
    """One server while it lives, and the folder of what is written for it."""

    server: Server
    http: httpx.AsyncClient
    folder: OwnFolder

    @staticmethod
    def to(server: Server, folder: OwnFolder) -> Connection:
        address, token = server.client.address, server.client.token
        limits = httpx.Limits(max_connections=None)
        # A proxy of the environment is not on the way to this machine.
        transport = httpx.AsyncHTTPTransport(uds=address.path or None, limits=limits, trust_env=False)
        http = httpx.AsyncClient(
            transport=transport, base_url="http://localhost" if address.path else f"http://{_host(address)}:{address.port}",
            headers={"Authorization": f"Bearer {token}"} if token else {}, trust_env=False,
            timeout=httpx.Timeout(None, connect=server.client.timeout_s),
        )  # fmt: skip
        return Connection(server, http, folder)

    async def get(self, path: str, timeout_s: float) -> Any:
        """Raises: EngineError where it refuses."""
        return _answered(await self.http.get(path, timeout=timeout_s))

    async def post(self, path: str, body: Any, timeout_s: float | None = None) -> Any:
        """Raises: EngineError where it refuses."""
        return _answered(await self.http.post(path, json=body, timeout=timeout_s))

    async def close(self) -> None:
        await self.http.aclose()
        await asyncio.to_thread(self.server.close)
        self.folder.remove()


class Dialect(Protocol):
    """How one kind of server is asked, and what its answers mean. Each call raises EngineError or httpx.HTTPError where it fails."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> str:
        """Of what samples a row."""
        ...

    def body(self, row: DecodingRow) -> Mapping[str, Any]:
        """Raises: RejectedError for what this server does not do."""
        ...

    def taken(self, row: DecodingRow, event: Any) -> News:
        """What a row takes of an event of its stream: tokens up to the one that ends it."""
        ...

    async def prompt_scores(
        self, connection: Connection, ids: tuple[int, ...], num_top: int, adapter: str | None
    ) -> list[Likeliest]: ...

    async def begin(self, connection: Connection) -> None:
        """A server that is there, without adapters yet: afterwards it has the weights that are served."""
        ...

    async def trouble(self, connection: Connection, adapters: Collection[str], timeout_s: float) -> str:
        """Why it is not the server any more that was begun with and given these adapters; "" where it is."""
        ...

    async def load(self, connection: Connection, name: str, factors: Factors) -> None: ...
    async def unload(self, connection: Connection, name: str) -> None: ...


class RejectedError(EngineError):
    """It takes no such request, and would not take it again."""


@dataclass(eq=False)
class RemoteRows:
    """Rows of one model, and of the adapters that were loaded by name."""

    dialect: Dialect
    connect: Callable[[], Connection]
    start_timeout_s: float
    timeout_s: float
    num_restarts: int = 0
    _adapters: dict[str, Factors] = field(default_factory=dict[str, Factors])
    _rows: dict[DecodingRow, asyncio.Task[None]] = field(default_factory=dict[DecodingRow, asyncio.Task[None]])
    _tells: dict[DecodingRow, Callable[[News], None]] = field(default_factory=dict[DecodingRow, Callable[[News], None]])
    _in_flight: set[DecodingRow] = field(default_factory=set[DecodingRow])
    """Whose request went out; one that is still being connected to a server is not lost with it."""
    _suspected: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self) -> None:
        """Raises: EngineError where it does not start, or is not what is needed."""
        self._live = asyncio.create_task(self._started())
        try:
            await self._live
        except asyncio.CancelledError:
            self._live.cancel()
            raise
        except httpx.HTTPError as error:
            raise EngineGoneError(f"{self.dialect.name}: {error or type(error).__name__}") from error
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        self._watching.cancel()
        self._fail_rows(self._rows, "the server is shutting down")
        self._live.cancel()
        with contextlib.suppress(asyncio.CancelledError, EngineError, httpx.HTTPError):
            await (await self._live).close()

    # --- rows ------------------------------------------------------------------------------------------------------

    def submit(self, row: DecodingRow, tell: Callable[[News], None]) -> None:
        self._tells[row] = tell
        self._rows[row] = asyncio.create_task(self._answer(row))

    def cancel(self, row: DecodingRow) -> None:
        self._tells.pop(row, None)
        if (task := self._rows.pop(row, None)) is not None:
            task.cancel()

    async def _answer(self, row: DecodingRow) -> None:
        name = self.dialect.name
        try:
            body = self.dialect.body(row)
            while not await self._asked_of_a_live_one(row, body):
                pass
        except RejectedError as error:
            self._end(row, News(refusal=f"{name}: {error}"))
        except (EngineError, httpx.HTTPError) as error:
            self._suspected.set()
            self._end(row, News(failure=f"{name}: {error or type(error).__name__}"))
        finally:
            self._end(row, News(failure="a defect of the server; its log says more"))  # of nobody who was told
            self._rows.pop(row, None)
            self._in_flight.discard(row)

    async def _asked_of_a_live_one(self, row: DecodingRow, body: Mapping[str, Any]) -> bool:
        """False where nobody was there to be asked: nothing of it was lost."""
        connection, live = await self.live(), self._live

        async def on_its_way(step: str, info: Mapping[str, Any]) -> None:
            if step.endswith("send_request_headers.started"):
                if live is not self._live:
                    raise httpx.ConnectError("another server came meanwhile")
                self._in_flight.add(row)

        try:
            async with contextlib.aclosing(_stream(connection, self.dialect.path, body, on_its_way)) as events:
                async for event in events:
                    news = self.dialect.taken(row, event)
                    if news.is_last:
                        self._end(row, news)
                        return True
                    self._tells[row](news)
        except httpx.ConnectError:
            self._in_flight.discard(row)
            self._suspected.set()
            await asyncio.sleep(0.05)
            return False
        raise EngineGoneError("its answer ended early")

    def _end(self, row: DecodingRow, news: News) -> None:
        if (tell := self._tells.pop(row, None)) is not None:
            tell(news)

    def _fail_rows(self, rows: Collection[DecodingRow], why: str) -> None:
        for row in list(rows):
            self._end(row, News(failure=why))
            self.cancel(row)

    async def prompt_scores(self, ids: tuple[int, ...], num_top: int, adapter: str | None) -> list[Likeliest]:
        name = self.dialect.name
        try:
            return await self.dialect.prompt_scores(await self.live(), ids, num_top, adapter)
        except RejectedError as error:
            raise bad_request(f"{name}: {error}") from error
        except (EngineError, httpx.HTTPError) as error:
            self._suspected.set()
            raise ApiRefusal(503, f"{name}: {error}; ask again", code="interrupted", retry_after_s=1) from error

    # --- adapters --------------------------------------------------------------------------------------------------

    async def load_adapter(self, name: str, factors: Factors) -> None:
        connection = None
        while connection is not await self.live():  # one that came meanwhile does not have it
            connection = await self.live()
            try:
                await self.dialect.load(connection, name, factors)
            except (EngineError, httpx.HTTPError) as error:
                self._suspected.set()
                raise ModelError(f"{name}: {error}") from error
            self._adapters[name] = factors

    async def unload_adapter(self, name: str) -> None:
        del self._adapters[name]
        with contextlib.suppress(EngineError, httpx.HTTPError):  # the next server is not given it
            await self.dialect.unload(await self.live(), name)

    # --- its server ------------------------------------------------------------------------------------------------

    async def live(self) -> Connection:
        """The one that lives, waited for where it is being tried anew. Raises: EngineError where there is none."""
        while True:
            live = self._live
            connection = await asyncio.shield(live)
            if live is self._live:
                return connection

    async def _started(self, wait_s: float = 0.0, instead_of: Connection | None = None) -> Connection:
        if instead_of is not None:
            await instead_of.close()
        await asyncio.sleep(wait_s)
        connection = self.connect()
        name = self.dialect.name
        try:
            await asyncio.to_thread(await_ready, connection.server, self.start_timeout_s, "--start-timeout-s", name)
            await self.dialect.begin(connection)
            for adapter, factors in list(self._adapters.items()):
                await self.dialect.load(connection, adapter, factors)
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _watch(self) -> None:
        name, failures = self.dialect.name, 0
        while True:
            try:
                connection = await asyncio.shield(self._live)
            except (EngineError, httpx.HTTPError) as error:
                failures += 1
                wait_s = _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)]
                log.error("%s does not start again, tried anew in %g s: %s", name, wait_s, error)
                self._live = asyncio.create_task(self._started(wait_s))
            else:
                failures = 0
                why = await self._trouble(connection)
                log.error("%s is started anew, or looked for: %s", name, why)
                self._live = asyncio.create_task(self._started(instead_of=connection))
                # Who only waits for a server goes on waiting.
                self._fail_rows(self._in_flight, f"{name} is gone: {why.partition('; its log')[0]}")
            self.num_restarts += 1

    async def _trouble(self, connection: Connection) -> str:
        """Returns when it ended, does not answer any more, or is another one: why."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._suspected.wait(), _BEAT_S)
            self._suspected.clear()
            if why := await asyncio.to_thread(connection.server.ended):
                return why
            # Those that are being loaded while it is asked are not missing.
            names = list(self._adapters)
            try:
                why = await self.dialect.trouble(connection, names, self.timeout_s)
            except (EngineError, httpx.HTTPError) as error:
                return f"it does not answer ({error if isinstance(error, EngineError) else type(error).__name__})"
            if why and set(names) <= self._adapters.keys():
                return why


async def _stream(
    connection: Connection, path: str, body: Mapping[str, Any], trace: Callable[[str, Mapping[str, Any]], Awaitable[None]]
) -> AsyncGenerator[Any]:  # fmt: skip
    """The events of an answer; `trace` is told of each step of the connection. Raises: EngineError where an event is an error."""
    async with connection.http.stream("POST", path, json=body, extensions={"trace": trace}) as answer:
        if answer.is_error:
            await answer.aread()
            raise _error(answer)
        async for line in answer.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                event = json.loads(line[len("data: ") :])
                if "error" in event:
                    raise EngineError(f"it failed: {event['error']}")
                yield event


def _answered(answer: httpx.Response) -> Any:
    if answer.is_error:
        raise _error(answer)
    return answer.json() if answer.headers.get("content-type", "").startswith("application/json") else answer.text


def _error(answer: httpx.Response) -> EngineError:
    # Others of 4xx (its key, a model that it does not have) are no mistake of whoever asks us.
    kind = RejectedError if answer.status_code in (400, 413, 422) else EngineError
    return kind(f"it answered {answer.status_code}: {' '.join(answer.text.split())[:300]}")


def likeliest(scores: Mapping[int, float], token: int, num_top: int) -> Likeliest:
    ranked = sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))
    return Likeliest(scores[token], tuple(ranked[:num_top]))


def connect_given(options: ServeOptions) -> Connection:
    """To somebody else's server, which goes on without us."""
    address = Address(*loopback(options.url))
    return Connection.to(GivenServer(Client(address, options.engine_token, options.engine_timeout_s)), OwnFolder())


def _host(address: Address) -> str:
    return f"[{address.host}]" if ":" in address.host else address.host
