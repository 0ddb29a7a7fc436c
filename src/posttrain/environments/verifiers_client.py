"""Environments of the package verifiers (`env: verifiers:PYTHON ID`), which runs in a Python of its own: our ends of `verifiers_side`.

`VerifiersServer` is one process for a pool; a `VerifiersSession` is a connection to it, which has a fork of it for itself. An environment of verifiers
takes a turn whole and says all that stands before the next one, so the ids that are trained on stay those that were sampled.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from posttrain.environments.hosted import EpisodeLostError, HostedEnvironment, Reaction
from posttrain.errors import ConfigError
from posttrain.supervised import SupervisedProcess

_SCRIPT = str(Path(__file__).with_name("verifiers_side") / "posttrain_verifiers.py")
_START_TIMEOUT_S = 120.0
_LOOK_S = 0.02
_MAX_ANSWER_BYTES = 1 << 24
TASK = "task"
"""The column of a row that says which of the environment's tasks it is."""
EXPORT = "posttrain data env"


class VerifiersServer:
    """The environment in its own Python, from its start to `close`. Raises: ConfigError where it does not start."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words
        self._folder = tempfile.mkdtemp(prefix="posttrain-vf-")
        self.path = str(Path(self._folder) / "socket")
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        python, *named = words
        command = [python, _SCRIPT, self.path, *named]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        self._process = SupervisedProcess("posttrain.supervised:run_program", command, self._log, environment)
        try:
            self._await()
        except BaseException:
            self.close()
            raise

    def _await(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not os.path.exists(self.path):
            if self._process.has_ended():
                said = self._process.last_lines()
                with suppress(subprocess.TimeoutExpired):
                    said = said or [self._process.how_it_ended()]
                raise ConfigError(f"env: verifiers: {self._words[1]}: {_hint(said[-1], self._words[0])}")
            if time.monotonic() > deadline:
                raise ConfigError(f"env: verifiers: {self._words[1]} took over {_START_TIMEOUT_S:.0f} s to load")
            time.sleep(_LOOK_S)

    def tools(self) -> list[dict[str, Any]]:
        """What it offers with the first request of its first task. Raises: ConfigError."""
        return [_schema(tool["function"]) for tool in self._asked({"do": "describe"}, _START_TIMEOUT_S)["tools"]]

    def rows(self, limit: int) -> list[dict[str, Any]]:
        """A row for each of its first tasks: the prompt, and which task it is. Raises: ConfigError."""
        return self._asked({"do": "rows", "limit": limit})["rows"]

    def _asked(self, request: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        session = VerifiersSession(self.path, timeout_s)
        try:
            return session.ask(request)
        except EpisodeLostError as error:
            raise ConfigError(f"env: verifiers: {self._words[1]}: its first task cannot be played: {error}") from None
        finally:
            session.close()

    def close(self) -> None:
        self._process.end()
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class VerifiersSession:
    """One episode after the other on a connection of its own. Raises: EpisodeLostError from every method.

    In a pool the deadline is the pool's, which kills the process of the session; elsewhere it is `timeout_s`.
    """

    def __init__(self, path: str, timeout_s: float | None = None) -> None:
        self._path, self._timeout_s = path, timeout_s
        self._socket: socket.socket | None = None

    def reset(self, prompt: Any, seed: int, **columns: Any) -> None:
        """Begin the episode. What the environment asks first must be the prompt, which comes from the data."""
        task = columns.get(TASK)
        if not isinstance(task, int):
            raise EpisodeLostError(f"the row has no column {TASK!r} with a number; make the rows with `{EXPORT}`")
        asked = [
            (message["role"], message["content"])
            for message in self.ask({"do": "reset", "task": task, "seed": seed})["messages"]
        ]
        given = [("user", prompt)] if isinstance(prompt, str) else [(m["role"], m["content"]) for m in prompt]
        if isinstance(prompt, str) or asked != given:
            raise EpisodeLostError(
                f"task {task} begins with {str(asked)[:200]}, which is not the row's prompt; make the rows with `{EXPORT}`, and leave system prompts to the environment"
            )

    def turn(self, request: Mapping[str, Any]) -> Reaction:
        """A turn of the policy, or (`cut`) that there will be none: what stands before the next one, or what the episode paid."""
        said = self.ask(request)
        return Reaction(
            "", said.get("reward"), bool(said.get("done")), messages=tuple(said.get("messages", ())),
            was_cut=bool(said.get("was_cut")), metrics=said.get("metrics", {}),
        )  # fmt: skip

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX)
                self._socket.settimeout(self._timeout_s)
                self._socket.connect(self._path)
                self._answers = self._socket.makefile("rb")
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            line = self._answers.readline(_MAX_ANSWER_BYTES)
        except OSError as error:
            line, reason = b"", f": {error}"
        else:
            reason = ""
        if not line.endswith(b"\n"):
            self.close()
            wrote = f"wrote more than {_MAX_ANSWER_BYTES:,} bytes" if line else f"its process ended{reason}"
            raise EpisodeLostError(f"{wrote} at {request['do']}")
        answer: dict[str, Any] = json.loads(line)
        if "lost" in answer:
            raise EpisodeLostError(answer["lost"])
        return answer

    def close(self) -> None:
        if self._socket is not None:
            self._answers.close()
            self._socket.close()
        self._socket = None


def connect_verifiers(path: str, tools: Sequence[Mapping[str, Any]]) -> HostedEnvironment:
    """Played over the socket of a `VerifiersServer`; all episodes of a process on one connection."""
    session = VerifiersSession(path)
    return HostedEnvironment(lambda: session, tuple(tools), True, True, _no_calls, turn=VerifiersSession.turn)


def _no_calls(session: VerifiersSession, name: str, arguments: Mapping[str, Any]) -> Reaction:
    raise AssertionError(f"{name} was called outside of a turn")


def _schema(function: Mapping[str, Any]) -> dict[str, Any]:
    parameters = {key: value for key, value in function.get("parameters", {}).items() if key != "title"}
    return {
        "type": "function",
        "function": {
            "name": function["name"],
            "description": function.get("description") or function["name"],
            "parameters": parameters,
        },
    }


def _hint(said: str, python: str) -> str:
    if "No module named 'verifiers'" in said:
        return f"{python} has no package verifiers; install it there with: {python} -m pip install verifiers"
    return said[:500]
