"""Engines of one run as one engine: groups are dealt to them, and what one that is gone had not answered is asked of the others.

One that was started is STALE, and asked nothing, until it has got the weights of the last update and the canary has compared them. One that is
lost may answer for a while yet: what an earlier start delivers is dropped, counted and asked again. Any thread may sample; weights come
from the thread that made this.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from posttrain.distributed.roles import Role, RoleHealth, RoleSign
from posttrain.errors import EngineGoneError
from posttrain.protocols import Engine, Weights
from posttrain.types import Completion, EngineInfo, Moved, Request, SamplingParams

log = logging.getLogger(__name__)

_LOOK_S = 0.2


@dataclass(eq=False)
class _Replica:
    number: int
    start: Callable[[], Engine]
    engine: Engine
    role: Role
    under_way: int = 0
    """Calls that sample from it."""
    is_open: bool = True

    @property
    def health(self) -> RoleHealth:
        return self.role.state.health

    @property
    def lease(self) -> int:
        return self.role.state.lease

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self.engine.close()


class _Start(NamedTuple):
    """One start of a replica, as it was chosen: what it says counts while the replica has this lease."""

    replica: _Replica
    engine: Engine
    lease: int
    health: RoleHealth


class Replicas:
    """The engines that `starts` make, one that is gone made again, at most `max_restarts` times together.

    A request is asked again with its seed, and only where no completion of it was given out. The weights that a new one gets are those
    of the last update, at a call of `update`, `revive` or, from the thread that made this, of anything that samples: they must
    not have moved since. `check` (the canary) compares with them. `start_synced`: an engine starts with the weights that are wanted of it,
    until the first update. Raises: EngineGoneError, of the last one, with no restarts left.
    """

    def __init__(
        self, starts: Sequence[Callable[[], Engine]], check: Callable[[Engine, Weights], object], max_restarts: int,
        *, start_synced: bool,
    ) -> None:  # fmt: skip
        self._check, self._left, self._start_synced = check, max_restarts, start_synced
        self._changed = threading.Condition()
        self._owner = threading.get_ident()
        self._pushed: tuple[Weights, int] | None = None
        self._failure: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self._is_closing = False
        self.restarts = 0
        engines = _all_started(starts)
        self._replicas = [
            _Replica(n, start, engine, Role(f"engine-{n}", _tell))
            for n, (start, engine) in enumerate(zip(starts, engines, strict=True))
        ]
        for replica in self._replicas:
            replica.role.see(RoleSign.STARTING)
            self._has_started(replica)
        self._info = engines[0].describe()

    @property
    def policy_version(self) -> int:
        with self._changed:
            healthy = (r.engine.policy_version for r in self._replicas if r.health is RoleHealth.HEALTHY)
            return next(healthy, self._last_version)

    @property
    def _last_version(self) -> int:
        return 0 if self._pushed is None else self._pushed[1]

    @property
    def states(self) -> list[RoleHealth]:
        with self._changed:
            return [replica.health for replica in self._replicas]

    @property
    def dropped(self) -> int:
        """Deliveries of engines that were lost by then."""
        with self._changed:
            return sum(replica.role.dropped for replica in self._replicas)

    def describe(self) -> EngineInfo:
        return self._info

    # --- sampling --------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """Requests of one prompt that stand together go to one engine."""
        shares = self._shares(requests)
        begun = [self._begin(share, requests, params, skip=n) for n, share in enumerate(shares)]
        each = [self._completions(share, requests, params, first) for share, first in zip(shares, begun, strict=True)]
        return each[0] if len(each) == 1 else self._together(each)

    def score(self, sequences: Sequence[tuple[Sequence[int], int]], temperature: float = 1.0) -> list[list[float]]:
        while True:
            start = self._healthy()
            try:
                scores = start.engine.score(sequences, temperature)
            except EngineGoneError as error:
                self._lose(start, error)
                continue
            if self._takes(start):
                return scores

    def _shares(self, requests: Sequence[Request]) -> list[list[int]]:
        """The places of the requests, a share for each engine that can answer, of nearly as many."""
        count = max(1, self.states.count(RoleHealth.HEALTHY))
        groups: list[list[int]] = []
        for place, request in enumerate(requests):
            if not groups or requests[groups[-1][0]].prompt_ids != request.prompt_ids:
                groups.append([])
            groups[-1].append(place)
        shares: list[list[int]] = [[] for _ in range(min(count, max(1, len(groups))))]
        for group in groups:
            min(shares, key=len).extend(group)
        return shares

    def _begin(
        self, places: Sequence[int], requests: Sequence[Request], params: SamplingParams, skip: int = 0
    ) -> tuple[_Start, Iterator[Completion]]:
        start = self._healthy(skip)
        return start, start.engine.generate([requests[place] for place in places], params)

    def _completions(
        self, places: list[int], requests: Sequence[Request], params: SamplingParams,
        begun: tuple[_Start, Iterator[Completion]],
    ) -> Iterator[Completion]:  # fmt: skip
        left = set(places)
        while True:
            start, found = begun
            self._count(start.replica, 1)
            try:
                for completion in found:
                    if not self._takes(start):
                        break
                    place = places[completion.request]
                    left.discard(place)
                    yield replace(completion, request=place)
                else:
                    return
            except EngineGoneError as error:
                self._lose(start, error)
            finally:
                self._count(start.replica, -1)
            places = sorted(left)
            begun = self._begin(places, requests, params)

    def _together(self, each: Sequence[Iterator[Completion]]) -> Iterator[Completion]:
        """As they end, whichever gives them."""
        found: queue.SimpleQueue[Completion | BaseException | None] = queue.SimpleQueue()
        given_up = threading.Event()

        def drain(completions: Iterator[Completion]) -> None:
            try:
                for completion in completions:
                    found.put(completion)
                    if given_up.is_set():
                        return
                found.put(None)
            except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
                found.put(error)

        for completions in each:
            threading.Thread(target=drain, args=(completions,), daemon=True, name="replica").start()
        going = len(each)
        try:
            while going:
                self._revive_if_owner()
                try:
                    item = found.get(timeout=_LOOK_S)
                except queue.Empty:
                    continue
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    going -= 1
                else:
                    yield item
        finally:
            given_up.set()

    def _takes(self, start: _Start) -> bool:
        with self._changed:
            return start.replica.role.takes(start.lease)

    def _count(self, replica: _Replica, change: int) -> None:
        with self._changed:
            replica.under_way += change

    # --- weights ---------------------------------------------------------------------------------------------------

    def update(self, weights: Weights, version: int) -> Moved:
        """Bring every engine there is to these weights."""
        self._pushed = weights, version
        moved = Moved(0, 0)
        for replica in self._replicas:
            got = self._push(self._present(replica), self._pushed)
            moved = Moved(moved.num_bytes + got.num_bytes, moved.whole_bytes + got.whole_bytes)
        self._healthy()
        return moved

    def revive(self) -> None:
        """Engines that were started again get the weights of the last update."""
        for replica in self._replicas:
            if self._pushed is not None and (start := self._present(replica)).health is RoleHealth.STALE:
                self._push(start, self._pushed)

    def _push(self, start: _Start, pushed: tuple[Weights, int]) -> Moved:
        """What came, nothing where the engine is gone. The first weights of a single one are checked by whoever brings them."""
        if start.health not in (RoleHealth.HEALTHY, RoleHealth.STALE):
            return Moved(0, 0)
        is_back = start.lease > 1 and start.health is RoleHealth.STALE
        try:
            moved = start.engine.update(*pushed)
            if is_back or len(self._replicas) > 1:
                self._check(start.engine, pushed[0])
        except EngineGoneError as error:
            self._lose(start, error)
            return Moved(0, 0)
        with self._changed:
            if start.replica.lease == start.lease:
                start.replica.role.see(RoleSign.SYNCED)
                self._changed.notify_all()
        return moved

    # --- who is there ----------------------------------------------------------------------------------------------

    def _present(self, replica: _Replica) -> _Start:
        with self._changed:
            return _Start(replica, replica.engine, replica.lease, replica.health)

    def _healthy(self, skip: int = 0) -> _Start:
        """The one with the least to do, or the `skip`-th after it; waits for one that is being started."""
        while True:
            self._revive_if_owner()
            with self._changed:
                if self._failure is not None:
                    raise self._failure
                if self._is_closing:
                    raise EngineGoneError("the engines are closed")
                assert self._start_synced or self._pushed, "nothing is asked of engines before they have the weights"
                able = sorted(
                    (replica for replica in self._replicas if replica.health is RoleHealth.HEALTHY),
                    key=lambda replica: (replica.under_way, replica.number),
                )
                if able:
                    return self._present(able[skip % len(able)])
                self._changed.wait(_LOOK_S)

    def _revive_if_owner(self) -> None:
        if threading.get_ident() == self._owner:
            self.revive()

    def _lose(self, start: _Start, error: EngineGoneError) -> None:
        """Begin to start it again, where nobody has yet. Raises: `error` where none is left and none may be started."""
        with self._changed:
            if start.replica.lease == start.lease and start.replica.health is not RoleHealth.DEAD:
                self._restart(start.replica, error)
            if self._is_closing or self._failure is not None:
                raise self._failure or error

    def _restart(self, replica: _Replica, error: EngineGoneError) -> None:
        replica.role.see(RoleSign.ENDED, str(error))
        if self._left:
            self._left -= 1
            self.restarts += 1
            log.warning("%s; it is started again (%d more times at most)", error, self._left)
            replica.role.see(RoleSign.STARTING)
            thread = threading.Thread(target=self._started_again, args=(replica,), daemon=True, name="restart")
            self._threads.append(thread)
            thread.start()
        else:
            replica.close()
            if all(one.health is RoleHealth.DEAD for one in self._replicas):
                self._failure = error
            else:
                log.warning("%s; it is not started again (rollout.max_restarts), the others go on", error)
        self._changed.notify_all()

    def _started_again(self, replica: _Replica) -> None:
        replica.close()
        if self._is_closing:
            return
        try:
            engine = replica.start()
        except EngineGoneError as error:
            with self._changed:
                self._restart(replica, error)
            return
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits for it
            with self._changed:
                self._failure = error
                self._changed.notify_all()
            return
        with self._changed:
            replica.engine, replica.is_open = engine, True
            self._has_started(replica)
            self._changed.notify_all()

    def _has_started(self, replica: _Replica) -> None:
        replica.role.see(RoleSign.STARTED)
        if self._start_synced and self._pushed is None:
            replica.role.see(RoleSign.SYNCED)

    def rest(self) -> None:
        """One that is being started meanwhile stays awake until the next time."""
        for replica in self._replicas:
            if (start := self._present(replica)).health is RoleHealth.HEALTHY:
                try:
                    start.engine.rest()
                except EngineGoneError as error:
                    self._lose(start, error)

    def close(self) -> None:
        with self._changed:
            self._is_closing, self._left = True, 0
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for replica in self._replicas:
            replica.close()


def _tell(details: Mapping[str, Any]) -> None:
    if "dropped" in details:
        said = "%s answered after it was lost: what it said is not taken (%d times so far)"
        log.warning(said, details["role"], details["dropped"])


def _all_started(starts: Sequence[Callable[[], Engine]]) -> list[Engine]:
    """All at once; where one cannot be started, none is left."""
    if len(starts) == 1:
        return [starts[0]()]
    with ThreadPoolExecutor(len(starts)) as pool:
        futures = [pool.submit(start) for start in starts]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        for future in futures:
            if future.exception() is None:
                future.result().close()
        raise errors[0]
    return [future.result() for future in futures]
