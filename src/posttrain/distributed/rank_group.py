"""The ranks of a run as roles: started together, watched, and started again from the last checkpoint when one is lost."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from posttrain.distributed.roles import (
    Role,
    RoleHealth,
    RoleLateError,
    RoleLostError,
    RoleNode,
    RoleProgram,
    RoleReport,
    RoleSign,
)  # fmt: skip
from posttrain.errors import EXIT_CRASH, EXIT_USAGE, ConfigError

_POLL_S = 0.25
_EXIT_KILLED = 137
_STILL_S = 10.0
"""How long the others may take to end once a rank has ended with an error."""


class KeptRole(Protocol):
    """A keeper, wherever it is. Raises, from each call: RoleLateError, RoleLostError."""

    @property
    def node(self) -> RoleNode: ...

    def ask(self, method: str, *arguments: Any) -> Any: ...

    def take(self, asked: Any, timeout_s: float = ...) -> Any: ...

    def kill(self) -> None: ...


@dataclass(frozen=True)
class RankProgram:
    """What every rank runs, and how often all of them may be started again."""

    command: tuple[str, ...]
    folder: str
    environment: Mapping[str, str]
    max_restarts: int = 3


@dataclass
class _Lost:
    """Why the ranks of a start cannot go on."""

    why: str
    settled_s: float
    """Seconds until what nobody can reach has surely ended."""


@dataclass
class RankGroup:
    """`make(n)` gives the keeper of rank n; `write` takes what ranks write; `wants_stop` is asked at every look.

    `beside` is called at every look too: other roles of the run are watched there.
    """

    program: RankProgram
    roles: Sequence[Role]
    make: Callable[[int], KeptRole]
    write: Callable[[str, bytes], None]
    wants_stop: Callable[[], bool]
    beside: Callable[[], None]
    lease_s: float
    call_s: float
    _kept: dict[int, KeptRole] = field(default_factory=dict)
    _codes: dict[int, int] = field(default_factory=dict)
    _told: bool = False

    def run(self) -> int:
        """Until all have ended. Returns the run's exit code, as one process would have given it."""
        left = self.program.max_restarts
        try:
            while True:
                lost = self._start() or self._watch()
                if lost is None:
                    return code_of([self._codes[rank] for rank in sorted(self._codes)])
                self._end(lost)
                if self._told:
                    return _EXIT_KILLED
                if not left:
                    raise ConfigError(
                        f"{lost.why}, and the ranks were started again {self.program.max_restarts} times already; start again to go on from the last checkpoint"
                    )
                left -= 1
                self.write(
                    "err",
                    f"{lost.why}; the ranks start again from the last checkpoint ({left} more times at most)\n".encode(),
                )
        finally:
            self._drop()

    def _start(self) -> _Lost | None:
        self._codes = {}
        for role in self.roles:
            role.see(RoleSign.STARTING)
        try:
            for rank in range(len(self.roles)):
                self._kept[rank] = self.make(rank)
            meeting, *_ = [self._kept[rank].node for rank in range(len(self.roles))]  # all have a place
            asked = [
                (
                    self._kept[rank],
                    self._kept[rank].ask("start", role.state.lease, self._rank_program(rank, role, meeting)),
                )
                for rank, role in enumerate(self.roles)
            ]
            for kept, call in asked:
                kept.take(call)
        except (RoleLateError, RoleLostError) as error:
            return _Lost(f"a rank could not be started: {error}", self.lease_s)
        for rank, role in enumerate(self.roles):
            role.see(RoleSign.STARTED, node=self._kept[rank].node.address)
        return None

    def _rank_program(self, rank: int, role: Role, meeting: RoleNode) -> RoleProgram:
        place = {
            "RANK": rank, "WORLD_SIZE": len(self.roles), "LOCAL_RANK": 0, "MASTER_ADDR": meeting.address,
            "MASTER_PORT": meeting.port, "TORCHELASTIC_RESTART_COUNT": role.state.lease,
        }  # fmt: skip
        variables = {name: str(value) for name, value in place.items()}
        return RoleProgram(self.program.command, self.program.folder, {**self.program.environment, **variables})

    def _watch(self) -> _Lost | None:
        """Until all have ended, or one was lost."""
        failed_at = math.inf
        while len(self._codes) < len(self.roles):
            time.sleep(_POLL_S)
            if self.wants_stop() and not self._told:
                self._told = True
                for kept in self._kept.values():
                    kept.ask("signal", int(signal.SIGTERM))
            self.beside()
            until = time.monotonic() + self.call_s
            asked = {rank: kept.ask("look") for rank, kept in self._kept.items()}
            for rank, call in asked.items():
                if lost := self._look(rank, call, until):
                    return lost
            if any(code in (EXIT_USAGE, EXIT_CRASH) for code in self._codes.values()):
                failed_at = min(failed_at, time.monotonic())
            if time.monotonic() - failed_at > _STILL_S and (lost := self._left_behind()):
                return lost
        return None

    def _left_behind(self) -> _Lost | None:
        """Of ranks that an error of another one did not end: what the user must fix ends them all, else one that stands still was the cause."""
        still = [rank for rank in range(len(self.roles)) if rank not in self._codes]
        if EXIT_USAGE in self._codes.values():
            self._codes |= dict.fromkeys(still, EXIT_USAGE)
        elif still:
            return _Lost(
                f"rank {still[0]} on {self._kept[still[0]].node.address} stands still, and another one gave it up", 0.0
            )
        return None

    def _look(self, rank: int, call: Any, until: float) -> _Lost | None:
        role, kept = self.roles[rank], self._kept[rank]
        try:
            report: RoleReport = kept.take(call, until - time.monotonic())
        except RoleLateError as error:
            if role.see(RoleSign.MISSED, str(error)).health is RoleHealth.DEAD:
                return _Lost(f"rank {rank} on {kept.node.address} does not answer", self.lease_s)
            return None
        except RoleLostError as error:
            role.see(RoleSign.ENDED, str(error))
            return _Lost(f"rank {rank} on {kept.node.address} is lost: {error}", self.lease_s)
        if rank in self._codes or not role.takes(report.lease):
            return None
        role.see(RoleSign.ANSWERED)
        if report.version >= 0:
            role.see(RoleSign.SYNCED)
        for name, data in (("out", report.out), ("err", report.err)):
            if data:
                self.write(name, data)
        if report.code is not None:
            self._codes[rank] = report.code
            role.see(RoleSign.ENDED, report.how)
            if report.code < 0:
                return _Lost(f"rank {rank} on {kept.node.address} was {report.how}", 0.0)
        return None

    def _end(self, lost: _Lost) -> None:
        """Of the ranks that can be reached at once, of the others when their leases have run out."""
        for rank, role in enumerate(self.roles):
            role.see(RoleSign.ENDED, "ended with the others")
            kept = self._kept.get(rank)
            if kept is None:
                continue
            try:
                kept.take(kept.ask("end"))
            except (RoleLateError, RoleLostError):
                lost.settled_s = self.lease_s
        self._drop()
        until = time.monotonic() + lost.settled_s
        while time.monotonic() < until and not self.wants_stop():
            self.beside()
            time.sleep(_POLL_S)

    def _drop(self) -> None:
        for kept in self._kept.values():
            kept.kill()
        self._kept = {}


def code_of(codes: Sequence[int]) -> int:
    """What the user must fix goes before a defect, and a rank that only ended because of another says nothing."""
    for code in (EXIT_USAGE, EXIT_CRASH):
        if code in codes:
            return code
    return codes[0]
