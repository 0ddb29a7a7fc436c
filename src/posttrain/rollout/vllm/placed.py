"""A server of vLLM that a keeper on a node of the cluster owns: it outlives a trainer that was killed, and serves the next one.

On the trainer's own node it is asked through its Unix socket; on another one through a relay that wants the token for every path.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from posttrain.distributed.roles import RoleLateError, RoleLostError, RoleNode, RoleProgram, RoleReport
from posttrain.errors import EngineGoneError
from posttrain.rollout.http import Address, Client
from posttrain.rollout.vllm.options import VLLMOptions
from posttrain.rollout.vllm.server import ended_with, server_command, server_environment

_LOOK_S = 0.5


class EngineKeeper(Protocol):
    """Raises, from each call: RoleLateError, RoleLostError."""

    @property
    def node(self) -> RoleNode: ...

    def call(self, method: str, *arguments: Any) -> Any: ...


class PlacedServer:
    """Started by the keeper that `find` gives, or running there already. `is_near`: whether it is on this node.

    Raises, when it is made: EngineGoneError where no keeper answers within `start_s`.
    """

    outlives_us = False

    def __init__(
        self, find: Callable[[], EngineKeeper], here: str, options: VLLMOptions, log: Path, timeout_s: float, start_s: float
    ) -> None:  # fmt: skip
        self.log = log
        token = secrets.token_urlsafe(32)
        program = RoleProgram(
            ("{python}", *server_command(options, "{private}/socket")),
            os.getcwd(),
            _variables(token),
            str(log.resolve()),
            token,
        )
        self._keeper, reach = _served(find, program, start_s)
        self.is_near = self._keeper.node.name == here
        at = Address(path=reach["socket"]) if self.is_near else Address(self._keeper.node.address, reach["port"])
        self.client = Client(at, reach["token"], timeout_s)

    def ended(self) -> str:
        try:
            report: RoleReport = self._keeper.call("look")
        except RoleLateError:
            return ""
        except RoleLostError as error:
            return f"its node or its keeper is gone ({error})"
        if report.code is None and not report.is_idle:
            return ""
        return ended_with(report.how or "ended", report.err.decode("utf-8", "replace").splitlines(), self.log)

    def synced(self, version: int) -> None:
        """Raises: EngineGoneError where the keeper does not hear it: it must not hand on a server with half an update."""
        try:
            self._keeper.call("synced", version)
        except (RoleLateError, RoleLostError) as error:
            raise EngineGoneError(f"the keeper of the engine does not answer: {error}") from error

    def close(self) -> None:
        with suppress(RoleLateError, RoleLostError):  # then its lease ends it
            self._keeper.call("end")


def _served(
    find: Callable[[], EngineKeeper], program: RoleProgram, start_s: float
) -> tuple[EngineKeeper, Mapping[str, Any]]:
    """Where a keeper was lost with its node, another one is on its way."""
    until = time.monotonic() + start_s
    while True:
        try:
            keeper = find()
            return keeper, keeper.call("serve", program)
        except (RoleLateError, RoleLostError) as error:
            if time.monotonic() >= until:
                raise EngineGoneError(f"no keeper of the engine answered within {start_s:g} s: {error}") from error
        time.sleep(_LOOK_S)


def _variables(token: str) -> dict[str, str]:
    return {**server_environment(), "VLLM_API_KEY": token}
