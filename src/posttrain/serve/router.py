"""Names → models. An alias follows its registry: it points at the new version only when that can answer.

A request is answered by one version from its first token to its last; the version before is dropped when its last
answer is out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from posttrain.errors import PosttrainError
from posttrain.files import reading
from posttrain.serve.faults import ApiRefusal
from posttrain.serve.pool import Lease, ModelVersion, Pool

log = logging.getLogger(__name__)

Names = Mapping[str, ModelVersion]
LostNames = Mapping[str, PosttrainError]
"""Name → why it cannot be told what it means."""
_RETRY_S = 30.0


class NameSource(Protocol):
    """Where served names come from. Always called in the same thread."""

    def names(self) -> tuple[Names, LostNames]:
        """What each public name means now; what is lost stays where it is, and the others move. Raises: PosttrainError."""
        ...

    def eager(self) -> frozenset[str]:
        """The names whose version is to be in memory before it is asked for."""
        ...


class Router:
    def __init__(
        self, source: NameSource, pool: Pool, follow_s: float, *, retire: bool, default: str, one_at_a_time: bool = False
    ) -> None:  # fmt: skip
        """`retire`: a version that no name means any more leaves the memory. `default`: the name of a request without one.

        `one_at_a_time`: the pool holds one version, so a name turns over before the next is loaded, and who asks waits for it.
        """
        self._source, self._pool, self._follow_s, self._retire = source, pool, follow_s, retire
        self._one_at_a_time = one_at_a_time
        self._failed: tuple[ModelVersion | None, float] = None, 0.0
        """The version that did not load last, and when it may be tried again (seconds of the loop's clock)."""
        self._reading: dict[ModelVersion, contextlib.ExitStack] = {}
        """Eager versions, whose folders stay where they are as long as a name means them, in memory or not."""
        self.default = default
        self._names: dict[str, ModelVersion] = {}
        self._thread = ThreadPoolExecutor(1, "registry")
        self._following: asyncio.Task[None] | None = None
        self.num_swaps = 0
        self.trouble: dict[str, str] = {}
        """Name → why it does not follow."""

    async def start(self) -> None:
        """Loads what must be there before the first request. Raises: PosttrainError."""
        await self._follow_once()
        if self.trouble:
            raise PosttrainError(next(iter(self.trouble.values())))
        self._following = asyncio.create_task(self._follow())

    async def close(self) -> None:
        if self._following is not None:
            self._following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._following
        await self._pool.close()
        self._let_go(list(self._reading))
        self._thread.shutdown()

    @property
    def names(self) -> Names:
        return self._names

    @property
    def ids(self) -> list[str]:
        """Of what is in memory."""
        return self._pool.ids

    def find(self, model: str) -> ModelVersion:
        """By public name, or by immutable name with at least as many digits of the digest as are shown. Raises: ApiRefusal."""
        if model in self._names:
            return self._names[model]
        if "@sha256:" in model:
            for version in self._names.values():
                if model.startswith(version.id) and f"{version.name}@{version.digest}".startswith(model):
                    return version
        raise ApiRefusal(
            404, f"The model `{model}` does not exist; there are {', '.join(sorted(self._names)[:20])}", code="model_not_found",
            param="model",
        )  # fmt: skip

    async def acquire(self, model: str) -> Lease:
        """Raises: ApiRefusal."""
        while True:
            version = self.find(model)
            try:
                lease = await self._pool.acquire(version)
            except PosttrainError as error:
                if self._names.get(model, version) != version:
                    continue  # it went back to the version before, which answers
                raise ApiRefusal(503, f"{version.id} cannot be loaded: {error}", code="model_not_loaded") from error
            if self._names.get(model, version) == version:
                return lease
            lease.release()  # it was promoted away while we waited

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._follow_s)
            await self._follow_once()

    async def _follow_once(self) -> None:
        try:
            found, lost = await self._in_thread(self._source.names)
        except PosttrainError as error:
            self._note("registry", error)
            return
        self.trouble.pop("registry", None)
        for name, error in lost.items():
            self._note(name, error)
        if lost and self._following is None:
            return  # at the start it ends the command, so nothing is loaded first
        eager = self._source.eager()
        for name, version in found.items():
            if self._names.get(name) == version:
                self.trouble.pop(name, None)  # what it could not follow was rolled back
            elif self._may_try(version):
                alike = [other for other, meant in found.items() if meant == version] if self._one_at_a_time else [name]
                await self._point(alike, version, load=not eager.isdisjoint(alike))
        for name in [name for name in self._names if name not in found and name not in lost]:
            del self._names[name]
        self._let_go([version for version in self._reading if version not in self._names.values()])
        if self._retire:
            meant = set(self._names.values())
            for version in self._pool.versions:
                if version not in meant:
                    self._pool.retire(version)

    async def _point(self, names: Sequence[str], version: ModelVersion, *, load: bool) -> None:
        before = {name: self._names.get(name) for name in names}
        if load:
            try:
                self._hold(version)
                await self._load(names, version)
            except PosttrainError as error:
                self._names |= {name: held for name, held in before.items() if held is not None}
                self._failed = version, asyncio.get_running_loop().time() + _RETRY_S
                self._note(names[0], error)
                return
        for name, held in before.items():
            self._names[name] = version
            self.trouble.pop(name, None)
            if held is not None:
                self.num_swaps += 1
                log.warning("%s: %s instead of %s", name, version.id, held.id)

    async def _load(self, names: Sequence[str], version: ModelVersion) -> None:
        if self._one_at_a_time:
            await asyncio.to_thread(version.check)  # while the version before answers
            self._names |= {name: version for name in names if name in self._names}
        (await self._pool.acquire(version)).release()

    def _hold(self, version: ModelVersion) -> None:
        if version not in self._reading:
            with contextlib.ExitStack() as held:
                held.enter_context(reading(version.folder))
                self._reading[version] = held.pop_all()

    def _let_go(self, versions: Sequence[ModelVersion]) -> None:
        for version in versions:
            self._reading.pop(version).close()

    def _may_try(self, version: ModelVersion) -> bool:
        """One at a time it stops the others: not every second what failed."""
        failed, again_s = self._failed
        return not self._one_at_a_time or failed != version or asyncio.get_running_loop().time() >= again_s

    def _note(self, name: str, error: PosttrainError) -> None:
        # At the start it is the command's own error.
        if self._following is not None and self.trouble.get(name) != str(error):
            log.error("%s stays where it is: %s", name, error)
        self.trouble[name] = str(error)

    async def _in_thread(self, work: Callable[[], tuple[Names, LostNames]]) -> tuple[Names, LostNames]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
