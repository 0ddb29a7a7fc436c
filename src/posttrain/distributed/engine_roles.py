"""The keepers of a run's engines: asked after so that they live on while trainers come and go, and made again when one is lost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from posttrain.distributed.keeper import NODE_VARIABLE
from posttrain.distributed.on_ray import KeeperOnRay, RayCluster
from posttrain.distributed.rank_group import KeptRole
from posttrain.distributed.roles import Role, RoleHealth, RoleLateError, RoleLostError, RoleReport, RoleSign
from posttrain.errors import EngineGoneError

LEASE_S = 120.0
"""Longer than that of a rank: an engine that was given up does no harm, for nobody has its address and token."""
_VARIABLE = "POSTTRAIN_ROLES"


class EngineRoles:
    """`make(n)` gives the keeper of engine n, which has nothing to keep until a trainer asks it to serve.

    A look never waits: ranks are looked at in the same thread.
    """

    def __init__(
        self, roles: Sequence[Role], make: Callable[[int], KeptRole], call_s: float, max_restarts: int
    ) -> None:
        self._roles, self._make, self._call_s = roles, make, call_s
        self._left = [max_restarts] * len(roles)
        self._kept = [make(number) for number in range(len(roles))]
        self._asked: dict[int, tuple[Any, float]] = {}
        self._lease, self._served = [0] * len(roles), [0] * len(roles)

    def look(self) -> None:
        for number, role in enumerate(self._roles):
            if number not in self._asked:
                self._asked[number] = self._kept[number].ask("look"), time.monotonic() + self._call_s
            asked, until = self._asked[number]
            try:
                report: RoleReport = self._kept[number].take(asked, 0.0)
            except RoleLateError as error:
                if time.monotonic() > until:
                    del self._asked[number]
                    if role.see(RoleSign.MISSED, str(error)).health is RoleHealth.DEAD:
                        self._again(number)
                continue
            except RoleLostError as error:
                del self._asked[number]
                role.see(RoleSign.ENDED, f"its keeper is lost: {error}")
                self._again(number)
                continue
            del self._asked[number]
            self._take(number, role, report)

    def _take(self, number: int, role: Role, report: RoleReport) -> None:
        """A trainer starts what is kept, and says when it has its weights; here it is only seen."""
        if report.lease > self._lease[number]:
            self._lease[number] = report.lease
            role.see(RoleSign.ENDED, "another one was asked for")
            role.see(RoleSign.STARTING)
            role.see(RoleSign.STARTED, node=self._kept[number].node.address)
        elif report.asked > self._served[number]:
            role.see(RoleSign.HANDED_ON, "another trainer goes on with it")
        self._served[number] = report.asked
        if report.code is not None or report.is_idle:
            role.see(RoleSign.ENDED, report.how or "its trainer let it go")
            return
        role.see(RoleSign.ANSWERED)
        if report.version >= 0:
            role.see(RoleSign.SYNCED)

    def _again(self, number: int) -> None:
        if self._left[number]:
            self._left[number] -= 1
            self._kept[number].kill()
            self._lease[number] = 0
            self._kept[number] = self._make(number)

    def close(self) -> None:
        for kept in self._kept:
            kept.kill()


@dataclass(frozen=True)
class EnginePlaces:
    """Where a trainer that was started by `--ray` finds the keepers of its engines."""

    cluster: RayCluster
    count: int
    here: str
    """The trainer's own node."""

    def keeper(self, number: int) -> KeeperOnRay:
        """Raises: RoleLostError where there is none now; one that was lost may come again."""
        return self.cluster.named(engine_name(number))


def engine_name(number: int) -> str:
    return f"engine-{number}"


def places_variable(address: str, namespace: str, count: int) -> dict[str, str]:
    """What tells a trainer of them."""
    return {_VARIABLE: f"{address} {namespace} {count}"} if count else {}


def are_placed(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a cluster gives this trainer's engines their places."""
    return _VARIABLE in environ


def engine_places(environ: Mapping[str, str] = os.environ) -> EnginePlaces | None:
    """None for a trainer whose engines are its own children. Raises: EngineGoneError."""
    said = environ.get(_VARIABLE)
    return _joined(said, environ[NODE_VARIABLE]) if said else None


@cache
def _joined(said: str, here: str) -> EnginePlaces:
    address, namespace, count = said.split()
    try:
        return EnginePlaces(RayCluster(address, namespace), int(count), here)
    except ValueError as error:
        raise EngineGoneError(f"the cluster that keeps the engines cannot be joined: {error}") from error
