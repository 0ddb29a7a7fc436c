"""A server of vLLM that a run starts and owns, or one that it is given: reachable, alive, and gone with the run.

Its own listens on a Unix socket in a folder that only this user can enter: vLLM's key guards the paths that answer prompts,
but not those that pause it, change its weights or call its workers.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from posttrain.distributed.launch import without_launch
from posttrain.errors import EngineError, EngineGoneError
from posttrain.rollout.http import Address, Client, RefusedError
from posttrain.rollout.vllm.options import VLLMOptions, environment, on_cards
from posttrain.supervised import SupervisedProcess

BASE = "base"
"""The name under which a server of ours serves the given model."""
_MODULE = "vllm.entrypoints.openai.api_server"
_ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[3])
_MAX_SOCKET_PATH = 100
_LOOK_S = 0.2
_CAUSE = re.compile(r"\b\w*(Error|Exception|error): .*\S")
_POINTS_ELSEWHERE = re.compile(r"\babove\b|EngineDeadError")
_TELLS_OF_NO_END = re.compile(r"(\([^)]*\)\s*)*(DEBUG|INFO|WARNING) [\d-]+ [\d:]+ \[")
_LOG_PREFIX = re.compile(r"^(\([^)]*\)\s*)+(\w+ [\d-]+ [\d:]+ \[[^\]]*\]\s*)?")


class Server(Protocol):
    """Where an engine's calls go, and whether somebody is there to answer them."""

    @property
    def outlives_us(self) -> bool: ...

    @property
    def client(self) -> Client: ...

    def ended(self) -> str:
        """How it ended, in words; "" while it runs, and where nobody here can tell."""
        ...

    def synced(self, version: int) -> None:
        """Whoever may hand it on is told which weights it has; -1 while they are on their way."""
        ...

    def close(self) -> None: ...


class GivenServer:
    """Somebody else's, which goes on without us."""

    outlives_us = True

    def __init__(self, client: Client) -> None:
        self.client = client
        self._is_let_go = False

    def ended(self) -> str:
        """What it does nobody here can tell; who waits for it in a thread is told that it need not."""
        return "nobody waits for it any more" if self._is_let_go else ""

    def synced(self, version: int) -> None:
        pass

    def close(self) -> None:
        self._is_let_go = True


class OwnServer:
    """Started here, with a socket in `folder`; what it writes is appended to `log`."""

    outlives_us = False

    def __init__(self, options: VLLMOptions, folder: Path, log: Path, timeout_s: float) -> None:
        socket = folder / "socket"
        if len(str(socket)) > _MAX_SOCKET_PATH:
            raise EngineError(
                f"{socket} is too long for a Unix socket ({_MAX_SOCKET_PATH}); set TMPDIR to a shorter path"
            )
        token = secrets.token_urlsafe(32)
        self.client = Client(Address(path=str(socket)), token, timeout_s)
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("a+b")
        variables = without_launch(os.environ) | server_environment() | on_cards(options.cards)
        variables |= {"VLLM_API_KEY": token}
        command = [sys.executable, *server_command(options, str(socket))]
        self._process = SupervisedProcess("posttrain.supervised:run_program", command, self._log, variables)

    @property
    def pid(self) -> int:
        """Its supervisor's."""
        return self._process.pid

    def ended(self) -> str:
        if not self._process.has_ended():
            return ""
        return ended_with(self._process.how_it_ended(), self._process.last_lines(), self.log)

    def synced(self, version: int) -> None:
        pass

    def close(self) -> None:
        self._process.end()
        self._log.close()


def await_ready(
    server: Server, timeout_s: float, option: str = "rollout.start_timeout_s", engine: str = "vLLM"
) -> None:
    """`option` is what sets `timeout_s`. Raises: EngineGoneError where it ends before it answers, or does not answer in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return server.client.call("GET", "/health", timeout_s=max(_LOOK_S, min(5.0, deadline - time.monotonic())))
        except (EngineGoneError, RefusedError) as error:
            ended = server.ended()
            if ended:
                raise EngineGoneError(f"{engine}'s server did not start: {ended}") from None
            if time.monotonic() >= deadline:
                raise EngineGoneError(
                    f"{engine}'s server was not ready after {timeout_s:g} s ({error}); raise {option} if it needs longer"
                ) from error
        time.sleep(_LOOK_S)


def ended_with(how: str, lines: Sequence[str], log: Path) -> str:
    line = last_cause(lines)
    return f"it ended ({how})" + (f": {line}" if line else "") + f"; its log is {log}"


def server_command(options: VLLMOptions, socket: str) -> list[str]:
    """What follows the interpreter."""
    return ["-P", "-m", _MODULE, "--uds", socket, *server_arguments(options)]


def server_environment() -> dict[str, str]:
    """Over that of the process which starts it."""
    level = {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "INFO")}
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), _PACKAGE_ROOT]))
    return environment() | level | _ENVIRONMENT | {"PYTHONPATH": path}


def server_arguments(options: VLLMOptions) -> list[str]:
    """`options` on the server's command line."""
    args = options.engine_args() | {
        "served_model_name": BASE, "enable_scale_out": True, "disable_uvicorn_access_log": True, "disable_log_stats": True,
        # Of a model's own defaults for sampling nothing is to be added to what a request says.
        "generation_config": "vllm",
    }  # fmt: skip
    found: list[str] = []
    for name, value in args.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found.append(f"--{flag}={json.dumps(value) if isinstance(value, dict) else value}")
    return found


def last_cause(lines: Sequence[str]) -> str:
    """The last line that says what went wrong, without the log's own prefix; else the last line."""
    said = [line for line in map(str.strip, lines) if line and not _TELLS_OF_NO_END.match(line)]
    causes = [line for line in said if _CAUSE.search(line) and not _POINTS_ELSEWHERE.search(line)]
    return _LOG_PREFIX.sub("", (causes or said or [""])[-1])[:400]
