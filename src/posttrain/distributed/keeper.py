"""Keeps one program of a role on the machine where it is made, for as long as somebody asks after it.

A keeper that nobody asks for `lease_s` ends its program: whoever started it is gone, or has given it up and started another one
elsewhere, which may be sure after that time that the first one writes nothing more.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NoReturn

from posttrain.distributed.relay import Relay
from posttrain.distributed.roles import RoleNode, RoleProgram, RoleReport, RoleResources
from posttrain.files import write_atomic
from posttrain.supervised import SupervisedProcess, run_program

NODE_VARIABLE = "POSTTRAIN_NODE"
"""Tells a program the name of its node. What a cluster says of a process may be that of another node on its machine."""
_SYNCED_VARIABLE = "POSTTRAIN_SYNCED"
"""Tells a program the file in which it says which version of the run's state it has."""
_LOOK_S = 0.25
_HERE = "127.0.0.1"
_MOST_BYTES = 1 << 20


class Keeper:
    """Its calls do not wait for the program. `name` and `address` are its node's; `on_expiry` is called once its lease has run out."""

    def __init__(
        self, lease_s: float, name: str = _HERE, address: str = _HERE, on_expiry: Callable[[], None] = lambda: None
    ) -> None:
        self._lease_s, self._name, self._address, self._on_expiry = lease_s, name, address, on_expiry
        self._lock = threading.Lock()
        self._running: _Running | None = None
        self._lease, self._asked, self._version, self._served = 0, time.monotonic(), -1, 0
        self._closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="lease").start()

    def node(self) -> RoleNode:
        with socket.create_server((self._address, 0)) as probe:
            return RoleNode(self._name, self._address, probe.getsockname()[1])

    def start(self, lease: int, program: RoleProgram) -> None:
        """In place of what it kept before."""
        with self._lock:
            self._end()
            self._asked, self._lease = time.monotonic(), lease
            self._running = _Running(program, self._name, self._address)

    def serve(self, program: RoleProgram) -> Mapping[str, Any]:
        """Its program's socket, the port of its relay and the token.

        Started unless one of the same command runs already that was synced, with nothing on its way since (`warm`).
        """
        with self._lock:
            warm = self._version >= 0 and self._running is not None and self._running.serves(program)
            if not warm:
                self._end()
                self._lease += 1
                self._running = _Running(program, self._name, self._address)
            assert self._running is not None
            self._asked, self._version = time.monotonic(), -1
            self._served += 1
            return self._running.reach() | {"warm": warm}

    def synced(self, version: int) -> None:
        """Its program has the run's state of this version."""
        self._version = version

    def look(self) -> RoleReport:
        """Raises nothing of the program's: its end is in the report."""
        with self._lock:
            self._asked = time.monotonic()
            if self._running is None:
                return RoleReport(self._lease, is_idle=True)
            version = max(self._version, self._running.version())
            return replace(self._running.report(self._lease), version=version, asked=self._served)

    def signal(self, number: int) -> None:
        with self._lock:
            if self._running is not None:
                self._running.process.signal(number)

    def end(self) -> None:
        with self._lock:
            self._end()

    def close(self) -> None:
        self._closed.set()
        self.end()

    def _end(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK_S):
            if self._running is not None and time.monotonic() - self._asked > self._lease_s:
                self._closed.set()
                self.end()
                self._on_expiry()


class _Running:
    def __init__(self, program: RoleProgram, node: str, address: str) -> None:
        self._program = program
        self._private = Path(tempfile.mkdtemp(prefix="posttrain-role-"))
        self._out: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._err: IO[bytes] = _opened(program.log)
        self._read = {"out": 0, "err": 0}
        self._relay = Relay(address, self._private / "socket", program.token) if program.token else None
        self._synced = self._private / "synced"
        command = [word.replace("{private}", str(self._private)) for word in program.command]
        self.process = SupervisedProcess(
            "posttrain.distributed.keeper:run_in_folder", [program.folder, *command], self._err,
            os.environ | program.environment | {NODE_VARIABLE: node, _SYNCED_VARIABLE: str(self._synced)}, out=None if program.log else self._out,
        )  # fmt: skip

    def serves(self, program: RoleProgram) -> bool:
        return self._program.command == program.command and not self.process.has_ended()

    def version(self) -> int:
        """That the program said it has; -1 before that."""
        return int(self._synced.read_text()) if self._synced.exists() else -1

    def reach(self) -> dict[str, Any]:
        port = self._relay.port if self._relay else 0
        return {"socket": str(self._private / "socket"), "port": port, "token": self._program.token}

    def report(self, lease: int) -> RoleReport:
        ended = self.process.has_ended()
        out, err = (b"", b"") if self._program.log else (self._new("out"), self._new("err"))
        if not ended or out or err:  # the end is told once all was read
            return RoleReport(lease, out, err)
        lines = "\n".join(self.process.last_lines()) if self._program.log else ""
        return RoleReport(lease, b"", lines.encode(), self.process.code, self.process.how_it_ended())

    def _new(self, name: str) -> bytes:
        found = os.pread((self._out if name == "out" else self._err).fileno(), _MOST_BYTES, self._read[name])
        self._read[name] += len(found)
        return found

    def close(self) -> None:
        self.process.end()
        if self._relay:
            self._relay.close()
        self._out.close()
        self._err.close()
        shutil.rmtree(self._private, ignore_errors=True)


class LocalKeeper:
    """A keeper in this process, asked as one on a node is; its calls are done at once."""

    def __init__(self) -> None:
        self._keeper = Keeper(math.inf)
        self.node = self._keeper.node()

    def ask(self, method: str, *arguments: Any) -> Any:
        return getattr(self._keeper, method)(*arguments)

    def take(self, asked: Any, timeout_s: float = 0.0) -> Any:
        return asked

    def call(self, method: str, *arguments: Any) -> Any:
        return self.ask(method, *arguments)

    def kill(self) -> None:
        self._keeper.close()


class LocalCluster:
    """This machine, without Ray: every place is here, and there is room as long as there is memory."""

    def __init__(self, address: str = "local", namespace: str = "") -> None:
        self.address, self.namespace = address, namespace

    def reserve(self, bundles: Sequence[RoleResources], strategy: str) -> None:
        pass

    def keeper(self, index: int, name: str, resources: RoleResources, lease_s: float = math.inf) -> LocalKeeper:
        return LocalKeeper()

    def close(self) -> None:
        pass


def _opened(log: str) -> IO[bytes]:
    if not log:
        return tempfile.TemporaryFile()
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    return Path(log).open("a+b")


def say_synced(version: int, environ: Mapping[str, str] = os.environ) -> None:
    """To the keeper of this process, where it has one: it has this version of the run's state, and goes on from it."""
    if place := environ.get(_SYNCED_VARIABLE):
        write_atomic(Path(place), str(version))


def run_in_folder(folder: str, *command: str) -> NoReturn:
    """An entry: the program that `command` names, in `folder`; `python` is this interpreter."""
    os.chdir(folder)
    run_program(*(sys.executable if word == "{python}" else word for word in command))
