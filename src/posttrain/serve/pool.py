"""Which models are in memory: loaded on demand, least recently used out, never while somebody is being answered by one.

Everything here happens in the thread of the event loop; loading and unloading are the backend's, in threads of its own.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from posttrain.files import reading
from posttrain.models.slots import Factors
from posttrain.rollout.decoding import DecodingRow, Likeliest
from posttrain.serve.codec import ServedCodec
from posttrain.serve.loop import News

_SHOWN = len("sha256:") + 12


@dataclass(frozen=True)
class ModelVersion:
    """Something that can be served: exactly these files. `check` refuses them where they are not (PosttrainError)."""

    name: str
    digest: str
    folder: Path
    version: int | None = None
    check: Callable[[], None] = field(default=lambda: None, compare=False)

    @property
    def id(self) -> str:
        """Its name for ever, whatever becomes of aliases."""
        return f"{self.name}@{self.digest[:_SHOWN]}"


@dataclass(frozen=True)
class ServedModel:
    """A version in memory: the engine that samples its rows, through which adapter, and its text."""

    version: ModelVersion
    rows: RowEngine
    codec: ServedCodec
    adapter: str | None = None


class RowEngine(Protocol):
    """What samples rows. Called in the thread of the event loop, where it tells its news too."""

    def submit(self, row: DecodingRow, tell: Callable[[News], None]) -> None: ...
    def cancel(self, row: DecodingRow) -> None:
        """Free what a row holds; nothing more is told of it."""
        ...

    async def prompt_scores(self, ids: tuple[int, ...], num_top: int, adapter: str | None) -> list[Likeliest]:
        """Of `ids[1:]`: the first token has no log-prob. Raises: ApiRefusal where it cannot say."""
        ...

    async def load_adapter(self, name: str, factors: Factors) -> None:
        """Raises: PosttrainError for one that is not for this base."""
        ...

    async def unload_adapter(self, name: str) -> None: ...
    async def close(self) -> None:
        """Who still waits is told so."""
        ...


class Backend(Protocol):
    async def load(self, version: ModelVersion) -> ServedModel: ...
    async def unload(self, served: ServedModel) -> None: ...
    async def close(self) -> None:
        """After all are unloaded."""
        ...


@dataclass(eq=False)
class _Entry:
    version: ModelVersion
    loading: asyncio.Task[ServedModel]
    folder: ExitStack
    """Held while it is in memory: what answers may be started anew from it."""
    refs: int = 0
    used: int = 0
    is_closing: bool = False
    """Nobody new is let in; it goes when the last one has left."""


@dataclass(eq=False)
class Lease:
    """The right to be answered by a model until `release`."""

    served: ServedModel
    _pool: Pool
    _held: bool = True

    def release(self) -> None:
        if self._held:
            self._held = False
            self._pool.release(self.served.version)


class Pool:
    """At most `capacity` models of one backend in memory beside those `kept` for ever; None: as many as are not retired."""

    def __init__(
        self, backend: Backend, capacity: int | None = None, kept: frozenset[ModelVersion] = frozenset()
    ) -> None:
        self._backend, self._capacity, self._kept = backend, capacity, kept
        self._entries: dict[str, _Entry] = {}
        self._wanted: list[str] = []
        """Who waits for a place, in order."""
        self._changed = asyncio.Condition()
        self._clock = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def ids(self) -> list[str]:
        return list(self._entries)

    @property
    def versions(self) -> list[ModelVersion]:
        return [entry.version for entry in self._entries.values()]

    def refs(self, version: ModelVersion) -> int:
        return self._entries[version.id].refs if version.id in self._entries else 0

    async def acquire(self, version: ModelVersion) -> Lease:
        """Waits until it is in memory. Raises: what loading it raises."""
        entry = await self._opened(version)
        entry.refs += 1  # from here on it stays
        entry.used = next(self._clock)
        try:
            served = await asyncio.shield(entry.loading)
        except BaseException:
            entry.refs -= 1
            if _failed(entry.loading):
                await self._drop(entry)
            elif entry.is_closing:
                self._close(entry)
            raise
        return Lease(served, self)

    async def _opened(self, version: ModelVersion) -> _Entry:
        self._wanted.append(version.id)
        try:
            async with self._changed:
                while (entry := self._enter(version)) is None:
                    await self._changed.wait()
                return entry
        finally:
            self._wanted.remove(version.id)

    def _enter(self, version: ModelVersion) -> _Entry | None:
        """The entry where there is one to enter, or room for one; else room is being made. Raises: RunLockedError."""
        entry = self._entries.get(version.id)
        if entry is not None:
            return None if entry.is_closing else entry
        others = [e for e in self._entries.values() if e.version not in self._kept]
        if self._capacity is None or version in self._kept or len(others) < self._capacity:
            with ExitStack() as held:
                held.enter_context(reading(version.folder))
                folder = held.pop_all()
            entry = _Entry(version, asyncio.create_task(self._backend.load(version)), folder)
            self._entries[version.id] = entry
            return entry
        absent = {wanted for wanted in self._wanted if wanted not in self._entries}
        leaving = sum(entry.is_closing for entry in others)
        staying = sorted((e for e in others if not e.is_closing), key=lambda e: (e.refs > 0, e.used))
        for victim in staying[: max(0, len(absent) - leaving)]:
            self._close(victim)
        return None

    def release(self, version: ModelVersion) -> None:
        entry = self._entries[version.id]
        entry.refs -= 1
        if entry.is_closing:
            self._close(entry)

    def retire(self, version: ModelVersion) -> None:
        """Out of memory as soon as those that it is answering have their answers."""
        if (entry := self._entries.get(version.id)) is not None:
            self._close(entry)

    def _close(self, entry: _Entry) -> None:
        entry.is_closing = True
        if entry.refs == 0:
            task = asyncio.create_task(self._unload(entry))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _unload(self, entry: _Entry) -> None:
        if self._entries.get(entry.version.id) is not entry or entry.refs:
            return
        await asyncio.wait([entry.loading])
        if entry.refs == 0 and not _failed(entry.loading) and self._entries.get(entry.version.id) is entry:
            await self._backend.unload(entry.loading.result())
        await self._drop(entry)

    async def _drop(self, entry: _Entry) -> None:
        entry.folder.close()
        if self._entries.get(entry.version.id) is entry:
            del self._entries[entry.version.id]
        async with self._changed:
            self._changed.notify_all()

    async def close(self) -> None:
        for entry in list(self._entries.values()):
            await asyncio.wait([entry.loading])
            if not _failed(entry.loading):
                await self._backend.unload(entry.loading.result())
            entry.folder.close()
        self._entries.clear()
        await self._backend.close()


def _failed(loading: asyncio.Task[ServedModel]) -> bool:
    return loading.done() and (loading.cancelled() or loading.exception() is not None)
