"""The processes of a run beside the one that was typed (trainer ranks, engines): what is known of each, as pure values.

Where they run is a row: `keeper.py` keeps one on this machine, `on_ray.py` on a node of a cluster. Knows neither clock nor process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

MISSED_LIMIT = 3
"""Deadlines in a row that a role may miss before it is taken for dead."""


class RoleHealth(StrEnum):
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    DEAD = "dead"
    RESTARTING = "restarting"
    STALE = "stale"


class RoleSign(StrEnum):
    """What is learnt of a role."""

    ANSWERED = "answered"
    MISSED = "missed"  # a deadline
    ENDED = "ended"
    STARTING = "starting"
    STARTED = "started"
    SYNCED = "synced"  # it has the state that the run is at
    HANDED_ON = "handed on"  # to one that goes on from another state


@dataclass(frozen=True)
class RoleState:
    """`lease` counts its starts: what an earlier start still delivers is not taken. `synced`: whether this start has the run's state."""

    health: RoleHealth = RoleHealth.DEAD
    lease: int = 0
    missed: int = 0
    synced: bool = False


def next_state(state: RoleState, sign: RoleSign) -> RoleState:
    """A dead one comes back by a start alone, and is healthy after a sync alone, however often it answers."""
    health = state.health
    if sign is RoleSign.STARTING:
        return RoleState(RoleHealth.RESTARTING, state.lease + 1) if health is RoleHealth.DEAD else state
    if health is RoleHealth.DEAD:
        return state
    match sign:
        case RoleSign.ENDED:
            return replace(state, health=RoleHealth.DEAD, synced=False)
        case RoleSign.MISSED if state.missed + 1 >= MISSED_LIMIT:
            return replace(state, health=RoleHealth.DEAD, missed=0, synced=False)
        case RoleSign.MISSED:
            suspect = health is not RoleHealth.RESTARTING
            return replace(state, health=RoleHealth.SUSPECT if suspect else health, missed=state.missed + 1)
        case RoleSign.STARTED if health is RoleHealth.RESTARTING:
            return replace(state, health=RoleHealth.STALE, missed=0)
        case RoleSign.SYNCED if health is RoleHealth.STALE:
            return replace(state, health=RoleHealth.HEALTHY, synced=True, missed=0)
        case RoleSign.HANDED_ON:
            return replace(state, health=RoleHealth.STALE if health is RoleHealth.HEALTHY else health, synced=False)
        case RoleSign.ANSWERED if health is RoleHealth.SUSPECT:
            return replace(state, health=RoleHealth.HEALTHY if state.synced else RoleHealth.STALE, missed=0)
        case RoleSign.ANSWERED:
            return replace(state, missed=0)
        case _:
            return state


TellRole = Callable[[Mapping[str, Any]], None]


@dataclass
class Role:
    """One role and how it fares; each change goes to `tell` as an event."""

    name: str
    tell: TellRole
    state: RoleState = field(default_factory=RoleState)
    dropped: int = 0
    """Deliveries of an earlier start."""

    def see(self, sign: RoleSign, why: str = "", node: str = "") -> RoleState:
        before, self.state = self.state, next_state(self.state, sign)
        if before.health is not self.state.health:
            details = {
                "role": self.name,
                "from": str(before.health),
                "to": str(self.state.health),
                "lease": self.state.lease,
            }
            self.tell(details | {key: value for key, value in (("why", why), ("node", node)) if value})
        return self.state

    def takes(self, lease: int) -> bool:
        """Whether something delivered under `lease` is of its present start; what is not is counted."""
        if lease == self.state.lease and self.state.health is not RoleHealth.DEAD:
            return True
        self.dropped += 1
        self.tell({"role": self.name, "dropped": self.dropped, "lease": lease, "present": self.state.lease})
        return False


@dataclass(frozen=True)
class RoleResources:
    """What one process takes of a node."""

    cpus: float = 1.0
    gpus: float = 0.0

    def amounts(self) -> dict[str, float]:
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}

    def __str__(self) -> str:
        return " and ".join(f"{amount:g} {name}" for name, amount in self.amounts().items())


@dataclass(frozen=True)
class RoleProgram:
    """What a role runs: `command` in `folder`, with `environment` over that of its node.

    In `command`, `{private}` is a folder on that node that only this user can enter; it goes with the program. `log` takes
    what it writes; without one that is handed to whoever asks. Where `token` is given, `{private}/socket` is reachable from other
    nodes by who has it.
    """

    command: tuple[str, ...]
    folder: str
    environment: Mapping[str, str]
    log: str = ""
    token: str = ""


@dataclass(frozen=True)
class RoleReport:
    """What is delivered of a role: what it has written since the last one, and, once it ended, its code and how, in words.

    `version`: of the state that it was brought to, -1 before that. `is_idle`: whether nothing runs there. `asked`: how often it was asked to serve.
    """

    lease: int
    out: bytes = b""
    err: bytes = b""
    code: int | None = None
    how: str = ""
    version: int = -1
    is_idle: bool = False
    asked: int = 0


@dataclass(frozen=True)
class RoleNode:
    """Where a role is: `address` is the node's, `port` is free there."""

    name: str
    address: str
    port: int


class RoleLateError(Exception):
    """No answer before the deadline; it may come yet."""


class RoleLostError(Exception):
    """Whoever kept the role is gone, and the node may be too."""
