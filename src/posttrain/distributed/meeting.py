"""What the processes of one start tell each other beside collectives: that they are there, what rank 0 did, what went wrong.

All of it goes through a key-value store (torch's TCPStore), so a rank that waits is in no collective, which would end at its
timeout, and still hears signals.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed import DistError, PrefixStore, TCPStore

import posttrain
from posttrain.distributed.launch import Launch
from posttrain.errors import ConfigError, PosttrainError
from posttrain.files import digest_file, digest_json, digest_start

T = TypeVar("T")

_MEETING_S = 600.0
_NOTICE_S = 10.0
_BEAT_S = 2.0
_SAME_ERROR_S = 1.0
"""How long a rank waits for rank 0 to print the error that they share."""
_NEWS_S = 3.0
"""How long a rank whose collective broke waits for the rank that broke it to say why, and rank 0 for those that fail with it."""
_SAID_S = 5.0
"""How long a rank with nothing to say waits until the one that has something has printed it."""
_ANSWER_S = 15.0
"""How long a rank that ends with an error waits for the store, whose keeper may stand still."""
_CODE_S = 60.0
"""How long rank 0 waits for a rank that has come to say which code it runs."""


@cache
def code_digest() -> str:
    """Of the text of this package."""
    root = Path(posttrain.__file__).parent
    texts = sorted(path for path in root.rglob("*") if path.suffix in (".py", ".c"))
    return digest_json({str(path.relative_to(root)): digest_file(path) for path in texts})


class PeerFailedError(Exception):
    """Another rank has failed and says why; this one only ends."""


class _SilentStoreError(DistError):
    """Whoever keeps the store stands still: its connection is open, and a question waits for ever."""


def _answered(ask: Callable[[], T], within_s: float) -> T:
    """Raises: _SilentStoreError, and what `ask` raises. The thread that waits is left behind: nothing ends it before its process."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(ask())
        except BaseException as error:  # noqa: BLE001 - raised by who asked
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="ask").start()
    if not wait([future], within_s).done:
        raise _SilentStoreError(f"no answer of the store within {within_s:g} s")
    return future.result()


class Meeting:
    """One rank's view of the store that all ranks of a start have in common."""

    def __init__(self, launch: Launch, store: Any) -> None:
        self.launch, self.store = launch, store
        self._works = 0

    @property
    def is_main(self) -> bool:
        return self.launch.rank == 0

    def refuse_other_code(self) -> None:
        """All ranks call it first, for what they say to each other afterwards is in the words of their code.

        Raises: ConfigError on every rank, naming one whose code is not that of rank 0.
        """
        self.store.set(f"code/{self.launch.rank}", code_digest())
        self.main_only(self._compare_code, _MEETING_S)

    def _compare_code(self) -> None:
        for rank in range(1, self.launch.world_size):
            key = f"code/{rank}"
            self._waits_for(lambda key=key: self.store.check([key]), _CODE_S)
            found = self.store.get(key).decode() if self.store.check([key]) else ""
            if found != code_digest():
                raise ConfigError(
                    f"rank {rank} was started otherwise than rank 0: code of posttrain is {digest_start(found) or 'older, and does not say'}, "
                    f"on rank 0 {digest_start(code_digest())}; give every rank the same YAML, files and packages"
                )

    # --- waiting for another rank ------------------------------------------------------------------------------

    def main_only(self, work: Callable[[], T], silence_s: float) -> T:
        """What `work` returns on rank 0, on every rank; what it raises there is raised everywhere. All ranks call it.

        Raises: PeerFailedError if rank 0 gives no sign of life for `silence_s`, or fails for no reason of the user's.
        """
        self._works += 1
        key = f"work/{self._works}"
        if not self.is_main:
            return self._result(key, 0, silence_s)
        try:
            with self._beating():
                value = work()
        except BaseException as error:
            self.store.set(key, _packed(error, 0))
            raise
        self.store.set(key, _packed(value, 0))
        return value

    def each(self, work: Callable[[], T], silence_s: float) -> list[T]:
        """What `work` returns on every rank, in rank order, on rank 0; nothing elsewhere. What it raises on one is raised on all.

        All ranks call it, and none goes on before the last is done. Raises: PeerFailedError as `main_only`, of any rank.
        """
        self._works += 1
        rank = self.launch.rank
        own = f"work/{self._works}/{rank}"
        keys = [f"work/{self._works}/{other}" for other in range(1, self.launch.world_size)]
        try:
            with self._beating():
                value = work()
        except BaseException as error:
            self.store.set(own, _packed(error, rank))
            if self.is_main or isinstance(error, Exception):
                with suppress(Exception):  # a rank has its own to raise, whichever of several rank 0 tells the others
                    self.main_only(partial(_raised, error), silence_s)
            raise
        others: list[T] = []
        if not self.is_main:
            self.store.set(own, _packed(value, rank))
        self.main_only(partial(self._take, keys, others, silence_s), silence_s)
        return [value, *others] if self.is_main else []

    def _take(self, keys: Sequence[str], others: list[Any], silence_s: float) -> None:
        """On rank 0, add the results of the others, which are too large to be sent to all."""
        for rank, key in enumerate(keys, start=1):
            others.append(self._result(key, rank, silence_s))
            self.store.delete_key(key)

    def _result(self, key: str, rank: int, silence_s: float) -> Any:
        """What `rank` wrote under `key`, once it is there."""
        beats, pause, beat, heard = f"beat/{rank}", 0.005, None, time.monotonic()
        while not self._asked(partial(self.store.check, [key]), silence_s):
            time.sleep(pause)
            pause = min(0.2, pause * 1.5)
            if (now := self._asked(partial(self.store.add, beats, 0), silence_s)) != beat:
                beat, heard = now, time.monotonic()
            if time.monotonic() - heard > silence_s:
                raise PeerFailedError(f"rank {rank} gave no sign of life for {silence_s:g} s")
        value = pickle.loads(self.store.get(key))  # written by a rank of this run
        if isinstance(value, BaseException):
            raise value
        return value

    def _asked(self, ask: Callable[[], T], silence_s: float) -> T:
        """Raises: PeerFailedError if rank 0, which keeps the store, stands still."""
        if self.is_main:
            return ask()
        try:
            return _answered(ask, silence_s)
        except _SilentStoreError as error:
            raise PeerFailedError(f"rank 0 gave no sign of life for {silence_s:g} s") from error

    @contextmanager
    def _beating(self) -> Iterator[None]:
        """While this lasts, a thread tells the other ranks that this one lives."""
        done, beats = threading.Event(), f"beat/{self.launch.rank}"

        def beat() -> None:
            while not done.wait(_BEAT_S):
                self.store.add(beats, 1)

        thread = threading.Thread(target=beat, daemon=True, name="beat")
        self.store.add(beats, 1)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    # --- what went wrong ---------------------------------------------------------------------------------------

    def is_mine_to_say(self, error: PosttrainError) -> bool:
        """Whether this rank prints the error that ends it: of several with the same one rank 0, else the first.

        Rank 0, which the store goes with, returns after the others.
        """
        try:
            return _answered(lambda: self._claim(f"error/{digest_json(str(error))}"), _ANSWER_S)
        except DistError:  # the store went with rank 0, which said why
            return False

    def _claim(self, key: str) -> bool:
        others = self.launch.world_size - 1
        self.store.add("failed", 1)
        if not self.is_main:
            self._waits_for(lambda: self.store.check([key]), _SAME_ERROR_S)
        is_mine = self.store.add(key, 1) == 1
        if self.store.add("asked", int(not self.is_main)) < others and self.is_main:
            self._waits_for(lambda: self.store.add("asked", 0) == others, _NEWS_S)
        if not is_mine:
            self._wait_until_said()
        return is_mine

    def has_said(self) -> None:
        """What is this rank's to say is printed: the others may end, of whom the first that does has a launcher end all."""
        with suppress(DistError):
            _answered(lambda: self.store.add("said", 1), _ANSWER_S)

    def _wait_until_said(self) -> None:
        self._waits_for(lambda: self.store.add("said", 0) > 0, _SAID_S)

    def another_failed(self) -> bool:
        """Whether another rank said that it failed, returned once it has printed why; where not, that this one did is noted."""
        try:
            return _answered(self._hear_of_failure, _ANSWER_S)
        except DistError:  # the store went with whoever kept it
            return True

    def _hear_of_failure(self) -> bool:
        until = time.monotonic() + _NEWS_S
        while time.monotonic() < until:
            if self.store.add("failed", 0):
                self.store.add("asked", int(not self.is_main))
                self._wait_until_said()
                return True
            time.sleep(0.05)
        self.store.add("failed", 1)
        return False

    def _waits_for(self, condition: Callable[[], bool], seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not condition():
            time.sleep(0.02)


def is_of_a_peer(error: Exception) -> bool:
    """Whether a collective broke because another rank is gone."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def meet(launch: Launch, say: Callable[[str], None], limit_s: float = _MEETING_S) -> Meeting:
    """Wait until every rank of the start is there, and say which ones are waited for.

    Raises: ConfigError if they do not come.
    """
    place = f"{launch.address}:{launch.port}"
    waits_for_store = threading.Timer(_NOTICE_S, say, [f"rank {launch.rank}: waiting for the store at {place}"])
    waits_for_store.daemon = True
    waits_for_store.start()
    try:
        opened = TCPStore(
            launch.address, launch.port, None, is_master=launch.rank == 0 and not launch.store_is_there,
            timeout=timedelta(seconds=limit_s), wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
    except DistError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"rank {launch.rank} of {launch.world_size}: nobody keeps a store at {place} ({reason}): is rank 0 started, and are "
            "MASTER_ADDR and MASTER_PORT the same everywhere?"
        ) from error
    finally:
        waits_for_store.cancel()
    store = PrefixStore(f"posttrain/{launch.attempt}", opened)
    if store.add(f"here/{launch.rank}", 1) > 1:
        raise ConfigError(
            f"rank {launch.rank} is there twice at {place}; give every process a RANK of its own, and every start a port"
        )
    _wait_for_all(launch, store, say, limit_s)
    return Meeting(launch, store)


def _wait_for_all(launch: Launch, store: Any, say: Callable[[str], None], limit_s: float) -> None:
    """Rank 0 looks who is there, and opens the door once all are. Raises: ConfigError."""
    began, noticed, pause = time.monotonic(), _NOTICE_S, 0.005
    missing = list(range(launch.world_size))
    while True:
        if launch.rank == 0:
            missing = [rank for rank in missing if not store.check([f"here/{rank}"])]
            if not missing:
                store.set("all", "here")
                return
        elif store.check(["all"]):
            return
        waited = time.monotonic() - began
        who = f"{'ranks' if len(missing) > 1 else 'rank'} {_some(missing)} of {launch.world_size}"
        if waited > limit_s:
            what = who if launch.rank == 0 else "the other ranks"
            raise ConfigError(
                f"waited {limit_s:g} s for {what} at {launch.address}:{launch.port}; start as many processes as WORLD_SIZE says"
            )
        if waited > noticed and launch.rank == 0:
            say(f"waiting for {who}")
            noticed *= 3
        time.sleep(pause)
        pause = min(0.2, pause * 1.5)


def _some(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")


def _packed(value: Any, rank: int) -> bytes:
    """A value, or an error that the other ranks raise too: the user's as it is, any other as that of a peer."""
    if isinstance(value, Exception) and not isinstance(value, PosttrainError) and not _is_ours(value):
        value = PeerFailedError(f"rank {rank}: {type(value).__name__}: {value}")
    elif isinstance(value, BaseException) and not isinstance(value, Exception):
        value = PeerFailedError(f"rank {rank} ended: {type(value).__name__}")
    return pickle.dumps(value)


def _raised(error: BaseException) -> Any:
    raise error


def _is_ours(error: Exception) -> bool:
    return type(error).__module__.startswith("posttrain.")
